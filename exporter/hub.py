"""Fetches a Gemma 4 checkpoint from the Hugging Face hub: the files that are needed, resumable, every byte checked.

`hub_client` talks to the hub and `hub_cache` knows the folder; here is decided which files make a checkpoint, and what
serves when the hub is out of reach.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma4_export.configs.errors import CheckpointError, ConfigError
from gemma4_export.configs.model import ModelConfig
from gemma4_export.exporter import hub_client
from gemma4_export.exporter.checkpoint import resolve_config
from gemma4_export.exporter.compressed_tensors import read_plain_config
from gemma4_export.exporter.gguf_file import is_auxiliary
from gemma4_export.exporter.hub_cache import COMMIT, HubFile, ModelCache

_log = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]
"""Called with the file at hand, and bytes done and in total over all files."""
OnConfig = Callable[[ModelConfig, Path, int], None]
"""Called once before the weights with the model, the cache's folder, and the bytes that are still to come to it."""

_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_REQUIRED = (_CONFIG, "generation_config.json", "tokenizer.json")
_OPTIONAL = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack")
_PROGRESS_STEP = 1 << 20  # bytes between two reports: pieces arrive in 64 KB


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded:
    """Snapshot folders: of the weights, and of config.json and the tokenizer files; one and the same but for a GGUF."""

    folder: Path
    companions: Path


def download(
    hub_id: str,
    *,
    revision: str | None = None,
    plain_id: str | None = None,
    on_config: OnConfig | None = None,
    on_progress: OnProgress | None = None,
) -> Downloaded:
    """Bring a checkpoint into huggingface_hub's cache: safetensors, or a repository's one GGUF file.

    What is there is not fetched again, what is there in part is continued, and each file is compared once with the size
    and the sha256 (small files: git id) that the hub lists. Without a connection a complete snapshot in the cache is
    used, with a warning.

    Args:
        hub_id: any model's id, e.g. ``google/gemma-4-E2B-it``.
        revision: branch, tag or commit; None: ``main``.
        plain_id: the checkpoint whose config.json and tokenizer files a GGUF repository that has none goes with.
        on_config: called before the weights; what it raises ends the download.
        on_progress: called with the file at hand, and bytes done and in total over all files.
    Raises:
        ConfigError: no such model or revision, the hub wants a login, config.json is not one of Gemma 4, a repository
            of GGUF files leaves open which is meant or what it was made from, or the cache cannot be written.
        CheckpointError: files are missing, damaged, cut off, or do not fit on the disk.
    """
    revision = revision or "main"
    with _disk_errors(hub_id):
        snapshot = _open(hub_id, revision)
        wanted = [(snapshot, _needed(snapshot))]
        if all(file.name != _CONFIG for file in wanted[0][1]):
            plain = _open(_plain_id(snapshot, plain_id), "main")
            wanted.insert(0, (plain, _complete(plain, _companions(plain))))
        for needing, files in wanted:
            _check_cached(needing, files)
        _check_space(wanted)
        progress = _Progress(on_progress, sum(file.bytes for _, files in wanted for file in files))
        for needing, file in [(needing, file) for needing, files in wanted for file in files]:
            progress.begin(file.name)
            path = _fetch(needing, file, progress.advance)
            if file.name == _CONFIG:  # before the weights: 60 GB of another family are not worth waiting for
                config = resolve_config(Path(needing.hub_id), read_plain_config(path.parent))
                if on_config is not None:
                    on_config(config, needing.cache.root, _missing_bytes(wanted))
        progress.report()
        folders = [_finish(needing) for needing, _ in wanted]
    return Downloaded(folder=folders[-1], companions=folders[0])


def current_commit(hub_id: str) -> str:
    """The commit that a download of ``hub_id`` would bring: one small request; without a connection the cached one.

    Raises:
        ConfigError: no such model, or the hub wants a login.
        CheckpointError: the hub is out of reach, and nothing is cached.
    """
    with _disk_errors(hub_id):
        return _open(hub_id, "main").commit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    """One commit of one model. ``unreachable`` says why only the cache can be used; None: the hub can be asked."""

    hub_id: str
    revision: str
    commit: str
    cache: ModelCache
    files: Mapping[str, HubFile]
    unreachable: str | None

    @property
    def place(self) -> str:
        return "the repository" if self.unreachable is None else "the cached snapshot"


