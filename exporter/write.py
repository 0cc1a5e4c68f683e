"""Writes the weights stage: slices read, quantised, packed, appended and released, with a journal that survives a kill.

Files only grow at their end, one weight after the other, so a build that was killed goes on behind the last weight that
its journal names. Memory stays at a few slices and one weight's scales, whatever the tensor.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from gemma4_export.configs.errors import ConfigError, Gemma4Error
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import FileEntry
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.names import TensorSpec
from gemma4_export.configs.output import naming
from gemma4_export.exporter.packing import matmul_scales, offset_codes
from gemma4_export.exporter.quantize import Float32, QuantizedRows, check_finite, dequantize, quantize
from gemma4_export.exporter.weights import WEIGHTS_FOLDER, PlacedWeight, Placement, StoredWeight

Array = np.ndarray[Any, np.dtype[Any]]

JOURNAL_NAME = "journal.jsonl"
_SLICE_BYTES = 16 << 20  # of float32: small enough for caches, large enough that Python costs nothing
_WORKERS = 2  # slices in work at once; NumPy frees the interpreter while it computes
_SPARE_BYTES = 64 << 20  # disk room for graphs, tokenizer and manifest


class WeightSource(Protocol):
    """Where a decoder comes from: a checkpoint, a quantised one, or a random generator."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def not_packed(self) -> Sequence[str]: ...
    @property
    def wide_scales(self) -> Collection[str]:
        """Weights that come with scales which float16 does not hold; every table of these needs float32 ones."""
        ...

    def slices(self, name: str, form: WeightFormat, max_bytes: int) -> Iterator[Array | QuantizedRows]:
        """The rows of a weight in order; already quantised where the source holds codes."""
        ...

    @property
    def weight_paths(self) -> Sequence[Path]:
        """The files that hold the weights. When one of them changes, a killed build does not go on but starts again."""
        ...

    def sources(self) -> dict[str, FileEntry]:
        """The files that decide the weights."""
        ...

    def write_tokenizer(self, folder: Path) -> None:
        """Make ``folder`` with the tokenizer files."""
        ...


@dataclass(slots=True)
class WeightStats:
    """What became of one weight, or summed, of one role."""

    parameters: int = 0
    bytes: int = 0
    square_sum: float = 0.0
    error_square_sum: float = 0.0
    codes: int = 0
    codes_kept: int = 0
    """Codes copied from a quantised source as they were."""

    def add(self, other: WeightStats) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True, slots=True)
class _Slice:
    """What one slice of rows becomes: bytes of values or codes, scales, and its share of the statistics."""

    values: Array
    scales: Array | None
    stats: WeightStats


@dataclass(slots=True)
class Written:
    """The result of the weights stage."""

    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """File -> bytes, sha256."""
    stats: dict[str, WeightStats] = field(default_factory=dict)
    """Weight -> what became of it."""


def write_weights(
    source: WeightSource, placement: Placement, folder: Path, *, key: str, on_bytes: Callable[[str, int], None]
) -> Written:
    """Write every weight of ``placement`` below ``folder``, going on where a killed build with the same ``key`` ended.

    Args:
        key: names everything that decides the bytes; a journal with another key is thrown away. The journal stays when
            all is written, for a build that is killed in a later stage.
        on_bytes: called with a weight's name and the bytes just written (or found written).
    Raises:
        CheckpointError: NaN or Inf in a weight, or a damaged file.
        Gemma4Error: the disk is full; the same build goes on from what is written.
    """
    journal = _Journal(folder / JOURNAL_NAME, key)
    _prepare(placement, folder)
    written, files = Written(), {name: _HashedFile(folder / name) for name in placement.num_bytes}
    try:
        with ThreadPoolExecutor(_WORKERS) as pool:
            is_resuming = True
            for weight in placement.stored:
                file, entry = files[weight.placed.file], journal.entries.get(weight.name)
                is_resuming = is_resuming and entry is not None and file.resume(entry.end, entry.sha256)
                if is_resuming:
                    written.stats[weight.name] = journal.entries[weight.name].stats
                else:
                    written.stats[weight.name] = _write_one(source, weight, file, pool)
                    journal.add(weight.name, file, written.stats[weight.name])
                on_bytes(weight.name, weight.placed.code_bytes + weight.placed.scale_bytes)
        for name, finished in files.items():
            finished.truncate()
            written.files[name] = (finished.num_bytes, finished.hash.hexdigest())
    finally:
        for opened in files.values():
            opened.close()
    return written


