"""Reads the project's own TOML files strictly: an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
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


def value_at(values: Any, keys: Sequence[str | int]) -> Any:
    """What stands at a path of table keys and list indices; None: nothing."""
    for key in keys:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def line_of(text: str, keys: Sequence[str | int]) -> int | None:
    """The line of a TOML text that spells the string, or else the last key, of ``keys``; None: it spells it otherwise.

    tomllib keeps no positions. Each place that could be meant is changed in turn, and the text is parsed again: it is
    the one where the string gets longer, or where nothing is left under the old key.
    """
    value = value_at(tomllib.loads(text), keys)
    names = [key for key in keys if isinstance(key, str)]
    spelt, expected = (value, f"{value}0") if isinstance(value, str) else (names[-1] if names else None, None)
    for found in re.finditer(re.escape(spelt), text) if spelt and value is not None else ():
        try:
            changed = tomllib.loads(f"{text[: found.end()]}0{text[found.end() :]}")
        except tomllib.TOMLDecodeError:
            continue  # a place between two values
        if value_at(changed, keys) == expected:
            return text.count("\n", 0, found.start()) + 1
    return None
