"""One model in huggingface_hub's cache: where its files lie, which of them are whole, and what was already hashed.

The layout is huggingface_hub's documented one, so its own tools list, share and delete what lies here:

    models--ORG--NAME/blobs/DIGEST                        content, named by its sha256 (LFS) or git blob id
    models--ORG--NAME/snapshots/COMMIT/NAME               a link to ../../blobs/DIGEST
    models--ORG--NAME/refs/REVISION                       the commit that a branch or tag meant last

and three kinds of files are ours, each derived data that may be deleted at any time:

    models--ORG--NAME/blobs/DIGEST.gemma4-export.incomplete   the first bytes of a transfer, continued by the next
    models--ORG--NAME/.gemma4-export/COMMIT.json              what the hub lists: offline, it says what is missing
    models--ORG--NAME/.gemma4-export/DIGEST.verified          size and mtime of content whose hash was right
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma4_export.configs.errors import CheckpointError

_log = logging.getLogger(__name__)

_HASH_STEP = 4 << 20  # bytes read at a time
COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file as the hub lists it. ``digest``: sha256 of an LFS file, else its git blob id; None: not known."""

    name: str
    bytes: int
    digest: str | None

    def __post_init__(self) -> None:
        # Both become paths in the cache, and both come from the network.
        if "/" in self.name or self.name in ("", ".", "..") or self.bytes < 0:
            raise ValueError(f"no file of a model: {self.name!r}, {self.bytes} bytes")
        if self.digest is not None and not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"{self.name}: {self.digest!r} is neither a sha256 nor a git id")

    def hasher(self) -> hashlib._Hash:
        """A hash object that ends at ``digest`` when it was fed exactly this file."""
        if self.digest is not None and len(self.digest) == 40:
            return hashlib.sha1(b"blob %d\0" % self.bytes, usedforsecurity=False)  # what git hashes
        return hashlib.sha256()


