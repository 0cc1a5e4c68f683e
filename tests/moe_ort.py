"""Case files of the MoE kernel through onnxruntime: our library's custom op in a graph with one node.

python tests/moe_ort.py LIBRARY CUDAExecutionProvider FOLDER    # exit code 1 if a case file of the folder is off
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

Array = npt.NDArray[Any]
DOMAIN = "gemma4"
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)  # as kernel.h numbers them
_CODES = {1: TensorProto.INT8, 2: TensorProto.INT4}
_BYTES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2, TensorProto.INT8: 1}


@dataclass(frozen=True, slots=True)
class OrtCase:
    """A graph without inputs whose output ``y`` is float32 [1, T, E], and what the reference makes of it."""

    model: onnx.ModelProto
    expected: Array
    bound: Array
    is_mutant: bool


def read_case(path: Path) -> OrtCase:
    """The case file as a graph; its bytes are the initialisers' bytes."""
    data = path.read_bytes()
    header = [int(n) for n in np.frombuffer(data[:128], "<i8")]
    T, E, X, F, top_k, real, router, weights, block = header[1:10]
    stored = _CODES.get(weights, _FLOATS[real])
    tensors = [
        ("hidden_states", _FLOATS[real], (1, T, E)),
        ("router_logits", _FLOATS[router], (1, T, X)),
        ("per_expert_scale", _FLOATS[router], (X,)),
    ]
    scale_type = _FLOATS[header[11]] if block else TensorProto.FLOAT
    for name, rows, k in (("gate_up", 2 * F, E), ("down", E, F)):
        tensors.append((f"{name}_proj", stored, (X, rows, k)))
        if weights:
            tensors.append((f"{name}_scales", scale_type, (X, rows, k // block if block else 1)))
    offset, initializers = 128, []
    for name, onnx_type, shape in tensors:
        count = int(np.prod(shape))
        size = count // 2 if onnx_type == TensorProto.INT4 else count * _BYTES[onnx_type]
        raw = data[offset : offset + size]
        initializers.append(helper.make_tensor(name, onnx_type, shape, raw, raw=True))
        offset += size
    expected, bound = np.frombuffer(data, "<f8", offset=offset).reshape(2, T, E)
    model = one_node(initializers, top_k=top_k, block=block)
    return OrtCase(model, expected, bound, is_mutant=bool(header[10]))


def one_node(initializers: list[onnx.TensorProto], *, top_k: int, block: int) -> onnx.ModelProto:
    """Gemma4MoE over the initialisers in their order, then a cast to float32."""
    names = [tensor.name for tensor in initializers]
    nodes = [
        helper.make_node("Gemma4MoE", names, ["moe"], name="experts", domain=DOMAIN, top_k=top_k, block=block),
        helper.make_node("Cast", ["moe"], ["y"], to=TensorProto.FLOAT),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "moe", [], [output], initializers)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def session(model: onnx.ModelProto, library: Path, provider: str = "CPUExecutionProvider") -> ort.InferenceSession:
    """A session in which the node is really run: nothing is folded while the graph is prepared."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors reach us as exceptions
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # on this provider or not at all
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=[provider])


def agrees(case: OrtCase, found: Array, bound: Array) -> bool:
    """Every element within its bound; NaN exactly where the bound is below zero."""
    wanted = bound >= 0
    if not (np.isnan(found) == ~wanted).all():
        return False
    return bool((np.abs(found - case.expected)[wanted] <= bound[wanted]).all())


def main(library: str, provider: str, folder: str) -> int:
    """Run every case file of the folder with one provider; the number of those that are off."""
    paths = sorted(Path(folder).glob("*.case"))
    wrong = mutants = 0
    for path in paths:
        case = read_case(path)
        running = session(case.model, Path(library), provider)
        if running.get_providers()[0] != provider:
            sys.exit(f"error: onnxruntime {ort.__version__} runs {running.get_providers()} here, not {provider}")
        found = running.run(None, {})[0][0]
        mutants += case.is_mutant
        if agrees(case, found, case.bound) == case.is_mutant:
            print("FAIL", path)
            wrong += 1
    print(f"onnxruntime {ort.__version__} {provider}: {wrong} wrong of {len(paths)} case files ({mutants} mutants)")
    return wrong


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) != 0)
