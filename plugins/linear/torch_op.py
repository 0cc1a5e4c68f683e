"""torch.ops.gemma4.linear: Gemma4Linear for tracing and for parity tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma4_export.plugins.common.onnx_torch_op import onnx_op
from gemma4_export.plugins.linear.contract import LINEAR


@torch.library.custom_op("gemma4::linear", mutates_args=())
def linear(input: Tensor, weight: Tensor) -> Tensor:
    """output[..., N] = input[..., K] @ weight[N, K].T, in the dtype of the input; see reference.py."""
    LINEAR.check({"input": input, "weight": weight}, {})
    return torch.nn.functional.linear(input, weight)


@linear.register_fake
def _(input: Tensor, weight: Tensor) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def onnx_translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entry for ``custom_translation_table`` of torch.onnx.export."""
    op = onnx_op(LINEAR)

    def gemma4_linear(input, weight):  # type: ignore[no-untyped-def]  # torch.onnx would read annotations as types
        return op(input, weight)

    return {torch.ops.gemma4.linear.default: gemma4_linear}
