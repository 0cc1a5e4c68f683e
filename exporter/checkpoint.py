"""Reads a checkpoint folder lazily: safetensors headers once, rows by pread, and an error for tensors nobody reads."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma4_export.configs.errors import CheckpointError, ConfigError
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import FileEntry
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.names import (
    EMBED_TOKENS,
    LM_HEAD,
    NOT_PACKED_PREFIXES,
    TEXT_PREFIXES,
    TensorSpec,
    check_shape,
    decoder_tensors,
    redundant_tensors,
)
from gemma4_export.exporter.package import hash_file, hash_header
from gemma4_export.exporter.pread import OpenFiles, damaged
from gemma4_export.exporter.quantize import QuantizedRows
from gemma4_export.exporter.tokenizer_files import copy_tokenizer

Array = np.ndarray[Any, np.dtype[Any]]

# What a Gemma 4 checkpoint can hold as plain weights. Integer and 8-bit dtypes mean a quantised one.
FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_ITEM_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_COMPARED_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: file, dtype as safetensors spells it, shape, and its bytes from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of one stored tensor that are part of a decoder weight."""

    stored_name: str
    num_rows: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Parse and check one safetensors header; the data itself is not touched.

    Raises:
        CheckpointError: the file is truncated, or its header contradicts itself or the file's size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise damaged(path, f"{size} bytes is too short for a header")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise damaged(path, f"its header claims {header_bytes} bytes, the file has {size}")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise damaged(path, f"its header of {header_bytes} bytes is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is no JSON object")
    data_start, tensors = 8 + header_bytes, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(entry["dtype"]), _sizes(entry["shape"])
            begin, end = _sizes(entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, f"{name}: its header entry is malformed ({error!r})") from error
        bits = _ITEM_BITS.get(dtype)
        if bits is not None and (end - begin) * 8 != math.prod(shape) * bits:
            needed = math.prod(shape) * bits // 8
            raise damaged(path, f"{name}: {dtype} {list(shape)} needs {needed} bytes, has {end - begin}")
        tensors[name] = StoredTensor(path, dtype, shape, data_start + begin, end - begin)
    # The format's own rule: tensors fill the file without holes or overlaps.
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.start != position or tensor.num_bytes < 0:
            raise damaged(path, f"{name}: begins at byte {tensor.start}, expected {position}")
        position += tensor.num_bytes
    if position != size:
        raise damaged(path, f"its tensors end at byte {position}, the file has {size}")
    return tensors


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(size) is not int or size < 0 for size in values):
        raise ValueError(f"{values!r} is no list of sizes")
    return tuple(values)


