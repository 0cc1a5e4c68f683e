"""``gemma4-export matrix``: many artifacts, those built that are not there yet."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from gemma4_export.configs.command_line import shows_progress
from gemma4_export.configs.commands.app import completing
from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.matrix import DEFAULT_MATRIX, Cell, Engines, load_matrix, one_cell
from gemma4_export.configs.target import target_names
from gemma4_export.exporter.commands import options


def matrix(
    matrix: Annotated[Path | None, typer.Option(help="Which artifacts.", show_default="configs/matrix.toml")] = None,
    out: Annotated[Path, typer.Option(help="Where they go: OUT/MODEL-TARGET-RECIPE.")] = Path("artifacts"),
    jobs: Annotated[
        int, typer.Option(min=1, help="Builds at a time; each takes up to 3 GB, more where engines are compiled.")
    ] = 1,
    verify: Annotated[options.Verify, typer.Option(help="Hold each new artifact to its oracle.")] = "layers",
    target: Annotated[
        str | None,
        typer.Option(
            help="One artifact instead of a matrix, described by this and what follows: where it will run.",
            autocompletion=completing(target_names),
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Released model or hub id.", autocompletion=options.complete_model)
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint folder; --model then is any name.")] = None,
    weights: Annotated[options.Weights, typer.Option(help="dummy: random weights of --model.")] = "model",
    recipe: options.Recipe = None,
    context: options.Context = None,
    chunk: options.Chunk = None,
    engines: Annotated[Engines | None, typer.Option(help="later: compile no TensorRT engines.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be built, and why.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Build every artifact of a matrix whose inputs have changed, by content; exit code 3 when one does not fit."""
    if target is None:
        if model is not None or checkpoint is not None:
            raise ConfigError("--model and --checkpoint are of one artifact, which needs --target", hint="--target cpu")
        cells: Sequence[Cell] = load_matrix(matrix or DEFAULT_MATRIX)
    elif matrix is not None:
        raise ConfigError("--matrix and --target exclude each other", hint="the file says which targets")
    else:
        cells = [
            one_cell(
                model=model,
                target=target,
                recipe=recipe,
                checkpoint=checkpoint,
                has_dummy_weights=weights == "dummy",
                context=context,
                chunk=chunk,
                engines=engines,
            )
        ]
    from gemma4_export.exporter.matrix import exit_code, run_matrix
    from gemma4_export.exporter.matrix_table import markdown_lines, text_lines

    signal.signal(signal.SIGTERM, _interrupt)
    level = None if verify == "off" else verify
    results = run_matrix(cells, out, verify=level, jobs=jobs, say=_say, dry=dry_run)
    code = exit_code(results)
    if as_json:
        print(json.dumps({"exit_code": code, "cells": [asdict(result) for result in results]}))
    else:
        print("\n".join(text_lines(results)))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write("\n".join(markdown_lines(results)) + "\n")
    if code:
        raise typer.Exit(code)


def _say(line: str) -> None:
    if shows_progress():
        sys.stderr.write(f"{line}\n")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A runner that is told to end takes its builds with it."""
    sys.exit(128 + number)
