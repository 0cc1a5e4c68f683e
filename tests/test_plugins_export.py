"""All semantic ops survive torch.export on fake weights and torch.onnx.export, with names, options and attributes."""

from __future__ import annotations

import warnings
from typing import Any

import onnx.defs
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gemma4_export.plugins.attention.contract import ATTENTION, SHARED_ATTENTION
from gemma4_export.plugins.common.contract import OpContract, TensorSpec
from gemma4_export.plugins.common.torch_ops import translation_table
from gemma4_export.plugins.linear.contract import LINEAR
from gemma4_export.plugins.moe.contract import MOE

ops = torch.ops.gemma4
CONTRACTS = (LINEAR, ATTENTION, SHARED_ATTENTION, MOE)


class EveryOp(torch.nn.Module):
    """A sliding, a global and a shared attention, then a MoE, as a decoder would chain them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Parameter(torch.empty(32, 16))
        self.k_proj = torch.nn.Parameter(torch.empty(16, 16))
        self.router = torch.nn.Parameter(torch.empty(8, 32))
        self.per_expert_scale = torch.nn.Parameter(torch.empty(8))
        self.gate_up_proj = torch.nn.Parameter(torch.empty(8, 48, 32))
        self.down_proj = torch.nn.Parameter(torch.empty(8, 32, 24))

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        write_index: torch.Tensor,
        sliding_start: torch.Tensor,
        sliding_end: torch.Tensor,
        output_rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        B, T, _ = hidden_states.shape
        query = ops.linear(hidden_states, self.q_proj).reshape(B, T, 4, 8)
        key = ops.linear(hidden_states, self.k_proj).reshape(B, T, 2, 8)
        sliding, key_cache, value_cache = ops.attention(
            query, key, key, key_cache, value_cache, write_index, sliding_start, sliding_end, 1.0
        )
        full, key_cache, value_cache = ops.attention(
            sliding, key, key, key_cache, value_cache, write_index, None, sliding_end, 0.5
        )
        rows = full.reshape(B * T, 4, 8).index_select(0, output_rows)[None]
        ends = sliding_end.reshape(B * T).index_select(0, output_rows)[None]
        shared = ops.shared_attention(rows, key_cache, value_cache, None, ends, 1.0).flatten(2)
        logits = ops.linear(shared, self.router)
        output = ops.moe(shared, logits, self.per_expert_scale, self.gate_up_proj, self.down_proj, 3)
        return output, key_cache, value_cache


@pytest.fixture(scope="module")
def model() -> Any:
    """The exported onnx_ir.Model; the weights never exist."""
    Dim = torch.export.Dim
    T, C, R = Dim("T", min=1), Dim("C", min=1), Dim("R", min=1)
    with FakeTensorMode():
        inputs = (
            torch.empty(1, 3, 16),
            torch.empty(1, 2, 20, 8),
            torch.empty(1, 2, 20, 8),
            torch.empty(1, dtype=torch.int64),
            torch.empty(1, 3, dtype=torch.int32),
            torch.empty(1, 3, dtype=torch.int32),
            torch.empty(2, dtype=torch.int64),
        )
        shapes = ({1: T}, {2: C}, {2: C}, None, {1: T}, {1: T}, {0: R})
        program = torch.export.export(EveryOp(), inputs, strict=False, dynamic_shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx warns about its own deprecated calls
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=24,
            custom_translation_table=translation_table(),
            verbose=False,
        )
    assert exported is not None
    return exported.model


def _nodes(model: Any, name: str) -> list[Any]:
    return [node for node in model.graph if (node.domain, node.op_type) == ("gemma4", name)]


def test_every_op_arrives_as_one_node_of_the_domain(model: Any) -> None:
    counts = {contract.name: len(_nodes(model, contract.name)) for contract in CONTRACTS}
    assert counts == {"Gemma4Linear": 3, "Gemma4Attention": 2, "Gemma4SharedAttention": 1, "Gemma4MoE": 1}
    assert model.opset_imports["gemma4"] == 1
    assert model.opset_imports[""] == 24


def test_nodes_have_the_inputs_and_outputs_of_their_contract(model: Any) -> None:
    for contract in CONTRACTS:
        for node in _nodes(model, contract.name):
            assert len(node.inputs) == len(contract.inputs)
            assert len(node.outputs) == len(contract.outputs)
            for value, (name, line) in zip(node.inputs, contract.inputs.items(), strict=True):
                assert (value is not None) or TensorSpec.parse(line).is_optional, f"{contract.name} {name}"


def test_attributes_arrive(model: Any) -> None:
    sliding, full = _nodes(model, "Gemma4Attention")
    (shared,) = _nodes(model, "Gemma4SharedAttention")
    (moe,) = _nodes(model, "Gemma4MoE")
    assert {name: a.value for name, a in sliding.attributes.items()} == {"scale": 1.0}
    assert {name: a.value for name, a in full.attributes.items()} == {"scale": 0.5}
    assert {name: a.value for name, a in shared.attributes.items()} == {"scale": 1.0}
    assert {name: a.value for name, a in moe.attributes.items()} == {"top_k": 3}


def test_an_absent_start_is_an_absent_input(model: Any) -> None:
    sliding, full = _nodes(model, "Gemma4Attention")
    (shared,) = _nodes(model, "Gemma4SharedAttention")
    start = list(ATTENTION.inputs).index("visible_start")
    assert sliding.inputs[start].name == "sliding_start"
    assert full.inputs[start] is None
    assert full.inputs[start + 1].name == "sliding_end"
    assert shared.inputs[list(SHARED_ATTENTION.inputs).index("visible_start")] is None


def test_sizes_stay_dynamic(model: Any) -> None:
    output, present_key, _ = model.graph.outputs
    assert [str(size).isdigit() for size in output.shape] == [True, False, True]  # [1, R, 32]
    assert [str(size).isdigit() for size in present_key.shape] == [True, True, False, True]  # [1, 2, C, 8]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_the_registered_schema_is_the_contract(contract: OpContract) -> None:
    translation_table()
    schema = onnx.defs.get_schema(contract.name, contract.version, contract.domain)
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    assert [(i.name, i.option == optional) for i in schema.inputs] == [
        (name, TensorSpec.parse(line).is_optional) for name, line in contract.inputs.items()
    ]
    assert [o.name for o in schema.outputs] == list(contract.outputs)
    assert {name: a.required for name, a in schema.attributes.items()} == dict.fromkeys(contract.attributes, True)


def test_onnx_checker_accepts_nodes_and_refuses_a_missing_attribute() -> None:
    translation_table()
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 12, {"": 24, "gemma4": 1}
    names = ["q", "keys", "values", "", "end"]
    good = onnx.helper.make_node("Gemma4SharedAttention", names, ["o"], domain="gemma4", scale=1.0)
    onnx.checker.check_node(good, context)
    bad = onnx.helper.make_node("Gemma4SharedAttention", names, ["o"], domain="gemma4")
    with pytest.raises(onnx.checker.ValidationError, match="scale"):
        onnx.checker.check_node(bad, context)
