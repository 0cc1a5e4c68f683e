"""Small ONNX graphs for the engine builder: one linear layer with GELU in each weight format, and graphs it refuses."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gemma4_export.plugins import compile as compiler

K, N = 1024, 8192  # 8.4 M weights: 4.2 MB as int4, so that what else an engine holds is noise
BLOCK = 32
TYPES = {"float16": (TensorProto.FLOAT16, np.float16), "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16)}
T_RANGE = {"prefill": ((1, K), (16, K), (64, K)), "decode": ((1, K), (1, K), (1, K))}
"""Profiles of input ``x``."""


_scratch = tempfile.TemporaryDirectory(prefix="gemma4-plugins-")


@functools.cache
def quick_plugins() -> Path:
    """Our library, for one architecture and hardly optimised: 4 seconds; `make plugins` compiles the real one."""
    out = Path(_scratch.name) / "libgemma4_plugins.so"
    quick = ("-O0", "-Xcicc=-O1", "-Xptxas=-O0")
    compiler.compile_library(out, architectures=("sm_89",), options=quick)
    return out


@dataclass(frozen=True, slots=True)
class Linear:
    """A graph ``y = gelu_tanh(x @ w)`` with x [T, K], and the bytes that its weights are packed into."""

    graph: Path
    data: Path
    packed_bytes: int


def linear(folder: Path, *, weights: str, real: str = "float16") -> Linear:
    """Write the graph with ``weights`` "float", "int4" (blocks along K), "int8" (one scale a column) or "fp8"."""
    onnx_type, dtype = TYPES[real]
    generator = np.random.default_rng(0)
    nodes, initializers = _weights(generator, weights, onnx_type, dtype)
    nodes += [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="linear"),
        helper.make_node("Gelu", ["product"], ["y"], name="activation", approximate="tanh"),
    ]
    inputs = [helper.make_tensor_value_info("x", onnx_type, ["T", K])]
    outputs = [helper.make_tensor_value_info("y", onnx_type, ["T", N])]
    packed = sum(len(tensor.raw_data) for tensor in initializers)
    path = folder / f"{weights}-{real}.onnx"
    path.with_suffix(".bin").unlink(missing_ok=True)  # onnx appends to what is there
    save(path, nodes, inputs, outputs, initializers, data=f"{path.stem}.bin")
    return Linear(path, path.with_suffix(".bin"), packed)


def _weights(
    generator: np.random.Generator, weights: str, onnx_type: int, dtype: type
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    def tensor(name: str, kind: int, values: np.ndarray) -> onnx.TensorProto:
        return helper.make_tensor(name, kind, values.shape, np.ascontiguousarray(values).tobytes(), raw=True)

    if weights == "float":
        values = (generator.standard_normal((K, N)) / 32).astype(dtype)
        return [], [tensor("w", onnx_type, values)]
    if weights == "int4":
        raw = generator.integers(0, 256, K * N // 2, dtype=np.uint8).tobytes()
        codes = helper.make_tensor("codes", TensorProto.INT4, [K, N], raw, raw=True)
        scales = tensor("scales", onnx_type, generator.uniform(0.004, 0.008, (K // BLOCK, N)).astype(dtype))
        attributes = {"axis": 0, "block_size": BLOCK}
    elif weights == "int8":
        codes = tensor("codes", TensorProto.INT8, generator.integers(-127, 128, (K, N), dtype=np.int8))
        scales = tensor("scales", onnx_type, generator.uniform(0.0002, 0.0004, N).astype(dtype))
        attributes = {"axis": 1}
    else:
        values = generator.standard_normal((K, N)).astype(ml_dtypes.float8_e4m3fn)
        codes = tensor("codes", TensorProto.FLOAT8E4M3FN, values)
        scales = tensor("scales", onnx_type, np.array(0.03, dtype))
        attributes = {}
    node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], name="dequantize", **attributes)
    return [node], [codes, scales]


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    *,
    data: str | None = None,
) -> Path:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("gemma4", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    external = {} if data is None else {"save_as_external_data": True, "location": data, "size_threshold": 64}
    onnx.save(model, path, **external)
    return path


def circular_scatter(folder: Path) -> Path:
    """TensorRT's TensorScatter knows linear writes only."""
    sizes = {"cache": [1, 1, 8, 64], "update": [1, 1, 2, 64]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, size) for name, size in sizes.items()]
    inputs.append(helper.make_tensor_value_info("index", TensorProto.INT64, [1]))
    outputs = [helper.make_tensor_value_info("present", TensorProto.FLOAT16, sizes["cache"])]
    node = helper.make_node(
        "TensorScatter", ["cache", "update", "index"], ["present"], name="layers.0.write", mode="circular"
    )
    return save(folder / "circular.onnx", [node], inputs, outputs)


