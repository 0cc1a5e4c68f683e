"""Gemma4Attention and Gemma4SharedAttention: attention over one contiguous run of cache slots per query."""

from gemma4_export.plugins.common.contract import OpContract

_TYPES = {"real": ("float32", "float16", "bfloat16", "float64")}

# Every slot run must be inside the cache and non-empty: a softmax over nothing has no value.
_RUN_LIMITS = ("visible_start >= 0", "visible_start < visible_end", "visible_end <= C")

ATTENTION = OpContract(
    domain="gemma4",
    name="Gemma4Attention",
    version=1,
    inputs={
        "query": "real B T Hq D",
        "key": "real B T Hkv D",
        "value": "real B T Hkv D",
        "key_cache": "real B Hkv C D",
        "value_cache": "real B Hkv C D",
        "write_index": "int64 B",
        "visible_start": "int32? B T",
        "visible_end": "int32 B T",
    },
    outputs={"output": "real B T Hq D", "present_key": "real B Hkv C D", "present_value": "real B Hkv C D"},
    types=_TYPES,
    attributes={"scale": float},
    limits=("Hq % Hkv == 0", "write_index >= 0", "write_index + T <= C", *_RUN_LIMITS),
    source="transformers modeling_gemma4.py, Gemma4TextAttention of layers that own their keys and values",
)

SHARED_ATTENTION = OpContract(
    domain="gemma4",
    name="Gemma4SharedAttention",
    version=1,
    inputs={
        "query": "real B R Hq D",
        "key_cache": "real B Hkv C D",
        "value_cache": "real B Hkv C D",
        "visible_start": "int32? B R",
        "visible_end": "int32 B R",
    },
    outputs={"output": "real B R Hq D"},
    types=_TYPES,
    attributes={"scale": float},
    limits=("Hq % Hkv == 0", *_RUN_LIMITS),
    source="transformers modeling_gemma4.py, Gemma4TextAttention of KV-shared layers",
)
