"""The lowering: every pass alone, the graph after it against the module before it, and what onnxruntime is handed.

Two structures have between them every kind of node: E2B (KV sharing, PLE) and 26B-A4B (experts, K = V). The others add
none; the full tier walks them too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from artifacts import artifact, expected, model, traced
from tiny import STRUCTURES

from gemma4_export.configs.names import EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, LM_HEAD, decoder_tensors, expert_tensor
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.exporter.lower import ort_cpu_passes
from gemma4_export.exporter.models.text import Decoder
from gemma4_export.exporter.passes.static_reshapes import StaticReshapes
from gemma4_export.exporter.weights import place_weights
from gemma4_export.runtime import Gemma4
from gemma4_export.runtime.kv_cache import KVCache

FIRST = ("e2b", "26b-a4b")
every_structure = pytest.mark.parametrize(
    "structure",
    [*FIRST, *(pytest.param(other, marks=pytest.mark.full) for other in STRUCTURES if other not in FIRST)],
)
every_recipe = pytest.mark.parametrize("recipe", ["fp32", "bf16"])


# ---------------------------------------------------------------------------------------------------------------------
# Each pass


def described(graph: ir.Model) -> list[object]:
    """All of a model but the bytes of its weights, as something that compares."""

    def value(found: ir.Value | None) -> object:
        return found and (found.name, str(found.shape), str(found.type), dict(found.metadata_props), found.doc_string)

    def attribute(found: ir.Attr) -> object:
        if found.type == ir.AttributeType.TENSOR:
            return found.value.dtype, tuple(found.value.shape), found.value.tobytes()
        return found.value

    nodes = [
        (
            (node.domain, node.op_type, node.name, dict(node.metadata_props), node.doc_string),
            [source and source.name for source in node.inputs],
            [value(output) for output in node.outputs],
            {name: attribute(found) for name, found in node.attributes.items()},
        )
        for node in graph.graph
    ]
    weights = [(name, value(found), repr(found.const_value)) for name, found in graph.graph.initializers.items()]
    ends = [value(end) for end in (*graph.graph.inputs, *graph.graph.outputs)]
    return [dict(graph.metadata_props), dict(graph.opset_imports), ends, nodes, weights]


@every_recipe
@every_structure
def test_passes_are_idempotent_and_say_whether_they_changed_anything(structure, recipe):
    with Checkpoint(tiny.checkpoint(structure)) as checkpoint:
        placed = place_weights(checkpoint.specs.values(), load_recipe(recipe))
        graph = traced(checkpoint.config)
    changed = []
    for one in ort_cpu_passes(placed, activations="int8"):
        name = type(one).__name__
        before = described(graph)
        first = one(graph)
        after = described(graph)
        assert first.modified == (after != before), f"{name} says {first.modified}"
        second = one(graph)
        assert not second.modified, f"{name} found something again"
        assert described(graph) == after, f"{name} changed something again"
        changed.append((name, first.modified))
    # No pass of the list is idle, but for experts where there are none.
    assert [idle for idle, modified in changed if not modified] == ([] if structure == "26b-a4b" else ["LowerMoE"])


def test_static_reshapes_leaves_shapes_with_two_unknown_sizes_alone():
    shape = ir.Value(name="shape", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    data = ir.Value(name="data", shape=ir.Shape(["T", "R", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Reshape", [data, shape])
    node.outputs[0].shape = ir.Shape(["T", "R"])
    graph = ir.Graph([data, shape], node.outputs, nodes=[node], opset_imports={"": 24})
    one = StaticReshapes()
    assert not one(ir.Model(graph, ir_version=10)).modified
    node.outputs[0].shape = ir.Shape(["T", 4])
    assert one(ir.Model(graph, ir_version=10)).modified
    assert ir.convenience.get_const_tensor(node.inputs[1]).numpy().tolist() == [-1, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Before and after


class TorchSession:
    """The module that is traced, with a checkpoint's weights, in the place of the graph that it becomes."""

    def __init__(self, folder: Path) -> None:
        with Checkpoint(folder) as checkpoint:
            self.module = Decoder(checkpoint.config).eval()
            state = {}
            for name, spec in checkpoint.specs.items():
                if name != EMBED_TOKENS_PER_LAYER:  # the host gathers its rows; the module takes them as input
                    rows = checkpoint.rows(name, 0, spec.row_shape[0]).astype(np.float32)
                    name = LM_HEAD if name == EMBED_TOKENS else name
                    state[name] = torch.from_numpy(rows).reshape(spec.shape)
        self.module.load_state_dict(state)

    def run(self, feeds: dict[str, np.ndarray], cache: KVCache, out: np.ndarray | None = None) -> np.ndarray:
        caches = [tuple(map(torch.from_numpy, pair)) for pair in cache.buffers.values()]
        with torch.inference_mode():
            logits, present = self.module({name: torch.from_numpy(feed) for name, feed in feeds.items()}, caches)
        buffers = [buffer for pair in cache.buffers.values() for buffer in pair]
        for buffer, written in zip(buffers, present, strict=True):
            buffer[:] = written.numpy()
        return logits.numpy()


