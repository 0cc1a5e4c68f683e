"""Writes the graphs that engines are compiled from: groups of layers, with the shapes of every profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from gemma4_export.configs.evidence import GRAPHS_FOLDER
from gemma4_export.configs.manifest import EnginesEntry, GroupEntry, KVLayout
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.output import naming
from gemma4_export.configs.target import EngineBackend, FloatType, Profile, engine_profiles
from gemma4_export.exporter.lower_tensorrt import EngineOptions, lower_tensorrt
from gemma4_export.exporter.passes.trt_moe import ExpertsForm
from gemma4_export.exporter.split_groups import Group, split_groups
from gemma4_export.exporter.weights import Placement

Experts = Literal["plugin", "builtin"]
MAX_OUTPUT_ROWS = 16
"""Rows of one call whose logits an engine gives: a drafter's tokens; all of a chunk's would take V floats each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTarget:
    """What the graphs are for."""

    backend: EngineBackend
    compute_capability: str
    float_type: FloatType
    experts: Experts
    max_group_bytes: int


def write_engine_graphs(
    traced: ir.Model,
    config: ModelConfig,
    placement: Placement,
    layout: KVLayout,
    target: EngineTarget,
    *,
    chunk: int,
    context: int,
    folder: Path,
) -> EnginesEntry:
    """Lower ``traced``, cut it into groups and write an ONNX file for each below ``folder``; weights are not read."""
    phases: dict[str, list[GroupEntry]] = {}
    profiles = engine_profiles(chunk=chunk, context=context)
    for phase, form, own in _phases(config, target.experts, profiles):
        options = EngineOptions(
            float_type=target.float_type,
            sliding_slots=layout.sliding_slots,
            global_slots=layout.global_bucket,
            experts=form,
        )
        lowered = lower_tensorrt(traced.clone(), config, placement, options)
        groups = split_groups(lowered, config, placement, max_bytes=target.max_group_bytes)
        phases[phase] = [_write(group, f"{phase}.{index:02d}", own, folder) for index, group in enumerate(groups)]
    return EnginesEntry(
        backend=target.backend,
        compute_capability=target.compute_capability,
        float_type=target.float_type,
        experts=target.experts,
        phases=phases,
        compiled=None,
    )


def _phases(
    config: ModelConfig, experts: Experts, profiles: tuple[Profile, ...]
) -> list[tuple[str, ExpertsForm, tuple[Profile, ...]]]:
    """Name, form of the experts and profiles of each set of groups.

    Standard ops have no form of top-8 experts that is good for one token and for many, and an If in one engine would
    size its scratch for the larger; so there the two get engines of their own.
    """
    if experts == "plugin" or config.layers[0].moe is None:
        return [("decoder", "plugin", profiles)]
    return [("decode", "gather", profiles[:1]), ("prefill", "dense", profiles)]


def _write(group: Group, name: str, profiles: tuple[Profile, ...], folder: Path) -> GroupEntry:
    file = f"{GRAPHS_FOLDER}/{name}.onnx"
    with naming(folder / file):
        ir.save(group.model, folder / file)
    inputs = {str(value.name): value for value in group.model.graph.inputs}
    return GroupEntry(
        file=file,
        first=group.first,
        last=group.last,
        weight_bytes=group.weight_bytes,
        inputs=list(inputs),
        outputs=[str(value.name) for value in group.model.graph.outputs],
        profiles={profile.name: _shapes(inputs, profile) for profile in profiles},
        engine=None,
    )


def _shapes(inputs: dict[str, ir.Value], profile: Profile) -> dict[str, list[list[int]]]:
    """[least, best, largest] shape of every input with a dynamic size."""
    sizes: dict[str, tuple[int, int, int]] = {
        "T": profile.tokens,
        "S": profile.slots,
        "R": (1, 1, min(MAX_OUTPUT_ROWS, profile.tokens[2])),
    }
    shapes = {}
    for name, value in inputs.items():
        assert value.shape is not None
        axes = [size if isinstance(size, int) else str(size) for size in value.shape]
        if any(isinstance(axis, str) for axis in axes):
            shapes[name] = [[axis if isinstance(axis, int) else sizes[axis][at] for axis in axes] for at in range(3)]
    return shapes
