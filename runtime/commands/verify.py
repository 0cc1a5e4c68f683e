"""``gemma4-run verify``: does this artifact compute, on this machine, what its oracle recorded?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gemma4_export.configs.command_line import CHECK_FAILED, check_output
from gemma4_export.runtime.commands.options import ArtifactFolder
from gemma4_export.runtime.commands.screen import say


def verify(
    artifact: ArtifactFolder,
    backend: Annotated[str | None, typer.Option(help="What runs it.", show_default="what it was packed for")] = None,
    activations: Annotated[
        Literal["fp32", "int8"], typer.Option(help="int8: report the drift of rounded activations beside.")
    ] = "fp32",
    level: Annotated[
        Literal["layers", "full"], typer.Option(help="layers: leave out the pass of the whole model.")
    ] = "full",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report as an HTML page.")] = None,
) -> None:
    """Hold an artifact to its oracle: every file's hash, every layer by itself, the head, the whole model."""
    from gemma4_export.runtime.verify import verify as run
    from gemma4_export.runtime.verify_table import html_page, text_lines

    if html is not None:
        check_output("--html", html, ".html")
    report = run(artifact, backend=backend, activations=activations, level=level, say=say)
    # shown before it is saved: a folder that cannot be written must not cost what was found
    print(report.to_json() if as_json else "\n".join([*text_lines(report), ""]), end="", flush=True)
    if html is not None:
        html.write_text(html_page(report), encoding="utf-8")
    path = report.save(artifact)
    if not as_json:
        print(f"report: {path}" + ("" if html is None else f", {html}"))
    if not report.passed:
        raise typer.Exit(CHECK_FAILED)