class ModelCache:
    """The folder of one model. Paths only: nothing is created before something is stored."""

    def __init__(self, root: Path, folder_name: str) -> None:
        self.root, self.folder = root, root / folder_name
        self._ours = self.folder / ".gemma4-export"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def partial(self, file: HubFile) -> Path:
        return self._blob(file).with_name(f"{file.digest}.gemma4-export.incomplete")

    @contextlib.contextmanager
    def writing(self, file: HubFile) -> Iterator[None]:
        """Hold the lock that huggingface_hub takes to write this blob; waits, and says so, while another holds it."""
        path = self.root / ".locks" / self.folder.name / f"{file.digest}.lock"
        for folder in (path.parent, self.partial(file).parent):
            folder.mkdir(parents=True, exist_ok=True)
        with path.open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("%s: another process is downloading it; waiting", file.name)
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # some network file systems
                _log.warning("%s: no locks here (%s); do not download it twice at once", path.parent, error.strerror)
            yield

    def _blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / str(file.digest)

    def commit_of(self, revision: str) -> str | None:
        """The commit that ``revision`` meant last time, None when it was never seen."""
        if COMMIT.fullmatch(revision):
            return revision
        ref = self.folder / "refs" / revision
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
        return commit if COMMIT.fullmatch(commit) else None

    def set_ref(self, revision: str, commit: str) -> None:
        if self.commit_of(revision) != commit:
            self.snapshot(commit).mkdir(parents=True, exist_ok=True)  # huggingface_hub calls a ref to nothing corrupt
            _write(self.folder / "refs" / revision, commit)

    def listing(self, commit: str) -> dict[str, HubFile] | None:
        """What the hub listed for ``commit`` when it was asked, None when it was not or the record is damaged."""
        path = self._ours / f"{commit}.json"
        if not path.is_file():
            return None
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return {
                name: HubFile(name=name, bytes=int(entry["bytes"]), digest=entry["digest"])
                for name, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s is damaged (%s) and is not used", path, error)
            return None

    def store_listing(self, commit: str, files: Mapping[str, HubFile]) -> None:
        entries = {file.name: {"bytes": file.bytes, "digest": file.digest} for file in files.values()}
        self._remember(f"{commit}.json", json.dumps(entries, indent=1, sort_keys=True))

    def files_on_disk(self, commit: str) -> dict[str, HubFile]:
        """The snapshot's files as another tool left them; a link's target says what the content must hash to."""
        files: dict[str, HubFile] = {}
        folder = self.snapshot(commit)
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file():
                target = path.readlink().name if path.is_symlink() else ""
                digest = target if _DIGEST.fullmatch(target) else None
                files[path.name] = HubFile(name=path.name, bytes=path.stat().st_size, digest=digest)
        return files

    def find(self, commit: str, file: HubFile) -> Path | None:
        """Where the file's content lies: in the snapshot, or as a blob that another commit brought; else None."""
        placed = self.snapshot(commit) / file.name
        return placed if placed.is_file() else self._blob(file) if self._blob(file).is_file() else None

    def missing_bytes(self, commit: str, file: HubFile) -> int:
        """How much of the file a transfer would still have to bring."""
        if self.find(commit, file) is not None:
            return 0
        partial = self.partial(file)
        return file.bytes - min(file.bytes, partial.stat().st_size if partial.exists() else 0)

    def verify(self, commit: str, file: HubFile, path: Path, advance: Callable[[int], None]) -> None:
        """Compare size and hash with the hub's; content that was hashed before and has not changed is not read.

        Raises:
            CheckpointError: they differ. The content is deleted, so that the next download fetches it again.
        """
        stat = path.stat()
        if stat.st_size != file.bytes:
            self._discard(commit, file, path)
            raise mismatch(file, f"{file.bytes} bytes", f"{stat.st_size}")
        if file.digest is None:
            _log.warning("%s: the cache does not say what it must hash to, so only its presence was checked", path)
        elif not self._is_verified(file, stat):
            hasher = file.hasher()
            hash_into(hasher, path, file.bytes, advance)
            if hasher.hexdigest() != file.digest:
                self._discard(commit, file, path)
                raise mismatch(file, f"{hasher.name} {file.digest}", hasher.hexdigest())
            self._remember(f"{file.digest}.verified", _stamp(stat))
            return
        advance(file.bytes)

    def accept(self, file: HubFile) -> None:
        """Turn a partial whose hash was right into the blob."""
        blob = self._blob(file)
        self.partial(file).replace(blob)
        self._remember(f"{file.digest}.verified", _stamp(blob.stat()))

    def place(self, commit: str, file: HubFile) -> Path:
        """Have the snapshot name the blob; where there are no symbolic links, the blob itself moves there."""
        placed = self.snapshot(commit) / file.name
        if placed.is_file():
            return placed
        placed.parent.mkdir(parents=True, exist_ok=True)
        placed.unlink(missing_ok=True)  # a link to a blob that was deleted
        try:
            placed.symlink_to(Path("..", "..", "blobs", str(file.digest)))
        except OSError as error:
            _log.debug("no symbolic link at %s (%s): the file is moved there", placed, error)
            self._blob(file).replace(placed)
        return placed

    def _is_verified(self, file: HubFile, stat: os.stat_result) -> bool:
        stamp = self._ours / f"{file.digest}.verified"
        return stamp.is_file() and stamp.read_text(encoding="utf-8") == _stamp(stat)

    def _discard(self, commit: str, file: HubFile, path: Path) -> None:
        for bad in {path, self.snapshot(commit) / file.name, self._blob(file)}:
            bad.unlink(missing_ok=True)

    def _remember(self, name: str, text: str) -> None:
        try:
            _write(self._ours / name, text)
        except OSError as error:  # a cache that is mounted read-only still serves; it is hashed again next time
            _log.warning("%s cannot be written (%s)", self._ours / name, error.strerror)


def hash_into(hasher: hashlib._Hash, path: Path, num_bytes: int, advance: Callable[[int], None]) -> None:
    """Feed the first ``num_bytes`` of a file to ``hasher``, a few MB at a time."""
    with path.open("rb") as file:
        while num_bytes and (chunk := file.read(min(num_bytes, _HASH_STEP))):
            hasher.update(chunk)
            num_bytes -= len(chunk)
            advance(len(chunk))


def mismatch(file: HubFile, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{file.name}: the hub lists {expected}, found {found}; the copy here was deleted",
        hint="run the same command again to fetch it anew; if that fails too, the hub or a proxy serves a damaged file",
    )


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns}\n"


def _write(path: Path, text: str) -> None:
    """Replace a small file whole, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
