"""What one engine is built from, and the key under which it is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gemma4_export.configs.errors import ArtifactError, ConfigError, ContractError, nearest

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]
"""Smallest, likeliest and largest shape of one input."""
Builder = Literal["tensorrt-rtx", "tensorrt"]

# Engines of another layout of engine.json, or built with other flags, have other keys.
KEY_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One graph to compile.

    Attributes:
        graph: ONNX file; the parser looks for its external data in the folder that it lies in.
        data: the external data files that the graph names.
        profiles: name -> input -> its range of shapes, in the order in which the engine will number them. Every profile
            covers every input with an unknown axis; inputs of one shape may be left out.
        compute_capabilities: 89 stands for 8.9. Several give one engine that runs on each of them.
        plugins: libraries whose ops the graph uses.
        sha256: hashes known already, by file (a manifest lists them); the others are computed.
        read_bytes: what the graph reads of ``data``, which other graphs may share; None: all of it.
    """

    graph: Path
    data: tuple[Path, ...] = ()
    profiles: Mapping[str, Mapping[str, Range]]
    compute_capabilities: tuple[int, ...]
    plugins: tuple[Path, ...] = ()
    builder: Builder = "tensorrt-rtx"
    sha256: Mapping[Path, str] = field(default_factory=dict)
    read_bytes: int | None = None

    @property
    def weights_bytes(self) -> int:
        """Bytes of the graph and its data: what the builder reads."""
        data = sum(path.stat().st_size for path in self.data) if self.read_bytes is None else self.read_bytes
        return self.graph.stat().st_size + data

    def check(self) -> None:
        """Refuse what no builder could do, before a library is loaded.

        Raises:
            ConfigError: no or repeated compute capabilities, or a range that is not min <= opt <= max.
            ArtifactError: a file is missing.
        """
        capabilities = self.compute_capabilities
        if not capabilities or len(set(capabilities)) != len(capabilities):
            raise ConfigError(
                f"compute capabilities {list(capabilities)}: expected one or more, each once",
                hint="a target names its own: gemma4-run build ARTIFACT --target rtx4090",
            )
        for name, ranges in self.profiles.items():
            for tensor, (low, likely, high) in ranges.items():
                ordered = all(a <= b <= c for a, b, c in zip(low, likely, high, strict=False))
                if not ordered or not len(low) == len(likely) == len(high):
                    raise ConfigError(
                        f"profile {name}, {tensor}: min {low}, opt {likely}, max {high} are not in order",
                        hint="each axis needs min <= opt <= max",
                    )
        for path in (self.graph, *self.data, *self.plugins):
            if not path.is_file():
                what = "make plugins compiles it" if path in self.plugins else "build the artifact again"
                raise ArtifactError(f"{path}: no such file, the engine of {self.graph.name} needs it", hint=what)

    def key(self, library_version: str) -> str:
        """A name made of everything that decides what the engine is: equal keys, equal engines."""
        identity = {
            "format": KEY_FORMAT,
            "builder": self.builder,
            "library": library_version,
            "graph": self._hash(self.graph),
            "data": {path.name: self._hash(path) for path in self.data},
            "profiles": [[name, _plain(ranges)] for name, ranges in self.profiles.items()],
            "compute_capabilities": sorted(self.compute_capabilities),
            "plugins": sorted(self._hash(path) for path in self.plugins),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        return {
            "graph": str(self.graph.resolve()),
            "data": [str(path.resolve()) for path in self.data],
            "profiles": {name: _plain(ranges) for name, ranges in self.profiles.items()},
            "compute_capabilities": list(self.compute_capabilities),
            "plugins": [str(path.resolve()) for path in self.plugins],
            "builder": self.builder,
            "read_bytes": self.read_bytes,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EngineRequest:
        return cls(
            graph=Path(values["graph"]),
            data=tuple(Path(path) for path in values["data"]),
            profiles=profiles_from_json(values["profiles"]),
            compute_capabilities=tuple(values["compute_capabilities"]),
            plugins=tuple(Path(path) for path in values["plugins"]),
            builder=values["builder"],
            read_bytes=values["read_bytes"],
        )

    def _hash(self, path: Path) -> str:
        if path in self.sha256:
            return self.sha256[path]
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def check_profiles(request: EngineRequest, inputs: Mapping[str, Shape]) -> None:
    """Hold the profiles to the graph's inputs, where -1 is an axis of unknown size.

    Raises:
        ContractError: a profile names no input, misses one, or gives a size where the graph states another.
    """
    for profile, ranges in request.profiles.items():
        for name in ranges:
            if name not in inputs:
                raise ContractError(
                    f"{request.graph.name}, profile {profile}: no input {name}", hint=nearest(name, inputs)
                )
    for name, shape in inputs.items():
        for profile, ranges in request.profiles.items():
            for given in ranges.get(name, ()):
                if len(given) != len(shape) or any(n not in (-1, g) for n, g in zip(shape, given, strict=True)):
                    raise ContractError(
                        f"{request.graph.name}, profile {profile}, {name}: the graph has {list(shape)} (-1: any), "
                        f"the profile {list(given)}",
                        hint="build the artifact again: its profiles are not those of its graphs",
                    )
        missing = [profile for profile, ranges in request.profiles.items() if name not in ranges]
        if -1 in shape and (missing or not request.profiles):
            where = f"profile {missing[0]} leaves it out" if missing else "no profile bounds it"
            raise ContractError(
                f"{request.graph.name}, input {name} {list(shape)}: {where}",
                hint="every profile gives min, opt and max of every input with an unknown axis",
            )


def profiles_from_json(values: Mapping[str, Any]) -> dict[str, dict[str, Range]]:
    """Profiles as JSON stores them: lists where we have tuples."""
    return {
        name: {tensor: (tuple(low), tuple(opt), tuple(high)) for tensor, (low, opt, high) in ranges.items()}
        for name, ranges in values.items()
    }


def _plain(ranges: Mapping[str, Range]) -> dict[str, list[list[int]]]:
    return {tensor: [list(shape) for shape in shapes] for tensor, shapes in ranges.items()}
