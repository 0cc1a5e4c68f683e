"""The onnxruntime shell of Gemma4MoE: loads without a GPU, on the CPU equals the reference, refuses in words."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from moe_ort import OrtCase, agrees, one_node, read_case, session
from onnx import TensorProto, helper
from test_engine_build import HAS_WHEEL

from gemma4_export.plugins import compile as compiler
from gemma4_export.plugins.moe.kernel_cases import EXTRA, MUTANTS, TABLE, TYPES, file_name, write_case

pytestmark = pytest.mark.skipif(not HAS_WHEEL, reason="nvcc: wheels for Linux on x86-64 only")

# Half the distance to the next number of the output's type; the sums of the CPU kernel are in double.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
CASES = [
    *(replace(case, **types) for types in TYPES for case in TABLE if case.num_tokens < 10),
    *(replace(case, **TYPES[2]) for case in TABLE if case.name == "k3-ties"),
    *EXTRA[:2],
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plugins") / "libgemma4_plugins.so"
    compiler.compile_library(out, architectures=("sm_89",), options=("-O0", "-Xcicc=-O1", "-Xptxas=-O0"))
    return out


def rounding(case: OrtCase, real: str) -> np.ndarray[Any, Any]:
    """What one rounding of the output costs, per element; below 2^-14 numbers of fp16 are 2^-24 apart."""
    return np.where(case.bound < 0, -1.0, ROUNDOFF[real] * np.abs(case.expected) + 2.0**-25)


@pytest.mark.parametrize("case", CASES, ids=file_name)
def test_the_op_on_the_cpu_provider_equals_the_reference(case: Any, library: Path, tmp_path: Path) -> None:
    built = read_case(write_case(case, tmp_path))
    found = session(built.model, library).run(None, {})[0]
    assert found.shape == (1, case.num_tokens, case.hidden_size)
    # The bound is 1.01 roundings: NumPy's sums in double come in another order.
    assert agrees(built, found[0], 1.01 * rounding(built, case.real))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_op_does_not_agree_with_mutants(mutant: str, library: Path, tmp_path: Path) -> None:
    case = replace(next(case for case in TABLE if case.name == "k8-seven-tokens"), **TYPES[2])
    built = read_case(write_case(case, tmp_path, mutant))
    assert built.is_mutant
    assert not agrees(built, session(built.model, library).run(None, {})[0][0], built.bound)


def float32_inputs(**changes: tuple[int, ...]) -> list[onnx.TensorProto]:
    """T 2, E 64, X 4, F 32 in fp32, which only the CPU kernel takes."""
    shapes: dict[str, tuple[int, ...]] = {
        "hidden_states": (1, 2, 64),
        "router_logits": (1, 2, 4),
        "per_expert_scale": (4,),
        "gate_up_proj": (4, 64, 64),
        "down_proj": (4, 64, 32),
    }
    generator = np.random.default_rng(0)
    return [
        helper.make_tensor(
            name, TensorProto.FLOAT, shape, generator.standard_normal(shape).astype("<f4").tobytes(), True
        )
        for name, shape in (shapes | changes).items()
    ]


def test_shapes_are_inferred_from_hidden_states(library: Path) -> None:
    model = one_node(float32_inputs(), top_k=2, block=0)
    del model.graph.node[1]  # the cast; what is left has the op's own type and shape
    model.graph.node[0].output[0] = "y"
    del model.graph.initializer[0]
    hidden = helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, ("batch", "tokens", 64))
    model.graph.input.append(hidden)
    running = session(model, library)
    (output,) = running.get_outputs()
    assert (output.type, output.shape) == ("tensor(float)", ["batch", "tokens", 64])


@pytest.mark.parametrize(
    ("changes", "top_k", "message"),
    [
        ({}, 5, r"gemma4::Gemma4MoE top_k: expected 1\.\.min\(X, 32\), found 5"),
        ({}, 0, r"gemma4::Gemma4MoE top_k: expected 1\.\.min\(X, 32\), found 0"),
        ({"down_proj": (4, 64, 31)}, 2, "types or shapes of its inputs are not those of plugins/moe/README.md"),
        ({"router_logits": (1, 2, 3)}, 2, "types or shapes of its inputs are not those of plugins/moe/README.md"),
        (
            {"gate_up_proj": (4, 80, 64), "down_proj": (4, 64, 40)},
            2,
            "gemma4::Gemma4MoE F: expected a multiple of 32 up to 65536, found 40",
        ),
    ],
)
def test_the_op_refuses_in_words(changes: dict[str, tuple[int, ...]], top_k: int, message: str, library: Path) -> None:
    running = session(one_node(float32_inputs(**changes), top_k=top_k, block=0), library)
    with pytest.raises(Exception, match=message):
        running.run(None, {})


def test_the_cuda_kernel_says_that_there_is_no_gpu(library: Path, tmp_path: Path) -> None:
    """onnxruntime for CPUs never asks the CUDA kernel for anything, so this stands in for one that does."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("a GPU is here")
    messages: list[bytes] = []
    ops: list[int] = []
    keep = (
        ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda _, text: messages.append(text) or 1),
        ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(lambda name, out: None),
        ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(lambda _, op: ops.append(op)),
        ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(lambda options, domain: None),
    )
    table = (ctypes.c_void_p * 300)()
    for place, function in zip((0, 26, 27, 28), keep, strict=True):
        table[place] = ctypes.cast(function, ctypes.c_void_p).value
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda version: ctypes.addressof(table))
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p).value)
    # A copy, because a library remembers the first table that it is given.
    loaded = ctypes.CDLL(shutil.copy(library, tmp_path / "copy.so"))
    assert loaded.RegisterCustomOps(None, ctypes.byref(base)) == 0
    cuda_op, cpu_op = ((ctypes.c_void_p * 18).from_address(op) for op in ops)
    provider = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
    assert provider(cuda_op[3])(ops[0]) == b"CUDAExecutionProvider"
    assert provider(cpu_op[3])(ops[1]) == b"CPUExecutionProvider"
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, *[ctypes.c_void_p] * 4)(cuda_op[17])
    kernel = ctypes.c_void_p()
    assert create(ops[0], ctypes.addressof(table), None, ctypes.addressof(kernel)) == 1
    assert len(messages) == 1
    assert messages[0].startswith(b"Gemma4MoE on CUDAExecutionProvider: ")
    assert b"CUDA driver version is insufficient" in messages[0] or b"no CUDA-capable device" in messages[0]
    assert kernel.value is None


def test_without_the_library_onnxruntime_names_the_op() -> None:
    model = one_node(float32_inputs(), top_k=2, block=0)
    with pytest.raises(Exception, match=r"gemma4:Gemma4MoE"):
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
