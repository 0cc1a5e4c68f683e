"""What ``gemma4-export build`` asks of the builder: ``python -m gemma4_export.runtime.engine REQUEST``.

REQUEST is a JSON object: ``backend`` and ``compute_capability`` to be checked, and ``plugins``, whether graphs need
ours; or ``folder``, an artifact that is being built, to be compiled with ``memory_bytes``. Answers are JSON objects, a
line each: ``line``, ``done`` and ``total`` for every engine, then one with ``error``, or ``{}`` when all went well.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError, Gemma4Error
from gemma4_export.configs.manifest import MANIFEST_NAME, Manifest
from gemma4_export.plugins.compile import LIBRARY
from gemma4_export.runtime.engine.artifact import capability_number, check_builder, compile_artifact
from gemma4_export.runtime.engine.build import BuiltEngine
from gemma4_export.runtime.engine.report import engine_line


def answer(request: Mapping[str, Any]) -> None:
    """Do what ``request`` asks and print the answers."""
    try:
        if "folder" in request:
            _compile(Path(request["folder"]), request["memory_bytes"])
        else:
            capabilities = (capability_number(request["compute_capability"]),)
            check_builder(request["backend"], capabilities, plugins=LIBRARY if request["plugins"] else None)
    except Gemma4Error as error:
        _say(error={"kind": type(error).__name__, "cause": error.cause, "hint": error.hint})
    except OSError as error:
        cause = f"{error.filename or 'engines'}: {error.strerror or error}"
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = f"{'free some space' if is_full else 'mend that'} and run it again"
        _say(error={"kind": ArtifactError.__name__, "cause": cause, "hint": hint})
    else:
        _say()


def _compile(folder: Path, memory_bytes: int | None) -> None:
    # Not Artifact.open: the build that asks holds the folder's lock, and has just written every file.
    artifact = Artifact(folder, Manifest.from_json((folder / MANIFEST_NAME).read_text(encoding="utf-8")))
    engines = artifact.manifest.engines
    total, done = len(engines.groups) if engines else 0, 0

    def on_built(engine: BuiltEngine) -> None:
        nonlocal done
        done += 1
        _say(line=engine_line(artifact.manifest, engine), done=done, total=total)

    compile_artifact(artifact, memory_bytes=memory_bytes, on_built=on_built)


def _say(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")  # in one write: engines end in several threads
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        answer(json.loads(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
