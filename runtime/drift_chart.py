"""Drift over layers as a picture: a line per role on a logarithmic scale, its bound dashed, what is outside circled."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gemma4_export.configs.evidence import VerifiedRole
from gemma4_export.runtime import svg
from gemma4_export.runtime.verify_report import Report, TapDrift, worst

_COLOURS: dict[VerifiedRole, str] = {
    "attention": "#1f6feb",
    "mlp": "#d29922",
    "experts": "#8250df",
    "ple": "#2da44e",
    "output": "#57606a",
}
_OUTSIDE = "#cf222e"
_WIDTH, _HEIGHT = 860, 380  # of the picture, pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 844, 40, 328  # where the lines are drawn
_SMALLEST = 1e-9  # where the drawn scale ends; float32 cannot show less


def drift_svg(report: Report) -> str:
    """An ``svg`` element for a page; empty axes where no layer was computed."""
    layers, roles = report.by_layer(), report.layer_roles
    values = [value for tap in report.taps for value in (tap.drift, tap.bound) if math.isfinite(value)]
    low = math.floor(math.log10(max(_SMALLEST, min(values))))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    parts = [*_legend(roles), *_axes([*layers], low, high)]
    for role in roles:
        parts += _role_lines([*layers.values()], role, low, high)
    return svg.picture(_WIDTH, _HEIGHT, "drift per layer", parts, is_file=False)


def _legend(roles: Sequence[VerifiedRole]) -> list[str]:
    parts, x = [], _LEFT
    for role in roles:
        parts += [svg.line(x, 16, x + 22, 16, stroke=_COLOURS[role], stroke_width=2), svg.text(x + 28, 20, role)]
        x += 110
    parts += [svg.line(x, 16, x + 22, 16, stroke=svg.TEXT, stroke_dasharray="3 4"), svg.text(x + 28, 20, "its bound")]
    return [*parts, _circle(x + 121, 16), svg.text(x + 132, 20, "outside")]


def _axes(layers: Sequence[int], low: int, high: int) -> list[str]:
    parts = []
    for power in range(low, high + 1):
        y = _y(10.0**power, low, high)
        parts += [svg.line(_LEFT, y, _RIGHT, y), svg.text(_LEFT - 6, y + 4, f"1e{power}", text_anchor="end")]
    for index in range(0, len(layers), max(1, len(layers) // 12)):
        x = _x(index, len(layers))
        parts.append(svg.text(x, _BOTTOM + 18, str(layers[index]), text_anchor="middle"))
    parts.append(svg.text((_LEFT + _RIGHT) / 2, _BOTTOM + 42, "layer", text_anchor="middle"))
    middle = (_TOP + _BOTTOM) / 2
    words, turned = "drift: largest error / rms of its row", f"rotate(-90 20 {middle:g})"
    return [*parts, svg.text(20, middle, words, text_anchor="middle", transform=turned)]


def _role_lines(groups: Sequence[Sequence[TapDrift]], role: VerifiedRole, low: int, high: int) -> list[str]:
    found, bounds, outside = [], [], []
    for index, taps in enumerate(groups):
        tap = worst(tap for tap in taps if tap.role == role)
        if tap is None:
            continue
        x, y = _x(index, len(groups)), _y(tap.drift, low, high)
        found.append(f"{x:.1f},{y:.1f}")
        bounds.append(f"{x:.1f},{_y(tap.bound, low, high):.1f}")
        if not tap.is_inside:
            outside.append(_circle(x, y))
    drawn = {"fill": "none", "stroke": _COLOURS[role]}
    return [
        svg.element("polyline", points=" ".join(found), **drawn),
        svg.element("polyline", points=" ".join(bounds), stroke_dasharray="3 4", **drawn),
        *outside,
    ]


def _circle(x: float, y: float) -> str:
    return svg.element("circle", cx=x, cy=y, r=5, fill="none", stroke=_OUTSIDE, stroke_width=2)


def _x(index: int, count: int) -> float:
    return _LEFT + (_RIGHT - _LEFT) * (index + 0.5) / count


def _y(value: float, low: int, high: int) -> float:
    """Drifts that are no number lie above everything."""
    power = math.log10(max(value, 10.0**low)) if math.isfinite(value) else high
    return _TOP + (_BOTTOM - _TOP) * (high - power) / (high - low)
