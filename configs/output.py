"""What commands write: output that has arrived when they end, and files that are named when they cannot be written."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAME = "standard output"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block that writes ``path``: an OSError that leaves it says so. Python leaves it out where a disk is full."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


class _Output(io.FileIO):
    """Standard output, whose failed writes say that they were its."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = _NAME
            raise


@contextmanager
def written_output() -> Iterator[None]:
    """What a command printed has arrived when it ends; output that could not be written is an error with a name.

    Raises:
        OSError: standard output is closed, or what it leads to is full.
    """
    out = sys.stdout
    if out is None:
        raise OSError(errno.EBADF, "closed", _NAME)
    if out is sys.__stdout__ and isinstance(out, io.TextIOWrapper):
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output(out.fileno(), "w", closefd=False)),
            encoding=out.encoding,
            errors=out.errors,
            line_buffering=out.line_buffering,
            write_through=out.write_through,
        )
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename == _NAME:
            # Python would try once more at its end, and say so.
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
            if isinstance(error, BrokenPipeError):  # somebody read enough, as `| head` does
                sys.exit(1)
        raise
