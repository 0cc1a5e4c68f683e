"""``gemma4-export``: checkpoint folders to artifact folders."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma4_export import __version__
from gemma4_export.configs.command_line import run
from gemma4_export.exporter.commands.build import build
from gemma4_export.exporter.commands.inspect import inspect
from gemma4_export.exporter.commands.plan import plan

app = typer.Typer(
    name="gemma4-export",
    help="Turn a Gemma 4 checkpoint into a folder that runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(build)
app.command()(inspect)
app.command()(plan)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    run(app)