def _write_one(source: WeightSource, weight: StoredWeight, file: _HashedFile, pool: ThreadPoolExecutor) -> WeightStats:
    placed, stats = weight.placed, WeightStats()
    file.pad_to(placed.offset)
    scales: list[Array] = []

    def convert(rows: Array | QuantizedRows) -> _Slice:
        return _convert(rows, placed, weight.name)

    for done in _in_order(pool, convert, source.slices(weight.source, placed.format, _SLICE_BYTES)):
        file.write(done.values)
        if done.scales is not None:
            scales.append(done.scales)
        stats.add(done.stats)
    if placed.scales is not None:
        file.pad_to(placed.scales.offset)
        for part in scales:
            file.write(part)
    expected = placed.row_shape[0] * placed.row_shape[1]
    assert stats.parameters == expected, f"{weight.name}: wrote {stats.parameters} of {expected} values"
    stats.bytes = placed.code_bytes + placed.scale_bytes
    return stats


def _convert(rows: Array | QuantizedRows, placed: PlacedWeight, name: str) -> _Slice:
    form = placed.format
    if not form.is_quantized:
        values = dequantize(rows) if isinstance(rows, QuantizedRows) else rows
        with np.errstate(invalid="ignore"):  # NaN is refused in the next line, with a name
            largest = np.abs(values).max(initial=0)
        if not np.isfinite(largest):
            check_finite(values, name)
        stored = values.astype(np.float32 if form.kind == "float32" else ml_dtypes.bfloat16, copy=False)
        stats = WeightStats(parameters=values.size)
        if stored.dtype != values.dtype:
            original = values.astype(np.float32, copy=False)
            stats.square_sum = _squares(original)
            stats.error_square_sum = _squares(stored.astype(np.float32) - original)
        return _Slice(np.ascontiguousarray(stored), None, stats)
    wide: Float32 | None = None
    if isinstance(rows, QuantizedRows) and rows.format == form:
        quantized, kept = rows, True
    else:
        wide = dequantize(rows) if isinstance(rows, QuantizedRows) else rows.astype(np.float32, copy=False)
        quantized, kept = quantize(wide, form, name), False
    columns = placed.row_shape[1]
    size = len(quantized.codes) * columns
    stats = WeightStats(parameters=size, codes=size, codes_kept=size if kept else 0)
    if wide is not None:
        stats.square_sum, stats.error_square_sum = _squares(wide), _squares(dequantize(quantized) - wide)
    assert placed.scales is not None
    if placed.scales.per_row == quantized.scales.shape[1]:
        scales = quantized.scales.astype(placed.scales.dtype, copy=False)
        assert not kept or np.array_equal(scales, quantized.scales), f"{name}: {placed.scales.dtype} rounds its scales"
    else:
        scales = matmul_scales(quantized, columns)
    codes = quantized.codes if placed.has_signed_codes else offset_codes(quantized)
    return _Slice(np.ascontiguousarray(codes), np.ascontiguousarray(scales), stats)


def _squares(values: Float32) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Array | QuantizedRows], _Slice], items: Iterator[Array | QuantizedRows]
) -> Iterator[_Slice]:
    """``map`` with a short queue: results in order, and never more than a few slices alive."""
    queue: deque[Future[_Slice]] = deque()
    for item in items:
        queue.append(pool.submit(work, item))
        if len(queue) > _WORKERS:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()


def _prepare(placement: Placement, folder: Path) -> None:
    """Make the folders. Files of a killed build that stored other weights go: packaging takes whatever is there."""
    wanted = {folder / file for file in placement.num_bytes}
    for path in wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
    for path in {path.parent for path in wanted}:
        for leftover in set(path.iterdir()) - wanted:
            leftover.unlink()


