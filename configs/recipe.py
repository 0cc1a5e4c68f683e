"""Recipes: how an artifact stores weights, one format per role. A recipe decides what each weight is rounded to."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gemma4_export.configs.errors import ConfigError, nearest
from gemma4_export.configs.formats import FLOAT32, FP8, WeightFormat
from gemma4_export.configs.names import RECIPE_ROLES, Role
from gemma4_export.configs.toml import check_keys, load_named, names_in

_FOLDER = Path(__file__).parent / "recipes"
_FP8_ROLES: tuple[Role, ...] = ("decoder.attention", "decoder.mlp", "decoder.per_layer", "decoder.head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A format for every role. Norms and scalars are a rounding error of the bytes and stay float32."""

    name: str
    title: str
    formats: Mapping[Role, WeightFormat]
    prefers_qat: bool
    """A released model's quantisation-aware checkpoint is taken where configs/models names one."""

    def format_of(self, role: Role) -> WeightFormat:
        return FLOAT32 if role == "decoder.norm" else self.formats[role]


def recipe_names() -> list[str]:
    return names_in(_FOLDER)


def load_recipe(name: str) -> Recipe:
    """The shipped recipe called ``name``, or the one in a TOML file of that path.

    Raises:
        ConfigError: there is none, or it names a role or a format that does not exist; the hint names the nearest.
    """
    if name.endswith(".toml"):
        path = Path(name)
        try:
            return _parse(tomllib.loads(path.read_text(encoding="utf-8")), path.name)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            hint = "see docs/quantization.md for one that works, or take a shipped recipe: --recipe int4"
            raise ConfigError(f"{path}: not a readable TOML file ({error})", hint=hint) from error
    return _parse(load_named(_FOLDER, name, "recipe"), f"recipes/{name}.toml")


def _parse(values: Mapping[str, Any], where: str) -> Recipe:
    check_keys(values, {"name", "title", "roles"}, {"prefers_qat"}, where)
    roles = values["roles"]
    if not isinstance(roles, Mapping):
        found = type(roles).__name__
        raise ConfigError(f"{where}: roles: expected a table, found {found}", hint='begin it with a line "[roles]"')
    formats: dict[Role, WeightFormat] = {}
    for role, text in roles.items():
        if role not in RECIPE_ROLES:
            raise ConfigError(f"{where}: role {role!r} does not exist", hint=nearest(role, RECIPE_ROLES))
        try:
            formats[role] = WeightFormat.parse(str(text))
        except ConfigError as error:
            raise ConfigError(f"{where}: {role}: {error.cause}", hint=error.hint) from error
        if formats[role] == FP8 and role not in _FP8_ROLES:
            raise ConfigError(f"{where}: {role}: fp8 is for {', '.join(_FP8_ROLES)} only", hint=f'"{role}" = "int8"')
    missing = [role for role in RECIPE_ROLES if role not in formats]
    if missing:
        raise ConfigError(f"{where}: no format for {', '.join(missing)}", hint=f'add "{missing[0]}" = "bfloat16"')
    return Recipe(
        name=values["name"],
        title=values["title"],
        formats=MappingProxyType(formats),
        prefers_qat=bool(values.get("prefers_qat", False)),
    )
