"""Cuts a decoder graph into groups of whole layers, each with at most a given number of bytes of weights.

Building an engine takes four to eight times its weights in memory (docs/engines.md), so the size of a group decides
which machine can. A group takes the hidden states behind the group before it, and of earlier layers' caches those that
its KV-shared layers read; masks and cosines are computed again in each. The smallest group is one layer, or the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from gemma4_export.configs import names
from gemma4_export.configs.model import ModelConfig
from gemma4_export.exporter.weights import PlacedWeight, Placement

MAX_GROUP_BYTES = 1_500_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers ``first`` to ``last``; the head is the layer after the last."""

    first: int
    last: int
    model: ir.Model
    weight_bytes: int


def split_groups(model: ir.Model, config: ModelConfig, placement: Placement, *, max_bytes: int) -> list[Group]:
    """The groups of a lowered decoder in the order in which they run. ``model`` stays as it is."""
    sizes = [_unit_bytes(placement, unit, config.num_layers) for unit in range(config.num_layers + 1)]
    bounds = _bounds(sizes, max_bytes)
    cuts = _cut_values(model, config)
    return [
        Group(
            first=first,
            last=last,
            model=_cut_out(model, config, cuts, first, last),
            weight_bytes=sum(sizes[first : last + 1]),
        )
        for first, last in bounds
    ]


def _bounds(sizes: Sequence[int], max_bytes: int) -> list[tuple[int, int]]:
    """Runs of neighbours, each as long as the limit allows."""
    bounds: list[tuple[int, int]] = []
    held = 0
    for unit, size in enumerate(sizes):
        if bounds and held + size <= max_bytes:
            bounds[-1], held = (bounds[-1][0], unit), held + size
        else:
            bounds.append((unit, unit))
            held = size
    return bounds


def _unit_bytes(placement: Placement, unit: int, num_layers: int) -> int:
    """Bytes of a layer's weights, or of the head's; what merges per-layer inputs belongs to the first layer."""
    merge = ("per_layer_model_projection.", "per_layer_projection_norm.") if unit == 0 else ()
    prefixes = ("norm.",) if unit == num_layers else (f"layers.{unit}.", *merge)
    weights = [stored.placed for stored in placement.stored if stored.name.startswith(prefixes)]
    if unit == num_layers:
        weights.append(placement.weights[names.LM_HEAD])
    return sum(_bytes(weight) for weight in weights)


def _bytes(weight: PlacedWeight) -> int:
    return weight.code_bytes + weight.scale_bytes


def _cut_values(model: ir.Model, config: ModelConfig) -> dict[str, str]:
    """Where the graph may be cut: name of a value -> the name under which a later group takes it."""
    weights = model.graph.initializers
    cuts: dict[str, str] = {}
    for layer in config.layers:
        ((scaled, _),) = weights[f"layers.{layer.index}.layer_scalar"].uses()
        cuts[str(scaled.outputs[0].name)] = hidden_name(layer.index)
        if layer.owns_kv:
            cuts[names.present_key(layer)] = names.past_key(layer)
            cuts[names.present_value(layer)] = names.past_value(layer)
    if config.has_per_layer_inputs:
        value = weights["per_layer_projection_norm.weight"]
        for op_type in ("RMSNormalization", "Add", "Mul"):  # norm(projection), + token rows, / sqrt(2)
            ((node, _),) = value.uses()
            assert node.op_type == op_type, f"merge of per-layer inputs: {node.op_type}"
            value = node.outputs[0]
        cuts[str(value.name)] = names.MERGED_PER_LAYER_INPUTS
    return cuts


def hidden_name(layer: int) -> str:
    """The hidden states behind ``layer``, [1, T, E], or [1, R, E] from the first KV-shared layer on."""
    return f"hidden_states.{layer}"


def _cut_out(model: ir.Model, config: ModelConfig, cuts: Mapping[str, str], first: int, last: int) -> ir.Model:
    group = model.clone()
    graph = group.graph
    values = {str(output.name): output for node in graph for output in node.outputs}
    is_last = last == config.num_layers
    outputs = [value for value in graph.outputs if _is_output_of(str(value.name), first, last, is_last=is_last)]
    graph.outputs.clear()
    for name, taken in cuts.items():
        value, layer = values[name], _layer_of(taken)
        if layer < first:
            _become_input(graph, value, taken)
        elif taken == hidden_name(last) or (first == 0 and not is_last and taken == names.MERGED_PER_LAYER_INPUTS):
            value.name = taken
            outputs.append(value)
    graph.outputs.extend(outputs)
    common.RemoveUnusedNodesPass()(group)
    for value in tuple(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    graph.name = f"layers {first}-{last}"
    return group


def _is_output_of(name: str, first: int, last: int, *, is_last: bool) -> bool:
    kind, _, rest = name.partition(".")
    return first <= int(rest.partition(".")[0]) <= last if kind == "present" else is_last


def _layer_of(taken: str) -> int:
    """The layer that makes a value; per-layer inputs are merged before the first."""
    kind, _, rest = taken.partition(".")
    return 0 if kind == names.MERGED_PER_LAYER_INPUTS else int(rest.partition(".")[0])


def _become_input(graph: ir.Graph, value: ir.Value, name: str) -> None:
    taken = next((found for found in graph.inputs if found.name == name), None)
    if taken is None:
        taken = ir.Value(name=name, shape=value.shape, type=value.type)
        graph.inputs.append(taken)
    value.replace_all_uses_with(taken)
