"""Reads the project's own TOML files strictly: an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma4_export.configs.errors import ConfigError, nearest


def load_named(folder: Path, name: str, what: str) -> Mapping[str, Any]:
    """The TOML file called ``name`` in ``folder``.

    Raises:
        ConfigError: there is none; the hint names the nearest.
    """
    known = names_in(folder)
    if name not in known:
        raise ConfigError(f"{what} {name!r} is not known", hint=nearest(name, known))
    return tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))


def names_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.toml"))


def check_keys(values: Mapping[str, Any], required: set[str], optional: set[str], where: str) -> None:
    """Raise ConfigError for an unknown or a missing key."""
    for key in values:
        if key not in required | optional:
            raise ConfigError(f"{where}: unknown key {key!r}", hint=nearest(key, required | optional))
    missing = sorted(required - set(values))
    if missing:
        raise ConfigError(f"{where}: key {missing[0]!r} is missing", hint=f"add {missing[0]} = …")
