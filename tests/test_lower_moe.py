"""The lowered MoE block alone, at the width and the number of rows of a real prefill, on all threads."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from gemma4_export.configs.formats import FLOAT32
from gemma4_export.configs.names import expert_tensor
from gemma4_export.exporter.passes.lower_moe import LowerMoE
from gemma4_export.exporter.passes.matmul import MatMul
from gemma4_export.exporter.weights import PlacedWeight, Placement
from gemma4_export.plugins.moe.reference import moe

TOP_K = 8


def lowered(gate_up: np.ndarray, down: np.ndarray) -> onnxruntime.InferenceSession:
    """A session of one MoE block."""
    content = ir.to_proto(lowered_model(gate_up, down)).SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def lowered_model(gate_up: np.ndarray, down: np.ndarray) -> ir.Model:
    """One MoE block with these expert weights in the file."""
    num_experts, hidden_size, width = down.shape
    weights = {
        expert_tensor(name, index): expert
        for name, fused in (("experts.gate_up_proj", gate_up), ("experts.down_proj", down))
        for index, expert in enumerate(fused)
    }
    placed = {
        name: PlacedWeight(file="graphs/x.bin", offset=0, format=FLOAT32, shape=array.shape)
        for name, array in weights.items()
    }

    def value(name: str, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    inputs = [
        value("hidden_states", 1, "T", hidden_size),
        value("router_logits", 1, "T", num_experts),
        value("per_expert_scale", num_experts),
    ]
    fused = [
        value("experts.gate_up_proj", num_experts, 2 * width, hidden_size),
        value("experts.down_proj", num_experts, hidden_size, width),
    ]
    node = ir.node("Gemma4MoE", [*inputs, *fused], {"top_k": TOP_K}, domain="gemma4")
    node.outputs[0].name, node.outputs[0].type = "output", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([1, "T", hidden_size])
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=fused, opset_imports={"": 24}, name="moe")
    model = ir.Model(graph, ir_version=10)
    assert LowerMoE(MatMul(Placement(stored=(), weights=placed), "fp32"))(model).modified
    for name, tensor in weights.items():
        graph.initializers[name].const_value = ir.tensor(tensor, name=name)
    for value_ in fused:
        del graph.initializers[str(value_.name)]
    return model


def draw(num_rows: int, hidden_size: int, num_experts: int, width: int) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(7)
    hidden_states = random.standard_normal((1, num_rows, hidden_size), np.float32)
    logits = random.standard_normal((1, num_rows, num_experts), np.float32)
    scale = 1 + 0.3 * random.standard_normal(num_experts, np.float32)
    gate_up = random.standard_normal((num_experts, 2 * width, hidden_size), np.float32) / np.sqrt(hidden_size)
    down = random.standard_normal((num_experts, hidden_size, width), np.float32) / np.sqrt(width)
    return hidden_states, logits, scale, gate_up.astype(np.float32), down.astype(np.float32)


def test_no_expert_is_lost_when_many_rows_are_written_at_once() -> None:
    # 26B-A4B's width, experts and longest chunk on a CPU. Adding experts' rows with ScatterND's reduction lost whole
    # experts here in 1 of 20 runs, because onnxruntime adds from several threads at once; small sizes never show it.
    hidden_states, logits, scale, gate_up, down = draw(256, 2816, 128, 16)
    session = lowered(gate_up, down)
    feeds = {"hidden_states": hidden_states, "router_logits": logits, "per_expert_scale": scale}
    first = session.run(None, feeds)[0]
    rows = slice(0, 256, 17)  # the reference is a Python loop: every 17th row is compared with it
    expected = moe(hidden_states[:, rows], logits[:, rows], scale, gate_up, down, top_k=TOP_K)
    # float32 sums of 2816 products of unit size: rounding errors of some sqrt(2816) ulp, through a gated product.
    assert np.abs(first[:, rows] - expected).max() < 2e-5 * np.abs(expected).max()
    for _ in range(30):
        # The order of every sum is fixed, so not a bit may differ from run to run.
        assert np.array_equal(session.run(None, feeds)[0], first)


@pytest.mark.parametrize("num_rows", [1, 2, 33])
def test_ties_take_the_lower_expert_as_the_contract_says(num_rows: int) -> None:
    hidden_states, logits, scale, gate_up, down = draw(num_rows, 32, 24, 16)
    tied = np.round(logits)  # a handful of values for 24 experts: the top 8 always end in a tie
    ranked = -np.sort(-tied, axis=-1)
    assert (ranked[..., TOP_K - 1] == ranked[..., TOP_K]).any()
    expected = moe(hidden_states, tied, scale, gate_up, down, top_k=TOP_K)
    found = lowered(gate_up, down).run(
        None, {"hidden_states": hidden_states, "router_logits": tied, "per_expert_scale": scale}
    )[0]
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_an_expert_is_two_products_and_no_other_node() -> None:
    # A decode step of 26B-A4B walks 30 layers of 128 experts: every node of an expert is 3,840 nodes a step.
    def num_nodes(num_experts: int) -> int:
        return len(lowered_model(*draw(1, 32, num_experts, 16)[3:]).graph)

    assert num_nodes(24) - num_nodes(16) == 2 * 8