class _Progress:
    """Adds up bytes and passes them on, about once a megabyte."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress, self._total = on_progress or (lambda name, done, total: None), total
        self._name, self._done, self._reported = "", 0, 0

    def begin(self, name: str) -> None:
        self._name = name
        self.report()

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if abs(self._done - self._reported) >= _PROGRESS_STEP:
            self.report()

    def report(self) -> None:
        self._reported = self._done
        self._on_progress(self._name, self._done, self._total)


def _open(hub_id: str, revision: str) -> _Snapshot:
    """What ``revision`` means, and its files: one small request, none for a commit that was listed before."""
    cache = hub_client.open_cache(hub_id)
    if hub_client.is_offline():
        return _from_cache(hub_id, revision, cache, "HF_HUB_OFFLINE is set")
    known = cache.listing(revision) if COMMIT.fullmatch(revision) else None
    try:
        commit, files = (revision, known) if known else hub_client.list_files(hub_id, revision)
    except hub_client.HubUnreachableError as error:
        return _from_cache(hub_id, revision, cache, str(error))
    if cache.listing(commit) != files:
        cache.store_listing(commit, files)
    if cache.commit_of(revision) is None:
        cache.set_ref(revision, commit)  # else only when the new snapshot is complete: until then the old one serves
    return _Snapshot(hub_id=hub_id, revision=revision, commit=commit, cache=cache, files=files, unreachable=None)


def _from_cache(hub_id: str, revision: str, cache: ModelCache, reason: str) -> _Snapshot:
    commit = cache.commit_of(revision)
    files = (cache.listing(commit) or cache.files_on_disk(commit)) if commit else {}
    if commit is None or not files:
        raise CheckpointError(
            f"{hub_id}: {reason}, and {cache.root} holds nothing of its revision {revision}",
            hint="connect (unset HF_HUB_OFFLINE) and run the same command, or give a local folder to --checkpoint",
        )
    _log.warning("%s: %s; using commit %s from the cache", hub_id, reason, commit[:12])
    return _Snapshot(hub_id=hub_id, revision=revision, commit=commit, cache=cache, files=files, unreachable=reason)


def _needed(snapshot: _Snapshot) -> list[HubFile]:
    """The files of a checkpoint, small ones first. To know the shards, their index is fetched."""
    files = snapshot.files
    names = _companions(snapshot)
    if _INDEX in files:
        _check_cached(snapshot, [files[_INDEX]])
        names += [_INDEX, *_shards(_fetch(snapshot, files[_INDEX], lambda num_bytes: None))]
    elif _SINGLE in files:
        names.append(_SINGLE)
    elif any(name.endswith(".gguf") for name in files):
        whole = _gguf_file(snapshot)
        # Most such repositories have no tokenizer; a few have everything.
        names = [*names, whole] if files.keys() >= set(_REQUIRED) else [whole]
    else:
        found = ", ".join(sorted(name for name in files if name.endswith(_WEIGHT_ENDINGS))) or "no weights at all"
        raise CheckpointError(
            f"{snapshot.hub_id}: {snapshot.place} has neither {_SINGLE} nor {_INDEX}, but {found}",
            hint="give the id of the safetensors checkpoint; an adapter must be merged into its base model first",
        )
    return _complete(snapshot, names)


def _companions(snapshot: _Snapshot) -> list[str]:
    """What a checkpoint needs beside its weights."""
    return [*_REQUIRED, *(name for name in _OPTIONAL if name in snapshot.files)]


def _complete(snapshot: _Snapshot, names: list[str]) -> list[HubFile]:
    files = snapshot.files
    lacking = [name for name in names if name not in files]
    if lacking:
        raise CheckpointError(
            f"{snapshot.hub_id}: {snapshot.place} lacks {len(lacking)} of the {len(names)} files needed, "
            f"first {lacking[0]}",
            hint="give the id of a complete checkpoint",
        )
    return [files[name] for name in names]


def _gguf_file(snapshot: _Snapshot) -> str:
    """The one GGUF file of a repository that holds a decoder."""
    found = sorted(name for name in snapshot.files if name.endswith(".gguf") and not is_auxiliary(name))
    if len(found) != 1:
        what = f"{len(found)} GGUF files of decoders" if found else "GGUF files, none of a decoder"
        raise ConfigError(
            f"{snapshot.hub_id}: {snapshot.place} has {what}{f', such as {found[0]}' if found else ''}; "
            "this version takes repositories with one",
            hint="download the one you mean, add config.json, tokenizer.json, generation_config.json and "
            "chat_template.jinja of the plain checkpoint, and give the folder to --checkpoint",
        )
    return found[0]


def _plain_id(snapshot: _Snapshot, plain_id: str | None) -> str:
    if plain_id is None:
        raise ConfigError(
            f"{snapshot.hub_id}: a GGUF file without config.json and tokenizer, and the name is that of no released "
            "model they could be taken from",
            hint="put the file, config.json, tokenizer.json, generation_config.json and chat_template.jinja into one "
            "folder and give it to --checkpoint",
        )
    _log.warning("%s has no config.json and tokenizer; they are taken from %s", snapshot.hub_id, plain_id)
    return plain_id


def _finish(snapshot: _Snapshot) -> Path:
    """Have the cache name the snapshot, now that it is complete."""
    if snapshot.unreachable is None:
        snapshot.cache.set_ref(snapshot.revision, snapshot.commit)
    return snapshot.cache.snapshot(snapshot.commit)


def _shards(index: Path) -> list[str]:
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{_INDEX}: no weight_map ({error!r})", hint="give the id of another checkpoint"
        ) from error


def _check_cached(snapshot: _Snapshot, files: list[HubFile]) -> None:
    """Without the hub, everything must be there."""
    if snapshot.unreachable is None:
        return
    missing = [file for file in files if snapshot.cache.find(snapshot.commit, file) is None]
    if missing:
        raise CheckpointError(
            f"{snapshot.hub_id}: {snapshot.unreachable}, and the cached snapshot lacks {len(missing)} of {len(files)} "
            f"files ({sum(file.bytes for file in missing)} bytes), first {missing[0].name}",
            hint="connect (unset HF_HUB_OFFLINE) and run the same command: it fetches only what is missing",
        )


def _missing_bytes(wanted: list[tuple[_Snapshot, list[HubFile]]]) -> int:
    return sum(needing.cache.missing_bytes(needing.commit, file) for needing, files in wanted for file in files)


def _check_space(wanted: list[tuple[_Snapshot, list[HubFile]]]) -> None:
    """Refuse before the first byte what cannot end well. The caches of all models lie on one disk."""
    needed, snapshot = _missing_bytes(wanted), wanted[-1][0]
    if not needed:
        return
    snapshot.cache.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(snapshot.cache.root).free
    if needed > free:
        raise CheckpointError(
            f"{snapshot.hub_id}: {needed} bytes are still to be downloaded, {snapshot.cache.root} has {free} free",
            hint="free some space, or set HF_HOME to a larger disk",
        )


def _fetch(snapshot: _Snapshot, file: HubFile, advance: Callable[[int], None]) -> Path:
    """The file's path in the snapshot folder, its content checked; what is missing of it is transferred."""
    cache, commit = snapshot.cache, snapshot.commit
    path = cache.find(commit, file)
    if path is None:
        with cache.writing(file):
            path = cache.find(commit, file)  # another process may have brought it while we waited
            if path is None:
                hub_client.transfer(snapshot.hub_id, commit, file, cache.partial(file), advance)
                cache.accept(file)
                return cache.place(commit, file)
    cache.verify(commit, file, path, advance)
    return cache.place(commit, file)


@contextlib.contextmanager
def _disk_errors(hub_id: str) -> Iterator[None]:
    """A cache that is full or not ours to write is somebody's to mend, so it gets a cause and a hint."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{hub_id}: the disk of huggingface_hub's cache is full ({error})",
                hint="free some space, or set HF_HOME to a larger disk; the same command continues where it stopped",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConfigError(
                f"{hub_id}: huggingface_hub's cache cannot be written ({error})",
                hint="set HF_HOME to a folder that you may write",
            ) from error
        raise
