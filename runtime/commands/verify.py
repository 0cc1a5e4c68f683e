"""``gemma4-run verify``: does this artifact compute, on this machine, what its oracle recorded?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from gemma4_export.configs.command_line import CHECK_FAILED, check_output
from gemma4_export.configs.output import naming
from gemma4_export.runtime.commands.options import ArtifactFolder
from gemma4_export.runtime.commands.screen import say
from gemma4_export.runtime.verify_report import Against, Report


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
    against: Annotated[
        Against | None, typer.Option(help="Compare each layer with this runner too, through polygraphy.")
    ] = None,
) -> None:
    """Hold an artifact to its oracle: every file's hash, every layer by itself, the head, the whole model."""
    from gemma4_export.runtime.verify import verify as run
    from gemma4_export.runtime.verify_table import html_page, text_lines

    if html is not None:
        check_output("--html", html, ".html")
    if against is not None:
        from gemma4_export.runtime.polygraphy_runners import check_against

        check_against(against)
    report = run(artifact, backend=backend, activations=activations, level=level, say=say)
    # shown before it is saved: a folder that cannot be written must not cost what was found
    if not as_json or against is None:
        print(report.to_json() if as_json else "\n".join([*text_lines(report), ""]), end="", flush=True)
    if html is not None:
        with naming(html):
            html.write_text(html_page(report), encoding="utf-8")
    path = report.save(artifact)
    if not as_json:
        print(f"report: {path}" + ("" if html is None else f", {html}"))
    agrees = against is None or _compare(artifact, against, report, as_json=as_json)
    if not (report.passed and agrees):
        raise typer.Exit(CHECK_FAILED)


def _compare(artifact: Path, against: Against, report: Report, *, as_json: bool) -> bool:
    """Compare with another runner, show it (as JSON inside ``report``'s own object), keep its report."""
    from gemma4_export.runtime.polygraphy_report import text_lines
    from gemma4_export.runtime.polygraphy_verify import verify_against

    other = verify_against(artifact, against, say=say)
    if as_json:
        both = {**json.loads(report.to_json()), "against": json.loads(other.to_json())}
        print(json.dumps(both, indent=1, sort_keys=True, ensure_ascii=False), flush=True)
    else:
        print("\n".join(text_lines(other)), flush=True)
    path = other.save(artifact)
    if not as_json:
        print(f"report: {path}")
    return other.passed
