"""One build in a process of its own: ``python -m gemma4_export.runtime.engine.child FOLDER PROGRESS_FD``.

``FOLDER/request.json`` says what to build. The engine, the build log (this process's output) and ``outcome.json`` are
left in the folder; without an outcome the library ended the process. Progress goes to the descriptor, one JSON list a
line.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma4_export.configs.errors import ArtifactError, Gemma4Error
from gemma4_export.configs.manifest import ENGINE_NAME
from gemma4_export.runtime.engine.module import ModuleBuilder, check_tensorrt_version
from gemma4_export.runtime.engine.outcome import OUTCOME_NAME, BuildLog
from gemma4_export.runtime.engine.plugins import library_contracts
from gemma4_export.runtime.engine.request import EngineRequest

_PR_SET_PDEATHSIG = 1
_STEP_EVERY_S = 0.2


def main(folder: Path, progress_fd: int) -> None:
    # A killed build must not leave this process behind, working for nobody. Ctrl-C is the parent's, which kills this:
    # Python would see it only between two calls of the library, minutes later.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    values = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        outcome = _build(
            EngineRequest.from_json(values["request"]),
            values["library"],
            BuildLog(sys.stderr, values["log"]),
            folder,
            progress_fd,
        )
    except Gemma4Error as error:
        outcome = {"error": {"kind": type(error).__name__, "cause": error.cause, "hint": error.hint}}
    except OSError as error:
        cause = f"{error.filename or folder}: {error.strerror or error}"
        outcome = {
            "error": {"kind": ArtifactError.__name__, "cause": cause, "hint": "free some space and run it again"}
        }
    (folder / OUTCOME_NAME).write_text(json.dumps(outcome), encoding="utf-8")


def _build(
    request: EngineRequest, library: dict[str, Any], log: BuildLog, folder: Path, progress_fd: int
) -> dict[str, Any]:
    contracts: dict[str, int] = {}
    for plugin in request.plugins:
        contracts |= library_contracts(plugin)
    builder = _builder(library, log)
    # Unbuffered: a full disk shows in the write that hits it.
    with (folder / ENGINE_NAME).open("wb", buffering=0) as file, os.fdopen(progress_fd, "w") as pipe:
        last = 0.0

        def progress(phase: str, done: int, steps: int) -> None:
            nonlocal last
            if time.monotonic() - last > _STEP_EVERY_S:
                last = time.monotonic()
                print(json.dumps([phase, done, steps]), file=pipe, flush=True)

        network = builder.build(request, file, progress)
    return {
        "inputs": [asdict(tensor) for tensor in network.inputs],
        "outputs": [asdict(tensor) for tensor in network.outputs],
        "weights_bytes": log.weights_bytes,
        "scratch_bytes": log.scratch_bytes,
        "plugins": contracts,
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> int:
    """Bytes. Not getrusage: its maximum begins with what the parent held when it forked."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _builder(library: dict[str, Any], log: BuildLog) -> Any:
    if library["module"] is None:
        from gemma4_export.runtime.engine.library import rtx_library_in
        from gemma4_export.runtime.engine.rtx import RtxBuilder

        return RtxBuilder(rtx_library_in(Path(library["folder"])), log)
    module = importlib.import_module(library["module"])
    if library["module"] == "tensorrt":
        check_tensorrt_version(module.__version__)
    return ModuleBuilder(module, log)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
