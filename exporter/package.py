"""Writes an artifact folder whole or not at all: work happens in ``OUT.partial``, renamed when complete."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from gemma4_export.configs.errors import CheckpointError, ConfigError
from gemma4_export.configs.evidence import GRAPHS_FOLDER
from gemma4_export.configs.manifest import ENGINES_FOLDER, LOCK_NAME, MANIFEST_NAME, FileEntry
from gemma4_export.exporter.weights import WEIGHTS_FOLDER
from gemma4_export.exporter.write import JOURNAL_NAME, num_finished

_log = logging.getLogger(__name__)


def partial_of(out: Path) -> Path:
    """Where ``out`` is made before it has its name.

    Raises:
        ConfigError: ``out`` has no name.
    """
    if not out.name:
        raise ConfigError(f"--out {str(out)!r} names no new folder", hint="give a name, such as --out gemma4-e2b-cpu")
    return out.with_name(out.name + ".partial")


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A work folder beside ``out`` that becomes ``out`` when the block ends well.

    When the block is interrupted, killed, or the disk is full, the folder stays, and the next build of the same input
    goes on from its journal. When it raises because the input is wrong, the folder vanishes if no weight was finished.
    A build that still runs is refused by its lock.

    Raises:
        ConfigError: ``out`` exists, another build is writing it, or ``OUT.partial`` is not ours.
    """
    work = partial_of(out)
    _take_back(out, work)
    if out.exists() or out.is_symlink():
        # Only an artifact is ours to call removable: --out may name a checkpoint, or a whole home.
        is_artifact = (out / MANIFEST_NAME).is_file()
        hint = "give another --out" + (f", or remove it: rm -r {shlex.quote(str(out))}" if is_artifact else "")
        raise ConfigError(f"{out}: exists already", hint=hint)
    lock = work / LOCK_NAME
    if work.exists() and not lock.is_file() and (not work.is_dir() or any(work.iterdir())):
        raise ConfigError(f"{work}: exists and was not made by gemma4-export", hint="give another --out")
    work.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            owner = handle.read().strip() or "unknown process"
            raise ConfigError(
                f"{work}: another build is writing here ({owner})", hint="wait for it, or give another --out"
            ) from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        _remove_what_is_redone(work)
        try:
            yield work
        except (CheckpointError, ConfigError):
            _give_up(work)
            raise
        # Until the lock goes nobody loads the folder, whatever happens in between.
        work.rename(out)
        (out / JOURNAL_NAME).unlink(missing_ok=True)
        (out / LOCK_NAME).unlink()


def _give_up(work: Path) -> None:
    """Keep what took long to make: a damaged file or a disk that does not answer may be mended."""
    if finished := num_finished(work):
        command = f"rm -r {shlex.quote(str(work))}"
        _log.warning(
            "%s: %d finished weights are kept for the same build to go on from; or %s", work, finished, command
        )
    else:
        shutil.rmtree(work)


def _take_back(out: Path, work: Path) -> None:
    """A build killed between its last two steps left ``out`` with its lock: it is to go on like any other."""
    lock = out / LOCK_NAME
    if not lock.is_file() or work.exists():
        return
    with lock.open("a") as handle, contextlib.suppress(BlockingIOError):  # its build still runs: it exists already
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        out.rename(work)


def _remove_what_is_redone(work: Path) -> None:
    """Of a killed build the journal, the weight files that it describes and engines are worth keeping.

    Engines are named by what they were built from, so that none of another build is ever taken.
    """
    kept = (work / LOCK_NAME, work / JOURNAL_NAME, work / GRAPHS_FOLDER, work / ENGINES_FOLDER)
    weights = work / WEIGHTS_FOLDER
    for leftover in (*work.glob("*"), *(work / GRAPHS_FOLDER).glob("*")):
        if leftover not in kept and leftover != weights:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def hash_files(work: Path, known: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """Size and sha256 of every file in ``work`` but engines, those in ``known`` taken from there."""
    entries = dict(known)
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if name.startswith(f"{ENGINES_FOLDER}/"):  # a killed build's; compiling lists those that are still right
            continue
        if path.is_file() and name not in (LOCK_NAME, JOURNAL_NAME) and name not in entries:
            entries[name] = hash_file(path)
    return entries


def hash_file(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


def hash_header(path: Path) -> FileEntry:
    """A safetensors file by size and the sha256 of its header: hashing 60 GB would take longer than building."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    return FileEntry(bytes=path.stat().st_size, sha256=hashlib.sha256(length + header).hexdigest())
