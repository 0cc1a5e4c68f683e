"""Text and JSON that a user wrote: read whole, and refused by file and line where it is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma4_export.configs.errors import ConfigError


def read_text(path: Path, hint: str) -> str:
    """The UTF-8 text of a file, a byte order mark left out.

    Raises:
        ConfigError: no such file, a folder, or no UTF-8.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, not a file", hint=hint)
    if not path.exists():
        raise ConfigError(f"{path}: no such file", hint=hint)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is no UTF-8", hint="save it as UTF-8 text") from error


def parse_json(text: str, where: str, hint: str) -> Any:
    """The value of a JSON text; ``where`` names its place.

    Raises:
        ConfigError: no JSON, or an object with a key twice: only the second would be read.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConfigError(f"{where}: key {key!r:.60} stands twice in one object", hint="remove one of the two")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}", hint=hint) from error
