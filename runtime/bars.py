"""Accuracies as a picture: horizontal bars with their confidence intervals, one self-contained SVG."""

from __future__ import annotations

from collections.abc import Sequence

from gemma4_export.runtime import svg
from gemma4_export.runtime.eval import Score

_ROW, _TOP, _LEFT, _WIDTH, _RIGHT = 26, 64, 210, 420, 170  # pixels
_ON, _OFF = "#2f6fb3", "#b3b9c2"


def bars(title: str, scores: Sequence[Score]) -> str:
    """An SVG document: a bar for each score, dark with thinking and light without, on a scale from 0 to 100 %."""
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _ROW * len(scores) + 34
    parts = [
        svg.element("rect", width=width, height=height, fill="#ffffff"),
        svg.text(16, 26, title, font_size=16, font_weight="bold"),
        *_legend(),
        *(_tick(share, height) for share in (0, 25, 50, 75, 100)),
    ]
    for index, score in enumerate(scores):
        parts += _bar(score, _TOP + _ROW * index)
    return svg.picture(width, height, title, parts, is_file=True) + "\n"


def _x(share: float) -> float:
    return _LEFT + _WIDTH * share


def _legend() -> list[str]:
    marks = []
    for x, color, words in ((16, _ON, "thinking on"), (120, _OFF, "thinking off")):
        marks.append(svg.element("rect", x=x, y=39, width=11, height=11, fill=color))
        marks.append(svg.text(x + 16, 49, words))
    return [*marks, svg.text(_LEFT + 16, 49, "right answers; lines: 95 % confidence (Wilson)")]


def _tick(percent: int, height: int) -> str:
    x = _x(percent / 100)
    return svg.line(x, _TOP - 4, x, height - 28) + svg.text(x, height - 12, f"{percent} %", text_anchor="middle")


def _bar(score: Score, y: int) -> list[str]:
    middle = y + _ROW / 2
    color, words = (_ON, "on") if score.thinking else (_OFF, "off")
    low, high = round(_x(score.low), 1), round(_x(score.high), 1)
    whiskers = f"M{low} {middle - 4}v8M{low} {middle}H{high}M{high} {middle - 4}v8"
    return [
        svg.text(_LEFT - 10, middle + 4, score.task, hover=f"{score.task}, thinking {words}", text_anchor="end"),
        svg.element("rect", x=_LEFT, y=y + 4, width=_WIDTH * score.accuracy, height=_ROW - 8, fill=color),
        svg.element("path", d=whiskers, stroke=svg.TEXT, fill="none"),
        svg.text(_x(1) + 12, middle + 4, f"{score.accuracy:.1%}, {score.right} of {score.total}"),
    ]
