"""Gemma4MoE: from router logits to the weighted sum of the chosen experts' outputs."""

from gemma4_export.plugins.common.contract import OpContract

_REAL = ("float32", "float16", "bfloat16", "float64")

MOE = OpContract(
    domain="gemma4",
    name="Gemma4MoE",
    version=1,
    inputs={
        "hidden_states": "real B T E",
        "router_logits": "router B T X",
        "per_expert_scale": "router X",
        "gate_up_proj": "real X 2F E",
        "down_proj": "real X E F",
    },
    outputs={"output": "real B T E"},
    # The router may stay in a wider type than the experts: a rounded logit can choose another expert.
    types={"real": _REAL, "router": _REAL},
    attributes={"top_k": int},
    limits=("top_k >= 1", "top_k <= X"),
    source="transformers modeling_gemma4.py, Gemma4TextRouter (after its projection) and Gemma4TextExperts",
)
