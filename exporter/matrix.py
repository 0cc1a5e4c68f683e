"""Brings the artifacts of a matrix up to date, each by a `gemma4-export build` of its own.

An artifact gets its place when it is complete and verified; until then the one before it stays. Runs meet at a lock per
cell. It is handed to the build: of a runner that was killed alone, the build ends in peace, and the next runner waits
for it and takes what it made. A build that was killed as well is gone on with, from its journal.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from gemma4_export.configs.command_line import CHECK_FAILED, SKIPPED
from gemma4_export.configs.errors import ConfigError, Gemma4Error
from gemma4_export.configs.matrix import Cell
from gemma4_export.configs.models import ReleasedModel
from gemma4_export.configs.target import check_recipe
from gemma4_export.exporter.cell_folder import BOOKS, Built, CellFolder, files_sha256
from gemma4_export.exporter.cell_key import Inputs, changes, config_of, holds_plugins, inputs_of, key_of
from gemma4_export.exporter.child import VerifyLevel, verify_in_child
from gemma4_export.exporter.file_hashes import FileHashes
from gemma4_export.exporter.package import partial_of
from gemma4_export.plugins.compile import ensure_library

State = Literal["built", "up to date", "to build", "skipped", "failed"]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a cell in one run."""

    cell: str
    model: str
    target: str
    recipe: str
    state: State
    folder: str
    key: str = ""
    reason: str = ""
    """Why it was built, skipped or failed."""
    hint: str = ""
    bytes: int = 0
    seconds: float = 0.0
    """Of its build and verification, also where that was an earlier run's."""
    verified: str = ""
    """The verdict of `gemma4-run verify`, or why it was not asked."""


