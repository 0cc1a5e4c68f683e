"""Reads an artifact's oracle: refused unless it was recorded from this artifact's weights, tensors checked by shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.evidence import IDENTITY_KEY, bound_of, oracle_identity

Array = np.ndarray[Any, np.dtype[Any]]

_REBUILD = "build the artifact again with gemma4-export build"


class Oracle:
    """The tensors of ``configs/evidence.py``, read one at a time."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self._names = frozenset(file.keys())
        ids = self.tensor("ids")
        if ids.ndim != 2 or not ids.size:
            raise ArtifactError(f"{name}: ids: expected [prompts, tokens], found {list(ids.shape)}", hint=_REBUILD)
        self.ids = ids.astype(np.int64)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str, *shape: int) -> Array:
        """One tensor; of this shape when one is given.

        Raises:
            ArtifactError: it is absent or has another shape.
        """
        if name not in self._names:
            raise ArtifactError(f"{self._name}: holds no {name}", hint=_REBUILD)
        values: Array = self._file.get_tensor(name)
        if shape and values.shape != shape:
            raise ArtifactError(
                f"{self._name}: {name}: expected {list(shape)} (manifest.json), found {list(values.shape)}",
                hint=_REBUILD,
            )
        return values

    def bound(self, name: str) -> float:
        """The largest drift of tensor ``name`` that passes."""
        return bound_of(float(self.tensor(f"rounding.{name}").item()))


@contextmanager
def open_oracle(artifact: Artifact) -> Iterator[Oracle]:
    """The oracle of ``artifact``.

    Raises:
        ArtifactError: it is no safetensors file, or was recorded from other weights.
    """
    from safetensors import SafetensorError, safe_open

    manifest = artifact.manifest
    name = manifest.verify.oracle
    try:
        with safe_open(artifact.path(name), framework="numpy") as file:
            found = (file.metadata() or {}).get(IDENTITY_KEY)
            if found != oracle_identity(manifest.census, manifest.sources):
                raise ArtifactError(
                    f"{name}: recorded from other weights than {manifest.model.name} as {manifest.recipe} has",
                    hint=_REBUILD,
                )
            yield Oracle(file, name)
    except SafetensorError as error:
        raise ArtifactError(f"{name}: not a safetensors file ({error})", hint=_REBUILD) from error
