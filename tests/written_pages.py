"""``python tests/written_pages.py`` writes the pages of docs/ that are made from code: commands.md and manifest.md."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import itertools
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
from conftest import REPOSITORY

from gemma4_export.configs import manifest, names
from gemma4_export.configs.command_line import EXIT_CODES
from gemma4_export.exporter import commands as exporter_commands
from gemma4_export.runtime import commands as runtime_commands

APPS = {"gemma4-export": exporter_commands.app, "gemma4-run": runtime_commands.app}
MADE = "Made by `python tests/written_pages.py`; a test compares."


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows), ""]


def plain(text: str) -> str:
    """A docstring as Markdown: double backticks single, ends of lines as they are."""
    return inspect.cleandoc(text).replace("``", "`")


# ---------------------------------------------------------------------------------------------------------------------
# commands.md


def commands_page() -> str:
    lines = [
        "# Commands",
        "",
        f"{MADE} How both behave in a shell is in [shell.md](shell.md).",
        "",
        "## Exit codes",
        "",
        *table(("exit code", "meaning"), ((str(code), meaning) for code, meaning in EXIT_CODES.items())),
    ]
    for name, app in APPS.items():
        assert app.registered_callback is not None
        lines += [f"## {name}", "", str(app.info.help), "", *parameters(app.registered_callback.callback)]
        for command in app.registered_commands:
            text = plain((command.callback.__doc__ or "").split("Raises:")[0])
            lines += [f"### {name} {command.name}", "", text.strip(), "", *parameters(command.callback)]
    return "\n".join(lines)


def parameters(command: Any) -> list[str]:
    """The table of a command's arguments and options, as its signature declares them."""
    rows = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, info = get_args(parameter.annotation)
        value = f"`{info.metavar or value_of(kind)}`"
        if isinstance(info, typer.models.OptionInfo):
            what, value = f"`{option_name(parameter.name, info)}`", "" if kind is bool else value
        else:
            what, value = value, ""
        rows.append((what, value, default_of(parameter), info.help or ""))
    return table(("argument or option", "value", "unless given", "meaning"), rows)


def option_name(name: str, info: typer.models.OptionInfo) -> str:
    """``--name``; typer keeps a name that is given in ``Annotated`` where defaults are otherwise."""
    given = [info.default, *(info.param_decls or ())]
    return next((str(word) for word in given if str(word).startswith("--")), f"--{name.replace('_', '-')}")


def value_of(kind: Any) -> str:
    """The values of a type as a reader may type them."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is list:
        return f"{value_of(get_args(kind)[0])} …"
    if get_origin(kind) in (Union, types.UnionType):
        return value_of(get_args(kind)[0])
    if issubclass(kind, enum.Enum):
        return "|".join(str(member.value) for member in kind)
    return {Path: "PATH", int: "INTEGER", float: "NUMBER", str: "TEXT", bool: ""}[kind]


def default_of(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is inspect.Parameter.empty or default is ...:
        return "required"
    return "" if default in (None, False, (), []) else f"`{getattr(default, 'value', default)}`"


# ---------------------------------------------------------------------------------------------------------------------
# manifest.md


def manifest_page() -> str:
    rules = (manifest.__doc__ or "").split("\n\n", 1)[1]
    lines = [
        "# manifest.json",
        "",
        f"{MADE} What the other files of an artifact are is in [artifact.md](artifact.md).",
        "",
        f"Format {manifest.FORMAT}. {plain(rules)}",
        "",
    ]
    for entry in entries(manifest.Manifest):
        notes = attribute_docs(manifest, entry.__name__)
        fields = [(f"`{f.name}`", f"`{f.type}`", notes.get(f.name, "")) for f in dataclasses.fields(entry)]
        text = "" if (entry.__doc__ or "").startswith(f"{entry.__name__}(") else plain(entry.__doc__ or "")
        lines += [f"## {entry.__name__}", "", *([text, ""] if text else []), *table(("key", "type", "meaning"), fields)]
    lines += ["# Inputs and outputs of graphs", "", plain((names.__doc__ or "").split("\n\n", 1)[1]), ""]
    lines += ["## Inputs", "", plain(names.decoder_inputs.__doc__ or ""), ""]
    lines += ["## Outputs", "", plain(names.decoder_outputs.__doc__ or ""), ""]
    lines += ["## Only of engines", "", *table(("name", "meaning"), engine_names()), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def entries(kind: type) -> list[type]:
    """``kind`` and every dataclass that its fields lead to, each once."""
    found = [kind]
    for entry in found:
        for word in re.findall(r"\w+", " ".join(str(f.type) for f in dataclasses.fields(entry))):
            other = getattr(manifest, word, None)
            if dataclasses.is_dataclass(other) and other not in found:
                found.append(other)  # type: ignore[arg-type]
    return found


def attribute_docs(module: types.ModuleType, class_name: str | None = None) -> dict[str, str]:
    """Name -> the string below its assignment, in a class or at the top of a module."""
    body: Any = ast.parse(inspect.getsource(module)).body
    if class_name is not None:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return dict(_documented(body))


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for node, after in itertools.pairwise(body):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if (
            targets
            and isinstance(targets[0], ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            yield targets[0].id, plain(str(after.value.value))


def engine_names() -> Iterator[tuple[str, str]]:
    """The graph inputs and outputs that are constants of ``configs/names.py``."""
    for name, text in attribute_docs(names).items():
        value = getattr(names, name)
        values = value if isinstance(value, tuple) else (value,)
        if text.startswith("["):  # a shape comes first
            yield ", ".join(f"`{value}`" for value in values), text


PAGES = {"docs/commands.md": commands_page, "docs/manifest.md": manifest_page}


if __name__ == "__main__":
    for path, page in PAGES.items():
        (REPOSITORY / path).write_text(page(), encoding="utf-8")
