"""The runtime in a process of its own: the exporter imports none of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

VerifyLevel = Literal["layers", "full"]


class Verdict(NamedTuple):
    """What ``gemma4-run verify`` found: one line, or where it could not begin its own words about why."""

    passed: bool
    text: str | None
    error: str


def verify_in_child(folder: Path, level: VerifyLevel) -> Verdict:
    """Hold the artifact in ``folder`` to its oracle."""
    command = [sys.executable, "-m", "gemma4_export.runtime", "verify", str(folder), "--level", level, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if not ended.stdout:
        at = ended.stderr.rfind("error: ")  # without its progress
        return Verdict(False, None, ended.stderr[max(at, 0) :])
    return Verdict(ended.returncode == 0, json.loads(ended.stdout)["verdict"], "")
