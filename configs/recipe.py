"""Recipes: how an artifact stores weights. A recipe decides what each weight is rounded to, not what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemma4_export.configs.errors import ConfigError, nearest
from gemma4_export.configs.names import Role

WeightFormat = Literal["float32", "bfloat16"]
ITEM_BYTES: dict[WeightFormat, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One storage format for all matrices; norms and scalars are a rounding error of the bytes and stay float32."""

    name: str
    matrices: WeightFormat

    def format_of(self, role: Role) -> WeightFormat:
        return "float32" if role == "decoder.norm" else self.matrices


RECIPES = {
    recipe.name: recipe
    for recipe in (Recipe(name="fp32", matrices="float32"), Recipe(name="bf16", matrices="bfloat16"))
}


def load_recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        ConfigError: there is none; the hint names the nearest.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is not known", hint=nearest(name, RECIPES))
    return RECIPES[name]
