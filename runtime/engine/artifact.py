"""Compiles the engines of an artifact, keeps them below ``engines/`` in it and lists them in its manifest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError, ConfigError
from gemma4_export.configs.evidence import GRAPHS_FOLDER
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import (
    ENGINE_NAME,
    ENGINES_FOLDER,
    MANIFEST_NAME,
    RECORD_NAME,
    CompiledEntry,
    EnginesEntry,
    FileEntry,
    GroupEntry,
    Manifest,
)
from gemma4_export.configs.target import EngineBackend, check_formats, load_target
from gemma4_export.plugins.compile import LIBRARY
from gemma4_export.runtime.engine.build import (
    BuiltEngine,
    OnBuilt,
    Progress,
    build_engines,
    build_memory,
    find_library,
    free_engines,
    nothing,
)
from gemma4_export.runtime.engine.module import check_device, device_capability
from gemma4_export.runtime.engine.plugins import CONTRACTS, library_contracts
from gemma4_export.runtime.engine.record import dotted
from gemma4_export.runtime.engine.request import EngineRequest, profiles_from_json
from gemma4_export.runtime.memory import available_bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What `compile_artifact` did: an engine per group in the manifest's order, and the manifest that lists them."""

    manifest: Manifest
    engines: list[BuiltEngine]
    removed: list[Path]
    """Folders of engines that the manifest does not name any more."""


def compile_artifact(
    artifact: Artifact,
    *,
    compute_capabilities: tuple[int, ...] | None = None,
    memory_bytes: int | None = None,
    plugins: Path = LIBRARY,
    progress: Progress = nothing,
    on_built: OnBuilt = nothing,
) -> Compiled:
    """Compile every group of ``artifact`` into ``engines/KEY/`` and seal a manifest that lists them.

    Engines that are there already and made from the same bytes by the same library are taken as they are, so that a
    killed run goes on where it stopped; those of another run are removed at the end.

    Args:
        artifact: opened without its engines.
        compute_capabilities: GPUs that each engine is to run on, 89 for 8.9; None: the one it was lowered for.
        memory_bytes: what all builds together may take; None: what the machine has left.
        plugins: the library of our plugins; read only where a graph has a node of ours.
    Raises:
        ConfigError: the artifact has no engines, a GPU is asked for that the builder does not know, or one group alone
            takes more than ``memory_bytes``.
        ContractError: profiles that do not fit their graph.
        ArtifactError: no builder for these GPUs here, a missing plugin, no room on the disk, another build in the same
            folder, or a build that failed.
    """
    entry = _engines_of(artifact)
    capabilities = compute_capabilities or (capability_number(entry.compute_capability),)
    check_builder(entry.backend, capabilities, plugins=plugins if needs_plugins(artifact.manifest) else None)
    requests = _requests(artifact, entry, capabilities, plugins)
    _check_build_memory(requests, memory_bytes)
    folder = artifact.path(ENGINES_FOLDER)
    folder.mkdir(exist_ok=True)
    with _only_one(folder):
        _check_disk(requests, folder)
        built = build_engines(requests, folder, memory_bytes=memory_bytes, progress=progress, on_built=on_built)
        manifest = _with_engines(artifact.manifest, entry, built)
        _seal(artifact.path(MANIFEST_NAME), manifest)
        removed = free_engines(folder, built)
        for path in removed:
            shutil.rmtree(path)
        for log in folder.glob("*.log"):  # of builds that failed before
            log.unlink()
    return Compiled(manifest=manifest, engines=built, removed=removed)


def check_builder(backend: EngineBackend, compute_capabilities: tuple[int, ...], *, plugins: Path | None) -> None:
    """Refuse at once what would otherwise fail when the weights are written.

    Args:
        plugins: the library that graphs need; None: they need none.
    Raises:
        ArtifactError: no library, one of another version, no GPU of the kind that ``tensorrt`` compiles for, or no
            plugins of this version.
    """
    find_library(backend)
    if backend == "tensorrt":
        check_device(compute_capabilities, device_capability())
    if plugins is None:
        return
    if not plugins.is_file():
        raise ArtifactError(
            f"{plugins}: no such file; the engines of this model contain nodes of ours",
            hint="make plugins compiles it, or build the artifact with --experts builtin",
        )
    if missing := sorted(CONTRACTS.keys() - library_contracts(plugins).keys()):
        raise ArtifactError(f"{plugins}: has no {missing[0]}", hint="make plugins compiles the library of this version")


def capability_number(dotted_capability: str) -> int:
    """8.9 as builders count: 89."""
    return int(dotted_capability.replace(".", ""))


def target_capabilities(names: list[str], manifest: Manifest) -> tuple[int, ...] | None:
    """Compute capabilities of the targets called ``names``, each once; None where there are none.

    Raises:
        ConfigError: a target does not exist, runs engines of another backend or none, or does not multiply with the
            artifact's weights.
    """
    if manifest.engines is None or not names:
        return None
    found, backend = [], manifest.engines.backend
    formats = [WeightFormat.parse(entry.format) for entry in manifest.census.values()]
    for name in names:
        target = load_target(name)
        if target.built_backend != backend or target.compute_capability is None:
            raise ConfigError(
                f"--target {name}: runs {target.built_backend or ' or '.join(target.backends)}, "
                f"this artifact was lowered for {backend}",
                hint=f"build another one: gemma4-export build --target {name}",
            )
        check_formats(target, manifest.recipe, formats)
        found.append(capability_number(target.compute_capability))
    return tuple(dict.fromkeys(found))


