"""Gemma4Attention and Gemma4SharedAttention -> TensorScatter and what TensorRT has kernels for.

Sliding layers: a copy of the visible run, whose length W - 1 + T depends on nothing but T, and ``Attention`` with a
mask (its kernels end at head_dim 256). Where the run begins is data on the device: a captured decode step stays valid.
Global layers have head_dim 512 and are written out, over the first S slots, S being the size of the input
``global_slots``: profiles bound T times S, and with that the scores.

TensorRT reads ``is_causal`` as upper-left and ignores ``nonpad_kv_seqlen``: neither is written, masks are explicit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gemma4_export.configs.names import GLOBAL_SLOTS, SLIDING_START
from gemma4_export.exporter.passes.builder import NodeBuilder, attribute, dim, input_of, nodes_of
from gemma4_export.exporter.passes.trt_precision import Precision

_LARGEST_FUSED_HEAD = 256
_LOWEST = float(np.finfo(np.float32).min)  # exp(_LOWEST - anything visible) is 0


@dataclass(frozen=True, slots=True)
class _Node:
    """The inputs of either op under one set of names; ``new`` are this call's keys and values, if it writes any."""

    query: ir.Value
    new: tuple[ir.Value, ir.Value] | None
    caches: tuple[ir.Value, ir.Value]
    write_index: ir.Value | None
    start: ir.Value | None
    end: ir.Value

    @classmethod
    def of(cls, node: ir.Node) -> _Node:
        values = [input_of(node, 0), *node.inputs[1:]]
        if node.op_type == "Gemma4Attention":
            query, key, value, key_cache, value_cache, write_index, start, end = values
            new = (key, value)
        else:
            (query, key_cache, value_cache, start, end), new, write_index = values, None, None
        return cls(query, new, (key_cache, value_cache), write_index, start, end)  # type: ignore[arg-type]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return dim(self.query, 2) // dim(self.caches[0], 1)


@dataclass(frozen=True, slots=True)
class _Visible:
    """What a call's queries see: which slots are read, and the mask over them."""

    slots: ir.Value
    mask: ir.Value


