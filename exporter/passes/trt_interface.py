"""Inputs and outputs of an engine: caches of static size, two inputs more, and the best logits in place of all."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from gemma4_export.configs.names import ENGINE_OUTPUTS, GLOBAL_SLOTS, LOGIT_BIAS
from gemma4_export.exporter.passes.builder import NodeBuilder, dim
from gemma4_export.exporter.passes.trt_precision import Precision

NUM_TOP_LOGITS = 64


class EngineInterface(ir.passes.InPlacePass):
    """Runs first: later passes find their inputs by name. Dynamic sizes are called T, R and S afterwards."""

    def __init__(
        self, precision: Precision, *, sliding_slots: int, global_slots: int, sliding_layers: Collection[int]
    ) -> None:
        super().__init__()
        self.precision = precision
        self.slots = {True: sliding_slots, False: global_slots}
        self.sliding_layers = sliding_layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if any(value.name == GLOBAL_SLOTS for value in graph.inputs):
            return ir.passes.PassResult(model, False)
        sizes = {value.name: value.shape for value in graph.inputs}
        tokens, rows = sizes["inputs_embeds"], sizes["output_rows"]
        assert tokens is not None, "inputs_embeds has no shape"
        assert rows is not None, "output_rows has no shape"
        called = {str(tokens[1]): "T", str(rows[0]): "R"}
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            self._name_sizes(value, called)
        logits = graph.outputs[0]
        position = next(i for i, value in enumerate(graph.inputs) if str(value.name).startswith("past_key_values."))
        slots = ir.Value(name=GLOBAL_SLOTS, shape=ir.Shape(["S"]), type=ir.TensorType(ir.DataType.INT32))
        bias_shape = ir.Shape([1, dim(logits, 1)])
        bias = ir.Value(name=LOGIT_BIAS, shape=bias_shape, type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs[position:position] = [slots, bias]
        graph.outputs[0:1] = self._best(graph, logits, bias)
        return ir.passes.PassResult(model, True)

    def _name_sizes(self, value: ir.Value, called: Mapping[str, str]) -> None:
        if value.shape is None:
            return
        kind, _, rest = str(value.name).partition(".")
        sizes = [size if isinstance(size, int) else called.get(str(size), str(size)) for size in value.shape]
        if kind in ("past_key_values", "present"):
            sizes[2] = self.slots[int(rest.partition(".")[0]) in self.sliding_layers]
            value.type = ir.TensorType(self.precision.float_type)
        value.shape = ir.Shape(sizes)

    def _best(self, graph: ir.Graph, logits: ir.Value, bias: ir.Value) -> list[ir.Value]:
        """Values and ids of the highest logits, and the log of the sum of all exponentials, stable at any bias."""
        op, last = NodeBuilder(), -1
        count = min(NUM_TOP_LOGITS, dim(logits, 1))
        biased = op("Add", logits, bias)
        values, ids = op.several("TopK", 2, biased, op.ints(count), axis=last)
        largest = op("Slice", values, op.ints(0), op.ints(1), op.ints(last))
        total = op("ReduceSum", op("Exp", op("Sub", biased, largest)), op.ints(last), keepdims=1)
        outputs = [values, ids, op("Add", largest, op("Log", total))]
        types = (ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.FLOAT)
        for output, name, dtype, width in zip(outputs, ENGINE_OUTPUTS, types, (count, count, 1), strict=True):
            output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape(["R", width])
        op.append_to(graph)
        return outputs
