"""torch.ops.gemma4.moe: Gemma4MoE for tracing and for parity tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from gemma4_export.plugins.common.onnx_torch_op import onnx_op
from gemma4_export.plugins.moe.contract import MOE


@torch.library.custom_op("gemma4::moe", mutates_args=())
def moe(
    hidden_states: Tensor,
    router_logits: Tensor,
    per_expert_scale: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k: int,
) -> Tensor:
    """Send each token through its top_k experts and add their outputs, weighted; see reference.py.

    Everything is computed in fp32 (fp64 for fp64 inputs) and rounded once; experts nobody chose are not read.
    """
    MOE.check(
        {
            "hidden_states": hidden_states,
            "router_logits": router_logits,
            "per_expert_scale": per_expert_scale,
            "gate_up_proj": gate_up_proj,
            "down_proj": down_proj,
        },
        {"top_k": top_k},
    )
    precise = torch.promote_types(hidden_states.dtype, torch.float32)
    rows = hidden_states.flatten(0, 1).to(precise)  # [B*T, E]
    experts, weights = route(router_logits.flatten(0, 1), per_expert_scale, top_k)
    output = torch.zeros_like(rows)
    for expert in sorted(set(experts.flatten().tolist())):
        chosen_rows, place = (experts == expert).nonzero(as_tuple=True)
        gate, up = linear(rows[chosen_rows], gate_up_proj[expert].to(precise)).chunk(2, dim=-1)
        expert_output = linear(gelu(gate, approximate="tanh") * up, down_proj[expert].to(precise))
        output[chosen_rows] += weights[chosen_rows, place, None].to(precise) * expert_output
    return output.to(hidden_states.dtype).reshape(hidden_states.shape)


@moe.register_fake
def _(
    hidden_states: Tensor,
    router_logits: Tensor,
    per_expert_scale: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k: int,
) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def route(router_logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Experts [rows, top_k] int64 and their weights [rows, top_k] of router logits [rows, X]."""
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    probabilities = logits.softmax(dim=-1)
    # torch.topk promises no order among equals; a stable sort keeps the lower index first.
    experts = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = probabilities.gather(1, experts)
    return experts, chosen / chosen.sum(dim=-1, keepdim=True) * per_expert_scale.to(logits.dtype)[experts]


def onnx_translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entry for ``custom_translation_table`` of torch.onnx.export."""
    op = onnx_op(MOE)

    # torch.onnx reads annotations: without one a parameter is a tensor, with ``int`` an attribute.
    def gemma4_moe(  # type: ignore[no-untyped-def]
        hidden_states, router_logits, per_expert_scale, gate_up_proj, down_proj, top_k: int
    ):
        return op(hidden_states, router_logits, per_expert_scale, gate_up_proj, down_proj, top_k=top_k)

    return {torch.ops.gemma4.moe.default: gemma4_moe}
