"""Writes an artifact folder whole or not at all: work happens in ``OUT.partial``, renamed when complete."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.manifest import LOCK_NAME, FileEntry

TOKENIZER_FOLDER = "tokenizer"
_REQUIRED = ("tokenizer.json", "generation_config.json")
_OPTIONAL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A work folder beside ``out`` that becomes ``out`` when the block ends well and vanishes when it raises.

    What a killed build left there is removed first; a build that still runs is refused by its lock.

    Raises:
        ConfigError: ``out`` exists, another build is writing it, or ``OUT.partial`` is not ours.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already", hint=f"give another --out, or remove it: rm -r {out}")
    work = out.with_name(out.name + ".partial")
    lock = work / LOCK_NAME
    if work.exists() and not lock.is_file() and (not work.is_dir() or any(work.iterdir())):
        raise ConfigError(f"{work}: exists and was not made by gemma4-export", hint="give another --out")
    work.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{work}: another build is writing here", hint="wait for it, or give another --out"
            ) from error
        for leftover in work.iterdir():
            if leftover != lock:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield work
        except BaseException:
            shutil.rmtree(work)
            raise
        # Until the lock goes nobody loads the folder, whatever happens in between.
        work.rename(out)
        (out / LOCK_NAME).unlink()


def copy_tokenizer(checkpoint: Path, work: Path, *, vocab_size: int) -> bool:
    """Copy the tokenizer files as they are, and say whether the checkpoint can chat (has a template).

    Raises:
        ConfigError: a file is missing, is not JSON, or names ids that the model does not have.
    """
    folder = work / TOKENIZER_FOLDER
    folder.mkdir()
    for name in (*_REQUIRED, *_OPTIONAL):
        source = checkpoint / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
        elif name in _REQUIRED:
            raise ConfigError(f"{checkpoint}: no {name}", hint="download it from the model's page into the same folder")
    highest = _highest_id(folder / "tokenizer.json")
    if highest >= vocab_size:
        raise ConfigError(
            f"tokenizer.json: token id {highest}, the model's vocabulary has {vocab_size}",
            hint="tokenizer.json and config.json belong to different models",
        )
    template = read_chat_template(checkpoint)
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template.encode())
    return template is not None


def read_chat_template(checkpoint: Path) -> str | None:
    """The checkpoint's chat template: its own file, or, as older transformers saved it, in tokenizer_config.json."""
    template, config = checkpoint / "chat_template.jinja", checkpoint / "tokenizer_config.json"
    if template.is_file():
        try:
            return template.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{template.name}: not UTF-8 ({error.reason})", hint="download it again") from error
    inline = _read_json(config).get("chat_template") if config.is_file() else None
    return inline if isinstance(inline, str) else None


def hash_files(work: Path, known: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """Size and sha256 of every file in ``work``, those in ``known`` taken from there."""
    entries = dict(known)
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if path.is_file() and name != LOCK_NAME and name not in entries:
            entries[name] = hash_file(path)
    return entries


def hash_file(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


def hash_header(path: Path) -> FileEntry:
    """A safetensors file by size and the sha256 of its header: hashing 60 GB would take longer than building."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    return FileEntry(bytes=path.stat().st_size, sha256=hashlib.sha256(length + header).hexdigest())


def _highest_id(path: Path) -> int:
    tokenizer = _read_json(path)
    try:
        ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer.get("added_tokens", []))]
        return max(int(index) for index in ids)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path.name}: has no vocabulary ({error!r})", hint="download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name}: not JSON ({error})", hint="download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path.name}: expected a JSON object, found {type(value).__name__}", hint="download it again"
        )
    return value
