"""Which artifacts are built together: a TOML file of models, targets and recipes, read into one ``Cell`` per artifact.

recipes = ["int4"]              # of every model that names no others

[targets.cpu]
[targets.rtx4090]
engines = "later"               # optional: what `gemma4-export build --engines` takes

[models.e2b]                    # a released model or hub id; downloaded unless weights = "dummy"
[models.mine]                   # any name, with a folder relative to this file
checkpoint = "../checkpoints/mine"
context = 8192                  # optional, tokens; chunk likewise
targets = ["cpu"]               # optional: not all of them
recipes = ["int8", "own.toml"]  # optional: others
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma4_export.configs.errors import ConfigError, nearest
from gemma4_export.configs.models import ReleasedModel, is_other, load_model
from gemma4_export.configs.recipe import Recipe, load_recipe
from gemma4_export.configs.target import Target, check_buildable, load_target
from gemma4_export.configs.toml import line_of, value_at

DEFAULT_MATRIX = Path(__file__).parent / "matrix.toml"
Engines = Literal["later"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One artifact of a matrix: what `gemma4-export build` is told."""

    model: str
    """A released model, a hub id, or with ``checkpoint`` any name."""
    target: Target
    recipe: Recipe
    recipe_argument: str
    """A recipe's name, or the path of its file."""
    checkpoint: Path | None = None
    has_dummy_weights: bool = False
    context: int | None = None
    chunk: int | None = None
    engines: Engines | None = None

    @property
    def name(self) -> str:
        """MODEL-TARGET-RECIPE: the artifact's folder below OUT."""
        return f"{self.model.rsplit('/', 1)[-1]}-{self.target.name}-{Path(self.recipe_argument).stem}"

    @property
    def released(self) -> ReleasedModel | None:
        """None: a folder's model, or one of the hub that configs/models does not list."""
        return None if self.checkpoint is not None or is_other(self.model) else load_model(self.model)

    @property
    def has_engines(self) -> bool:
        return self.target.built_backend != "ort-cpu"

    @property
    def compiles_engines(self) -> bool:
        return self.has_engines and self.engines != "later"


