"""Engines of an artifact: each built in a child process, kept by content, several at once where memory allows."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_export.configs import errors
from gemma4_export.configs.errors import ArtifactError, Gemma4Error
from gemma4_export.configs.manifest import ENGINE_NAME
from gemma4_export.runtime.engine.library import find_rtx_library
from gemma4_export.runtime.engine.outcome import OUTCOME_NAME, ended
from gemma4_export.runtime.engine.record import EngineRecord, TensorRecord, read_record, write_record
from gemma4_export.runtime.engine.request import Builder, EngineRequest
from gemma4_export.runtime.memory import available_bytes

LOG_NAME = "build.log"
MEMORY_PER_WEIGHT_BYTE = 5.9
"""Peak of a build above `BASE_MEMORY_BYTES`, over its weights, at most; docs/engines.md has what was seen.

Layers take less, those with experts in our plugin half of it; a head alone takes all of it.
"""
BASE_MEMORY_BYTES = 1_000_000_000
"""What a child takes beside its weights: the library is 234 MB, kernels for three GPUs are as much again."""
Progress = Callable[[str, str, int, int], None]
"""(graph, phase, steps done, steps in all); called from several threads."""
OnBuilt = Callable[["BuiltEngine"], None]
"""Called as each engine is there; from several threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine in its folder; ``seconds`` and ``peak_memory_bytes`` are 0 where it was there already."""

    folder: Path
    record: EngineRecord
    was_cached: bool
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """For machines: what it is, and what building it took."""
        return {
            "graph": self.record.graph,
            "folder": str(self.folder),
            "bytes": self.record.engine_bytes,
            "weights_bytes": self.record.weights_bytes,
            "scratch_bytes": self.record.scratch_bytes,
            "was_cached": self.was_cached,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """What builds: NVIDIA's module by name, or the libraries in a folder."""

    module: str | None
    folder: Path | None
    version: str


def nothing(*progress: object) -> None:
    pass


def build_engine(request: EngineRequest, engines: Path, progress: Progress = nothing) -> BuiltEngine:
    """Compile one graph into ``engines/KEY/``, or find it there.

    Args:
        request: graph, profiles and GPUs.
        engines: folder that holds one folder per engine, named by what it was built from. A failed build leaves
            ``KEY.log`` in it.
    Raises:
        ConfigError: the request asks for what no builder does.
        ContractError: the profiles do not fit the graph.
        ArtifactError: no library, a library of another version, or a build that failed; the cause says where.
    """
    request.check()
    library = find_library(request.builder)
    key = request.key(library.version)
    folder = engines / key
    if folder.is_dir():
        try:
            return _found(folder)
        except ArtifactError as error:
            progress(request.graph.name, f"building again: {error.cause}", 0, 1)
            shutil.rmtree(folder)
    started = time.perf_counter()
    partial = engines / f"{key}.partial-{os.getpid()}-{threading.get_ident()}"
    partial.mkdir(parents=True)
    try:
        log = engines / f"{key}.log"
        outcome = _run_child(request, library, partial, log, progress)
        record = _record(request, library, key, partial, outcome)
        write_record(partial, record)
        log.replace(partial / LOG_NAME)
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return BuiltEngine(
        folder=folder,
        record=record,
        was_cached=False,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=outcome["peak_memory_bytes"],
    )


def build_engines(
    requests: Sequence[EngineRequest],
    engines: Path,
    *,
    memory_bytes: int | None = None,
    progress: Progress = nothing,
    on_built: OnBuilt = nothing,
) -> list[BuiltEngine]:
    """Compile several graphs, as many at once as ``memory_bytes`` and the processors allow, in the order given.

    Args:
        memory_bytes: what all builds together may take; None: what the machine has free now. One graph is always built,
            whatever it is estimated to need.
    Raises:
        As `build_engine`; the first failure waits for the builds that are under way and starts no other. Ctrl-C ends
        them.
    """
    _remove_abandoned(engines)
    free = available_bytes() if memory_bytes is None else memory_bytes
    turns = _Turns(sys.maxsize if free is None else free)

    def build(request: EngineRequest) -> BuiltEngine:
        with turns.of(build_memory(request.weights_bytes)):
            engine = build_engine(request, engines, progress)
        on_built(engine)
        return engine

    with ThreadPoolExecutor(max(1, min(len(requests), os.cpu_count() or 1))) as pool:
        running = [pool.submit(build, request) for request in requests]
        try:
            return [future.result() for future in running]
        except BaseException as error:
            for future in running:
                future.cancel()
            if not isinstance(error, Gemma4Error):
                _kill_children()
            raise


def build_memory(weights_bytes: int) -> int:
    """Bytes that building a graph with these weights takes at its peak, estimated."""
    return BASE_MEMORY_BYTES + int(MEMORY_PER_WEIGHT_BYTE * weights_bytes)


