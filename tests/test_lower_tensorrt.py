"""The TensorRT lowering: its float32 twin against the ort-cpu artifact, and the shipped graphs against the twin.

Two structures have between them every kind of node: E2B (KV sharing, PLE) and 26B-A4B (experts, K = V). The others add
none; the full tier walks them too. Checkpoints lie on the recipe's grid, so both backends store the same weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import onnx
import pytest
from artifacts import traced, traces
from engine_twin import EngineTwin, engine_artifact, write_engine_artifact
from oracle import Oracle, find_prompt
from safetensors.numpy import load_file
from test_int4_parity import built, grid_artifact, grid_checkpoint
from test_passes import described
from tiny import STRUCTURES

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.formats import FLOAT32, FP8
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.configs.target import engine_profiles
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.exporter.lower_tensorrt import EngineOptions, tensorrt_passes
from gemma4_export.exporter.passes import trt_moe
from gemma4_export.exporter.split_groups import _bounds
from gemma4_export.exporter.weights import place_weights
from gemma4_export.runtime import Gemma4

FIRST = ("e2b", "26b-a4b")
every_structure = pytest.mark.parametrize(
    "structure",
    [*FIRST, *(pytest.param(other, marks=pytest.mark.full) for other in STRUCTURES if other not in FIRST)],
)
# Float32 sums in another order, through up to nine layers; both sides are that far from float64 (oracle.MIN_BOUND).
BOUND = 3e-4
PREFILL, STEPS = (7, 7, 6), 64  # three calls, then one token each: a sliding buffer of 10 slots compacts every 7


@functools.cache
def expected(structure: str, recipe: str) -> tuple[list[int], np.ndarray]:
    """A prompt without close routing decisions, and its logits [T, V] by the ort-cpu artifact."""
    checkpoint = grid_checkpoint(structure, recipe)
    ids = find_prompt(Oracle(checkpoint), length=sum(PREFILL) + STEPS)
    if recipe != "fp8":
        return ids, Gemma4.load(grid_artifact(structure, recipe, "fp32")).forward(ids)
    # No processor multiplies with fp8: float32 holds the values of its grid.
    formats = {role: FLOAT32 if form == FP8 else form for role, form in load_recipe(recipe).formats.items()}
    wide = dataclasses.replace(load_recipe(recipe), formats=formats)
    return ids, Gemma4.load(built(checkpoint, wide, activations="fp32")).forward(ids)


@functools.cache
def twin(structure: str, recipe: str, float_type: str = "float32", experts: str = "plugin") -> EngineTwin:
    return EngineTwin(
        engine_artifact(grid_checkpoint(structure, recipe), recipe, float_type=float_type, experts=experts)
    )


def worst(engine: EngineTwin, ids: list[int], logits: np.ndarray) -> float:
    """Run ids as prefill and decode steps; the largest difference of a top logit or a logsumexp from ``logits``."""
    cache, start, differences = engine.new_cache(), 0, []
    for count in (*PREFILL, *[1] * (len(ids) - sum(PREFILL))):
        rows = sorted({0, count // 2, count - 1}, reverse=True)  # in an order that a gather must keep
        top, best, total = engine.forward(ids[start : start + count], cache, rows)
        for row, index in enumerate(rows):
            wanted = logits[start + index].astype(np.float64)
            ranked = np.sort(wanted)[::-1][: top.shape[1]]
            differences.append(np.abs(top[row] - ranked).max())
            differences.append(np.abs(top[row] - wanted[best[row]]).max())
            differences.append(abs(total[row, 0] - np.log(np.exp(wanted).sum())))
            assert len(set(best[row].tolist())) == top.shape[1]
        start += count
    assert cache.num_compactions >= 2
    return float(np.max(differences))


@every_structure
@pytest.mark.parametrize("recipe", ["fp32", "int4", "int8", "fp8"])
def test_the_float32_twin_equals_ort_cpu(structure, recipe):
    assert worst(twin(structure, recipe), *expected(structure, recipe)) < BOUND


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_experts_of_standard_ops_equal_ort_cpu(recipe):
    assert worst(twin("26b-a4b", recipe, experts="builtin"), *expected("26b-a4b", recipe)) < BOUND


@pytest.mark.parametrize("at_once", [1, 6])
def test_experts_of_standard_ops_may_be_taken_a_few_at_a_time(at_once, monkeypatch):
    monkeypatch.setattr(trt_moe, "EXPERTS_AT_ONCE", at_once)  # 16 experts: the last run of six is shorter
    with traces(fresh=False):
        folder = write_engine_artifact(
            grid_checkpoint("26b-a4b", "int4"), "int4", float_type="float32", experts="builtin"
        )
    assert worst(EngineTwin(folder), *expected("26b-a4b", "int4")) < BOUND
    group = Artifact.open(folder).manifest.engines.phases["prefill"][0]
    names = {value.name for value in onnx.load(folder / group.file, load_external_data=False).graph.initializer}
    assert len([name for name in names if name.startswith("layers.0.experts.down_proj.")]) == 2 * math.ceil(
        16 / at_once
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped

UNIT = 2.0**-11  # half a unit in the last place of float16


def float16_bound(structure: str) -> float:
    """How far a float16 twin's logits may be off.

    A layer rounds a dozen times on the way from residual to residual: the input and output of each product, queries,
    keys, values, scores and weights of attention. Independent roundings of relative size UNIT add up like a random
    walk, norms keep their relative size, and logits reach 30 (the soft cap).
    """
    layers = Artifact.open(engine_artifact(grid_checkpoint(structure, "int4"), "int4", float_type="float16")).manifest
    return 30 * UNIT * math.sqrt(12 * layers.model.num_layers)


@every_structure
def test_a_float16_twin_stays_within_its_roundings(structure):
    ids, logits = expected(structure, "int4")
    found = worst(twin(structure, "int4", "float16"), ids, logits)
    assert BOUND < found < float16_bound(structure)


def nodes_without_casts(path) -> list[object]:
    """Op types, attributes and wiring of a graph, casts removed and values numbered in order of appearance."""
    graph = onnx.load(path, load_external_data=False).graph
    renamed = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast" and _is_float_cast(node)}
    numbers: dict[str, int] = {}

    def number(name: str) -> object:
        while name in renamed:
            name = renamed[name]
        return numbers.setdefault(name, len(numbers)) if name in made else name

    kept = [node for node in graph.node if node.output[0] not in renamed]
    made = {output for node in kept for output in node.output}
    return [
        (
            node.op_type,
            node.domain,
            [number(name) for name in node.input],
            [number(name) for name in node.output],
            sorted((one.name, one.SerializeToString()) for one in node.attribute),
        )
        for node in kept
    ]


def _is_float_cast(node: onnx.NodeProto) -> bool:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return next(one.i for one in node.attribute if one.name == "to") in floats


def element_types(path) -> dict[str, int]:
    graph = onnx.load(path, load_external_data=False).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}


@every_structure
@pytest.mark.parametrize("recipe", ["int4", "bf16", "fp8"])
def test_the_shipped_graphs_are_the_twin_but_for_types_and_casts(structure, recipe):
    checkpoint = grid_checkpoint(structure, recipe)
    shipped, other = (engine_artifact(checkpoint, recipe, float_type=name) for name in ("bfloat16", "float32"))
    engines = Artifact.open(shipped).manifest.engines
    assert engines is not None
    assert engines.float_type == "bfloat16"
    for group in engines.phases["decoder"]:
        assert nodes_without_casts(shipped / group.file) == nodes_without_casts(other / group.file)
        types = element_types(shipped / group.file)
        assert list(types) == list(element_types(other / group.file))
        for name, kind in types.items():
            if name.startswith(("past_key_values.", "present.")):
                assert kind == onnx.TensorProto.BFLOAT16
            else:
                assert kind != onnx.TensorProto.BFLOAT16, name


def test_codes_and_scales_are_stored_once_and_as_the_quantiser_made_them():
    folder = engine_artifact(grid_checkpoint("26b-a4b", "int4"), "int4", float_type="bfloat16")
    manifest = Artifact.open(folder).manifest
    graphs = [onnx.load(folder / group.file, load_external_data=False) for group in manifest.engines.phases["decoder"]]
    stored = {value.name: value for graph in graphs for value in graph.graph.initializer}
    codes = stored["layers.0.experts.gate_up_proj.codes"]
    assert (codes.data_type, list(codes.dims)) == (onnx.TensorProto.INT4, [16, 64, 64])
    scales = stored["layers.0.experts.gate_up_proj.scales"]
    assert (scales.data_type, list(scales.dims)) == (onnx.TensorProto.FLOAT16, [16, 64, 2])
    # UINT8 would be widened to INT32 on its way into a plugin
    assert {value.data_type for value in stored.values()}.isdisjoint({onnx.TensorProto.UINT8, onnx.TensorProto.UINT4})


@pytest.mark.parametrize(("structure", "experts"), [("e2b", "plugin"), ("26b-a4b", "gather"), ("26b-a4b", "dense")])
def test_passes_are_idempotent(structure, experts):
    with Checkpoint(grid_checkpoint(structure, "int4")) as checkpoint:
        config, recipe = checkpoint.config, load_recipe("int4")
        placed = place_weights(checkpoint.specs.values(), recipe, packing="tensorrt")
    options = EngineOptions(float_type="bfloat16", sliding_slots=10, global_slots=64, experts=experts)
    graph = traced(config)
    for one in tensorrt_passes(config, placed, options):
        one(graph)
        before = described(graph)
        assert not one(graph).modified, type(one).__name__
        assert described(graph) == before, type(one).__name__


@pytest.mark.parametrize(
    ("sizes", "bounds"),
    [
        ([4, 4, 4, 4], [(0, 1), (2, 3)]),
        ([4, 4, 4, 4, 9], [(0, 1), (2, 3), (4, 4)]),
        ([20, 1, 9, 1], [(0, 0), (1, 2), (3, 3)]),  # a layer above the limit is a group of its own
        ([1], [(0, 0)]),
    ],
)
def test_groups_are_as_long_as_the_limit_allows(sizes, bounds):
    assert _bounds(sizes, 10) == bounds


def test_profiles_bound_tokens_times_slots():
    profiles = {one.name: (one.tokens, one.slots) for one in engine_profiles(chunk=2048, context=131072)}
    assert profiles == {
        "decode": ((1, 1, 2), (1, 4096, 131072)),
        "prefill": ((1, 512, 2048), (1, 4096, 8192)),
        "prefill-32k": ((1, 128, 128), (1, 16384, 32768)),
        "prefill-long": ((1, 16, 16), (1, 65536, 131072)),
    }
    short = engine_profiles(chunk=1, context=100)
    assert [one.name for one in short] == ["decode"]
    for one in engine_profiles(chunk=64, context=4096):
        assert one.tokens[0] <= one.tokens[1] <= one.tokens[2]
        assert one.slots[0] <= one.slots[1] <= one.slots[2]


def test_suppressed_ids_are_not_among_the_best():
    engine = twin("26b-a4b", "int4")
    ids, _ = expected("26b-a4b", "int4")
    _, best, total = engine.forward(ids[:5], engine.new_cache(), [4])
    bias = np.zeros((1, engine.manifest.model.vocab_size), np.float32)
    bias[0, best[0, :3]] = -np.inf
    values, others, smaller = engine.forward(ids[:5], engine.new_cache(), [4], bias)
    assert others[0, :61].tolist() == best[0, 3:].tolist()
    assert np.isfinite(values).all()
    assert smaller[0, 0] < total[0, 0]


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_signed_and_unsigned_codes_record_one_oracle(recipe):
    checkpoint = grid_checkpoint("e2b", recipe)
    signed, unsigned = (
        load_file(folder / "oracle.safetensors")
        for folder in (engine_artifact(checkpoint, recipe, float_type="bfloat16"), grid_artifact("e2b", recipe, "fp32"))
    )
    assert signed.keys() == unsigned.keys()
    assert all(np.array_equal(value, unsigned[name]) for name, value in signed.items())