def load_matrix(path: Path) -> tuple[Cell, ...]:
    """The cells of a matrix file, models outermost.

    Raises:
        ConfigError: the file cannot be read, or a line of it names what does not exist; the cause begins FILE:LINE.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        hint = "docs/ci.md shows one that works; --matrix FILE takes another"
        raise ConfigError(f"{path}: not a readable TOML file ({error})", hint=hint) from error
    return _MatrixFile(path, text, values).cells()


def one_cell(
    *,
    model: str | None,
    target: str,
    recipe: str | None,
    checkpoint: Path | None,
    has_dummy_weights: bool,
    context: int | None,
    chunk: int | None,
    engines: Engines | None,
) -> Cell:
    """A cell without a file.

    Raises:
        ConfigError: a name is not known, or neither a model nor a checkpoint is given.
    """
    if model is None and checkpoint is None:
        raise ConfigError("neither a model nor a checkpoint is given", hint="--model e2b, or --checkpoint DIR")
    chosen = load_target(target)
    recipe = recipe or chosen.recipe
    cell = Cell(
        model=model or checkpoint_name(checkpoint),
        target=chosen,
        recipe=load_recipe(recipe),
        recipe_argument=recipe,
        checkpoint=checkpoint,
        has_dummy_weights=has_dummy_weights,
        context=context,
        chunk=chunk,
        engines=engines,
    )
    _check_target(cell.target, engines)
    _check_model(cell)
    return cell


_MAX_NAME_BYTES = 200
"""File systems take 255, and a build adds an ending."""


def checkpoint_name(checkpoint: Path | None) -> str:
    return "" if checkpoint is None else checkpoint.resolve().name


def _check_target(target: Target, engines: Engines | None) -> None:
    """Raise ConfigError for what this version cannot build."""
    check_buildable(target)
    if engines is not None and target.built_backend == "ort-cpu":
        raise ConfigError(f"engines {engines!r}: target {target.name} has none", hint="leave engines out")


def _check_model(cell: Cell) -> None:
    """Raise ConfigError for an unknown model, a missing folder, and options that exclude each other."""
    if not cell.model or not cell.name.isprintable() or len(cell.name.encode()) > _MAX_NAME_BYTES:
        raise ConfigError(
            f"model {cell.model!r:.60}: no name for a folder, {cell.name!r:.60}",
            hint=f"printable characters, up to {_MAX_NAME_BYTES} bytes with target and recipe",
        )
    if cell.checkpoint is None:
        if cell.released is None and cell.has_dummy_weights:
            raise ConfigError(f"dummy weights are drawn for released sizes only, not {cell.model}", hint="take e2b")
        return
    if cell.has_dummy_weights:
        raise ConfigError(f"model {cell.model}: a checkpoint and dummy weights", hint="leave one of them out")
    if not cell.checkpoint.is_dir():
        hint = "in a matrix, a relative path begins where the file lies"
        raise ConfigError(f"model {cell.model}: no folder {cell.checkpoint}", hint=hint)


_TOP = {"models", "targets", "recipes"}
_OF_TARGET = {"engines"}
_OF_MODEL = {"checkpoint", "weights", "context", "chunk", "targets", "recipes"}
Keys = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class _MatrixFile:
    path: Path
    text: str
    values: Mapping[str, Any]

    def cells(self) -> tuple[Cell, ...]:
        self._check_keys((), _TOP, required=("models", "targets"))
        targets = {name: self._target(name) for name in self._table(("targets",))}
        cells = [cell for model in self._table(("models",)) for cell in self._cells_of(model, targets)]
        seen: dict[str, Cell] = {}
        for cell in cells:
            if cell.name in seen:
                cause = f"two artifacts would be called {cell.name}"
                raise self._error(("models", cell.model), cause, "rename a model or a recipe file, or list it once")
            seen[cell.name] = cell
        return tuple(cells)

    def _target(self, name: str) -> tuple[Target, Engines | None]:
        keys = ("targets", name)
        self._check_keys(keys, _OF_TARGET)
        engines: Engines | None = self._choice((*keys, "engines"), ("later",))  # type: ignore[assignment]
        try:
            target = load_target(name)
            _check_target(target, engines)
        except ConfigError as error:
            raise self._error(keys, error.cause, error.hint) from error
        return target, engines

    def _cells_of(self, model: str, targets: Mapping[str, tuple[Target, Engines | None]]) -> Iterator[Cell]:
        keys = ("models", model)
        values = self._check_keys(keys, _OF_MODEL)
        folder = self._value((*keys, "checkpoint"), str)
        at_recipes: Keys = (*keys, "recipes") if "recipes" in values else ("recipes",)
        for name in self._names_of_targets((*keys, "targets"), targets):
            target, engines = targets[name]
            for index, recipe in enumerate(self._names(at_recipes)):
                argument, loaded = self._recipe((*at_recipes, index), recipe)
                cell = Cell(
                    model=model,
                    target=target,
                    recipe=loaded,
                    recipe_argument=argument,
                    checkpoint=None if folder is None else self.path.parent / folder,
                    has_dummy_weights=self._choice((*keys, "weights"), ("model", "dummy")) == "dummy",
                    context=self._length((*keys, "context")),
                    chunk=self._length((*keys, "chunk")),
                    engines=engines,
                )
                try:
                    _check_model(cell)
                except ConfigError as error:
                    raise self._error(keys, error.cause, error.hint) from error
                yield cell

    def _names_of_targets(self, keys: Keys, targets: Mapping[str, object]) -> Sequence[str]:
        if self._value(keys, list) is None:
            return list(targets)
        names = self._names(keys)
        for index, name in enumerate(names):
            if name not in targets:
                raise self._error((*keys, index), f"[targets.{name}] is not in this file", nearest(name, targets))
        return names

    def _recipe(self, keys: Keys, name: str) -> tuple[str, Recipe]:
        """What ``--recipe`` takes, and the recipe. A file's path begins where the matrix lies."""
        if not name.isprintable():
            raise self._error(keys, f"recipe {name!r:.60}: a name has printable characters", 'recipes = ["int4"]')
        argument = str(self.path.parent / name) if name.endswith(".toml") else name
        try:
            return argument, load_recipe(argument)
        except ConfigError as error:
            raise self._error(keys, error.cause, error.hint) from error

    # What stands where

    def _at(self, keys: Keys) -> Any:
        return value_at(self.values, keys)

    def _table(self, keys: Keys) -> Mapping[str, Any]:
        table: Mapping[str, Any] | None = self._value(keys, dict)
        if not table:
            name = ".".join(map(str, keys))
            raise self._error(
                keys, f"{name}: nothing in it", f"add a line [{name}.{'cpu' if name == 'targets' else 'e2b'}]"
            )
        return table

    def _names(self, keys: Keys) -> Sequence[str]:
        names: Sequence[str] | None = self._value(keys, list)
        if not names or not all(isinstance(name, str) for name in names):
            found = "nothing" if names is None else repr(names)
            name = keys[-1]
            raise self._error(keys, f"{name}: expected a list of names, found {found}", f'{name} = ["int4"]')
        return names

    def _length(self, keys: Keys) -> int | None:
        tokens: int | None = self._value(keys, int)
        if tokens is not None and tokens < 1:
            raise self._error(keys, f"{keys[-1]}: expected 1 token or more, found {tokens}", f"leave {keys[-1]} out")
        return tokens

    def _choice(self, keys: Keys, known: Sequence[str]) -> str | None:
        value: str | None = self._value(keys, str)
        if value is not None and value not in known:
            raise self._error(keys, f"{keys[-1]} {value!r} is not known", nearest(value, known))
        return value

    def _value(self, keys: Keys, kind: type) -> Any:
        value = self._at(keys)
        # True is an int to Python, not to a reader of the file.
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            names = {dict: "a table", list: "a list", str: "a string", int: "a number"}
            cause = f"{keys[-1]}: expected {names[kind]}, found {value!r}"
            raise self._error(keys, cause, "docs/ci.md lists the keys of a matrix")
        return value

    def _check_keys(self, keys: Keys, known: set[str], *, required: Sequence[str] = ()) -> Mapping[str, Any]:
        table: Mapping[str, Any] = self._value(keys, dict)
        for key in table:
            if key not in known:
                raise self._error((*keys, key), f"unknown key {key!r}", nearest(key, known))
        for key in required:
            if key not in table:
                raise self._error(
                    keys, f"no {key} in this file", f"add a line [{key}.{'cpu' if key == 'targets' else 'e2b'}]"
                )
        return table

    def _error(self, keys: Keys, cause: str, hint: str | None) -> ConfigError:
        line = line_of(self.text, keys)
        return ConfigError(f"{self.path}{'' if line is None else f':{line}'}: {cause}", hint=hint)