class Checkpoint:
    """A checkpoint folder: its config, its decoder weights by canonical name, and a record of what was read."""

    wide_scales: Collection[str] = frozenset()

    def __init__(self, folder: Path) -> None:
        """Open ``folder`` and match every stored tensor against the config.

        Raises:
            ConfigError: config.json is missing or describes no model that this version exports.
            CheckpointError: tensors are missing, misshapen, unknown, or a file is damaged.
        """
        self.folder = folder
        self.config = resolve_config(folder, self._read_config())
        self._files = OpenFiles()
        self.stored = self._read_stored()
        self.specs = decoder_tensors(self.config)
        self.not_packed = sorted(name for name in self.stored if name.startswith(NOT_PACKED_PREFIXES))
        self._segments: dict[str, list[Segment]] = {}
        self._match()

    def _read_config(self) -> Mapping[str, Any]:
        return read_config(self.folder)

    def _read_stored(self) -> dict[str, StoredTensor]:
        """Name -> where it lies, of every tensor in the folder."""
        return read_all_headers(self.folder)

    def _read_by_nobody(self, unread: set[str]) -> None:
        """Remove from ``unread`` what may be there although no decoder weight is made from it."""
        for name, shape in redundant_tensors(self.config).items():
            stored_name = self._text_prefix() + name
            if stored_name in unread:
                check_shape(stored_name, shape, self.stored[stored_name].shape)
                unread.remove(stored_name)
        if LM_HEAD in unread:
            # Quantisers store the tied head a second time (jundot/omlx #1775, on google/gemma-4-31B-it-qat-w4a16-ct).
            self._check_head(self._text_prefix() + EMBED_TOKENS)
            unread.remove(LM_HEAD)

    def _check_head(self, table_name: str) -> None:
        """Refuse a head of its own. Reads both tensors; equal ones cost a few seconds on the largest model."""
        head, table = self.stored[LM_HEAD], self.stored[table_name]
        is_equal = (head.dtype, head.shape, head.num_bytes) == (table.dtype, table.shape, table.num_bytes)
        is_equal = is_equal and head.dtype in FLOATS  # codes with scales of their own are not compared
        for start in range(0, head.num_bytes if is_equal else 0, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, head.num_bytes - start)
            mine, theirs = np.empty(size, np.uint8), np.empty(size, np.uint8)
            self._files.read(head.path, head.start + start, mine, LM_HEAD)
            self._files.read(table.path, table.start + start, theirs, table_name)
            if not np.array_equal(mine, theirs):
                is_equal = False
                break
        if not is_equal:
            raise CheckpointError(
                f"{LM_HEAD}: differs from {table_name}; this version computes the head from the token table",
                hint="use a checkpoint with tied embeddings, as the released ones are",
            )

    def _match(self) -> None:
        prefix = self._text_prefix()
        unread = {name for name in self.stored if not name.startswith(NOT_PACKED_PREFIXES)}
        missing: list[tuple[str, tuple[int, ...]]] = []
        for name, spec in self.specs.items():
            # Experts are stored fused, or one by one.
            is_split = spec.role == "decoder.experts" and prefix + name not in unread
            parts = _per_expert(spec) if is_split else {name: spec.shape}
            found = [part for part in parts if prefix + part in unread]
            if not found:
                missing.append((name, spec.shape))
                continue
            missing += [(part, parts[part]) for part in parts if part not in found]
            for part in found:
                self._check_stored(prefix + part, parts[part])
            self._segments[name] = [Segment(prefix + part, math.prod(shape[:-1])) for part, shape in parts.items()]
            unread.difference_update(prefix + part for part in found)
        if missing:
            name, shape = missing[0]
            raise CheckpointError(
                f"{self.folder.name}: {len(missing)} decoder tensors are missing, first {name} {list(shape)}",
                hint="the checkpoint is incomplete, or config.json belongs to another model",
            )
        self._read_by_nobody(unread)
        if unread:
            name = min(unread)
            raise CheckpointError(
                f"{self.folder.name}: {len(unread)} tensors are read by nobody, first {name} "
                f"{list(self.stored[name].shape)}",
                hint="config.json describes less than the checkpoint holds; adapters must be merged before exporting",
            )

    def _text_prefix(self) -> str:
        """What stands before the canonical names of the decoder in this checkpoint."""
        candidates = [name for name in self.stored if not name.startswith(NOT_PACKED_PREFIXES)]
        return next((p for p in TEXT_PREFIXES if any(name.startswith(p) for name in candidates)), "")

    def _check_stored(self, stored_name: str, shape: tuple[int, ...]) -> None:
        stored = self.stored[stored_name]
        check_shape(stored_name, shape, stored.shape)
        if stored.dtype not in FLOATS:
            raise CheckpointError(
                f"{stored_name}: dtype {stored.dtype} is not one of {', '.join(FLOATS)}",
                hint="a quantised checkpoint whose config.json does not say so; use the bf16 one",
            )

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of a decoder weight seen as [rows, columns], in the dtype in which it is stored.

        Only the bytes asked for are read. Rows that cross stored tensors (experts kept one by one) are joined.
        """
        spec, pieces, first = self.specs[name], [], 0
        assert 0 <= start < stop <= spec.row_shape[0], (name, start, stop)
        for segment in self._segments[name]:
            low, high = max(start, first), min(stop, first + segment.num_rows)
            if low < high:
                pieces.append(self._read(segment.stored_name, low - first, high - first, spec.row_shape[1]))
            first += segment.num_rows
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def slices(self, name: str, form: WeightFormat, max_bytes: int) -> Iterator[Array | QuantizedRows]:
        """All rows of a decoder weight in order, at most ``max_bytes`` of float32 at a time, as they are stored."""
        num_rows, columns = self.specs[name].row_shape
        step = max(1, max_bytes // (columns * 4))
        for start in range(0, num_rows, step):
            yield self.rows(name, start, min(start + step, num_rows))

    def _read(self, stored_name: str, start: int, stop: int, columns: int) -> Array:
        stored = self.stored[stored_name]
        rows = np.empty((stop - start, columns), FLOATS[stored.dtype])
        self._files.read(stored.path, stored.start + start * columns * rows.itemsize, rows, stored_name)
        return rows

    @property
    def weight_paths(self) -> list[Path]:
        return weight_files(self.folder)

    def sources(self) -> dict[str, FileEntry]:
        """The files that this checkpoint is made of: weights by header, config.json whole."""
        entries = {path.name: hash_header(path) for path in self.weight_paths}
        return {**entries, "config.json": hash_file(self.folder / "config.json")}

    def write_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer files into ``folder``, which is made.

        Raises:
            ConfigError: one is missing, or does not fit the model.
        """
        copy_tokenizer(self.folder, folder, vocab_size=self.config.vocab_size)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def resolve_config(folder: Path, values: Mapping[str, Any]) -> ModelConfig:
    """The model of a checkpoint's config.json.

    Raises:
        ConfigError: it describes no model that this version exports.
    """
    config = ModelConfig.from_hf(values)
    if config.drafter is not None:
        raise ConfigError(
            f"{folder.name}: a drafter (assistant) has no KV of its own and cannot run alone",
            hint="give the checkpoint of its target model to --checkpoint",
        )
    return config


