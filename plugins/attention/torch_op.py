"""torch.ops.gemma4.attention and .shared_attention: the attention ops for tracing and for parity tests."""

# ruff: noqa: N806 (shape letters are capitals, as in the contract)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma4_export.plugins.attention.contract import ATTENTION, SHARED_ATTENTION
from gemma4_export.plugins.common.onnx_torch_op import onnx_op


@torch.library.custom_op("gemma4::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    write_index: Tensor,
    visible_start: Tensor | None,
    visible_end: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write key and value into copies of the caches, then attend to the visible runs; see reference.py.

    Scores and softmax are in fp32 (fp64 for fp64 inputs).
    """
    sizes = ATTENTION.check(
        {
            "query": query,
            "key": key,
            "value": value,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "write_index": write_index,
            "visible_start": visible_start,
            "visible_end": visible_end,
        },
        {"scale": scale},
    )
    steps = torch.arange(sizes["T"], device=query.device)
    slots = (write_index[:, None] + steps)[:, None, :, None].expand(-1, sizes["Hkv"], -1, sizes["D"])  # [B, Hkv, T, D]
    present_key = key_cache.scatter(2, slots, key.transpose(1, 2))
    present_value = value_cache.scatter(2, slots, value.transpose(1, 2))
    output = _attend(query, present_key, present_value, visible_start, visible_end, scale)
    return output, present_key, present_value


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    write_index: Tensor,
    visible_start: Tensor | None,
    visible_end: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key_cache.new_empty(key_cache.shape),
        value_cache.new_empty(value_cache.shape),
    )


@torch.library.custom_op("gemma4::shared_attention", mutates_args=())
def shared_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    visible_start: Tensor | None,
    visible_end: Tensor,
    scale: float,
) -> Tensor:
    """Attend to the visible runs of another layer's caches; see reference.py."""
    SHARED_ATTENTION.check(
        {
            "query": query,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "visible_start": visible_start,
            "visible_end": visible_end,
        },
        {"scale": scale},
    )
    return _attend(query, key_cache, value_cache, visible_start, visible_end, scale)


@shared_attention.register_fake
def _(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    visible_start: Tensor | None,
    visible_end: Tensor,
    scale: float,
) -> Tensor:
    return query.new_empty(query.shape)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, visible_start: Tensor | None, visible_end: Tensor, scale: float
) -> Tensor:
    B, R, Hq, D = query.shape
    Hkv, C = keys.shape[1:3]
    precise = torch.promote_types(query.dtype, torch.float32)
    slots = torch.arange(C, device=query.device)
    visible = slots < visible_end[..., None]  # [B, R, C]
    if visible_start is not None:
        visible &= slots >= visible_start[..., None]
    # A slot nobody sees may hold anything, NaN included, and 0 * NaN would reach the output.
    seen = visible.any(dim=1)[:, None, :, None]  # [B, 1, C, 1]
    values = values.to(precise).masked_fill(~seen, 0)

    grouped = query.to(precise).reshape(B, R, Hkv, Hq // Hkv, D)
    scores = scale * torch.einsum("brkgd,bkcd->bkgrc", grouped, keys.to(precise))
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1)
    output = torch.einsum("bkgrc,bkcd->brkgd", weights, values)
    return output.reshape(B, R, Hq, D).to(query.dtype).contiguous()


def onnx_translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entries for ``custom_translation_table`` of torch.onnx.export."""
    owned, shared = onnx_op(ATTENTION), onnx_op(SHARED_ATTENTION)

    # torch.onnx reads annotations: without one a parameter is a tensor, with ``float`` an attribute.
    def gemma4_attention(  # type: ignore[no-untyped-def]
        query, key, value, key_cache, value_cache, write_index, visible_start, visible_end, scale: float
    ):
        return owned(query, key, value, key_cache, value_cache, write_index, visible_start, visible_end, scale=scale)

    def gemma4_shared_attention(  # type: ignore[no-untyped-def]
        query, key_cache, value_cache, visible_start, visible_end, scale: float
    ):
        return shared(query, key_cache, value_cache, visible_start, visible_end, scale=scale)

    return {
        torch.ops.gemma4.attention.default: gemma4_attention,
        torch.ops.gemma4.shared_attention.default: gemma4_shared_attention,
    }
