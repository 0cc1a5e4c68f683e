"""Writing for people: at once, and never what a terminal would obey instead of showing it."""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

from gemma4_export.configs.command_line import shows_progress

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# C0 but tab and newline, DEL, C1: a model's words may hold any of them.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show(stream: TextIO | None, text: str, *, dim: bool = False) -> None:
    """Write ``text``, dimmed where that is asked for and ``stream`` is a terminal that can; None: closed, nothing."""
    if stream is None:
        return
    if stream.isatty():
        text = _STEERING.sub("�", text)
        if dim and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            text = f"{_DIM}{text}{_PLAIN}"  # each piece by itself, so that Ctrl-C never leaves a dimmed terminal behind
    stream.write(text)
    stream.flush()


def say(line: str) -> None:
    """A line of progress on stderr; nothing with ``--quiet``."""
    if shows_progress():
        show(sys.stderr, f"{line}\n")
