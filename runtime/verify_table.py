"""A verification report as text for a terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence

from gemma4_export.runtime.drift_chart import drift_svg
from gemma4_export.runtime.verify_report import Report, TapDrift, worst


def text_lines(report: Report) -> list[str]:
    """One line per layer, one column per role: the drift that is worst in its bound; ! marks one outside."""
    roles = report.layer_roles
    lines = [f"{report.model}, {report.recipe}, {report.backend} on {report.device}", report.lengths]
    lines.append("drift      " + "".join(f"{role:>22}" for role in roles) + "      (drift / bound)")
    for layer, taps in report.by_layer().items():
        cells = [_cell([tap for tap in taps if tap.role == role]) for role in roles]
        lines.append(f"{f'layer {layer}':<11}" + "".join(f"{cell:>22}" for cell in cells))
    for role in ("embedding", "head"):
        lines.append(f"{role:<11}{_cell([tap for tap in report.taps if tap.role == role]):>22}")
    int8 = [tap.int8_drift for tap in report.taps if tap.int8_drift is not None]
    if int8:
        lines.append(f"with activations rounded to int8: drift up to {max(int8):.2e}, reported only")
    lines += _whole_lines(report)
    lines += [f"not covered: {what}" for what in report.not_covered]
    return [*lines, report.verdict]


def _whole_lines(report: Report) -> list[str]:
    if report.whole_not_run is not None:
        return [f"whole model not run: {report.whole_not_run}"]
    lines = []
    for one in report.whole:
        bound = "reported only" if one.bound is None else f"bound {one.bound:.2e}"
        greedy = f", greedy {one.greedy_agreement}" if one.greedy_agreement else ""
        lines.append(
            f"whole model, {one.activations} activations: drift {one.drift:.2e} ({bound}), "
            f"KL {one.kl_divergence:.2e} nats, top-1 {one.top1_agreement:.0%}{greedy}, "
            f"{one.compactions} compactions"
        )
    return lines


def _cell(taps: Sequence[TapDrift]) -> str:
    tap = worst(taps)
    if tap is None:
        return ""
    return f"{_drift(tap, 1)} / {tap.bound:.1e}{' ' if tap.is_inside else '!'}"


def _drift(tap: TapDrift, digits: int) -> str:
    return f"{tap.drift:.{digits}e}" if tap.is_compared else "no token"


def html_page(report: Report) -> str:
    """The report with its drift per layer drawn; no script, no style sheet, no font from elsewhere."""
    verdict = "passed" if report.passed else "failed"
    rows = "".join(_table_row(tap, report) for tap in report.taps)
    facts = [
        f"{report.model}, recipe {report.recipe}",
        f"{report.backend} on {report.device}",
        f"{report.lengths}; {report.files} files hashed",
        *_whole_lines(report),
        *(f"not covered: {what}" for what in report.not_covered),
        ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items())),
        f"manifest sha256 {report.manifest_sha256}",
    ]
    listed = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(report.model)}: {verdict}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .1rem .8rem; text-align: right }} td:first-child, th:first-child {{ text-align: left }}
.failed {{ color: #cf222e }} .passed {{ color: #1a7f37 }} tr.outside {{ background: #ffebe9 }} svg {{ max-width: 100% }}
</style></head><body>
<h1>{html.escape(report.model)}: <span class="{verdict}">{verdict}</span></h1>
<p>{html.escape(report.verdict)}</p>
{drift_svg(report)}
<ul>{listed}</ul>
<table><thead><tr><th>tensor</th><th>role</th><th>drift</th><th>bound</th><th>int8</th><th>tokens</th></tr></thead>
<tbody>{rows}</tbody></table>
</body></html>
"""


def _table_row(tap: TapDrift, report: Report) -> str:
    is_outside = "" if tap.is_inside else ' class="outside"'
    int8 = "" if tap.int8_drift is None else f"{tap.int8_drift:.2e}"
    cells = (tap.name, tap.role, _drift(tap, 2), f"{tap.bound:.2e}", int8, str(tap.rows))
    return f"<tr{is_outside}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