def mixed_types(folder: Path) -> Path:
    """A product of float16 and float32: a strongly typed network casts nothing by itself."""
    weights = numpy_helper.from_array(np.zeros((64, 64), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="layers.0.linear")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])]
    return save(folder / "mixed.onnx", [node], inputs, outputs, [weights])


def moe(folder: Path, *, weights: str = "int4", num_experts: int = 16, wrong_scales: bool = False) -> Linear:
    """One Gemma4MoE node between two ordinary ones: bf16 rows, float32 router, ``weights`` int4, int8 or float."""
    E, F, X, real = 256, 768, num_experts, TensorProto.BFLOAT16
    generator = np.random.default_rng(0)
    initializers = [numpy_helper.from_array(generator.uniform(0.5, 2, X).astype(np.float32), "per_expert_scale")]
    names = ["rows", "router_logits", "per_expert_scale"]
    for name, (rows, k) in {"gate_up": (2 * F, E), "down": (E, F)}.items():
        kind = {"int4": TensorProto.INT4, "int8": TensorProto.INT8, "float": real}[weights]
        num_bytes = X * rows * k * {"int4": 1, "int8": 2, "float": 4}[weights] // 2
        raw = generator.integers(0, 63, num_bytes, dtype=np.uint8).tobytes()
        initializers.append(helper.make_tensor(name, kind, [X, rows, k], raw, raw=True))
        names.append(name)
        if weights != "float":
            shape = [X, rows, k // BLOCK + wrong_scales] if weights == "int4" else [X, rows, 1]
            dtype = ml_dtypes.bfloat16 if weights == "int4" else np.float32
            values = generator.uniform(0.01, 0.02, shape).astype(dtype)
            scale_type = real if weights == "int4" else TensorProto.FLOAT
            initializers.append(helper.make_tensor(f"{name}_scales", scale_type, shape, values.tobytes(), raw=True))
            names.append(f"{name}_scales")
    block = BLOCK if weights == "int4" else 0
    nodes = [
        helper.make_node("Gelu", ["x"], ["rows"], name="before", approximate="tanh"),
        helper.make_node("Gemma4MoE", names, ["mixed"], name="experts", domain="gemma4", top_k=8, block=block),
        helper.make_node("Add", ["mixed", "x"], ["y"], name="after"),
    ]
    inputs = [helper.make_tensor_value_info("x", real, [1, "T", E])]
    inputs.append(helper.make_tensor_value_info("router_logits", TensorProto.FLOAT, [1, "T", X]))
    outputs = [helper.make_tensor_value_info("y", real, [1, "T", E])]
    path = folder / f"moe-{weights}.onnx"
    path.with_suffix(".bin").unlink(missing_ok=True)
    save(path, nodes, inputs, outputs, initializers, data=f"{path.stem}.bin")
    return Linear(path, path.with_suffix(".bin"), sum(len(tensor.raw_data) for tensor in initializers))


def moe_without_weights(folder: Path) -> Path:
    """One node of ours, for the message about a missing plugin."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 64]) for name in ("x", "y")]
    node = helper.make_node("Gemma4MoE", ["x"], ["y"], name="layers.0.experts", domain="gemma4", top_k=2)
    return save(folder / "moe.onnx", [node], tensors[:1], tensors[1:])


def no_graph(folder: Path) -> Path:
    path = folder / "damaged.onnx"
    path.write_bytes(b"\x08\xff" * 100)
    return path