def needs_plugins(manifest: Manifest) -> bool:
    """Whether graphs have nodes of ours."""
    return manifest.engines is not None and manifest.engines.experts == "plugin" and manifest.model.num_experts > 0


def _engines_of(artifact: Artifact) -> EnginesEntry:
    if artifact.manifest.engines is None:
        raise ConfigError(
            f"{artifact.folder}: built for target {artifact.manifest.target}, which has no engines to compile",
            hint="gemma4-export build --target rtx4090 --engines later writes what engines are compiled from",
        )
    return artifact.manifest.engines


def _requests(
    artifact: Artifact, entry: EnginesEntry, capabilities: tuple[int, ...], plugins: Path
) -> list[EngineRequest]:
    """One per group. All groups read the same weight files, whose hashes the manifest has."""
    manifest = artifact.manifest
    rows = manifest.embed_tokens_per_layer
    weights = [name for name in manifest.files if name.startswith(f"{GRAPHS_FOLDER}/") and name.endswith(".bin")]
    data = tuple(artifact.path(name) for name in sorted(weights) if rows is None or name != rows.file)
    known = {artifact.path(name): file.sha256 for name, file in manifest.files.items()}
    return [
        EngineRequest(
            graph=artifact.path(group.file),
            data=data,
            profiles=profiles_from_json(group.profiles),
            compute_capabilities=capabilities,
            plugins=(plugins,) if needs_plugins(manifest) else (),
            builder=entry.backend,
            sha256=known,
            read_bytes=group.weight_bytes,
        )
        for group in entry.groups
    ]


def _check_build_memory(requests: list[EngineRequest], memory_bytes: int | None) -> None:
    """Raise ConfigError where the largest group alone takes more than was given; what is left is only a guess."""
    largest = max(requests, key=lambda request: request.weights_bytes)
    needed = build_memory(largest.weights_bytes)
    left = available_bytes()
    if memory_bytes is None and left is not None and needed > left:
        _log.warning(
            "building %s takes about %.2f GB of memory, %.2f GB are left: close other programs",
            largest.graph.name,
            needed / 1e9,
            left / 1e9,
        )
    if memory_bytes is not None and needed > memory_bytes:
        raise ConfigError(
            f"--build-memory {memory_bytes / 1e9:.2f} GB: building {largest.graph.name} with "
            f"{largest.weights_bytes / 1e9:.2f} GB of weights takes about {needed / 1e9:.2f} GB",
            hint=f"--build-memory {needed}, or leave it out to try with what this machine has left",
        )


_ENGINE_OVERHEAD = 64_000_000
"""Kernels and plan beside the weights: engines of the smallest models, for one GPU, took 24 to 61 MB."""


def _check_disk(requests: list[EngineRequest], folder: Path) -> None:
    """Raise ArtifactError where engines, each as large as its weights and more, find no room beside those here."""
    here = sum(path.stat().st_size for path in folder.glob(f"*/{ENGINE_NAME}"))
    needed = sum(request.weights_bytes + _ENGINE_OVERHEAD for request in requests)
    free = shutil.disk_usage(folder).free + here
    if needed > free:
        raise ArtifactError(
            f"{folder}: engines need {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free",
            hint="free some room and run it again: gemma4-run build ARTIFACT",
        )


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process: two would remove each other's engines."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(
                f"{folder}: another process compiles engines here", hint="wait for it; finished engines are kept"
            ) from error
        yield
    finally:
        os.close(handle)


def _with_engines(manifest: Manifest, entry: EnginesEntry, built: list[BuiltEngine]) -> Manifest:
    """``manifest`` with an engine for each group, and with their files instead of those of engines before."""
    engines = iter(built)
    phases = {phase: [_with_engine(group, next(engines)) for group in groups] for phase, groups in entry.phases.items()}
    files = {name: file for name, file in manifest.files.items() if not name.startswith(f"{ENGINES_FOLDER}/")}
    for engine in built:
        folder = f"{ENGINES_FOLDER}/{engine.folder.name}"
        record = (engine.folder / RECORD_NAME).read_bytes()
        files[f"{folder}/{RECORD_NAME}"] = FileEntry(bytes=len(record), sha256=hashlib.sha256(record).hexdigest())
        engine_file = FileEntry(bytes=engine.record.engine_bytes, sha256=engine.record.engine_sha256)
        files[f"{folder}/{ENGINE_NAME}"] = engine_file
    compiled = CompiledEntry(
        library_version=built[0].record.library_version,
        compute_capabilities=[dotted(number) for number in built[0].record.compute_capabilities],
    )
    return replace(manifest, engines=replace(entry, phases=phases, compiled=compiled), files=files)


def _with_engine(group: GroupEntry, engine: BuiltEngine) -> GroupEntry:
    return replace(group, engine=f"{ENGINES_FOLDER}/{engine.folder.name}")


def _seal(path: Path, manifest: Manifest) -> None:
    """Write the manifest whole or not at all: what it lists is there, before and after."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
