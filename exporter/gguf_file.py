"""Reads the header of a GGUF file and decodes rows of its block formats.

The ``gguf`` package keeps an array object for each of a vocabulary's 777,000 strings: 19 s and 1.4 GB for a header that
this module walks in a second. Tests hold the two against each other.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma4_export.configs.errors import CheckpointError
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.exporter.pread import damaged
from gemma4_export.exporter.quantize import Float32, QuantizedRows

Array = np.ndarray[Any, np.dtype[Any]]
UInt8 = np.ndarray[Any, np.dtype[np.uint8]]

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_LAST_TYPE_DIMS = 4

# Metadata value types by number: scalars with their struct code, then string and array.
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""ggml's number of a tensor type -> its name."""

_FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q8_0": (32, 34), "Q6_K": (256, 210)}
"""Types that this version reads -> (weights, bytes) of a block."""


def is_auxiliary(name: str) -> bool:
    """Whether a GGUF file so named holds no decoder but the towers (mmproj, first or last in the name) or a drafter."""
    return "mmproj" in name.lower() or name.lower().startswith("mtp-")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: type by name, shape with rows first (the file lists columns first), first byte in the file."""

    type: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        weights, size = BLOCKS[self.type]
        return self.shape[-1] // weights * size


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Scalars and strings of the metadata (arrays are passed over), tensors, and the offset at which data begins."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data_start: int


def read_gguf_header(path: Path) -> GGUFHeader:
    """Parse the header; the data is not touched.

    Raises:
        CheckpointError: no GGUF file, one of another version, truncated, or its header contradicts its size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 24 or file.read(4) != b"GGUF":
            raise damaged(path, f"no GGUF file ({size} bytes)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(path, data), size)


def _parse(cursor: _Cursor, size: int) -> GGUFHeader:
    path = cursor.path
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{path.name}: GGUF version {version}, this version reads {' and '.join(map(str, _VERSIONS))}",
            hint="big-endian files and version 1 are not read; convert the model again with a current llama.cpp",
        )
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    entries: list[tuple[str, int, tuple[int, ...], int]] = []
    for _ in range(num_tensors):
        name, dims = cursor.text(), cursor.number("I")
        if dims > _LAST_TYPE_DIMS:
            raise damaged(path, f"{name}: {dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dims))[::-1] or (1,)
        entries.append((name, cursor.number("I"), shape, cursor.number("Q")))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise damaged(path, f"general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, number, shape, offset in entries:
        if name in tensors:
            raise damaged(path, f"{name}: listed twice")
        tensor = GGUFTensor(TYPE_NAMES.get(number, f"type {number}"), shape, data_start + offset)
        if tensor.type in BLOCKS:
            weights, _ = BLOCKS[tensor.type]
            if shape[-1] % weights:
                raise damaged(path, f"{name}: {shape[-1]} columns are no multiple of {tensor.type}'s {weights}")
            end = tensor.start + math.prod(shape[:-1]) * tensor.row_bytes
            if end > size:
                raise damaged(path, f"{name}: ends at byte {end}, the file has {size}")
        tensors[name] = tensor
    return GGUFHeader(metadata, tensors, data_start)


class _Cursor:
    """Walks a header value by value, and never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.position, self._data = path, 4, data

    def number(self, code: str) -> Any:
        start = self._advance(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self._data, start)[0]

    def text(self) -> str:
        length = self.number("Q")
        start = self._advance(length)
        return self._data[start : start + length].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A scalar or a string; None for an array, which is passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise damaged(self.path, f"metadata value type {kind} at byte {self.position}")
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            self._advance(count * struct.calcsize(f"<{_SCALARS[item]}"))
        elif item == _STRING:
            for _ in range(count):
                self._advance(self.number("Q"))
        else:
            raise damaged(self.path, f"metadata array of type {item} at byte {self.position}")
        return None

    def _advance(self, count: int) -> int:
        """Step over ``count`` bytes; returns where they begin."""
        start = self.position
        if count > len(self._data) - start:
            raise damaged(self.path, f"its header needs {count} bytes at {start}, the file has {len(self._data)}")
        self.position = start + count
        return start


def decode_rows(raw: UInt8, kind: str) -> Array | QuantizedRows:
    """Rows as stored [n, row_bytes] uint8 -> codes for Q4_0 and Q8_0, values [n, K] for the other types.

    Source: ggml's block layouts, as the ``gguf`` package 0.19 reads them.
    """
    if kind in _FLOATS:
        return raw.view(_FLOATS[kind])
    weights, size = BLOCKS[kind]
    blocks = raw.reshape(len(raw), -1, size)
    if kind == "Q4_0":
        return QuantizedRows(WeightFormat("int4", weights), _q4_0_codes(blocks[:, :, 2:]), _float16(blocks[:, :, :2]))
    if kind == "Q8_0":
        codes = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).reshape(len(raw), -1)
        return QuantizedRows(WeightFormat("int8", weights), codes, _float16(blocks[:, :, :2]))
    return _q6_k_values(blocks)


def _float16(pairs: UInt8) -> Array:
    """[n, blocks, 2] bytes -> [n, blocks] float16."""
    return np.ascontiguousarray(pairs).view(np.float16)[:, :, 0]


def _q4_0_codes(nibbles: UInt8) -> UInt8:
    """[n, blocks, 16] bytes -> [n, 16 * blocks] in canonical order.

    A byte of Q4_0 holds weight j of its block in the low nibble and weight j + 16 in the high one; ours holds two
    neighbours. Q4_0 stores codes 8 above their signed value.
    """
    even, odd = nibbles[:, :, 0::2], nibbles[:, :, 1::2]
    low, four = np.uint8(15), np.uint8(4)
    codes = np.concatenate([(even & low) | (odd << four), (even >> four) | (odd & ~low)], axis=2)
    return np.asarray(codes.reshape(len(nibbles), -1) ^ np.uint8(0x88))


def _q6_k_values(blocks: UInt8) -> Float32:
    """[n, blocks, 210] bytes -> [n, 256 * blocks]: block scale x scale of 16 weights x (6-bit code - 32).

    A block is two halves of 128 weights. In a half, 64 bytes hold the lower four bits: weight r in the low nibbles for
    r < 64, in the high ones above; 32 bytes hold the upper two bits of weights c, c + 32, c + 64, c + 96, lowest first.
    """
    n, count, _ = blocks.shape
    lower = blocks[:, :, :128].reshape(n, count, 2, 1, 64)
    upper = blocks[:, :, 128:192].reshape(n, count, 2, 1, 32)
    shifts = np.arange(4, dtype=np.uint8)[:, None]
    four_bits = ((lower >> (4 * shifts[:2])) & np.uint8(15)).reshape(n, count, 2, 128)
    two_bits = ((upper >> (2 * shifts)) & np.uint8(3)).reshape(n, count, 2, 128)
    codes = (four_bits | (two_bits << np.uint8(4))).reshape(n, count, 16, 16).astype(np.float32) - np.float32(32)
    scales = np.ascontiguousarray(blocks[:, :, 192:208]).view(np.int8).astype(np.float32)
    scales *= _float16(blocks[:, :, 208:]).astype(np.float32)[:, :, None]
    return np.asarray((codes * scales[:, :, :, None]).reshape(n, -1))
