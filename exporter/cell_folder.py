"""Where an artifact of a matrix lies, and what is remembered about it.

OUT/CELL/                       the artifact, as its last good build left it
OUT/.matrix/CELL/lock           held while somebody works on the cell
OUT/.matrix/CELL/KEY[.partial]  the artifact while it is made; KEY names its inputs
OUT/.matrix/CELL/built.json     inputs and results of the artifact in OUT/CELL
OUT/.matrix/CELL/build.log      what the last build said
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError, ConfigError
from gemma4_export.configs.manifest import ENGINES_FOLDER, LOCK_NAME, Manifest
from gemma4_export.exporter.cell_key import Inputs
from gemma4_export.exporter.package import partial_of

BOOKS = ".matrix"
_LOCK, _BUILT, _LOG, _OLD = "lock", "built.json", "build.log", "old"


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What is remembered of an artifact: from which inputs it was made, and what was found."""

    inputs: Inputs
    files_sha256: str
    bytes: int
    seconds: float
    verified: str


@dataclass(frozen=True, slots=True)
class CellFolder:
    """The places of the cell called ``name``."""

    out: Path
    name: str

    @property
    def artifact(self) -> Path:
        return self.out / self.name

    @property
    def books(self) -> Path:
        return self.out / BOOKS / self.name

    @property
    def log(self) -> Path:
        return self.books / _LOG

    def work(self, key: str) -> Path:
        """Where the artifact of these inputs is made."""
        return self.books / key

    @contextlib.contextmanager
    def locked(self, on_wait: Callable[[bool], None]) -> Iterator[int]:
        """The cell for us alone, after whoever works on it; gives the lock's descriptor, for a child to hold.

        Args:
            on_wait: called every tenth of a second while another holds it, with whether this is the first time. What it
                raises ends the waiting: a thread that sleeps in the system's own waiting could not be interrupted.
        """
        self.books.mkdir(parents=True, exist_ok=True)
        with (self.books / _LOCK).open("a+") as handle:
            is_first = True
            while not _take(handle.fileno()):
                on_wait(is_first)
                is_first = False
                time.sleep(0.1)
            yield handle.fileno()

    def built(self) -> Built | None:
        """What is remembered; None: nothing, or by a version that remembered other things."""
        try:
            built = Built(**json.loads((self.books / _BUILT).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        kinds = (
            (built.inputs, dict),
            (built.files_sha256, str),
            (built.bytes, int),
            (built.seconds, (int, float)),
            (built.verified, str),
        )
        return built if all(isinstance(value, kind) for value, kind in kinds) else None

    def fault(self, built: Built, key: str) -> str:
        """What is wrong with the artifact; empty: it is the one that was built."""
        if self.work(key).exists():
            return "a newer one has not come to its place"
        if not self.artifact.exists():
            return "it is gone"
        try:
            manifest = Artifact.open(self.artifact).manifest
        except ArtifactError as error:
            return error.cause
        return "" if files_sha256(manifest) == built.files_sha256 else "it is not the one that was built"

    def check_ours(self) -> None:
        """Refuse to replace what no run made.

        Raises:
            ConfigError: something lies in the artifact's place, and nothing is remembered about it.
        """
        if self.built() is None and (self.artifact.exists() or self.artifact.is_symlink()):
            hint = f"give another --out, or remove it: rm -r {shlex.quote(str(self.artifact))}"
            raise ConfigError(f"{self.artifact}: exists, and no matrix built it", hint=hint)

    def prune(self, key: str) -> None:
        """Remove what was made of other inputs, and a finished work folder that is damaged."""
        work = self.work(key)
        kept = {self.books / name for name in (_LOCK, _BUILT, _LOG)} | {work, partial_of(work)}
        for leftover in set(self.books.iterdir()) - kept:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if work.exists() and not (work / LOCK_NAME).exists() and self.finished(key) is None:
            shutil.rmtree(work)

    def finished(self, key: str) -> Manifest | None:
        """The manifest of the artifact of these inputs when it is made and whole."""
        try:
            return Artifact.open(self.work(key)).manifest
        except ArtifactError:
            return None

    def publish(self, key: str, built: Built) -> None:
        """Give the finished artifact its place. A kill in between leaves a cell that is published again."""
        written = self.books / f"{_BUILT}.new"
        written.write_text(json.dumps(asdict(built), indent=1, sort_keys=True), encoding="utf-8")
        written.replace(self.books / _BUILT)
        old = self.books / _OLD
        if self.artifact.exists():
            self.artifact.rename(old)
        self.work(key).rename(self.artifact)
        shutil.rmtree(old, ignore_errors=True)


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def files_sha256(manifest: Manifest) -> str:
    """Of all files but engines, which are compiled later too."""
    files = {name: entry.sha256 for name, entry in manifest.files.items() if not name.startswith(f"{ENGINES_FOLDER}/")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
