"""Gemma4Attention and Gemma4SharedAttention -> TensorScatter and Attention, onnxruntime's CPU kernels.

Attention reads every slot it is given. A sliding buffer is therefore cut down to the slots that any query of this call
sees; a linear cache is not, because there the copy costs more than the masked slots do (head_dim 512, 8192 slots, one
token on 2 cores: 3.8 ms whole, 8.7 ms cut).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from gemma4_export.exporter.passes.builder import NodeBuilder, attribute, input_of, nodes_of


@dataclass(frozen=True, slots=True)
class _Run:
    """Which slots a call's queries see: mask [B, 1, T, S], and the cut [first, last) of the cache axis, if any."""

    mask: ir.Value
    cut: tuple[ir.Value, ir.Value] | None


class LowerAttention(ir.passes.InPlacePass):
    """Writes K and V by TensorScatter (in place when bound so), then attends to the visible run with a mask."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # All layers of one type see the same run: its mask is computed once, before the first of them.
        runs: dict[tuple[int, int, str], _Run] = {}
        modified = False
        for node in nodes_of(model, "Gemma4Attention", "Gemma4SharedAttention"):
            op = NodeBuilder()
            if node.op_type == "Gemma4Attention":
                present = [
                    op(
                        "TensorScatter",
                        input_of(node, cache),
                        op("Transpose", input_of(node, new), perm=[0, 2, 1, 3]),  # [B, T, Hkv, D] -> [B, Hkv, T, D]
                        input_of(node, 5),
                        axis=2,
                        mode="linear",
                    )
                    for new, cache in ((1, 3), (2, 4))
                ]
                start, end, cache = node.inputs[6], input_of(node, 7), input_of(node, 3)
            else:
                present = [input_of(node, 1), input_of(node, 2)]
                start, end, cache = node.inputs[3], input_of(node, 4), input_of(node, 1)
            key = (id(end), 0 if start is None else id(start), _slots(cache))
            if key not in runs:
                runs[key] = _visible_run(node, start, end, cache)
            output = _attend(op, input_of(node, 0), present, runs[key], scale=attribute(node, "scale"))
            op.replace(node, [output, *present][: len(node.outputs)])
            modified = True
        return ir.passes.PassResult(model, modified)


def _slots(cache: ir.Value) -> str:
    """The name of a cache's slot axis, which tells sliding and global caches apart."""
    assert cache.shape is not None
    return str(cache.shape[2])


def _visible_run(node: ir.Node, start: ir.Value | None, end: ir.Value, cache: ir.Value) -> _Run:
    op = NodeBuilder()
    zero, one = op.scalar(0, ir.DataType.INT32), op.scalar(1, ir.DataType.INT32)
    last_axis, head_axis = op.ints(-1), op.ints(1)
    cut = None
    if start is None:
        length = op("Cast", op("Shape", cache, start=2, end=3), to=ir.DataType.INT32)
        slots = op("Range", zero, op("Squeeze", length, op.ints(0)), one)
    else:
        # output_rows may come in any order, so the run is from the smallest start to the largest end.
        first, last = op("ReduceMin", start, keepdims=0), op("ReduceMax", end, keepdims=0)
        slots = op("Range", first, last, one)
        cut = (op("Unsqueeze", first, op.ints(0)), op("Unsqueeze", last, op.ints(0)))
    mask = op("Less", slots, op("Unsqueeze", end, last_axis))  # [B, T, S]
    if start is not None:
        mask = op("And", mask, op("GreaterOrEqual", slots, op("Unsqueeze", start, last_axis)))
    run = _Run(op("Unsqueeze", mask, head_axis), cut)
    op.insert_before(node)
    return run


def _attend(op: NodeBuilder, query: ir.Value, present: list[ir.Value], run: _Run, *, scale: float) -> ir.Value:
    keys, values = present
    if run.cut is not None:
        axis = op("Constant", value=ir.tensor([2], dtype=ir.DataType.INT32))
        keys, values = (op("Slice", cache, *run.cut, axis) for cache in present)
    heads = op("Transpose", query, perm=[0, 2, 1, 3])  # [B, T, Hq, D] -> [B, Hq, T, D]
    return op("Transpose", op("Attention", heads, keys, values, run.mask, scale=scale), perm=[0, 2, 1, 3])
