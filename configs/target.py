"""Where an artifact is to run: one TOML file per target in ``targets/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.toml import check_keys, load_named, names_in

BACKENDS = ("ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx")
BUILT_BACKEND = "ort-cpu"
"""The only one that this version lowers to and runs."""
_FOLDER = Path(__file__).parent / "targets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device to build for."""

    name: str
    title: str
    backends: tuple[str, ...]
    """What runs on it, best first."""
    chunk: int
    """Longest run of tokens in one call of the decoder, unless --chunk says otherwise."""
    compute_capability: str | None
    memory_bytes: int | None
    """Of the device; None: the machine's own."""
    bandwidth_bytes_per_s: int | None


def target_names() -> list[str]:
    return names_in(_FOLDER)


def load_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        ConfigError: there is none, or its file is wrong; the hint names the nearest.
    """
    values, where = load_named(_FOLDER, name, "target"), f"targets/{name}.toml"
    optional = {"compute_capability", "memory_bytes", "bandwidth_bytes_per_s"}
    check_keys(values, {"name", "title", "backends", "chunk"}, optional, where)
    unknown = [backend for backend in values["backends"] if backend not in BACKENDS]
    if unknown or values["name"] != name or values["chunk"] < 1:
        raise ConfigError(
            f"{where}: name {values['name']!r}, chunk {values['chunk']}, unknown backends {unknown}",
            hint=f"backends are {', '.join(BACKENDS)}; chunk is at least 1",
        )
    return Target(
        name=name,
        title=values["title"],
        backends=tuple(values["backends"]),
        chunk=values["chunk"],
        compute_capability=values.get("compute_capability"),
        memory_bytes=values.get("memory_bytes"),
        bandwidth_bytes_per_s=values.get("bandwidth_bytes_per_s"),
    )


def check_buildable(target: Target) -> None:
    """Refuse a target that none of our backends runs on: no CPU graph ever carries the name of a GPU.

    Raises:
        ConfigError: the target's backends do not exist yet.
    """
    if BUILT_BACKEND not in target.backends:
        raise ConfigError(
            f"target {target.name} runs {' or '.join(target.backends)}; this version builds {BUILT_BACKEND} only",
            hint="--target cpu builds a folder that runs on any machine's processor",
        )
