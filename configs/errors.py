"""The four errors a user can meet, by what the reader can do about them, each with a hint that can be typed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Gemma4Error(Exception):
    """Base of every error that is somebody's input, not our bug: one line of cause with numbers, one line of hint."""

    def __init__(self, cause: str, *, hint: str | None = None) -> None:
        # Names come from files that somebody else wrote: no line break of theirs makes a third line, and no escape
        # sequence reaches a terminal.
        cause, hint = _shown(cause), None if hint is None else _shown(hint)
        super().__init__(cause if hint is None else f"{cause}\nhint: {hint}")
        self.cause = cause
        self.hint = hint


class ConfigError(Gemma4Error):
    """A config, a recipe, a target or an argument needs editing."""


class CheckpointError(Gemma4Error):
    """Weights are missing, misshapen, damaged, or were read by nobody."""


class ContractError(Gemma4Error):
    """A tensor breaks a promise that an op or a graph made."""


class ArtifactError(Gemma4Error):
    """The artifact folder is damaged, too new, or made for another device."""


def _shown(line: str) -> str:
    """``line`` with what cannot be printed spelled out, as repr does."""
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known spelling closest to ``name``, or all of them when none is close."""
    names = sorted(known)
    # "26b" means "26b-a4b", however close "12b" is by letters.
    longer = [other for other in names if other.startswith(name)] if name else []
    if longer:
        return f"did you mean {min(longer, key=len)!r}?"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
