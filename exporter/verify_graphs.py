"""One small graph per layer over the artifact's own weight files, so that each layer can be verified by itself.

Lowered as the whole decoder is, with float32 activations: what the gate compares. Layers that differ in nothing but
their weights share one trace. The head is cut into graphs of some vocabulary rows each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from gemma4_export.configs.evidence import VERIFY_GRAPHS_FOLDER
from gemma4_export.configs.manifest import GraphEntry
from gemma4_export.configs.model import LayerConfig, ModelConfig
from gemma4_export.configs.names import LM_HEAD
from gemma4_export.configs.output import naming
from gemma4_export.configs.target import RUN_BACKEND
from gemma4_export.exporter.lower import lower_ort_cpu
from gemma4_export.exporter.trace import trace_head, trace_layer, trace_per_layer_inputs
from gemma4_export.exporter.weights import PlacedWeight, Placement

_HEAD_BYTES = 1 << 29  # of one slice's rows in float32, what a backend may hold of them


def write_verify_graphs(config: ModelConfig, placement: Placement, folder: Path) -> dict[str, GraphEntry]:
    """Write the graphs below ``folder`` and describe them: ``layers.{i}``, ``head.{k}`` and, with PLE, ``inputs``."""
    (folder / VERIFY_GRAPHS_FOLDER).mkdir(parents=True, exist_ok=True)
    entries: dict[str, GraphEntry] = {}

    def write(name: str, file: str, traced: ir.Model, where: Placement) -> None:
        model = lower_ort_cpu(traced, where, activations="fp32")
        path = f"{VERIFY_GRAPHS_FOLDER}/{file}.onnx"
        with naming(folder / path):
            ir.save(model, folder / path)
        entries[name] = GraphEntry(
            file=path,
            backend=RUN_BACKEND,
            inputs=[str(value.name) for value in model.graph.inputs],
            outputs=[str(value.name) for value in model.graph.outputs],
        )

    if config.has_per_layer_inputs:
        write("inputs", "inputs", trace_per_layer_inputs(config), placement)
    layers = _Templates(lambda layer: trace_layer(layer, config))
    for layer in config.layers:
        write(f"layers.{layer.index}", f"layer_{layer.index:02}", layers.graph(layer), placement)
    for index, (rows, where) in enumerate(_head_slices(placement)):
        write(f"head.{index}", f"head_{index:02}", trace_head(replace(config, vocab_size=rows)), where)
    return entries


class _Templates:
    """Traces each kind of layer once; further layers of that kind are copies with other names."""

    def __init__(self, trace: Callable[[LayerConfig], ir.Model]) -> None:
        self._trace = trace
        self._traced: dict[LayerConfig, tuple[int, ir.Model]] = {}

    def graph(self, layer: LayerConfig) -> ir.Model:
        kind = replace(layer, index=0, kv_source=0 if layer.owns_kv else 1)
        if kind not in self._traced:
            self._traced[kind] = (layer.index, self._trace(layer))
        index, template = self._traced[kind]
        graph = template.clone()
        for name, value in tuple(graph.graph.initializers.items()):
            if name.startswith(f"layers.{index}."):
                del graph.graph.initializers[name]
                value.name = f"layers.{layer.index}." + name.removeprefix(f"layers.{index}.")
                graph.graph.initializers[value.name] = value
        return graph


def _head_slices(placement: Placement) -> Iterator[tuple[int, Placement]]:
    """(rows, placement in which the head is those rows), in order."""
    head = placement.weights[LM_HEAD]
    num_rows, columns = head.row_shape
    count = -(-num_rows * columns * 4 // _HEAD_BYTES)
    step = -(-num_rows // count)
    for start in range(0, num_rows, step):
        rows = min(step, num_rows - start)
        yield rows, replace(placement, weights=placement.weights | {LM_HEAD: _rows_of(head, start, rows)})


def _rows_of(weight: PlacedWeight, start: int, rows: int) -> PlacedWeight:
    num_rows, columns = weight.row_shape
    scales = weight.scales
    if scales is not None:
        scales = replace(scales, offset=scales.offset + start * (weight.scale_bytes // num_rows))
    offset = weight.offset + start * weight.format.row_bytes(columns)
    return replace(weight, offset=offset, shape=(rows, columns), scales=scales)
