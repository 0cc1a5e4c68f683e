"""The runtime in a process of its own: the exporter imports none of it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gemma4_export.configs import errors
from gemma4_export.configs.command_line import CHECK_FAILED
from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.manifest import MANIFEST_NAME, Manifest
from gemma4_export.configs.target import Target

OnEngine = Callable[[str, int, int], None]
"""Called with a line about each engine as it is there, and how many of how many are."""
VerifyLevel = Literal["layers", "full"]


class Verdict(NamedTuple):
    """What ``gemma4-run verify`` found."""

    passed: bool
    text: str | None
    """One line; None where it found nothing."""
    error: str
    """Lines about what kept it from beginning, or from ending well; "" where it told its verdict and saved it."""


def verify_in_child(folder: Path, level: VerifyLevel) -> Verdict:
    """Hold the artifact in ``folder`` to its oracle."""
    command = [sys.executable, "-m", "gemma4_export.runtime", "verify", str(folder), "--level", level, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    code = ended.returncode
    # of a child that was killed the report may be cut off
    report = json.loads(ended.stdout) if ended.stdout and code in (0, CHECK_FAILED) else None
    passed, text = (False, None) if report is None else (report["passed"], report["verdict"])
    if code == 0:
        return Verdict(passed, text, "")
    _, told, error = f"\n{ended.stderr}".rpartition("\nerror: ")  # behind its progress
    if told:  # also by a child that printed its verdict and could not save it
        return Verdict(False, text, f"error: {error}")
    if report is not None and not passed:
        return Verdict(False, text, "")
    end = f"signal {-code}" if code < 0 else f"exit code {code}"
    again = f"gemma4-run verify {shlex.quote(str(folder))}"
    return Verdict(False, text, f"error: gemma4-run verify ended by {end}\nhint: {again}\n")


def check_engine_builder(target: Target, *, needs_plugins: bool) -> None:
    """Refuse now a target whose engines nothing here can compile, not when the weights are written.

    Raises:
        ArtifactError: no builder, one of another version, or no plugins.
    """
    request = {
        "backend": target.built_backend,
        "compute_capability": target.compute_capability,
        "plugins": needs_plugins,
    }
    try:
        for _ in _ask_engine_builder(request):
            pass
    except ArtifactError as error:
        raise ArtifactError(
            f"target {target.name}: {error.cause}",
            hint=f"{error.hint}; or --engines later here, and gemma4-run build ARTIFACT where it can",
        ) from error


def compile_engines(folder: Path, *, memory_bytes: int | None, on_engine: OnEngine) -> Manifest:
    """Compile what was written into ``folder``; returns its manifest, which lists the engines now.

    Raises:
        ArtifactError, ConfigError, ContractError: as ``runtime/engine/artifact.py`` raises them.
    """
    for said in _ask_engine_builder({"folder": str(folder), "memory_bytes": memory_bytes}):
        on_engine(said["line"], said["done"], said["total"])
    return Manifest.from_json((folder / MANIFEST_NAME).read_text(encoding="utf-8"))


def _ask_engine_builder(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The answers of ``python -m gemma4_export.runtime.engine`` but for the last one."""
    command = [sys.executable, "-m", "gemma4_export.runtime.engine", json.dumps(request)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said: dict[str, Any] = {"line": ""}
        for line in child.stdout:
            said = json.loads(line)
            if "line" in said:
                yield said
    if "error" in said:
        error = said["error"]
        raise getattr(errors, error["kind"])(error["cause"], hint=error["hint"])
    if said or child.returncode:
        raise ArtifactError(
            f"{shlex.join(command[:3])} ended without an answer (exit code {child.returncode})",
            hint="run the same build again: what is finished is kept",
        )