def free_engines(engines: Path, used: Sequence[BuiltEngine]) -> list[Path]:
    """Folders of engines that none of ``used`` is: of an earlier build, library or set of profiles."""
    kept = {engine.folder for engine in used}
    return sorted(path for path in engines.iterdir() if path.is_dir() and path not in kept)


_children: set[subprocess.Popen[bytes]] = set()


def _kill_children() -> None:
    """End the builds under way: their threads wait for them, and nobody for the threads."""
    for child in tuple(_children):
        child.kill()


class _Turns:
    """Lets a build in when its memory fits beside that of the others, and always when it is alone."""

    def __init__(self, memory_bytes: int) -> None:
        self._free, self._running = memory_bytes, 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, num_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0 or num_bytes <= self._free)
            self._running += 1
            self._free -= num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._free += num_bytes
                self._changed.notify_all()


def _found(folder: Path) -> BuiltEngine:
    return BuiltEngine(
        folder=folder, record=read_record(folder, check_engine=True), was_cached=True, seconds=0.0, peak_memory_bytes=0
    )


def find_library(builder: Builder) -> Library:
    """The official module where it is installed, else the libraries of the onnxruntime wheel.

    Raises:
        ArtifactError: neither is there, or it is damaged or of a version that is not known.
    """
    module = builder.replace("-", "_")
    if importlib.util.find_spec(module) is not None:
        return Library(module=module, folder=None, version=_module_version(module))
    if builder == "tensorrt":
        raise ArtifactError(
            "TensorRT is not installed: engines for this GPU need it",
            hint='pip install "gemma4-export[tensorrt]" on the device, then gemma4-run build ARTIFACT there',
        )
    library = find_rtx_library()
    return Library(module=None, folder=library.core.parent, version=library.version)


def _module_version(module: str) -> str:
    """Asked in a process of its own: importing loads hundreds of megabytes, or fails for want of a library."""
    code = f"import {module}; print({module}.__version__)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        reason = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        raise ArtifactError(
            f"{module} is installed and does not import: {reason}",
            hint="its libraries must be on the loader's path (LD_LIBRARY_PATH)",
        )
    return asked.stdout.strip().splitlines()[-1]


def _run_child(
    request: EngineRequest, library: Library, folder: Path, log_path: Path, progress: Progress
) -> dict[str, Any]:
    values = {"module": library.module, "folder": None if library.folder is None else str(library.folder)}
    text = json.dumps({"request": request.to_json(), "library": values, "log": str(log_path)})
    (folder / "request.json").write_text(text, encoding="utf-8")
    environment = dict(os.environ)
    if library.module is None:
        links = str(find_rtx_library().link_into(folder / "lib"))
        paths = [links, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "gemma4_export.runtime.engine.child", str(folder), str(write_end)]
    with log_path.open("wb") as log, os.fdopen(read_end) as lines:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, pass_fds=[write_end]
            )
            _children.add(child)
        finally:
            os.close(write_end)  # the child's copy alone is left, so that its end is the end of the lines
        try:
            for line in lines:
                progress(request.graph.name, *json.loads(line))
        except BaseException:
            child.kill()
            raise
        finally:
            status = child.wait()
            _children.discard(child)
    return _outcome(request, folder, status, log_path)


def _outcome(request: EngineRequest, folder: Path, status: int, log: Path) -> dict[str, Any]:
    path = folder / OUTCOME_NAME
    if not path.is_file():
        raise ended(request, status, log)
    try:
        outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # cut short: the disk was full
        raise ended(request, status, log) from None
    if "error" in outcome:
        error = outcome["error"]
        raise getattr(errors, error["kind"])(error["cause"], hint=error["hint"])
    return outcome


def _record(request: EngineRequest, library: Library, key: str, folder: Path, outcome: dict[str, Any]) -> EngineRecord:
    def tensors(name: str) -> tuple[TensorRecord, ...]:
        return tuple(TensorRecord(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in outcome[name])

    with (folder / ENGINE_NAME).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return EngineRecord(
        key=key,
        builder=request.builder,
        library_version=library.version,
        graph=request.graph.name,
        compute_capabilities=request.compute_capabilities,
        profiles={name: dict(ranges) for name, ranges in request.profiles.items()},
        inputs=tensors("inputs"),
        outputs=tensors("outputs"),
        weights_bytes=outcome["weights_bytes"],
        scratch_bytes=outcome["scratch_bytes"],
        plugins=outcome["plugins"],
        engine_bytes=(folder / ENGINE_NAME).stat().st_size,
        engine_sha256=sha256,
    )


def _move(partial: Path, folder: Path) -> None:
    """Give a finished build its name; another process that was faster with the same one has made an equal engine."""
    for name in ("request.json", OUTCOME_NAME):
        (partial / name).unlink()
    shutil.rmtree(partial / "lib", ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _remove_abandoned(engines: Path) -> None:
    """Folders of builds whose process is gone: it was killed."""
    for path in engines.glob("*.partial-*"):
        pid = path.name.rpartition(".partial-")[2].partition("-")[0]
        if not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