def check_room(
    placement: Placement,
    work: Path,
    *,
    oracle_bytes: int,
    engine_bytes: int = 0,
    cache: Path | None = None,
    download_bytes: int = 0,
) -> None:
    """Refuse before the first byte what the disk cannot hold.

    Args:
        work: the folder that the artifact is written in. It need not be there yet; what a stopped build left in it is
            written over or removed, and counts as room.
        oracle_bytes: of the record that is made from the weights.
        engine_bytes: of engines that are compiled from them.
        cache: where ``download_bytes`` of the checkpoint are still to come to; they count where it shares a disk with
            ``work``.
    Raises:
        ConfigError: the disk has less room.
    """
    sizes = {work / file: size for file, size in placement.num_bytes.items()}
    files = [path for path in (work / WEIGHTS_FOLDER).glob("*") if path.is_file()]
    # A file that is longer than it will be is cut last of all.
    there = sum(min(path.stat().st_size, sizes.get(path, path.stat().st_size)) for path in files)
    disk = _existing(work)
    free, artifact = shutil.disk_usage(disk).free + there, sum(sizes.values()) + oracle_bytes + _SPARE_BYTES
    artifact += engine_bytes
    shares = cache is not None and _existing(cache).stat().st_dev == disk.stat().st_dev
    download = download_bytes if shares else 0
    if free < artifact + download:
        besides = f" beside a download of {download / 1e9:.2f} GB" if download else ""
        elsewhere = ", or set HF_HOME to one" if download else ""
        raise ConfigError(
            f"{work}: the artifact needs {artifact / 1e9:.2f} GB{besides}, the disk has {free / 1e9:.2f} GB free",
            hint=f"free some room, give an --out on another disk{elsewhere}, or use a smaller recipe: --recipe int4",
        )


def _existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


class _HashedFile:
    """A file that is only appended to, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.path, self.hash, self.num_bytes = path, hashlib.sha256(), 0
        self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)  # noqa: SIM115, PTH123

    def resume(self, end: int, digest: str) -> bool:
        """Take the bytes up to ``end`` as written if they are what the journal says."""
        probe = self.hash.copy()
        self._file.seek(self.num_bytes)
        left = end - self.num_bytes
        while left > 0 and (block := self._file.read(min(left, 1 << 24))):
            probe.update(block)
            left -= len(block)
        if left or probe.hexdigest() != digest:
            return False
        self.hash, self.num_bytes = probe, end
        return True

    def write(self, data: Array | bytes) -> None:
        buffer = memoryview(data if isinstance(data, bytes) else data.view(np.uint8).data).cast("B")
        done = 0
        try:
            while done < len(buffer):
                done += os.pwrite(self._file.fileno(), buffer[done:], self.num_bytes + done)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                error.filename = str(self.path)
                raise
            raise Gemma4Error(
                f"{self.path}: the disk is full, {(self.num_bytes + done) / 1e9:.2f} GB of this file are written",
                hint="free some room and run the same build again: it goes on from here",
            ) from error
        self.hash.update(buffer)
        self.num_bytes += len(buffer)

    def pad_to(self, offset: int) -> None:
        assert offset >= self.num_bytes, f"{self.path.name}: at {self.num_bytes}, next weight at {offset}"
        self.write(bytes(offset - self.num_bytes))

    def truncate(self) -> None:
        """Drop what a killed build left behind the last weight."""
        self._file.truncate(self.num_bytes)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class _Finished:
    """A weight that is written: where it ends in its file, the hash of the file up to there, and its statistics."""

    end: int
    sha256: str
    stats: WeightStats


def num_finished(folder: Path) -> int:
    """How many weights the journal in ``folder`` lists as written; 0 without one."""
    path = folder / JOURNAL_NAME
    return max(0, len(path.read_bytes().split(b"\n")) - 2) if path.is_file() else 0  # its key, and a line's end


class _Journal:
    """Finished weights, one JSON line each. A half-written last line was not finished and is ignored."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.entries = path, dict[str, _Finished]()
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        try:
            parsed = [json.loads(line) for line in lines]
            if parsed and parsed[0] == {"key": key}:
                for entry in parsed[1:]:
                    stats = WeightStats(**entry["stats"])
                    self.entries[entry["name"]] = _Finished(int(entry["end"]), str(entry["sha256"]), stats)
        except (ValueError, KeyError, TypeError):
            self.entries = {}
        with naming(path):
            if not self.entries:
                path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
            elif not path.read_bytes().endswith(b"\n"):
                path.write_bytes(b"\n".join(lines) + b"\n")

    def add(self, name: str, file: _HashedFile, stats: WeightStats) -> None:
        entry = {"name": name, "end": file.num_bytes, "sha256": file.hash.hexdigest(), "stats": asdict(stats)}
        with naming(self.path), self.path.open("ab") as journal:
            journal.write(json.dumps(entry).encode() + b"\n")


def relative_error(stats: WeightStats) -> float:
    """sqrt(sum of squared rounding errors / sum of squares); 0 where nothing was rounded."""
    return float(np.sqrt(stats.error_square_sum / stats.square_sum)) if stats.square_sum else 0.0
