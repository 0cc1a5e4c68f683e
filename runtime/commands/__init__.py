"""``gemma4-run``: artifact folders to text."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma4_export import __version__
from gemma4_export.configs.command_line import run
from gemma4_export.runtime.commands.bench import bench
from gemma4_export.runtime.commands.chat import chat
from gemma4_export.runtime.commands.doctor import doctor
from gemma4_export.runtime.commands.eval import evaluate_command
from gemma4_export.runtime.commands.generate import generate
from gemma4_export.runtime.commands.verify import verify

app = typer.Typer(
    name="gemma4-run",
    help="Run what gemma4-export built.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(chat)
app.command()(generate)
app.command()(bench)
app.command("eval")(evaluate_command)
app.command()(verify)
app.command()(doctor)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    run(app)