@every_structure
def test_the_lowered_graph_computes_what_the_module_does(structure):
    lowered, want = model(structure, fresh_trace=False), expected(structure)
    before = Gemma4.load(artifact(structure, fresh_trace=False))
    before.decoder._session = TorchSession(tiny.checkpoint(structure))
    ours, theirs, start = lowered.new_cache(), before.new_cache(), 0
    for count, rows in ((7, None), (1, None), (7, [6, 0, 6]), (3, [1]), (1, [0]), (7, None), (2, []), (7, [3, 2])):
        ids = want.ids[start : start + count]
        after, right = lowered.forward(ids, cache=ours, rows=rows), before.forward(ids, cache=theirs, rows=rows)
        assert after.shape == right.shape
        assert np.abs(after - right).max(initial=0) <= want.bound
        for layer, pair in ours.buffers.items():
            for buffer, other in zip(pair, theirs.buffers[layer], strict=True):
                assert np.abs(buffer - other).max() <= want.bound  # keys and values are normed, as large as logits
        if rows is None:
            assert want.difference(right, start) <= want.bound  # the module itself equals transformers
        start += count
    assert ours.num_compactions == theirs.num_compactions >= 2


# ---------------------------------------------------------------------------------------------------------------------
# What onnxruntime is handed


def loaded(folder: Path) -> ir.Model:
    return ir.load(folder / "graphs" / "decoder.onnx")


@every_structure
def test_only_standard_ops_are_left_and_norm_scales_are_as_long_as_an_axis(structure):
    graph = loaded(artifact(structure, fresh_trace=False))
    assert set(graph.opset_imports) == {""}
    assert {node.domain for node in graph.graph} == {""}
    norms = [node for node in graph.graph if node.op_type == "RMSNormalization"]
    assert len(norms) > 20
    for node in norms:
        scale = node.inputs[1]
        weight = scale.const_value or ir.convenience.get_const_tensor(scale)
        assert weight is not None, f"{node.name}: its scale {scale.name} is computed in every call"
        assert len(weight.shape) == 1
    assert not any(node.op_type in ("ConstantOfShape", "Expand") for node in graph.graph), "filled anew in every call"


def config_of(structure: str):
    with Checkpoint(tiny.checkpoint(structure)) as checkpoint:
        return checkpoint.config


