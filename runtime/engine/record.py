"""``engine.json``: what lies in an engine file, hashed with itself: no manifest lists an engine that was just built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.manifest import ENGINE_NAME, RECORD_NAME
from gemma4_export.runtime.engine.request import Range, profiles_from_json

FORMAT = 1
_REBUILD = "gemma4-run build ARTIFACT builds it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """One input or output; -1 is an axis whose size the profiles bound."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """One compiled engine.

    Attributes:
        key: name of its folder, made of everything that it was built from.
        builder, library_version: "tensorrt-rtx" and "1.7.1"; an engine loads into the same version only.
        graph: file name of the graph.
        compute_capabilities: GPUs it runs on; 89 stands for 8.9.
        profiles: name -> input -> (min, opt, max).
        weights_bytes, scratch_bytes: as the build log states them; an engine holds the first, its context the second.
        plugins: op -> contract version, of the plugin libraries it was built with.
        engine_bytes, engine_sha256: of `ENGINE_NAME`.
    """

    key: str
    builder: str
    library_version: str
    graph: str
    compute_capabilities: tuple[int, ...]
    profiles: dict[str, dict[str, Range]]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    weights_bytes: int
    scratch_bytes: int
    plugins: dict[str, int]
    engine_bytes: int
    engine_sha256: str

    def check_device(self, compute_capability: int) -> None:
        """Refuse a GPU that the engine was not built for.

        Raises:
            ArtifactError: it runs on others only.
        """
        if compute_capability not in self.compute_capabilities:
            built = ", ".join(dotted(value) for value in self.compute_capabilities)
            raise ArtifactError(
                f"engine of {self.graph}: built for compute capability {built}, "
                f"this GPU has {dotted(compute_capability)}",
                hint="gemma4-run build ARTIFACT --target NAME compiles for that GPU",
            )

    def check_library(self, builder: str, version: str) -> None:
        """Refuse another library than the one that built the engine.

        Raises:
            ArtifactError: builder or version differ.
        """
        if (builder, version) != (self.builder, self.library_version):
            raise ArtifactError(
                f"engine of {self.graph}: built by {self.builder} {self.library_version}, here is {builder} {version}",
                hint="gemma4-run build ARTIFACT builds it with the library at hand",
            )


def write_record(folder: Path, record: EngineRecord) -> None:
    values = {"format": FORMAT, **dataclasses.asdict(record)}
    values["sha256"] = _self_hash(values)
    (folder / RECORD_NAME).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path, *, check_engine: bool = False) -> EngineRecord:
    """Read and check ``folder/engine.json``, and the size of the engine beside it.

    Args:
        check_engine: hash the engine as well (2 GB/s).
    Raises:
        ArtifactError: missing, damaged, changed by hand, or of another format.
    """
    path = folder / RECORD_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder}: no {RECORD_NAME} in it", hint=_REBUILD) from error
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}", hint=_REBUILD) from error
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error})", hint=_REBUILD) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise ArtifactError(f"{path}: format {found}, this version reads format {FORMAT}", hint=_REBUILD)
    stated = values.pop("sha256", None)
    if stated != _self_hash(values):
        raise ArtifactError(f"{path}: its sha256 does not match what it says", hint=_REBUILD)
    record = _from_json(values)
    _check_engine(folder / ENGINE_NAME, record, hashes=check_engine)
    return record


def _self_hash(values: dict[str, Any]) -> str:
    # In the order of the file: profiles are numbered by it, so it is part of what the hash protects.
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _from_json(values: dict[str, Any]) -> EngineRecord:
    fields = {name: value for name, value in values.items() if name != "format"}
    fields["profiles"] = profiles_from_json(fields["profiles"])
    fields["compute_capabilities"] = tuple(fields["compute_capabilities"])
    for name in ("inputs", "outputs"):
        fields[name] = tuple(
            TensorRecord(name=tensor["name"], dtype=tensor["dtype"], shape=tuple(tensor["shape"]))
            for tensor in fields[name]
        )
    return EngineRecord(**fields)


def _check_engine(path: Path, record: EngineRecord, *, hashes: bool) -> None:
    found = path.stat().st_size if path.is_file() else 0
    if found != record.engine_bytes:
        raise ArtifactError(f"{path}: expected {record.engine_bytes} bytes, found {found}", hint=_REBUILD)
    if hashes:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != record.engine_sha256:
            raise ArtifactError(f"{path}: sha256 {sha256[:12]}…, expected {record.engine_sha256[:12]}…", hint=_REBUILD)


def dotted(compute_capability: int) -> str:
    """89 as people write it: 8.9."""
    return f"{compute_capability // 10}.{compute_capability % 10}"
