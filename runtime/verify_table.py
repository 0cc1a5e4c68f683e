"""A verification report as text for a terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from gemma4_export.configs.evidence import VerifiedRole
from gemma4_export.runtime.verify_report import Report, TapDrift

_LAYER_ROLES: tuple[VerifiedRole, ...] = ("attention", "mlp", "experts", "ple", "output")
_COLOURS: dict[str, str] = dict(zip(_LAYER_ROLES, ("#1f6feb", "#d29922", "#8250df", "#2da44e", "#57606a"), strict=True))
_WIDTH, _HEIGHT, _LEFT, _TOP = 860, 300, 64, 12
_SMALLEST = 1e-9  # where the drawn scale ends; float32 cannot show less


def worst(taps: Iterable[TapDrift]) -> TapDrift | None:
    """The tap that is furthest out, measured in its own bound."""
    return max(taps, key=lambda tap: (not tap.is_inside, tap.drift / tap.bound), default=None)


def text_lines(report: Report) -> list[str]:
    """One line per layer, one column per role: the drift that is worst in its bound; ! marks one outside."""
    roles = _roles_of(report)
    lines = [f"{report.model}, {report.recipe}, {report.backend} on {report.device}"]
    lines.append("drift      " + "".join(f"{role:>22}" for role in roles) + "      (drift / bound)")
    for name, taps in _groups(report):
        cells = [_cell([tap for tap in taps if tap.role == role]) for role in roles]
        lines.append(f"{name:<11}" + "".join(f"{cell:>22}" for cell in cells))
    outside = {"embedding": "embedding", "head": "head"}
    for role, name in outside.items():
        lines.append(f"{name:<11}{_cell([tap for tap in report.taps if tap.role == role]):>22}")
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


def _roles_of(report: Report) -> list[VerifiedRole]:
    present = {tap.role for tap in report.taps}
    return [role for role in _LAYER_ROLES if role in present]


def _groups(report: Report) -> list[tuple[str, list[TapDrift]]]:
    layers = sorted({tap.layer for tap in report.taps if tap.layer is not None})
    return [(f"layer {layer}", [tap for tap in report.taps if tap.layer == layer]) for layer in layers]


def _cell(taps: Sequence[TapDrift]) -> str:
    tap = worst(taps)
    return "" if tap is None else f"{tap.drift:.1e} / {tap.bound:.1e}{' ' if tap.is_inside else '!'}"


def html_page(report: Report) -> str:
    """The report with its drift per layer drawn; no script, no style sheet, no font from elsewhere."""
    verdict = "passed" if report.passed else "failed"
    rows = "".join(_table_row(tap, report) for tap in report.taps)
    facts = [
        f"{report.model}, recipe {report.recipe}",
        f"{report.backend} on {report.device}",
        f"{report.prompts} prompts of {report.tokens} tokens; {report.files} files hashed",
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
    cells = (tap.name, tap.role, f"{tap.drift:.2e}", f"{tap.bound:.2e}", int8, str(tap.rows))
    return f"<tr{is_outside}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def drift_svg(report: Report) -> str:
    """Drift over layers, one line per role on a logarithmic scale; dashed: the bound; red circles: outside."""
    groups = _groups(report)
    values = [value for tap in report.taps for value in (tap.drift, tap.bound) if math.isfinite(value)]
    low = math.floor(math.log10(max(_SMALLEST, min(values))))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 60}" role="img" aria-label="drift per layer">']
    for power in range(low, high + 1):
        y = _y(10.0**power, low, high)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d8dee4"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="12">1e{power}</text>')
    step = max(1, len(groups) // 12)
    for index in range(0, len(groups), step):
        x, y = _x(index, len(groups)), _HEIGHT + 18
        parts.append(
            f'<text x="{x:.1f}" y="{y}" text-anchor="middle" font-size="12">{groups[index][1][0].layer}</text>'
        )
    for index, role in enumerate(_roles_of(report)):
        parts += _role_lines(groups, role, low, high)
        x = _LEFT + 130 * index
        parts.append(f'<text x="{x}" y="{_HEIGHT + 44}" font-size="13" fill="{_COLOURS[role]}">— {role}</text>')
    return "".join(parts) + "</svg>"


def _role_lines(groups: Sequence[tuple[str, list[TapDrift]]], role: str, low: int, high: int) -> list[str]:
    found, bounds, outside = [], [], []
    for index, (_, taps) in enumerate(groups):
        tap = worst(tap for tap in taps if tap.role == role)
        if tap is None:
            continue
        x, y = _x(index, len(groups)), _y(tap.drift, low, high)
        found.append(f"{x:.1f},{y:.1f}")
        bounds.append(f"{x:.1f},{_y(tap.bound, low, high):.1f}")
        if not tap.is_inside:
            outside.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="#cf222e" stroke-width="2"/>')
    line = f'<polyline fill="none" stroke="{_COLOURS[role]}" points='
    return [f'{line}"{" ".join(found)}"/>', f'{line}"{" ".join(bounds)}" stroke-dasharray="3 4"/>', *outside]


def _x(index: int, count: int) -> float:
    return _LEFT + (_WIDTH - _LEFT - 16) * (index + 0.5) / count


def _y(value: float, low: int, high: int) -> float:
    """Drifts that are no number lie above everything."""
    power = math.log10(max(value, 10.0**low)) if math.isfinite(value) else high
    return _TOP + (_HEIGHT - _TOP) * (high - power) / (high - low)
