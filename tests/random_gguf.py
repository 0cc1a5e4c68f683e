"""A GGUF file of random weights that llama.cpp runs: full-size speed without anybody's checkpoint.

What llama.cpp's own quantiser makes of a model for Q4_0: every matrix in Q4_0, the token table, which is the head as
well, in Q6_K, norms and routers in float32. It has no tokenizer: token ids go in, logits come out.
"""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from gemma4_export.configs.formats import FLOAT32
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.names import EMBED_TOKENS, TensorSpec
from gemma4_export.exporter.dummy import DummySource
from gemma4_export.exporter.gguf_checkpoint import ARCHITECTURE, gguf_name

_Q4_0 = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])  # of 32 values
_Q6_K = np.dtype([("codes", "u1", 192), ("scales", "i1", 16), ("scale", "<f2")])  # of 256 values
_CODE_RMS = {Type.Q4_0: 4.61, Type.Q6_K: 18.5}  # of codes drawn evenly from -8…7 and -32…31
_FLOAT_ROLES = ("decoder.norm", "decoder.router")


def write_random_gguf(path: Path, config: ModelConfig) -> None:
    """Write ``path``, one tensor in memory at a time. Norms and routers are those of ``DummySource``."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _add_metadata(writer, config)
    source, rng = DummySource(config), np.random.default_rng(0)
    for spec in source.specs.values():
        kind, (rows, columns) = type_of(spec), spec.row_shape
        if kind == Type.F32:
            writer.add_tensor_info(gguf_name(spec.name), spec.shape, np.dtype(np.float32), 4 * spec.num_elements)
        else:
            row_bytes = columns // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
            shape = (*spec.shape[:-1], row_bytes)
            writer.add_tensor_info(gguf_name(spec.name), shape, np.dtype(np.uint8), rows * row_bytes, raw_dtype=kind)
    factors = rope_factors(config)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for spec in source.specs.values():
        kind = type_of(spec)
        if kind == Type.F32:
            writer.write_tensor_data(np.asarray(source.rows(spec.name, FLOAT32, 0, spec.row_shape[0])))
        else:
            writer.write_tensor_data(_random_blocks(rng, spec, kind))
    writer.write_tensor_data(factors)
    writer.close()


def type_of(spec: TensorSpec) -> Type:
    return Type.F32 if spec.role in _FLOAT_ROLES else Type.Q6_K if spec.name == EMBED_TOKENS else Type.Q4_0


def rope_factors(config: ModelConfig) -> np.ndarray:
    """What global layers divide their angles by, [D // 2]: 1 for the pairs that turn, 1e30 for those that stand."""
    rope = config.rope("full_attention")
    assert rope is not None
    return np.where(np.arange(rope.head_dim // 2) < rope.num_frequencies, 1, 1e30).astype(np.float32)


def _random_blocks(rng: np.random.Generator, spec: TensorSpec, kind: Type) -> np.ndarray:
    """[rows, bytes] of blocks whose values give products of unit inputs unit size."""
    rows, columns = spec.row_shape
    layout = _Q4_0 if kind == Type.Q4_0 else _Q6_K
    num_blocks = rows * (columns // gguf.GGML_QUANT_SIZES[kind][0])
    blocks = np.frombuffer(bytearray(rng.bytes(num_blocks * layout.itemsize)), layout)
    blocks["scale"] = 1 / (_CODE_RMS[kind] * math.sqrt(columns))
    if kind == Type.Q6_K:
        blocks["scales"] = 1
    return blocks.view(np.uint8).reshape(rows, -1)


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    layers, sliding, full = config.layers, config.rope("sliding_attention"), config.rope("full_attention")
    assert sliding is not None
    assert full is not None
    assert config.sliding_window is not None
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length([layer.intermediate_size for layer in layers])
    writer.add_head_count([layer.num_heads for layer in layers])
    writer.add_head_count_kv([layer.num_kv_heads for layer in layers])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    writer.add_rope_freq_base(full.theta)
    writer.add_rope_freq_base_swa(sliding.theta)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([layer.is_sliding for layer in layers])
    writer.add_shared_kv_layers(config.num_layers - config.first_shared_layer)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if layers[0].moe is not None:
        writer.add_expert_count(layers[0].moe.num_experts)
        writer.add_expert_used_count(layers[0].moe.top_k)
        writer.add_expert_feed_forward_length(layers[0].moe.intermediate_size)