class LowerAttentionToTensorRT(ir.passes.InPlacePass):
    """Keys and values are written in place by TensorScatter, then attended to; caches are in the float type."""

    def __init__(self, precision: Precision, *, sliding_window: int | None) -> None:
        super().__init__()
        self.precision, self.window = precision, sliding_window

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # Layers of one kind see the same slots: their masks are computed once, before the first of them.
        seen: dict[tuple[int, int], _Visible] = {}
        modified = False
        for node in nodes_of(model, "Gemma4Attention", "Gemma4SharedAttention"):
            found, op = _Node.of(node), NodeBuilder()
            present = self._write(op, found)
            key = (id(found.end), 0 if found.start is not None else found.group)
            if key not in seen:
                before = NodeBuilder()
                seen[key] = self._visible(before, model, found)
                before.insert_before(node)
            output = self._attend(op, found, present, seen[key], scale=attribute(node, "scale"))
            op.replace(node, [self.precision.widen(op, output), *present][: len(node.outputs)])
            modified = True
        return ir.passes.PassResult(model, modified)

    def _write(self, op: NodeBuilder, node: _Node) -> tuple[ir.Value, ir.Value]:
        if node.new is None:
            return node.caches
        key, value = (
            op(
                "TensorScatter",
                cache,
                self.precision.narrow(op, op("Transpose", new, perm=[0, 2, 1, 3])),  # [B, T, Hkv, D] -> [B, Hkv, T, D]
                node.write_index,
                axis=2,
                mode="linear",
            )
            for new, cache in zip(node.new, node.caches, strict=True)
        )
        return key, value

    def _visible(self, op: NodeBuilder, model: ir.Model, node: _Node) -> _Visible:
        if node.start is None:
            return _global_slots(op, model, node)
        assert self.window is not None
        slots = _sliding_slots(op, model, self.window)
        # The mask's last node must not be an Unsqueeze: fused with several layers' Attention, TensorRT-RTX 1.7.1 copies
        # it under one name and fails ("Graph contains more than one op named …_iota").
        ends, starts = (op("Unsqueeze", edge, op.ints(1, 3)) for edge in (node.end, node.start))  # [B, 1, T, 1]
        return _Visible(slots, op("And", op("Less", slots, ends), op("GreaterOrEqual", slots, starts)))

    def _attend(
        self, op: NodeBuilder, node: _Node, present: tuple[ir.Value, ir.Value], visible: _Visible, *, scale: float
    ) -> ir.Value:
        query = self.precision.narrow(op, node.query)
        if node.start is None:
            return self._attend_written_out(op, node, query, present, visible, scale)
        assert dim(node.query, 3) <= _LARGEST_FUSED_HEAD, f"sliding head_dim {dim(node.query, 3)}"
        keys, values = (op("Gather", cache, visible.slots, axis=2) for cache in present)
        heads = op("Transpose", query, perm=[0, 2, 1, 3])  # [B, T, Hq, D] -> [B, Hq, T, D]
        return op("Transpose", op("Attention", heads, keys, values, visible.mask, scale=scale), perm=[0, 2, 1, 3])

    def _attend_written_out(
        self,
        op: NodeBuilder,
        node: _Node,
        query: ir.Value,
        present: tuple[ir.Value, ir.Value],
        visible: _Visible,
        scale: float,
    ) -> ir.Value:
        """The G query heads of one KV head are rows of one matrix, so that a KV head is read once."""
        assert scale == 1.0, f"scale {scale}: Gemma 4 does not scale its scores"
        num_heads, head_dim, group = dim(node.query, 2), dim(node.query, 3), node.group
        num_kv_heads = num_heads // group
        split = op("Reshape", query, op.ints(1, -1, num_kv_heads, group, head_dim))
        rows = op("Transpose", split, perm=[0, 2, 1, 3, 4])  # [1, T, Hkv, G, D] -> [1, Hkv, T, G, D]
        rows = op("Reshape", rows, op.ints(1, num_kv_heads, -1, head_dim))
        length, zero, axis = op("Shape", visible.slots), op.ints(0), op.ints(2)
        keys, values = (op("Slice", cache, zero, length, axis) for cache in present)
        scores = op("MatMul", rows, op("Transpose", keys, perm=[0, 1, 3, 2]))  # [1, Hkv, T * G, S]
        lowest = op.scalar(_LOWEST, ir.DataType.FLOAT)
        masked = op("Where", visible.mask, self.precision.widen(op, scores), lowest)
        weights = self.precision.narrow(op, op("Softmax", masked, axis=-1))
        output = op("Reshape", op("MatMul", weights, values), op.ints(1, num_kv_heads, -1, group, head_dim))
        output = op("Transpose", output, perm=[0, 2, 1, 3, 4])
        return op("Reshape", output, op.ints(1, -1, num_heads, head_dim))


def _global_slots(op: NodeBuilder, model: ir.Model, node: _Node) -> _Visible:
    """Slots as the call gives them; mask [1, 1, T * G, S], each token's run repeated for its G query heads."""
    slots = _graph_input(model, GLOBAL_SLOTS)
    ends = op("Tile", op("Unsqueeze", node.end, op.ints(-1)), op.ints(1, 1, node.group))
    return _Visible(slots, op("Less", slots, op("Reshape", ends, op.ints(1, 1, -1, 1))))


def _sliding_slots(op: NodeBuilder, model: ir.Model, window: int) -> ir.Value:
    """[W - 1 + T] int32, from the first slot that any query of this call sees.

    The first query is at position p: before W - 1 its run begins at slot 0 and the buffer has W - 1 + T slots; later
    it begins W - 1 slots below p's, and the last of W - 1 + T slots is the one of the call's last token.
    """
    start = _graph_input(model, SLIDING_START)
    length = op("Add", op("Squeeze", op("Shape", start, start=1, end=2), op.ints(0)), op.scalar(window - 1, _INT64))
    offsets = op("Range", op.scalar(0, _INT64), length, op.scalar(1, _INT64))
    return op("Add", op("Cast", offsets, to=ir.DataType.INT32), op("ReduceMin", start, keepdims=0))


_INT64 = ir.DataType.INT64


def _graph_input(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)
