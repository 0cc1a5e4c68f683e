"""Opens an artifact folder: manifest read, every size checked, small files hashed, before anything is loaded."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gemma4_export.configs.errors import ArtifactError, ContractError, nearest
from gemma4_export.configs.manifest import ENGINES_FOLDER, LOCK_NAME, MANIFEST_NAME, FileEntry, Manifest

# Hashing runs at about 2 GB/s: files up to this size cost load at most 30 ms each, weights can take minutes.
SMALL_FILE_BYTES = 64 << 20
Check = Literal["small", "full"]
_FETCH_AGAIN = "copy the folder again, or build it again with gemma4-export build"


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact folder whose files are those that its manifest lists."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, *, check: Check = "small", with_engines: bool = True) -> Artifact:
        """Read the manifest and check the files.

        Args:
            check: "small" compares every size and hashes files up to 64 MiB; "full" hashes the weights as well.
            with_engines: False leaves engines unchecked: they are about to be compiled.
        Raises:
            ArtifactError: no artifact, of another format, damaged, or naming files outside its folder.
            ContractError: ``folder`` is no path or an empty one, or ``check`` is neither of its values.
        """
        folder = artifact_path(folder)
        if check not in get_args(Check):
            raise ContractError(
                f"check: expected 'small' or 'full', found {check!r:.60}", hint=nearest(str(check), get_args(Check))
            )
        path = folder / MANIFEST_NAME
        if (folder / LOCK_NAME).exists():
            raise ArtifactError(
                f"{folder}: its build has not finished",
                hint="wait for it; if it was killed, run it again",
            )
        if not path.is_file():
            missing = "a file, not a folder" if folder.exists() else "no such folder"
            cause = "no manifest.json in it" if folder.is_dir() else missing
            raise ArtifactError(f"{folder}: {cause}", hint="an artifact is a folder that gemma4-export build wrote")
        try:
            manifest = Manifest.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{path}: not UTF-8 ({error.reason})", hint=_FETCH_AGAIN) from error
        artifact = cls(folder, manifest)
        for name, entry in manifest.files.items():
            if name.startswith(f"{ENGINES_FOLDER}/") and not with_engines:
                continue
            artifact._check_file(name, entry, hashes=check == "full" or entry.bytes <= SMALL_FILE_BYTES)
        return artifact

    def path(self, name: str) -> Path:
        return self.folder / name

    def _check_file(self, name: str, entry: FileEntry, *, hashes: bool) -> None:
        path = self.path(name)
        if not path.is_file():
            raise ArtifactError(f"{name}: listed in {MANIFEST_NAME}, missing in {self.folder}", hint=_FETCH_AGAIN)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ArtifactError(f"{name}: a link that leads out of {self.folder}", hint=_FETCH_AGAIN)
        size = path.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(f"{name}: expected {entry.bytes} bytes, found {size}", hint=_FETCH_AGAIN)
        if hashes:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry.sha256:
                raise ArtifactError(f"{name}: sha256 {found[:12]}…, expected {entry.sha256[:12]}…", hint=_FETCH_AGAIN)


def artifact_path(name: Any) -> Path:
    """The path that ``name`` is; an empty one would be the current folder, which nobody named.

    Raises:
        ContractError: it is no path, or empty.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ContractError(
            f"the artifact: expected the path of a folder, found {name!r:.60}",
            hint="an artifact is a folder that gemma4-export build wrote",
        )
    return Path(name)
