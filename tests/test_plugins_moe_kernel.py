"""The CUDA kernel of Gemma4MoE without a GPU: it compiles, it refuses in words, and its case files are right."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma4_export.plugins.moe import kernel_cases, torch_op  # noqa: F401  (registers torch.ops.gemma4.moe)
from gemma4_export.plugins.moe.kernel_cases import EXTRA, MUTANTS, TABLE, TYPES, Case, cases, file_name, write_case

FOLDER = Path(kernel_cases.__file__).parent
Array = np.ndarray[Any, Any]
SEVEN_TOKENS = next(case for case in TABLE if case.name == "k8-seven-tokens")


def _read(path: Path) -> tuple[Array, dict[str, Array]]:
    """A second reader of the case format, written from its description: header and arrays, weights as float64."""
    data = path.read_bytes()
    header = np.frombuffer(data[:128], "<i8")
    T, E, X, F, _, real, router, weights, block = (int(n) for n in header[1:10])
    offset = 128

    def take(dtype: str, *shape: int) -> Array:
        nonlocal offset
        count = int(np.prod(shape))
        array = np.frombuffer(data, dtype, count, offset).reshape(shape)
        offset += array.nbytes
        return array

    def floats(kind: int, *shape: int) -> Array:
        if kind == 2:
            return (take("<u2", *shape).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return take("<f2" if kind == 1 else "<f4", *shape).astype(np.float64)

    def matrices(rows: int, k: int) -> Array:
        if weights == 0:
            return floats(real, X, rows, k)
        if weights == 1:
            codes = take("i1", X, rows, k)
            return codes * take("<f4", X, rows, 1).astype(np.float64)
        pairs = take("u1", X, rows, k // 2)
        codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(X, rows, k).astype(np.int64)
        codes = np.where(codes > 7, codes - 16, codes)
        scales = floats(int(header[11]), X, rows, k // block)
        return (codes.reshape(X, rows, k // block, block) * scales[..., None]).reshape(X, rows, k)

    arrays = {
        "hidden_states": floats(real, T, E),
        "router_logits": floats(router, T, X),
        "per_expert_scale": floats(router, X),
        "gate_up_proj": matrices(2 * F, E),
        "down_proj": matrices(E, F),
        "expected": take("<f8", T, E),
        "bound": take("<f8", T, E),
    }
    assert offset == len(data)
    return header, arrays


def _torch_output(header: Array, arrays: dict[str, Array]) -> Array:
    """The torch op in fp32, which is how far from the reference a right kernel may be and still be right."""
    tensors = [torch.from_numpy(np.nan_to_num(array)).float() for array in list(arrays.values())[:5]]
    tensors[0], tensors[1] = tensors[0][None], tensors[1][None]
    output: Array = torch.ops.gemma4.moe(*tensors, int(header[5])).double().numpy()[0]
    return output


CHECKED = [
    *(replace(SEVEN_TOKENS, **types) for types in TYPES),
    *(replace(case, **TYPES[2]) for case in TABLE if case.num_tokens < 100),
    *EXTRA[:2],
]


@pytest.mark.parametrize("case", CHECKED, ids=file_name)
def test_case_files_hold_what_the_torch_op_computes(case: Case, tmp_path: Path) -> None:
    header, arrays = _read(write_case(case, tmp_path))
    assert header[0] == kernel_cases.MAGIC
    assert header[10] == 0
    wanted = arrays["bound"] >= 0
    assert (np.isnan(arrays["expected"]) == ~wanted).all()
    assert (np.abs(_torch_output(header, arrays) - arrays["expected"])[wanted] <= arrays["bound"][wanted]).all()
    if wanted.any():  # a bound that lets zeros pass would prove nothing
        assert (np.abs(arrays["expected"][wanted]) > arrays["bound"][wanted]).mean() > 0.8


@pytest.mark.parametrize("types", TYPES, ids=lambda types: f"{types['real']}-{types['weights']}")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_no_right_kernel_agrees_with_a_mutants_file(mutant: str, types: dict[str, Any], tmp_path: Path) -> None:
    header, arrays = _read(write_case(replace(SEVEN_TOKENS, **types), tmp_path, mutant))
    assert header[10] == 1
    assert (np.abs(_torch_output(header, arrays) - arrays["expected"]) > 2 * arrays["bound"]).mean() > 0.5


def test_the_table_covers_what_it_must() -> None:
    table = list(cases())
    assert len({file_name(case) for case in table}) == len(table)
    for weights in ("float", "int8", "int4"):
        chosen = [case for case in table if case.weights == weights]
        assert {case.top_k for case in chosen} >= {1, 8}
        assert {case.num_tokens for case in chosen} >= {0, 1, 7, 300}
        assert {case.router for case in chosen} >= {"all experts", "one expert", "ties", "nan"}
        assert {case.real for case in chosen} == {"bfloat16", "float16"}


def _toolkit() -> tuple[Path, list[str]] | None:
    """nvcc and its library folder: on PATH, or from the ``kernels`` extra."""
    on_path = shutil.which("nvcc")
    if on_path is not None:
        nvcc = Path(on_path).resolve()
        return nvcc, [f"-L{nvcc.parent.parent / 'lib'}"]
    spec = importlib.util.find_spec("nvidia")
    for place in [] if spec is None else spec.submodule_search_locations or []:
        for nvcc in sorted(Path(place).glob("cu1*/bin/nvcc")):
            return nvcc, [f"-L{nvcc.parent.parent / 'lib'}"]
    return None


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, compiled for one architecture with warnings as errors."""
    toolkit = _toolkit()
    if toolkit is None:
        pytest.skip("no nvcc: install the kernels extra (cuda-toolkit[nvcc,crt,nvvm,cccl]==13.0.*)")
    nvcc, libraries = toolkit
    program = tmp_path_factory.mktemp("moe") / "moe_driver"
    architecture = "-gencode=arch=compute_90,code=sm_90"
    sources = [str(FOLDER / "kernel_driver.cu"), str(FOLDER / "kernel_cuda.cu")]
    # What the optimiser makes of it is checked on a GPU; without it this takes 5 seconds.
    quick = ["-O0", "-Xcicc=-O1", "-Xptxas=-O0"]
    strict = ["-std=c++17", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    options = [*quick, *strict, architecture]
    done = subprocess.run(
        [str(nvcc), *options, *sources, *libraries, "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return program


def test_the_kernel_compiles_and_refuses_in_words(driver: Path) -> None:
    done = subprocess.run([str(driver), "limits"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "limits: 0 wrong of 15\n")


@pytest.mark.gpu
def test_the_kernel_equals_the_reference_on_this_gpu(driver: Path, tmp_path: Path) -> None:
    if not Path("/dev/nvidiactl").exists() and os.name == "posix":
        pytest.skip("no NVIDIA GPU here")
    kernel_cases.main(tmp_path)
    files = sorted(map(str, tmp_path.glob("*.case")))
    done = subprocess.run([str(driver), "check", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
