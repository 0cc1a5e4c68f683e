"""Real TensorRT-RTX engines of every structure, for three GPUs in one file, on a machine that has none.

The lowered graphs are the exporter's own. A node that the builder refuses is a failure here, and its message names it.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import onnx
import pytest
import small
from artifacts import traces
from engine_graphs import K, linear, quick_plugins
from engine_twin import engine_artifact
from test_engine_build import HAS_WHEEL
from test_int4_parity import grid_checkpoint
from tiny import STRUCTURES

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.manifest import GroupEntry
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.configs.target import load_target
from gemma4_export.exporter import build
from gemma4_export.exporter.dummy import DummySource
from gemma4_export.plugins.moe.contract import MOE
from gemma4_export.runtime.engine import BuiltEngine, EngineRequest, TensorRecord, build_engines
from gemma4_export.runtime.engine.artifact import compile_artifact
from gemma4_export.runtime.engine.request import profiles_from_json

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not HAS_WHEEL, reason="TensorRT-RTX's wheel exists for Linux on x86-64 only"),
]
CAPABILITIES = {"bf16": (86, 89, 120), "int8": (86, 89, 120), "int4": (86, 89, 120), "fp8": (89, 120)}
ELEMENTS = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
}
# Widths at which TensorRT-RTX has kernels for packed weights: a layer of 6 MB and more in 4 bits.
WIDE = {"num_layers": 2, "hidden_size": 1024, "intermediate_size": 4096, "max_position_embeddings": 131072}
WIDE_EXPERTS = WIDE | {"intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 32}


CASES = [
    (structure, recipe, experts)
    for recipe in ("bf16", "int4", "fp8")
    for structure, experts in (*((one, "plugin") for one in STRUCTURES), ("26b-a4b", "builtin"))
]


@functools.cache
def wide_artifact(structure: str, recipe: str, experts: str) -> Path:
    """An artifact of random weights with all four profiles, in groups of the usual size: one."""
    config = small.model_config(structure, **(WIDE_EXPERTS if structure == "26b-a4b" else WIDE))
    options = build.resolve_options(
        config,
        model_name="wide",
        target=load_target("rtx4090"),
        recipe=load_recipe(recipe),
        context=65536,
        chunk=256,
        has_dummy_weights=True,
        experts=experts,
    )
    out = Path(small.scratch_folder()) / "artifact"
    with traces(fresh=False):
        build.build_artifact(DummySource(config), options, out, lambda *progress: None)
    return out


def compile_groups(folder: Path, copy: Path, capabilities: tuple[int, ...]) -> list[tuple[GroupEntry, BuiltEngine]]:
    """Every group of a copy of an artifact with its engine, as ``gemma4-run build`` compiles them."""
    shutil.copytree(folder, copy)
    opened = Artifact.open(copy, with_engines=False)
    compiled = compile_artifact(opened, compute_capabilities=capabilities, plugins=quick_plugins())
    assert opened.manifest.engines is not None
    return list(zip(opened.manifest.engines.groups, compiled.engines, strict=True))


@functools.cache
def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def tensors(values: list[onnx.ValueInfoProto]) -> list[TensorRecord]:
    """What a graph says of its inputs or outputs, as an engine records it."""
    return [
        TensorRecord(
            name=value.name,
            dtype=ELEMENTS[value.type.tensor_type.elem_type],
            shape=tuple(-1 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    ]


@pytest.mark.parametrize(("structure", "recipe", "experts"), CASES)
def test_every_group_becomes_one_engine_for_all_gpus(structure, recipe, experts, tmp_path):
    folder = engine_artifact(grid_checkpoint(structure, recipe), recipe, float_type="bfloat16", experts=experts)
    uses_plugin = structure == "26b-a4b" and experts == "plugin"
    with_node = 0
    for group, engine in compile_groups(folder, tmp_path / "copy", CAPABILITIES[recipe]):
        record, graph = engine.record, graph_of(folder / group.file)
        assert list(record.inputs) == tensors(graph.input)
        assert list(record.outputs) == tensors(graph.output)
        assert [one.name for one in record.inputs] == group.inputs
        assert [one.name for one in record.outputs] == group.outputs
        assert record.profiles == profiles_from_json(group.profiles)
        assert list(record.profiles) == ["decode", "prefill"][: len(group.profiles)]
        assert record.compute_capabilities == CAPABILITIES[recipe]
        assert record.plugins == ({MOE.name: MOE.version} if uses_plugin else {})
        with_node += any(node.op_type == MOE.name for node in graph.node)
    assert (with_node > 0) == uses_plugin


@pytest.mark.parametrize(
    ("structure", "experts"), [("e2b", "plugin"), ("31b", "plugin"), ("26b-a4b", "plugin"), ("26b-a4b", "builtin")]
)
@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", "fp8"])
def test_weights_stay_as_small_as_they_were_packed_with_all_profiles(structure, experts, recipe, tmp_path):
    folder = wide_artifact(structure, recipe, experts)
    for group, engine in compile_groups(folder, tmp_path / "copy", CAPABILITIES[recipe]):
        assert group.weight_bytes >= 4e6
        assert engine.record.weights_bytes == pytest.approx(group.weight_bytes, rel=0.1)


def test_rows_of_8_bits_are_written_out_for_exactly_one_token(tmp_path):
    """Why decoding is profiled for one token or two: the last line fails the day that this is mended."""
    layer = linear(tmp_path, weights="int8")
    written_out = 2 * layer.packed_bytes  # in 16 bits
    for most, is_written_out in ((2, False), (1, True)):
        ranges = {"decode": {"x": ((1, K), (1, K), (most, K))}}
        request = EngineRequest(graph=layer.graph, data=(layer.data,), profiles=ranges, compute_capabilities=(89,))
        (engine,) = build_engines([request], tmp_path / "engines")
        assert (engine.record.scratch_bytes > 0.9 * written_out) == is_written_out
