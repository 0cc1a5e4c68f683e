"""Weights read back from an artifact's files and dequantised, a few rows at a time: what the oracle computes with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemma4_export.configs.names import expert_tensor
from gemma4_export.exporter.models.text import Decoder, Experts, Linear, gelu
from gemma4_export.exporter.weights import PlacedWeight, Placement
from gemma4_export.plugins.moe.torch_op import route

Array = np.ndarray[Any, np.dtype[Any]]

_SLICE_VALUES = 1 << 20  # 8 MB in float64: decoded, multiplied and dropped while it is in the cache


class StoredWeights:
    """The weights of a placement, decoded from the bytes that a backend will read."""

    def __init__(self, folder: Path, placement: Placement) -> None:
        self._folder, self._placement = folder, placement

    def shape(self, name: str) -> tuple[int, ...]:
        return self._placement.weights[name].shape

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``start:stop`` of a weight seen as [rows, columns], exact in float64: code times scale."""
        placed = self._placement.weights[name]
        columns = placed.row_shape[1]
        kind, row_bytes = placed.format.kind, placed.format.row_bytes(columns)
        raw = self._read(placed, placed.offset, start, stop, row_bytes, np.uint8)
        if kind in ("float32", "bfloat16"):
            return torch.from_numpy(raw).view(torch.float32 if kind == "float32" else torch.bfloat16).to(dtype)
        scales = placed.scales
        assert scales is not None
        per_row = scales.per_row
        item = np.dtype(scales.dtype)
        factors = torch.from_numpy(self._read(placed, scales.offset, start, stop, per_row * item.itemsize, item))
        if kind == "fp8":
            values = torch.from_numpy(raw).view(torch.float8_e4m3fn).to(dtype)
            return values.mul_(factors.to(dtype))
        if placed.has_signed_codes:  # flipping the sign bit adds 8 (or 128)
            raw = raw ^ np.uint8(0x88 if kind == "int4" else 0x80)
        values = _signed_codes(torch.from_numpy(raw), is_int4=kind == "int4", dtype=dtype)
        values.view(stop - start, per_row, -1).mul_(factors.to(dtype)[:, :, None])
        return values

    def gather(self, name: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows [N] of a table, [N, columns]."""
        return torch.cat([self.rows(name, index, index + 1, dtype) for index in ids.tolist()])

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        placed = self._placement.weights[name]
        return self.rows(name, 0, placed.row_shape[0], dtype).reshape(placed.shape)

    def product(self, inputs: Tensor, name: str) -> Tensor:
        """``inputs`` [..., K] times the transpose of a weight [N, K], in the dtype of ``inputs``."""
        num_rows, columns = self._placement.weights[name].row_shape
        step = max(1, _SLICE_VALUES // columns)
        output = inputs.new_empty((*inputs.shape[:-1], num_rows))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            output[..., start:stop] = inputs @ self.rows(name, start, stop, inputs.dtype).T
        return output

    def _read(self, placed: PlacedWeight, offset: int, start: int, stop: int, row_bytes: int, dtype: Any) -> Array:
        """Rows of ``row_bytes`` each from a region of the weight's file, [rows, items]."""
        item = np.dtype(dtype).itemsize
        count = (stop - start) * row_bytes // item
        values = np.fromfile(self._folder / placed.file, dtype, count, offset=offset + start * row_bytes)
        return values.reshape(stop - start, -1)


def _signed_codes(raw: Tensor, *, is_int4: bool, dtype: torch.dtype) -> Tensor:
    """Codes as MatMulNBits stores them, 8 or 128 above their value, the lower column in the low nibble."""
    if not is_int4:
        return raw.to(dtype).sub_(128)
    values = torch.empty((*raw.shape, 2), dtype=dtype)
    values[..., 0] = raw & 15
    values[..., 1] = raw >> 4
    return values.sub_(8).flatten(1)


class StreamedLinear(nn.Module):
    """A projection whose weight stays in its file."""

    def __init__(self, weights: StoredWeights, name: str) -> None:
        super().__init__()
        self.weights, self.name = weights, name

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weights.product(hidden_states, self.name)


class StreamedExperts(nn.Module):
    """``Experts`` that reads one expert after the other, and none that no token chose."""

    def __init__(self, weights: StoredWeights, name: str) -> None:
        super().__init__()
        self.weights, self.name = weights, name

    def forward(self, hidden_states: Tensor, router_logits: Tensor, per_expert_scale: Tensor, top_k: int) -> Tensor:
        rows = hidden_states.flatten(0, 1)
        experts, weights = route(router_logits.flatten(0, 1), per_expert_scale, top_k)
        output = torch.zeros_like(rows)
        for expert in sorted(set(experts.flatten().tolist())):
            chosen, place = (experts == expert).nonzero(as_tuple=True)
            both = self.weights.product(rows[chosen], expert_tensor(f"{self.name}.gate_up_proj", expert))
            gate, up = both.chunk(2, dim=-1)
            down = self.weights.product(gelu(gate) * up, expert_tensor(f"{self.name}.down_proj", expert))
            output[chosen] += weights[chosen, place, None] * down
        return output.reshape(hidden_states.shape)


def streamed(decoder: Decoder, weights: StoredWeights, dtype: torch.dtype) -> Decoder:
    """Make every matrix of ``decoder`` (built on the meta device) one that streams, and load norms and scalars."""
    for name, module in tuple(_replaced(decoder)):
        parent = decoder.get_submodule(name.rpartition(".")[0])
        child = (
            StreamedExperts(weights, name) if isinstance(module, Experts) else StreamedLinear(weights, f"{name}.weight")
        )
        setattr(parent, name.rpartition(".")[2], child)
    state = {name: weights.whole(name, dtype).reshape(value.shape) for name, value in decoder.state_dict().items()}
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(False)


def _replaced(decoder: Decoder) -> Iterator[tuple[str, nn.Module]]:
    for name, module in decoder.named_modules():
        if isinstance(module, (Linear, Experts)):
            yield name, module
