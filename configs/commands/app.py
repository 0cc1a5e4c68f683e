"""A command line of ours: commands that take ``--quiet`` and ``--verbose``, ``--version``, completion, exit codes."""

from __future__ import annotations

import functools
import inspect
import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from gemma4_export.configs.command_line import EXIT_CODES, installed_versions, set_verbosity
from gemma4_export.configs.errors import ConfigError

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress: results, warnings and errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also steps, and where an error came from.")]


def make_app(name: str, text: str, commands: Mapping[str, Callable[..., None]]) -> typer.Typer:
    """The command line called ``name``; ``text`` says what it is for."""
    app = typer.Typer(
        name=name,
        help=text,
        epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def begin(
        version: Annotated[bool, typer.Option("--version", help="Print the versions that matter and exit.")] = False,
    ) -> None:
        if version:
            print(version_line(name))
            raise typer.Exit

    for command_name, command in commands.items():
        app.command(command_name)(with_verbosity(command))
    return app


def with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the two options that every command has.

    Raises:
        ConfigError: when it is called with both.
    """

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool, verbose: bool, **options: Any) -> None:
        if quiet and verbose:
            raise ConfigError("--quiet and --verbose contradict each other", hint="leave one of them out")
        set_verbosity(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
        command(*arguments, **options)

    more = {"quiet": Quiet, "verbose": Verbose}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in more.items()
    ]
    signature = inspect.signature(command, eval_str=True)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, **more}
    return run


def version_line(name: str) -> str:
    """Ours, Python's and those of the packages that decide what comes out, read without importing any."""
    versions = installed_versions()
    ours = versions.pop("gemma4-export")
    others = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"{name} {ours} (Python {platform.python_version()}, {others})"


def completing(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A shell's completion of an option whose value is one of ``names``."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete
