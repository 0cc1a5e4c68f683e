"""``optimum-cli export gemma4``: the command ``gemma4-export build`` under optimum's roof.

``src/optimum/commands/register/gemma4.py`` hands it to optimum, which reads that folder of every distribution. Options
and their words are taken from our own command line; what they are given goes back to it unread.
"""

from __future__ import annotations

import importlib.metadata
from argparse import ArgumentParser
from typing import Any

import typer.main
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from gemma4_export.configs.command_line import run
from gemma4_export.configs.errors import ConfigError
from gemma4_export.exporter.commands import app

SUPPORTED = 2
"""Major version of optimum; ``pyproject.toml`` asks for the same."""


def check_optimum() -> None:
    """Refuse an optimum whose command line may not be what this was written for.

    Raises:
        ConfigError: it has another major version.
    """
    version = importlib.metadata.version("optimum")
    if version.split(".")[0] != str(SUPPORTED):
        raise ConfigError(
            f"optimum {version} is installed, optimum-cli export gemma4 works with {SUPPORTED}.*",
            hint=f'pip install "optimum=={SUPPORTED}.*", or use gemma4-export build, which takes the same options',
        )


def _build_command() -> Any:
    group: Any = typer.main.get_command(app)
    return group.commands["build"]


class Gemma4Command(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum comes without types
    """One command of optimum's; it makes an instance to declare the options and another one to run."""

    COMMAND = CommandInfo(name="gemma4", help="Export a Gemma 4 checkpoint as gemma4-export build does.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare every option of ``gemma4-export build``. Its value stays text here: the command itself judges it."""
        command = _build_command()
        context = command.make_context("gemma4", [], resilient_parsing=True)
        parser.description = command.help
        parser.allow_abbrev = False
        for option in command.params:
            # "--target <str>", and its help; argparse reads % as the beginning of a placeholder
            spelled, described = (text.replace("%", "%%") for text in option.get_help_record(context))
            if option.is_flag:
                parser.add_argument(*option.opts, dest=option.name, action="store_true", help=described)
            else:
                kind = spelled.partition(" ")[2]
                parser.add_argument(*option.opts, dest=option.name, metavar=kind, help=described)

    def run(self) -> None:
        """Build, and end as ``gemma4-export`` does: exit code, cause and hint."""
        command, words = _build_command(), []
        for option in command.params:
            value = getattr(self.args, option.name)
            if option.is_flag and value:
                words.append(option.opts[0])
            elif value is not None and not option.is_flag:
                words += [option.opts[0], value]

        def build() -> None:
            check_optimum()
            command.main(args=words, prog_name="optimum-cli export gemma4")

        run(build)
