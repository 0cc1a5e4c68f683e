"""Files opened once and read at offsets: nothing is mapped, so a page counts as ours only while it is copied."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_export.configs.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]


class OpenFiles:
    """Descriptors by path, opened at the first read."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def read(self, path: Path, offset: int, into: Array, what: str) -> None:
        """Fill ``into`` (contiguous) with the bytes from ``offset`` on.

        Raises:
            CheckpointError: the file ends before that, naming ``what`` was read.
        """
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        buffer, done = into.view(np.uint8).data.cast("B"), 0
        while done < len(buffer):
            count = os.preadv(self._descriptors[path], [buffer[done:]], offset + done)
            if count <= 0:
                raise damaged(path, f"{what}: ended {len(buffer) - done} bytes early")
            done += count

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def damaged(path: Path, cause: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {cause}", hint="the download is incomplete or damaged; fetch this file again")
