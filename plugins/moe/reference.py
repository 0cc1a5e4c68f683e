"""What Gemma4MoE means: token by token, expert by expert, sums in float64, one rounding at the end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma4_export.plugins.moe.contract import MOE

Array = npt.NDArray[Any]


def moe(
    hidden_states: Array,
    router_logits: Array,
    per_expert_scale: Array,
    gate_up_proj: Array,
    down_proj: Array,
    *,
    top_k: int,
) -> Array:
    """Send each token through its top_k experts and add their outputs, weighted.

        p = softmax(router_logits);  i = the top_k experts by router logit, the lower index first among equals
        w_j = p[i_j] / sum_j p[i_j] * per_expert_scale[i_j]
        output = sum_j w_j * down_proj[i_j] @ (gelu_tanh(gate[i_j] @ x) * (up[i_j] @ x))

    The scale comes after the normalisation, so the weights do not add up to 1.

    Args:
        hidden_states: [B, T, E], x above, already normed by pre_feedforward_layernorm_2.
        router_logits: [B, T, X], the router projection's output.
        per_expert_scale: [X].
        gate_up_proj: [X, 2F, E], rows 0..F-1 are the gate, rows F..2F-1 are up; down_proj: [X, E, F].
        top_k: experts per token.
    Returns:
        output [B, T, E] in the dtype of ``hidden_states``.
    Raises:
        ContractError: sizes or dtypes disagree, or top_k is not in 1..X.
    Source: transformers, Gemma4TextRouter and Gemma4TextExperts with gelu_pytorch_tanh.
    """
    sizes = MOE.check(
        {
            "hidden_states": hidden_states,
            "router_logits": router_logits,
            "per_expert_scale": per_expert_scale,
            "gate_up_proj": gate_up_proj,
            "down_proj": down_proj,
        },
        {"top_k": top_k},
    )
    output = np.empty_like(hidden_states)
    for b, t in np.ndindex(sizes["B"], sizes["T"]):
        x = hidden_states[b, t].astype(np.float64)
        experts, weights = route(router_logits[b, t], per_expert_scale, top_k)
        total = np.zeros(sizes["E"])
        for expert, weight in zip(experts, weights, strict=True):
            projected = gate_up_proj[expert].astype(np.float64) @ x  # [2F]
            activated = gelu_tanh(projected[: sizes["F"]]) * projected[sizes["F"] :]
            total += weight * (down_proj[expert].astype(np.float64) @ activated)
        output[b, t] = total
    return output


def route(router_logits: Array, per_expert_scale: Array, top_k: int) -> tuple[Array, Array]:
    """Experts [top_k] and their weights [top_k] of one token with router logits [X], the strongest expert first."""
    logits = router_logits.astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    experts = np.argsort(-logits, kind="stable")[:top_k]  # stable: the lower index first among equals
    chosen = probabilities[experts]
    return experts, chosen / chosen.sum() * per_expert_scale[experts].astype(np.float64)


def gelu_tanh(x: Array) -> Array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³))), the activation named gelu_pytorch_tanh."""
    gelu: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return gelu
