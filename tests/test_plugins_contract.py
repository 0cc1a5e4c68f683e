"""The contract notation: what binds, what is refused, and in which words."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma4_export.configs.errors import ContractError
from gemma4_export.plugins.attention.contract import ATTENTION, SHARED_ATTENTION
from gemma4_export.plugins.common.contract import OpContract, TensorSpec
from gemma4_export.plugins.linear.contract import LINEAR
from gemma4_export.plugins.moe.contract import MOE

CONTRACTS = (LINEAR, ATTENTION, SHARED_ATTENTION, MOE)

TOY = OpContract(
    domain="gemma4",
    name="Toy",
    version=1,
    inputs={"rows": "real ... 2F", "weight": "real F N", "start": "int32? N", "end": "int64 N"},
    outputs={"output": "real ... N"},
    types={"real": ("float32", "bfloat16")},
    attributes={"scale": float, "count": int},
    limits=("N % 2 == 0", "start + count <= end"),
    source="made up",
)


def toy_arrays(**changes: np.ndarray | None) -> dict[str, np.ndarray | None]:
    arrays: dict[str, np.ndarray | None] = {
        "rows": np.zeros((5, 3, 8), np.float32),
        "weight": np.zeros((4, 2), np.float32),
        "start": np.array([0, 1], np.int32),
        "end": np.array([7, 8], np.int64),
    }
    return {**arrays, **changes}


ATTRIBUTES = {"scale": 1.0, "count": 7}


def test_letters_bind_sizes() -> None:
    assert TOY.check(toy_arrays(), ATTRIBUTES) == {"F": 4, "N": 2}
    assert TOY.check(toy_arrays(output=np.zeros((5, 3, 2), np.float32)), ATTRIBUTES) == {"F": 4, "N": 2}


def test_an_absent_optional_input_counts_as_zero_in_limits() -> None:
    TOY.check(toy_arrays(start=None), ATTRIBUTES)
    with pytest.raises(ContractError, match="start = 0, count = 8, end\\[0\\] = 7"):
        TOY.check(toy_arrays(start=None), {**ATTRIBUTES, "count": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, "gemma4::Toy weight: expected real [F, N], found nothing"),
        ({"wieght": np.zeros(3)}, "gemma4::Toy has no tensor wieght\nhint: did you mean 'weight'?"),
        ({"weight": np.zeros((4, 2))}, "gemma4::Toy weight: expected float32 or bfloat16, found float64"),
        ({"end": np.zeros(2, np.int32)}, "gemma4::Toy end: expected int64, found int32"),
        (
            {"weight": np.zeros((4, 2, 1), np.float32)},
            "gemma4::Toy weight: expected 2 axes [F, N], found shape (4, 2, 1)",
        ),
        ({"weight": np.zeros((3, 2), np.float32)}, "gemma4::Toy weight [F, N]: expected F = 4, found 3"),
        (
            {"rows": np.zeros((5, 7), np.float32)},
            "gemma4::Toy rows [..., 2F]: expected 2F to be a multiple of 2, found 7",
        ),
        ({"rows": np.zeros((), np.float32)}, "gemma4::Toy rows: expected 1 axes [..., 2F], found shape ()"),
        (
            {"output": np.zeros((5, 4, 2), np.float32)},
            "gemma4::Toy output [..., N]: expected leading axes (5, 3), found (5, 4)",
        ),
        (
            {"weight": np.zeros((4, 3), np.float32), "start": None, "end": np.full(3, 9, np.int64)},
            "gemma4::Toy: N % 2 == 0 does not hold for N = 3",
        ),
        (
            {"end": np.array([7, 5], np.int64)},
            "gemma4::Toy: start + count <= end does not hold for start[1] = 1, count = 7, end[1] = 5",
        ),
    ],
)
def test_a_broken_promise_is_named_with_its_numbers(changes: dict[str, np.ndarray | None], message: str) -> None:
    with pytest.raises(ContractError) as error:
        TOY.check(toy_arrays(**changes), ATTRIBUTES)
    assert str(error.value) == message


def test_a_type_variable_stands_for_one_dtype() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 arrays come from the export extra")
    with pytest.raises(ContractError, match="weight: expected float32 like the other real tensors, found bfloat16"):
        TOY.check(toy_arrays(weight=np.zeros((4, 2), ml_dtypes.bfloat16)), ATTRIBUTES)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"scale": 1.0}, "gemma4::Toy count: expected an attribute of type int, found nothing"),
        ({"scale": 1, "count": 7}, "gemma4::Toy scale: expected an attribute of type float, found int 1"),
        ({**ATTRIBUTES, "cuont": 7}, "gemma4::Toy has no attribute cuont\nhint: did you mean 'count'?"),
    ],
)
def test_attributes_have_no_defaults_and_no_casts(attributes: dict[str, float], message: str) -> None:
    with pytest.raises(ContractError) as error:
        TOY.check(toy_arrays(), attributes)
    assert str(error.value) == message


@given(data=st.data())
def test_changing_any_one_size_is_noticed(data: st.DataObject) -> None:
    """Every axis of every contract is bound twice or free; a bound one cannot change alone."""
    contract = data.draw(st.sampled_from(CONTRACTS))
    specs = {name: TensorSpec.parse(line) for name, line in {**contract.inputs, **contract.outputs}.items()}
    letters = sorted({axis for spec in specs.values() for axis in spec.axes if axis.isalpha()})
    sizes = dict.fromkeys(letters, 2) | {"C": 4}
    shapes = {
        name: [2 * sizes["F"] if axis == "2F" else sizes.get(axis, 3) for axis in spec.axes]
        for name, spec in specs.items()
    }
    name = data.draw(st.sampled_from([name for name in specs if name in contract.outputs]))
    axis = data.draw(st.integers(0, len(shapes[name]) - 1))

    def arrays() -> dict[str, np.ndarray]:
        made = {}
        for tensor, spec in specs.items():
            dtype = "float32" if spec.dtype in contract.types else spec.dtype
            made[tensor] = np.ones(shapes[tensor], dtype)
        if "visible_start" in made:
            made["visible_start"][:] = 0
        return made

    attributes = (
        {"scale": 1.0} if "scale" in contract.attributes else {"top_k": 1} if "top_k" in contract.attributes else {}
    )
    contract.check(arrays(), attributes)
    shapes[name][axis] += 1
    with pytest.raises(ContractError, match=name):
        contract.check(arrays(), attributes)


def test_only_torch_op_modules_import_more_than_numpy() -> None:
    plugins = Path(__file__).parents[1] / "plugins"
    allowed = {*sys.stdlib_module_names, "numpy", "gemma4_export"}
    for path in plugins.rglob("*.py"):
        if path.stem.endswith(("torch_op", "torch_ops")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] in allowed, f"{path.name} imports {name}"
                assert not name.startswith(("gemma4_export.exporter", "gemma4_export.runtime")), f"{path.name}: {name}"


def test_contracts_and_references_load_without_torch() -> None:
    program = (
        "import sys\n"
        "from gemma4_export.plugins.attention import reference\n"
        "from gemma4_export.plugins.linear import reference\n"
        "from gemma4_export.plugins.moe import reference\n"
        "found = {'torch', 'onnx', 'onnx_ir', 'onnxscript'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