class _CellEndError(Exception):
    """Ends one cell; the others go on."""

    def __init__(self, state: State, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.state: State = state
        self.reason, self.hint = reason, hint


class Builds:
    """The builds that run now: they end when the run is interrupted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False

    def run(self, arguments: Sequence[str], log: Path, *, held: int) -> int:
        """The exit code of ``gemma4-export build`` with ``arguments``, its words in ``log``, holding ``held``."""
        command = [sys.executable, "-m", "gemma4_export.exporter", "build", *arguments]
        with log.open("wb") as words:
            with self._lock:
                self.check_running()
                build = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT, pass_fds=(held,))
                self._running.add(build)
            try:
                return build.wait()
            finally:
                with self._lock:
                    self._running.discard(build)

    def check_running(self) -> None:
        """Raise _CellEndError once `stop` was called."""
        if self._is_stopped:
            raise _CellEndError("failed", "interrupted")

    def stop(self) -> None:
        """End all, and start no more."""
        with self._lock:
            self._is_stopped = True
            for build in self._running:
                build.terminate()


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRun:
    """One run over a matrix, into the folder ``out``."""

    out: Path
    verify: VerifyLevel | None
    """None: nothing is verified."""
    say: Say
    hashes: FileHashes
    builds: Builds

    def result_of(self, cell: Cell, *, dry: bool) -> Result:
        """Bring one cell up to date, or ``dry`` only say what that would take."""
        folder = CellFolder(self.out, cell.name)
        result = Result(
            cell=cell.name,
            model=cell.model,
            target=cell.target.name,
            recipe=cell.recipe.name,
            state="to build",
            folder=str(folder.artifact),
        )
        try:
            if dry:
                return self._look(cell, folder, result)[0]
            with folder.locked(lambda is_first: self._wait(cell, is_first)) as lock:
                result, inputs = self._look(cell, folder, result)
                if result.state == "to build":
                    self.say(f"{cell.name}: building, {result.reason}")
                    result = self._build(cell, folder, result, inputs, lock)
        except _CellEndError as end:
            result = replace(result, state=end.state, reason=end.reason, hint=end.hint)
        except Gemma4Error as error:
            result = replace(result, state="failed", reason=error.cause, hint=error.hint or "")
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            result = replace(result, state="failed", reason=f"{where}{error.strerror or error}")
        self.say(
            f"{cell.name}: {result.state}" + (f": {result.reason}" if result.state in ("skipped", "failed") else "")
        )
        return result

    def _wait(self, cell: Cell, is_first: bool) -> None:
        self.builds.check_running()
        if is_first:
            self.say(f"{cell.name}: waiting for another run")

    def _look(self, cell: Cell, folder: CellFolder, result: Result) -> tuple[Result, Inputs]:
        """Whether the artifact is there, and why not."""
        built = folder.built()
        if built is None:
            folder.check_ours()
            _check_suits(cell)  # before the hub is asked for what it would never be asked to send
        inputs = inputs_of(cell, self.hashes)
        key = key_of(inputs)
        result = replace(result, key=key)
        if built is None:
            reason = "new"
        elif key != key_of(built.inputs):
            reason = f"changed: {changes(built.inputs, inputs)}"
        elif fault := folder.fault(built, key):
            reason = f"damaged: {fault}"
        else:
            same = replace(result, bytes=built.bytes, seconds=built.seconds, verified=built.verified)
            return replace(same, state="up to date"), inputs
        work = folder.work(key)
        if work.exists() or partial_of(work).exists():
            reason = f"interrupted before ({reason})"
        if built is not None:
            _check_suits(cell)
        return replace(result, state="to build", reason=reason), inputs

    def _build(self, cell: Cell, folder: CellFolder, result: Result, inputs: Inputs, lock: int) -> Result:
        started = time.monotonic()
        folder.prune(result.key)
        manifest = folder.finished(result.key)
        if manifest is None:
            if holds_plugins(cell):
                ensure_library(self.say)
            code = self.builds.run(_build_arguments(cell, folder.work(result.key)), folder.log, held=lock)
            manifest = folder.finished(result.key)
            if code != 0 or manifest is None:
                _end_failed_build(code, folder.log)
        verified = self._verified(cell, folder.work(result.key))
        if late := changes(inputs, inputs_of(cell, self.hashes)):
            raise _CellEndError("failed", f"changed during the build: {late}", "run it again")
        built = Built(
            inputs=inputs,
            files_sha256=files_sha256(manifest),
            bytes=sum(entry.bytes for entry in manifest.files.values()),
            seconds=round(time.monotonic() - started, 1),
            verified=verified,
        )
        folder.publish(result.key, built)
        return replace(result, state="built", bytes=built.bytes, seconds=built.seconds, verified=verified)

    def _verified(self, cell: Cell, work: Path) -> str:
        if self.verify is None:
            return "no: verification is off"
        verdict = verify_in_child(work, self.verify)
        if not verdict.passed:
            reason = verdict.error.removeprefix("error: ").partition("\n")[0] or verdict.text
            raise _CellEndError("failed", f"built, not verified: {reason}", f"gemma4-run verify {work}")
        return f"{self.verify}: {verdict.text}"


def run_matrix(
    cells: Sequence[Cell], out: Path, *, verify: VerifyLevel | None, jobs: int, say: Say, dry: bool = False
) -> list[Result]:
    """Bring ``cells`` up to date below ``out``, ``jobs`` at a time. A cell that fails keeps no other from building.

    Args:
        dry: build nothing; the state of what is not there is "to build".
    """
    hashes, builds = FileHashes(out / BOOKS / "hashes.json"), Builds()
    run = MatrixRun(out=out, verify=verify, say=say, hashes=hashes, builds=builds)
    with ThreadPoolExecutor(jobs) as pool:
        try:  # around all of it: leaving the pool waits for what runs in it
            futures = [pool.submit(run.result_of, cell, dry=dry) for cell in cells]
            results = [future.result() for future in futures]
        except BaseException:
            builds.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if not dry:
        try:
            hashes.save()
        except OSError as error:  # only a memory: it must not cost the table of what was built
            say(f"hashes are not remembered, the next run reads every checkpoint again: {error}")
    return results


def exit_code(results: Sequence[Result]) -> int:
    """0: all are there; 1: one failed; 3: none failed, and one was left out because it does not fit."""
    states = {result.state for result in results}
    return CHECK_FAILED if "failed" in states else SKIPPED if "skipped" in states else 0


def _build_arguments(cell: Cell, out: Path) -> list[str]:
    options = {
        "--checkpoint" if cell.checkpoint else "--model": cell.checkpoint or cell.model,
        "--target": cell.target.name,
        "--recipe": cell.recipe_argument,
        "--weights": "dummy" if cell.has_dummy_weights else None,
        "--context": cell.context,
        "--chunk": cell.chunk,
        "--engines": cell.engines,
        "--verify": "off",  # done by the runner: what it found goes into the table
        "--out": out,
    }
    return [text for name, value in options.items() if value is not None for text in (name, str(value))]


def _end_failed_build(code: int, log: Path) -> NoReturn:
    """Raise _CellEndError with the last error that a build told, or with how it ended without one."""
    words = log.read_text(encoding="utf-8", errors="replace")
    _, told, error = words.rpartition("error: ")
    cause, _, rest = error.partition("\n")
    if not told:
        end = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        raise _CellEndError("failed", f"the build ended with {end}", f"its words are in {log}")
    raise _CellEndError("failed", cause, rest.partition("hint: ")[2].partition("\n")[0])


def _check_suits(cell: Cell) -> None:
    """Leave out what is larger than its target, or in formats that it has no products for.

    A target without a stated memory is the machine that the artifact will run on, of which nothing is known here; of a
    model that only the hub knows nothing is known before its download.

    Raises:
        _CellEndError: weights, KV and scratch need more memory than the target has, or the recipe is not for it.
    """
    try:
        check_recipe(cell.target, cell.recipe)
    except ConfigError as error:
        raise _CellEndError("skipped", error.cause, error.hint or "") from error
    config = None if cell.target.memory_bytes is None else config_of(cell)
    if config is None:
        return
    from gemma4_export.exporter.plan import check_fits, make_plan, resolve_plan

    released = cell.released or ReleasedModel(
        name=cell.model, title="", hub_id="", checkpoint_bytes=0, config=config, qat=None
    )
    # dummy: what a download would take is not asked here
    options = resolve_plan(
        released, target=cell.target, recipe=cell.recipe, dummy=True, context=cell.context, chunk=cell.chunk
    )
    try:
        check_fits(make_plan(released, options), released, options)
    except ConfigError as error:
        raise _CellEndError("skipped", error.cause, error.hint or "") from error