def read_config(folder: Path) -> Mapping[str, Any]:
    """The folder's config.json as a mapping."""
    path = folder / "config.json"
    if not path.is_file():
        cause = "no config.json in it" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {cause}", hint="--checkpoint takes a folder with config.json and *.safetensors")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})", hint="fetch the file again") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(config).__name__}", hint="fetch the file again")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, else the single file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index.name}: no weight_map ({error!r})", hint="fetch the file again") from error
        elsewhere = [name for name in names if not name or Path(name).name != name]
        if elsewhere:
            raise CheckpointError(
                f"{index.name}: {elsewhere[0]!r} is not a file of this folder",
                hint="all safetensors files must lie beside the index that names them",
            )
        paths = [folder / name for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise CheckpointError(
                f"{index.name}: {len(missing)} of {len(paths)} files it names are missing, first {missing[0]}",
                hint="the download is incomplete; fetch the missing files",
            )
        return paths
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json",
            hint="PyTorch .bin checkpoints are not read; use the safetensors one, or a Q4_0 or Q8_0 GGUF",
        )
    return [single]


def read_all_headers(folder: Path) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_header(path).items():
            if name in stored:
                raise CheckpointError(
                    f"{name}: stored twice, in {stored[name].path.name} and {path.name}",
                    hint="the files are of different checkpoints; fetch the folder again",
                )
            stored[name] = tensor
    return stored


def _per_expert(spec: TensorSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a fused expert weight's parts where experts are kept one by one, in row order."""
    base, kind = spec.name.rsplit(".", 1)
    num_experts, num_rows, columns = spec.shape
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return {
        f"{base}.{expert}.{part}.weight": (num_rows // len(parts), columns)
        for expert in range(num_experts)
        for part in parts
    }
