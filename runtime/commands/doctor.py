"""``gemma4-run doctor``: what can run here, what cannot, and what mends it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma4_export.configs.command_line import CHECK_FAILED
from gemma4_export.runtime.commands.screen import show

if TYPE_CHECKING:
    from gemma4_export.runtime.doctor import Finding


def doctor(
    artifact: Annotated[Path | None, typer.Argument(help="Also judge whether this artifact runs here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts and findings as one JSON object.")] = False,
) -> None:
    """Look at processor, memory, GPUs and libraries; exit 1 where a problem keeps the artifact from running.

    Without an artifact a problem is what is broken.
    """
    from gemma4_export.runtime.doctor import machine_findings
    from gemma4_export.runtime.doctor_artifact import artifact_findings, probe_artifact
    from gemma4_export.runtime.doctor_probe import probe

    facts = probe()
    machine = machine_findings(facts)
    of_artifact = [] if artifact is None else artifact_findings(probe_artifact(artifact), facts)
    has_problem = any(finding.level == "problem" for finding in (machine if artifact is None else of_artifact))
    if as_json:
        values = {
            "passed": not has_problem,
            "machine": [dataclasses.asdict(finding) for finding in machine],
            "artifact": None if artifact is None else [dataclasses.asdict(finding) for finding in of_artifact],
            "facts": dataclasses.asdict(facts),
        }
        print(json.dumps(values, indent=1))
    else:
        lines = text_lines(machine) if artifact is None else [*text_lines(machine), "", *text_lines(of_artifact)]
        show(sys.stdout, "\n".join([*lines, ""]))
    if has_problem:
        raise typer.Exit(CHECK_FAILED)


def text_lines(findings: Sequence[Finding]) -> list[str]:
    """A line a finding; what mends it stands below."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:8} {finding.what:13} {finding.found}")
        if finding.mend is not None:
            lines.append(f"{'':22} {'mend' if finding.level != 'ok' else 'get'}: {finding.mend}")
    return lines
