"""Reproducible random weights of a released model, for sizes and speed where there is no checkpoint.

Every weight is an int4 code -7…7 times a power of two, so that each storage format holds it exactly. Codes come from a
counter-based generator keyed by the tensor's name: any slice can be made without the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import FileEntry
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.names import TensorSpec, decoder_tensors
from gemma4_export.exporter.quantize import QuantizedRows
from gemma4_export.exporter.small_tokenizer import write_small_tokenizer

Array = np.ndarray[Any, np.dtype[Any]]

_COUNTER_BYTES = 32  # Philox 4x64 makes four 64-bit words per count
_CODE_RMS = math.sqrt(56 / 3)  # of codes drawn evenly from -7…7
# Norms behind a block: small, so that 30 random blocks do not drown the token's embedding. With ones, the routers of
# deep layers send everything to some 20 of 128 experts, and prefill looks a third faster than it is.
_POST_NORM, _OTHER_NORM = 0.02, 1.0


def _nibble_table() -> Array:
    """Byte -> the same byte with code -8 replaced by 0 in both nibbles: codes are then symmetric."""
    nibbles = np.arange(16, dtype=np.uint8)
    nibbles[8] = 0
    return np.array([nibbles[byte & 15] | nibbles[byte >> 4] << 4 for byte in range(256)], np.uint8)


_SYMMETRIC = _nibble_table()
_SIGNED = np.where(np.arange(16) < 8, np.arange(16), np.arange(16) - 16).astype(np.float32)
# Byte -> its two codes, low nibble first.
_BYTE_CODES = np.stack([_SIGNED[np.arange(256) & 15], _SIGNED[np.arange(256) >> 4]], axis=1)


class DummySource:
    """The decoder weights of ``config``, drawn at random."""

    not_packed: tuple[str, ...] = ()
    wide_scales: frozenset[str] = frozenset()
    weight_paths: tuple[Path, ...] = ()

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.specs = decoder_tensors(config)

    def sources(self) -> dict[str, FileEntry]:
        """There is no file; the seed stands in for one, and the hash is that of the model's config."""
        digest = hashlib.sha256(repr(self.config).encode()).hexdigest()
        return {f"dummy weights, seed {self.seed}": FileEntry(bytes=0, sha256=digest)}

    def write_tokenizer(self, folder: Path) -> None:
        """The small tokenizer, padded to the model's vocabulary so that every id it may produce has a name."""
        write_small_tokenizer(folder, vocab_size=self.config.vocab_size)

    def slices(self, name: str, form: WeightFormat, max_bytes: int) -> Iterator[Array | QuantizedRows]:
        """The rows of a weight in order, as codes where ``form`` holds codes."""
        num_rows, columns = self.specs[name].row_shape
        step = max(1, max_bytes // (columns * 4))
        for start in range(0, num_rows, step):
            yield self.rows(name, form, start, min(start + step, num_rows))

    def rows(self, name: str, form: WeightFormat, start: int, stop: int) -> Array | QuantizedRows:
        """Rows ``start:stop``, the same whatever slices are asked for."""
        spec = self.specs[name]
        columns = spec.row_shape[1]
        if spec.role == "decoder.norm":
            return self._norm(spec, start, stop)
        packed = self._codes(name, start, stop, columns)
        scale = _scale(spec)
        if form.kind == "int4":
            scales = np.full((stop - start, columns // form.block), scale, np.float16)
            return QuantizedRows(form, packed, scales)
        if form.kind == "int8":
            # Sixteen times the code, so that eight bits are used as a trained row would use them.
            codes = _two_at_a_time((_BYTE_CODES * 16).astype(np.int8), packed)
            scales = np.full((stop - start, columns // (form.block or columns)), scale / 16, np.float32)
            return QuantizedRows(form, codes, scales)
        if form.kind == "fp8":
            # Thirty-two times the code, for the same reason: up to 224 of 448.
            codes = _two_at_a_time((_BYTE_CODES * 32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8), packed)
            return QuantizedRows(form, codes, np.full((stop - start, 1), scale / 32, np.float32))
        dtype = ml_dtypes.bfloat16 if form.kind == "bfloat16" else np.float32
        return _two_at_a_time((_BYTE_CODES * scale).astype(dtype), packed)

    def _codes(self, name: str, start: int, stop: int, columns: int) -> Array:
        """[rows, columns // 2] bytes of two codes each."""
        assert columns % 2 == 0, f"{name}: {columns} columns"
        return _SYMMETRIC[self._bytes(name, start * columns // 2, stop * columns // 2)].reshape(stop - start, -1)

    def _bytes(self, name: str, first: int, last: int) -> Array:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        key = np.frombuffer(digest[:16], np.uint64)
        count, skip = divmod(first, _COUNTER_BYTES)
        words = -(-(last - first + skip) // 8)
        raw = np.random.Philox(key=key, counter=count).random_raw(words)
        return np.asarray(raw.view(np.uint8)[skip : skip + last - first])

    def _norm(self, spec: TensorSpec, start: int, stop: int) -> Array:
        """Norm weights and scalars spread by a quarter around their level, in steps that bfloat16 holds."""
        columns = spec.row_shape[1]
        spread = self._bytes(spec.name, start * columns, stop * columns).astype(np.float32) / 1024 + 0.875
        level = _POST_NORM if ".post_" in spec.name else _OTHER_NORM
        values = (spread * level).astype(ml_dtypes.bfloat16).astype(np.float32)
        return np.asarray(values.reshape(stop - start, columns))


def _two_at_a_time(pairs: Array, packed: Array) -> Array:
    """[n, bytes] -> [n, 2 * bytes]: each byte's pair, looked up as one integer twice as wide."""
    wide = pairs.view(f"u{2 * pairs.dtype.itemsize}")[:, 0]
    return np.asarray(wide[packed].view(pairs.dtype))


def _scale(spec: TensorSpec) -> float:
    """The power of two nearest to giving products of unit inputs unit size."""
    wanted = 1 / (_CODE_RMS * math.sqrt(spec.row_shape[1]))
    return float(2.0 ** round(math.log2(wanted)))
