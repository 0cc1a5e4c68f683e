"""What an artifact of a matrix is made from, by content: equal inputs are an equal artifact, whatever their times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gemma4_export.configs.command_line import installed_versions
from gemma4_export.configs.matrix import Cell
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.models import other_checkpoint
from gemma4_export.exporter.dependencies import file_hash, source_hashes
from gemma4_export.exporter.file_hashes import FileHashes
from gemma4_export.exporter.versions import package_versions
from gemma4_export.plugins.compile import PLUGINS, library_sources

Inputs = Mapping[str, str]
"""Name of an input -> hash of its content, or what it says."""

# Modules that `exporter.requested` reaches and that decide nothing about some cells: a download is its commit, and a
# plan refuses a build or lets it be what it is.
_OF_DOWNLOADS = ("exporter.hub",)
_OF_REFUSALS = ("exporter.plan",)
_OF_CPU = ("exporter.lower", "exporter.verify_graphs")
_OF_ENGINES = ("exporter.engine_graphs",)
_BUILDERS = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-cu13")
_CHECKPOINT_ENDINGS = (".safetensors", ".gguf", ".json", ".jinja")


def inputs_of(cell: Cell, hashes: FileHashes) -> Inputs:
    """Everything that decides the artifact of ``cell``: a change of one of them, and of nothing else, builds it again.

    Comments and titles of configs decide nothing. A checkpoint of the hub is its commit, which is asked for.

    Raises:
        CheckpointError: the hub does not answer, and its cache holds nothing.
    """
    return {
        **_origin_inputs(cell, hashes),
        f"target {cell.target.name}": _hash_of({**asdict(cell.target), "title": ""}),
        f"recipe {cell.recipe.name}": _hash_of(
            [cell.recipe.name, {role: str(form) for role, form in cell.recipe.formats.items()}]
        ),
        "options": _hash_of([cell.model, cell.context, cell.chunk, cell.engines]),
        **{f"version of {package}": version for package, version in _versions(cell).items()},
        **_code_inputs(cell),
    }


def config_of(cell: Cell) -> ModelConfig | None:
    """The model's; None: only the hub knows.

    Raises:
        CheckpointError, ConfigError: as `open_source`.
    """
    if cell.checkpoint is None:
        return None if cell.released is None else cell.released.config
    from gemma4_export.exporter.source import open_source

    with open_source(cell.checkpoint) as source:
        return source.config


def holds_plugins(cell: Cell) -> bool:
    """Whether engines are compiled with our kernels in them: those of routed experts."""
    if not cell.compiles_engines:
        return False
    config = config_of(cell)
    return config is None or config.layers[0].moe is not None


def key_of(inputs: Inputs) -> str:
    """A name for the inputs, 16 hexadecimal digits."""
    return _hash_of(dict(inputs))[:16]


def changes(before: Inputs, after: Inputs) -> str:
    """What differs, in words: ``recipe int4, exporter/quantize.py and 2 more``."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _origin_inputs(cell: Cell, hashes: FileHashes) -> dict[str, str]:
    if cell.checkpoint is not None:
        files = sorted(path for path in cell.checkpoint.iterdir() if path.suffix in _CHECKPOINT_ENDINGS)
        return {f"checkpoint {path.name}": hashes.hash_of(path) for path in files}
    released = cell.released
    if cell.has_dummy_weights and released is not None:
        return {f"model {cell.model}": _hash_of(asdict(released.config)), "weights": "dummy"}
    from gemma4_export.exporter.hub import current_commit

    return {f"commit of {hub_id}": current_commit(hub_id) for hub_id in _hub_ids(cell)}


def _hub_ids(cell: Cell) -> list[str]:
    released = cell.released
    wanted = other_checkpoint(cell.model, cell.recipe) if released is None else released.checkpoint_for(cell.recipe)
    return [wanted.hub_id, *([wanted.plain_id] if wanted.plain_id else [])]


def _code_inputs(cell: Cell) -> dict[str, str]:
    others = {"runtime", *_OF_DOWNLOADS, *_OF_REFUSALS, *(_OF_CPU if cell.has_engines else _OF_ENGINES)}
    others.add("exporter.source" if cell.has_dummy_weights else "exporter.dummy")
    kernels = library_sources() if holds_plugins(cell) else []
    compiler = ["runtime.engine.__main__"] if cell.compiles_engines else []
    return {
        **source_hashes(["exporter.requested", *compiler], without=others),
        **{f"plugins/{path.relative_to(PLUGINS).as_posix()}": file_hash(path) for path in kernels},
    }


def _versions(cell: Cell) -> dict[str, str]:
    """Of the packages that write graphs and weights, and of those that compile engines of them."""
    builders = installed_versions() if cell.compiles_engines else {}
    return package_versions() | {name: builders[name] for name in _BUILDERS if name in builders}


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
