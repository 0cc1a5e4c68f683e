"""sha256 of large files, remembered between runs: 60 GB take a minute to read, and seldom change."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from gemma4_export.exporter.dependencies import file_hash

# A file that changes twice within a tick of the file system's clock keeps its times: such a hash is not remembered.
_SETTLED_NS = 2_000_000_000


class FileHashes:
    """Hashes by inode, size and times. The time of a file's last change of any kind cannot be set back by a program."""

    def __init__(self, memory: Path) -> None:
        """``memory`` is the file that remembers; without it, or where it is damaged, everything is read again."""
        self._memory, self._lock = memory, threading.Lock()
        self._known: dict[str, str] = {}
        self._is_changed = False
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(known, dict):
            self._known = {key: value for key, value in known.items() if isinstance(value, str)}

    def hash_of(self, path: Path) -> str:
        """Of the content as it is now.

        Raises:
            OSError: ``path`` cannot be read.
        """
        with self._lock:  # two cells of one checkpoint read it once
            before = path.stat()
            key = _key(path, before)
            if key in self._known:
                return self._known[key]
            digest = file_hash(path)
            if key == _key(path, path.stat()) and time.time_ns() - before.st_ctime_ns > _SETTLED_NS:
                self._known[key], self._is_changed = digest, True
            return digest

    def save(self) -> None:
        """Remember for the next run, if anything is new; of two at once the last one's hashes stay."""
        if not self._is_changed:
            return
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        written = self._memory.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(self._known, indent=0, sort_keys=True), encoding="utf-8")
        written.replace(self._memory)


def _key(path: Path, found: os.stat_result) -> str:
    times = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    return f"{path.resolve()} {found.st_dev}:{found.st_ino} {times}"
