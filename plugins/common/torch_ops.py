"""Every torch op of the ``gemma4`` domain: importing this module registers them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gemma4_export.plugins.attention import torch_op as attention
from gemma4_export.plugins.linear import torch_op as linear
from gemma4_export.plugins.moe import torch_op as moe


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch op -> ONNX translation, for ``torch.onnx.export(custom_translation_table=...)``."""
    return {**linear.onnx_translation(), **attention.onnx_translation(), **moe.onnx_translation()}