@every_recipe
@every_structure
def test_every_initializer_is_the_checkpoints_tensor_in_a_file_below_graphs(structure, recipe):
    folder = artifact(structure, recipe=recipe, fresh_trace=False)
    graph = loaded(folder)
    with Checkpoint(tiny.checkpoint(structure)) as checkpoint:
        weights = {}
        for name, spec in checkpoint.specs.items():
            whole = checkpoint.rows(name, 0, spec.row_shape[0]).reshape(spec.shape)
            if spec.role == "decoder.experts":
                weights |= {expert_tensor(name, index): expert for index, expert in enumerate(whole)}
            elif name != EMBED_TOKENS_PER_LAYER:
                weights[LM_HEAD if name == EMBED_TOKENS else name] = whole
    assert set(graph.graph.initializers) == set(weights)
    norms = {name for name, spec in decoder_tensors(config_of(structure)).items() if spec.role == "decoder.norm"}
    for name, value in graph.graph.initializers.items():
        tensor, want = value.const_value, weights[name]
        assert isinstance(tensor, ir.ExternalTensor)
        assert Path(tensor.path).resolve().is_relative_to((folder / "graphs").resolve())
        assert tuple(value.shape) == tensor.numpy().shape == want.shape
        if recipe == "fp32" or name in norms:
            assert tensor.dtype == ir.DataType.FLOAT
            assert np.array_equal(tensor.numpy(), want)
        else:
            assert tensor.dtype == ir.DataType.BFLOAT16
            rounded = torch.from_numpy(want).bfloat16().float().numpy()
            assert np.array_equal(tensor.numpy().astype(np.float32), rounded)
            # Widened once, however often it is used.
            assert [node.op_type for node, _ in value.uses()] == ["Cast"]


@every_structure
def test_keys_and_values_are_written_where_the_cache_lies(structure):
    runtime = Gemma4.load(artifact(structure, fresh_trace=False))
    cache = runtime.new_cache()
    addresses = {layer: [buffer.ctypes.data for buffer in pair] for layer, pair in cache.buffers.items()}
    runtime.forward(expected(structure).ids[:3], cache=cache)
    for layer, pair in cache.buffers.items():
        assert [buffer.ctypes.data for buffer in pair] == addresses[layer]
        for buffer in pair:
            assert np.all(np.abs(buffer[:, :, :3]).max(axis=-1) > 0)  # every head of every token
            assert not buffer[:, :, 3:].any()
    # What the graph gave back as present is the very memory that it took as past.
    outputs = runtime.decoder._session._binding.get_outputs()
    found = {output.data_ptr() for output in outputs}
    assert {address for pair in addresses.values() for address in pair} < found


_GENERATE = """
import sys
from gemma4_export.configs.artifact import Artifact
from gemma4_export.runtime import Gemma4
from gemma4_export.runtime.session_ort import OrtSession

class Unbound:
    def __init__(self, path):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 2
        self.session = onnxruntime.InferenceSession(path, options)

    def run(self, feeds, cache, out=None):
        pairs = {f"past_key_values.{layer}": pair for layer, pair in cache.buffers.items()}
        past = {f"{name}.{part}": pair[i] for name, pair in pairs.items() for i, part in enumerate(("key", "value"))}
        return self.session.run(["logits"], dict(feeds) | past)[0]

runtime = Gemma4.load(sys.argv[1])
path = runtime.artifact.path("graphs/decoder.onnx")
runtime.decoder._session = Unbound(path) if sys.argv[2] == "unbound" else OrtSession(path, log_severity=2)
print(len(runtime.generate_ids(list(range(200, 220)), max_new_tokens=12, temperature=0)))
"""


@pytest.mark.parametrize("structure", FIRST)
def test_nothing_is_printed_at_the_level_of_warnings(structure):
    """ONNX Runtime warns of each TensorScatter that has to copy its cache: silence means that none does."""
    command = [sys.executable, "-c", _GENERATE, str(artifact(structure, fresh_trace=False))]
    quiet = subprocess.run([*command, "bound"], capture_output=True, text=True, check=True, timeout=120)
    assert (quiet.stdout, quiet.stderr) == ("12\n", "")
    loud = subprocess.run([*command, "unbound"], capture_output=True, text=True, check=True, timeout=120)
    assert "TensorScatter" in loud.stderr
