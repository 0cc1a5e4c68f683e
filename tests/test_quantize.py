"""Rounding, packing and tables against references of this file's own and against onnxruntime's operators.

Nothing of ``exporter/quantize.py`` or ``exporter/packing.py`` computes an expected value here: nibbles are taken apart
with loops, float16 is rounded by ``struct``, and sums are in float64.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import small
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import CheckpointError, ConfigError
from gemma4_export.configs.formats import BFLOAT16, BLOCKS, FLOAT32, FP8, INT8, WeightFormat
from gemma4_export.configs.manifest import ScalesEntry, TableEntry
from gemma4_export.configs.names import (
    EMBED_TOKENS,
    EMBED_TOKENS_PER_LAYER,
    LM_HEAD,
    RECIPE_ROLES,
    TensorSpec,
    expert_tensor,
)
from gemma4_export.configs.recipe import Recipe
from gemma4_export.exporter.packing import matmul_block, matmul_scales, offset_codes
from gemma4_export.exporter.quantize import QuantizedRows, dequantize, pack_int4, quantize, unpack_int4
from gemma4_export.exporter.weights import PlacedWeight, Placement, place_weights
from gemma4_export.exporter.write import write_weights
from gemma4_export.runtime.tables import EmbeddingTable

INT4 = tuple(WeightFormat("int4", block) for block in BLOCKS)
QUANTIZED = (*INT4, INT8, WeightFormat("int8", 32), WeightFormat("int8", 128))
few = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def matrices(draw, formats=QUANTIZED, largest_k=2112):
    """(format, float32 [N, K]) with odd N, K any multiple of the block (16 for int8) and rows of different sizes."""
    form = draw(st.sampled_from(formats))
    unit = form.block or 16
    blocks = draw(st.integers(-(-32 // unit), largest_k // unit))
    n = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal((n, blocks * unit), np.float32)
    return form, values * np.float32(2.0) ** rng.integers(-8, 8, (n, 1)).astype(np.float32)


def float16(value: float) -> float:
    """To the nearest float16, ties to even, by the standard library."""
    return struct.unpack("<e", struct.pack("<e", value))[0]


def nibble(byte: int, column: int) -> int:
    """Signed code of one column of its byte: the even column lies low."""
    code = (byte >> 4) if column % 2 else (byte & 15)
    return code - 16 if code > 7 else code


def canonical_values(rows: QuantizedRows) -> np.ndarray:
    """Code times scale, one float32 product per weight."""
    n = len(rows.codes)
    columns = rows.codes.shape[1] * (2 if rows.format.kind == "int4" else 1)
    block = columns // rows.scales.shape[1]
    values = np.empty((n, columns), np.float32)
    for row in range(n):
        codes, scales = rows.codes[row].tolist(), rows.scales[row].tolist()  # exact as Python floats
        for column in range(columns):
            code = nibble(codes[column // 2], column) if rows.format.kind == "int4" else codes[column]
            values[row, column] = np.float32(code * scales[column // block])  # exact in float64, then one rounding
    return values


def stored_values(data: bytes, weight: PlacedWeight) -> np.ndarray:
    """[rows, columns] float32 of a weight, read from its file's bytes as the manifest's docstrings describe them."""
    (n, columns), form = weight.row_shape, weight.format
    count = n * columns
    if form.kind == "float32":
        return np.array(struct.unpack_from(f"<{count}f", data, weight.offset), np.float32).reshape(n, columns)
    if form.kind == "bfloat16":
        halves = struct.unpack_from(f"<{count}H", data, weight.offset)
        flat = struct.unpack(f"<{count}f", b"".join(struct.pack("<HH", 0, half) for half in halves))
        return np.array(flat, np.float32).reshape(n, columns)
    assert weight.scales is not None
    letter = {"float16": "e", "float32": "f"}[weight.scales.dtype]
    per_row = weight.scales.per_row
    scales = struct.unpack_from(f"<{n * per_row}{letter}", data, weight.scales.offset)
    values = np.empty((n, columns), np.float32)
    for row in range(n):
        for column in range(columns):
            place = row * columns + column
            if form.kind == "int4":
                byte = data[weight.offset + place // 2]
                code = ((byte >> 4) if place % 2 else (byte & 15)) - 8
            else:
                code = data[weight.offset + place] - 128
            values[row, column] = np.float32(code * scales[row * per_row + column * per_row // columns])
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Rounding


@few
@given(matrices(largest_k=384))
def test_dequantised_weights_equal_code_times_scale_bit_for_bit(matrix):
    form, values = matrix
    rows = quantize(values, form, "w")
    assert rows.codes.shape == (len(values), form.row_bytes(values.shape[1]))
    assert rows.scales.shape == (len(values), values.shape[1] // (form.block or values.shape[1]))
    assert dequantize(rows).dtype == np.float32
    np.testing.assert_array_equal(dequantize(rows), canonical_values(rows))


@few
@given(matrices(largest_k=384))
def test_codes_and_scales_are_round_to_nearest(matrix):
    form, values = matrix
    rows = quantize(values, form, "w")
    block, limit = form.block or values.shape[1], 7 if form.kind == "int4" else 127
    for row, row_values in enumerate(values):
        for index in range(values.shape[1] // block):
            largest = max(abs(float(value)) for value in row_values[index * block : (index + 1) * block])
            scale = float(np.float32(largest) / np.float32(limit))
            scale = float16(scale) if form.kind == "int4" else scale
            assert float(rows.scales[row, index]) == scale
            for column in range(index * block, (index + 1) * block):
                raw = rows.codes[row]
                code = nibble(int(raw[column // 2]), column) if form.kind == "int4" else int(raw[column])
                exact = float(row_values[column]) / scale
                # The product with a rounded reciprocal is off by 2 ulp: only a tie closer than that may go either way.
                assert abs(code) <= limit
                nearest = max(-limit, min(limit, exact))
                assert abs(code - nearest) <= 0.5 + 2**-22 * limit, (code, exact)


@few
@given(matrices(largest_k=384), st.integers(-30, 12))
def test_rounding_errors_stay_within_half_a_scale(matrix, exponent):
    """|x - q| <= scale / 2, with the slack that the scale's own rounding and float32 arithmetic need.

    A scale rounded down by the relative 2^-11 of a normal float16 leaves the largest weight at 7 (1 + 2^-11) scales,
    and its code is clipped to 7: 0.0034 scales, far below a half. Where float16 is subnormal (scales below 2^-14) its
    step is the absolute 2^-24, so 7 half steps can be cut off: 7 x 2^-25 decides only for scales below 7 x 2^-24. The
    product x (1 / scale) is off by 2 ulp of float32, which moves a tie by at most 7 x 2^-22 scales.
    """
    form, values = matrix
    values = values * np.float32(2.0**exponent)
    assume(np.abs(values).max() < 7 * 65504)
    rows = quantize(values, form, "w")
    block = form.block or values.shape[1]
    scales = np.repeat(rows.scales.astype(np.float64), block, axis=1)
    error = np.abs(values.astype(np.float64) - dequantize(rows))
    limit = 7 if form.kind == "int4" else 127
    floor = 7 * 2.0**-25 if form.kind == "int4" else 0.0
    assert (error <= np.maximum(scales * (0.5 + limit * 2.0**-22), floor)).all()


@pytest.mark.parametrize("form", INT4, ids=str)
@few
@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 9), n=st.integers(1, 7))
def test_weights_on_an_int4_grid_keep_their_codes(form, seed, blocks, n):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-7, 8, (n, blocks, form.block)).astype(np.int8)
    codes[..., 0] = rng.choice([-7, 7], (n, blocks))  # the largest code occurs, so the scale is found again
    rng.permuted(codes, axis=2, out=codes)
    # Any float16 scale: 7 s is exact in float32, its seventh is s within an ulp of float32, so float16 rounds it to s.
    bits = rng.integers(1, 0x7C00, (n, blocks)).astype(np.uint16)  # all positive finite ones, subnormal ones included
    scales = bits.view(np.float16)
    values = codes.astype(np.float32) * scales.astype(np.float32)[..., None]
    rows = quantize(values.reshape(n, -1), form, "w")
    np.testing.assert_array_equal(unpack_int4(rows.codes), codes.reshape(n, -1))
    np.testing.assert_array_equal(rows.scales.view(np.uint16), bits)
    np.testing.assert_array_equal(dequantize(rows), values.reshape(n, -1))


@few
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 300), n=st.integers(1, 5), exponent=st.integers(-60, 60))
def test_weights_on_an_int8_grid_keep_their_codes(seed, columns, n, exponent):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (n, columns)).astype(np.int8)
    codes[:, -1] = rng.choice([-127, 127], n)
    values = codes.astype(np.float32) * np.float32(2.0**exponent)
    rows = quantize(values, INT8, "w")
    np.testing.assert_array_equal(rows.codes, codes)
    np.testing.assert_array_equal(dequantize(rows), values)


@pytest.mark.parametrize("form", QUANTIZED, ids=str)
def test_a_block_of_zeros_has_scale_and_codes_zero(form):
    values = np.zeros((3, 256), np.float32)
    values[1] = np.linspace(-1, 1, 256)
    values[2, :128] = 1  # half a row of zeros, a whole block of any size
    values[2, 128:] = -0.0
    rows = quantize(values, form, "w")
    assert not rows.codes[0].any()
    assert not rows.scales[0].any()
    np.testing.assert_array_equal(dequantize(rows)[0], 0)
    np.testing.assert_array_equal(dequantize(rows)[2, 128:], 0)
    assert np.abs(dequantize(rows)[1] - values[1]).max() < 0.08


@pytest.mark.parametrize("form", QUANTIZED, ids=str)
@pytest.mark.parametrize("largest", [1e-45, 3e-43, 1e-40, 1.2e-38, 5e-37, 1e-30, 2e-9, 1e-7])
def test_weights_too_small_for_a_scale_become_zero_or_near_it(form, largest):
    """Subnormal float32 values and scales: no division overflows, no NaN becomes a code."""
    values = np.linspace(-largest, largest, 128, dtype=np.float32)[None].repeat(3, axis=0)
    values[2] = np.linspace(-1, 1, 128)
    with np.errstate(all="raise", under="ignore"):
        rows = quantize(values, form, "w")
    tolerance = 7 * 2.0**-25 if form.kind == "int4" else np.finfo(np.float32).tiny * 127
    error = np.abs(dequantize(rows)[:2].astype(np.float64) - values[:2])
    assert error.max() <= max(tolerance, largest * 0.51 / 127)
    assert np.isfinite(dequantize(rows)).all()


@pytest.mark.parametrize("form", QUANTIZED, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 129), (2, 255)])
def test_nan_and_inf_are_refused_by_name(form, bad, place):
    values = np.ones((3, 256), np.float32)
    values[place] = bad
    values[1, 3:5] = bad
    count = int((~np.isfinite(values)).sum())
    with pytest.raises(CheckpointError, match=rf"layers\.3\.mlp\.up_proj\.weight: {count} values are NaN or Inf"):
        quantize(values, form, "layers.3.mlp.up_proj.weight")


def e4m3(code: int) -> float:
    """Four exponent bits biased by 7, three of mantissa; no infinities, 0x7f and 0xff are NaN."""
    sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
    assert (exponent, mantissa) != (15, 7)
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("exponent", [-60, -17, 0, 3])
def test_every_fp8_value_times_a_power_of_two_is_kept(exponent):
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    values = np.array([[e4m3(code) * 2.0**exponent for code in codes]], np.float32)
    rows = quantize(values, FP8, "w")
    assert (rows.codes.dtype, rows.codes[0].tolist()) == (np.uint8, codes)
    assert rows.scales.tolist() == [[2.0**exponent]]
    np.testing.assert_array_equal(dequantize(rows), values)


@few
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 5), exponent=st.integers(-60, 60))
def test_fp8_rounds_to_nearest_below_a_scale_that_fits(seed, n, exponent):
    values = np.random.default_rng(seed).standard_normal((n, 96)).astype(np.float32) * np.float32(2.0**exponent)
    rows = quantize(values, FP8, "w")
    np.testing.assert_array_equal(np.frexp(rows.scales)[0], 0.5)  # powers of two: exact in every float type
    largest = np.abs(values).max(axis=1, keepdims=True) / rows.scales
    assert ((largest > 224) & (largest <= 448)).all()
    # Half a step: three bits of mantissa, or below 2^-6 steps of 2^-9.
    step = np.maximum(np.abs(values) * 2.0**-4, rows.scales * 2.0**-10)
    assert (np.abs(dequantize(rows) - values) <= step).all()
    assert all(
        e4m3(int(code)) * scale == value
        for code, scale, value in zip(rows.codes[0], np.repeat(rows.scales[0], 96), dequantize(rows)[0], strict=True)
    )


def test_fp8_rows_of_zeros_and_of_next_to_nothing_have_scale_zero():
    values = np.zeros((4, 32), np.float32)
    values[1], values[2, 5], values[3] = 1, 1e-30, 1e-20
    with np.errstate(all="raise", under="ignore"):
        rows = quantize(values, FP8, "w")
    assert (rows.scales[:, 0] == 0).tolist() == [True, False, True, False]
    assert not rows.codes[[0, 2]].any()
    np.testing.assert_allclose(dequantize(rows)[[1, 3]], values[[1, 3]], rtol=2**-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fp8_has_no_room_for_nan_and_inf(bad):
    values = np.ones((3, 256), np.float32)
    values[1, 129] = bad
    with pytest.raises(CheckpointError, match="w: 1 values are NaN or Inf"):
        quantize(values, FP8, "w")


def test_a_weight_too_large_for_a_float16_scale_is_refused():
    values = np.ones((2, 64), np.float32)
    values[1, 40] = 7 * 65504
    assert dequantize(quantize(values, INT4[0], "w"))[1, 40] == 7 * 65504
    values[1, 40] = -np.nextafter(np.float32(7 * 65504), np.float32(np.inf))
    with pytest.raises(CheckpointError, match=r"w: holds 4\.59e\+05, too large for a float16 scale\nhint: use int8"):
        quantize(values, INT4[0], "w")
    assert np.isfinite(dequantize(quantize(values, INT8, "w"))).all()


@few
@given(st.integers(1, 7), st.integers(1, 33), st.integers(0, 2**32 - 1))
def test_nibbles_are_packed_low_column_first(n, pairs, seed):
    codes = np.random.default_rng(seed).integers(-8, 8, (n, 2 * pairs)).astype(np.int8)
    packed = pack_int4(codes)
    assert packed.dtype == np.uint8
    for row in range(n):
        assert [nibble(int(packed[row, column // 2]), column) for column in range(2 * pairs)] == codes[row].tolist()
    np.testing.assert_array_equal(unpack_int4(packed), codes)


# ---------------------------------------------------------------------------------------------------------------------
# onnxruntime's operators on the same bytes


_ONNX_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int64): TensorProto.INT64,
}


def run_node(op: str, inputs: dict[str, np.ndarray | tuple[int, ...]], *, raw: bytes = b"", **attributes: object):
    """One operator; an input given as a shape is an int4 initializer whose bytes are ``raw``."""
    initializers = [
        helper.make_tensor(name, TensorProto.INT4, value, raw, raw=True)
        if isinstance(value, tuple)
        else helper.make_tensor(name, _ONNX_TYPES[value.dtype], value.shape, value.tobytes(), raw=True)
        for name, value in inputs.items()
    ]
    node = helper.make_node(op, list(inputs), ["y"], **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [], [output], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), _session_options())
    return session.run(None, {})[0]


@functools.cache
def _session_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


@few
@given(matrices())
def test_canonical_codes_are_what_dequantize_linear_reads(matrix):
    form, values = matrix
    rows = quantize(values, form, "w")
    if form.kind == "int4":
        inputs = {"x": values.shape, "s": rows.scales.astype(np.float32)}
        found = run_node("DequantizeLinear", inputs, raw=rows.codes.tobytes(), axis=1, block_size=form.block)
    elif form.block:
        found = run_node("DequantizeLinear", {"x": rows.codes, "s": rows.scales}, axis=1, block_size=form.block)
    else:
        found = run_node("DequantizeLinear", {"x": rows.codes, "s": rows.scales[:, 0]}, axis=0)
    np.testing.assert_array_equal(found, dequantize(rows))


@few
@given(matrices(), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_packing_is_what_matmulnbits_multiplies(matrix, tokens, seed):
    form, values = matrix
    (n, columns), rows = values.shape, quantize(values, form, "w")
    block = matmul_block(form, columns)
    assert columns % block == 0
    assert block & (block - 1) == 0
    inputs = np.random.default_rng(seed).standard_normal((tokens, columns), np.float32)
    found = run_node(
        "MatMulNBits",
        {
            "a": inputs,
            "b": offset_codes(rows).reshape(n, columns // block, form.row_bytes(block)),
            "s": matmul_scales(rows, columns),
        },
        domain="com.microsoft",
        K=columns,
        N=n,
        bits=4 if form.kind == "int4" else 8,
        block_size=block,
        accuracy_level=1,
    )
    weights = canonical_values(rows) if columns <= 128 else dequantize(rows)
    exact = inputs.astype(np.float64) @ weights.astype(np.float64).T
    # K products and K - 1 sums, half an ulp each, in any order; the scale may be multiplied in after the sum.
    bound = (columns + 2) * 2.0**-24 * (np.abs(inputs).astype(np.float64) @ np.abs(weights).astype(np.float64).T)
    assert (np.abs(found - exact) <= bound + 1e-30).all()


@few
@given(matrices(), st.integers(0, 2**32 - 1))
def test_the_packing_is_what_gather_block_quantized_reads(matrix, seed):
    form, values = matrix
    (n, columns), rows = values.shape, quantize(values, form, "w")
    ids = np.random.default_rng(seed).integers(0, n, 4)
    found = run_node(
        "GatherBlockQuantized",
        {"data": offset_codes(rows), "indices": ids, "scales": matmul_scales(rows, columns)},
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        block_size=matmul_block(form, columns),
        bits=4 if form.kind == "int4" else 8,
    )
    np.testing.assert_array_equal(found, dequantize(rows)[ids])


def test_int8_takes_the_largest_block_that_divides():
    for columns, block in ((16, 16), (48, 16), (96, 32), (704, 64), (2112, 64), (1536, 256), (2816, 256), (5376, 256)):
        assert matmul_block(INT8, columns) == block
    with pytest.raises(
        ConfigError, match=r'y, x: int8 needs columns in multiples of 16, found 40\n.* "y" = "bfloat16"'
    ):
        INT8.check_columns(40, "y", "x")
    with pytest.raises(ConfigError, match=r'y, x: block 32 does not divide its 48 columns\nhint: write "y" = "int8" '):
        WeightFormat("int4", 32).check_columns(48, "y", "x")
    with pytest.raises(ConfigError, match=r'block 32 does not divide its 56 columns\nhint: write "y" = "bfloat16" '):
        WeightFormat("int4", 32).check_columns(56, "y", "x")


# ---------------------------------------------------------------------------------------------------------------------
# Files: what was written, read back by offset; tables; shared and separate heads


def recipe_of(default: WeightFormat, **formats: WeightFormat) -> Recipe:
    by_role = dict.fromkeys(RECIPE_ROLES, default) | {role.replace("__", "."): form for role, form in formats.items()}
    return Recipe(name="test", title="", formats=by_role, prefers_qat=False)


def write(
    folder: Path, specs: list[TensorSpec], recipe: Recipe, arrays: dict[str, np.ndarray] | None = None
) -> Placement:
    source = small.ArraySource(small.model_config("e2b"), arrays, specs={spec.name: spec for spec in specs})
    placement = place_weights(specs, recipe)
    write_weights(source, placement, folder, key="", on_bytes=lambda name, count: None)
    return placement


def rounded(values: np.ndarray, form: WeightFormat) -> np.ndarray:
    """What a weight becomes in a format. Checked against loops above."""
    if form.is_quantized:
        return dequantize(quantize(values, form, "w"))
    return values if form.kind == "float32" else values.astype(ml_dtypes.bfloat16).astype(np.float32)


FORMATS = (FLOAT32, BFLOAT16, *QUANTIZED)
_TABLES = [
    TensorSpec(name=EMBED_TOKENS, shape=(37, 384), role="embeddings.tokens"),
    TensorSpec(name=EMBED_TOKENS_PER_LAYER, shape=(37, 128), role="embeddings.per_layer"),
    TensorSpec(name="layers.0.mlp.up_proj.weight", shape=(5, 128), role="decoder.mlp"),
    TensorSpec(name="norm.weight", shape=(128,), role="decoder.norm"),
    TensorSpec(name="layers.0.experts.down_proj", shape=(3, 7, 128), role="decoder.experts"),
]


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("head", FORMATS, ids=str)
def test_files_hold_what_the_placement_says(tmp_path, form, head):
    placement = write(tmp_path, _TABLES, recipe_of(form, decoder__head=head))
    assert (LM_HEAD in {weight.name for weight in placement.stored}) == (form != head)
    for file, size in placement.num_bytes.items():
        assert (tmp_path / file).stat().st_size == size
    taken: dict[str, list[tuple[int, int]]] = {}
    for weight in placement.stored:
        spec = next(spec for spec in _TABLES if spec.name == weight.source)
        data, want = (tmp_path / weight.placed.file).read_bytes(), small.draw(spec).reshape(spec.row_shape)
        own = head if weight.name == LM_HEAD else FLOAT32 if spec.role == "decoder.norm" else form
        assert weight.placed.format == own
        np.testing.assert_array_equal(stored_values(data, weight.placed), rounded(want, own), err_msg=weight.name)
        for start, length in (
            (weight.placed.offset, weight.placed.code_bytes),
            (weight.placed.scales.offset if weight.placed.scales else 0, weight.placed.scale_bytes),
        ):
            assert start % 64 == 0
            taken.setdefault(weight.placed.file, []).append((start, start + length))
        if spec.role == "decoder.experts":
            for expert in range(3):
                part = placement.weights[expert_tensor(spec.name, expert)]
                wanted = rounded(want[7 * expert : 7 * expert + 7], own)
                np.testing.assert_array_equal(stored_values(data, part), wanted)
    for spans in taken.values():
        filled = sorted(span for span in spans if span[0] < span[1])
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(filled)), "regions overlap"


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("name", [EMBED_TOKENS, EMBED_TOKENS_PER_LAYER])
def test_tables_give_dequantised_rows(tmp_path, form, is_shared, name):
    head = form if is_shared else INT8 if form != INT8 else INT4[0]
    placement = write(tmp_path, _TABLES, recipe_of(form, decoder__head=head))
    placed = placement.weights[name]
    assert (placement.weights[LM_HEAD] == placement.weights[EMBED_TOKENS]) == is_shared
    scales = placed.scales and ScalesEntry(placed.scales.offset, placed.scales.dtype, placed.scales.per_row)
    rows, columns = placed.row_shape
    scale = float(np.float32(math.sqrt(1536)))
    entry = TableEntry(
        file=placed.file,
        format=str(form),
        offset=placed.offset,
        has_signed_codes=placed.has_signed_codes,
        scales=scales,
        rows=rows,
        columns=columns,
        scale=scale,
    )
    table = EmbeddingTable(Artifact(tmp_path, None), entry)
    ids = np.array([36, 0, 5, 5, 17])
    want = stored_values((tmp_path / placed.file).read_bytes(), placed)[ids] * np.float32(scale)
    found = table.gather(ids)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, want)
    assert table.gather(ids[:1]).shape == (1, columns)


@pytest.mark.parametrize("form", [form for form in FORMATS if form.is_quantized], ids=str)
def test_the_head_multiplies_with_the_bytes_of_the_shared_table(tmp_path, form):
    placement = write(tmp_path, _TABLES, recipe_of(form))
    placed = placement.weights[LM_HEAD]
    assert placed.file == placement.weights[EMBED_TOKENS].file
    n, columns = placed.row_shape
    data, block = (tmp_path / placed.file).read_bytes(), matmul_block(form, columns)
    inputs = np.random.default_rng(1).standard_normal((3, columns), np.float32)
    codes = np.frombuffer(data, np.uint8, placed.code_bytes, placed.offset)
    scales = np.frombuffer(data, np.float32, n * placed.scales.per_row, placed.scales.offset)
    found = run_node(
        "MatMulNBits",
        {"a": inputs, "b": codes.reshape(n, columns // block, -1), "s": scales.reshape(n, -1)},
        domain="com.microsoft",
        K=columns,
        N=n,
        bits=4 if form.kind == "int4" else 8,
        block_size=block,
        accuracy_level=1,
    )
    np.testing.assert_allclose(found, inputs @ stored_values(data, placed).T, rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_dtypes_of_a_checkpoint_are_rounded_alike(tmp_path, form, dtype):
    spec = TensorSpec(name="w", shape=(11, 256), role="decoder.mlp")
    values = small.draw(spec).astype(dtype)
    placed = write(tmp_path, [spec], recipe_of(form), {"w": values}).weights["w"]
    want = rounded(values.astype(np.float32), form)
    np.testing.assert_array_equal(stored_values((tmp_path / placed.file).read_bytes(), placed), want)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_weights_stage_names_the_tensor_that_holds_nan(tmp_path, form, bad, dtype):
    values = small.draw(_TABLES[0]).astype(dtype)
    values[30, 7:9] = bad
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: 2 values are NaN or Inf"):
        write(tmp_path, _TABLES, recipe_of(form), {EMBED_TOKENS: values})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_norm_is_named_too(tmp_path, bad):
    with pytest.raises(CheckpointError, match=r"norm\.weight: 128 values are NaN or Inf"):
        write(tmp_path, _TABLES, recipe_of(INT4[0]), {"norm.weight": np.full(128, bad, np.float32)})


@pytest.mark.parametrize("role", ["decoder.experts", "decoder.mlp", "embeddings.tokens", "decoder.head"])
@pytest.mark.parametrize(
    ("columns", "block", "instead"),
    [
        (2112, 128, "int4/64"),
        (704, 128, "int4/64"),
        (96, 64, "int4/32"),
        (48, 128, "int8"),
        (48, 32, "int8"),
    ],
)
def test_a_block_that_does_not_divide_is_refused_with_one_that_does(role, columns, block, instead):
    is_token = role in ("embeddings.tokens", "decoder.head")
    name = EMBED_TOKENS if is_token else "layers.0.experts.down_proj" if role == "decoder.experts" else "w"
    spec = TensorSpec(name=name, shape=(4, 8, columns), role="embeddings.tokens" if is_token else role)
    recipe = recipe_of(BFLOAT16, **{role.replace(".", "__"): WeightFormat("int4", block)})
    with pytest.raises(ConfigError) as refused:
        place_weights([spec], recipe)
    assert refused.value.cause.startswith(role)
    assert f"block {block} does not divide its {columns} columns" in refused.value.cause
    assert (refused.value.hint or "").startswith(f'write "{role}" = "{instead}" below [roles] in a recipe ')
