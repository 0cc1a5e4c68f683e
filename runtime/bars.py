"""Accuracies as a picture: horizontal bars with their confidence intervals, one self-contained SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gemma4_export.runtime.eval import Score

_ROW, _TOP, _LEFT, _WIDTH, _RIGHT = 26, 64, 210, 420, 170  # pixels
_ON, _OFF, _TEXT, _GRID = "#2f6fb3", "#b3b9c2", "#24292f", "#d8dee4"


def bars(title: str, scores: Sequence[Score]) -> str:
    """An SVG document: a bar for each score, dark with thinking and light without, on a scale from 0 to 100 %."""
    height = _TOP + _ROW * len(scores) + 34
    width = _LEFT + _WIDTH + _RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="13" fill="{_TEXT}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="16" font-weight="bold">{escape(title)}</text>',
        *_legend(),
        *(_tick(share, height) for share in (0, 25, 50, 75, 100)),
    ]
    for index, score in enumerate(scores):
        parts += _bar(score, _TOP + _ROW * index)
    return "\n".join([*parts, "</svg>", ""])


def _x(share: float) -> float:
    return round(_LEFT + _WIDTH * share, 1)


def _legend() -> list[str]:
    marks = []
    for x, color, words in ((16, _ON, "thinking on"), (120, _OFF, "thinking off")):
        marks.append(f'<rect x="{x}" y="39" width="11" height="11" fill="{color}"/>')
        marks.append(f'<text x="{x + 16}" y="49">{words}</text>')
    marks.append(f'<text x="{_LEFT + 16}" y="49">right answers; lines: 95 % confidence (Wilson)</text>')
    return marks


def _tick(percent: int, height: int) -> str:
    x = _x(percent / 100)
    return (
        f'<line x1="{x}" y1="{_TOP - 4}" x2="{x}" y2="{height - 28}" stroke="{_GRID}"/>'
        f'<text x="{x}" y="{height - 12}" text-anchor="middle">{percent} %</text>'
    )


def _bar(score: Score, y: int) -> list[str]:
    middle = y + _ROW / 2
    color, words = (_ON, "on") if score.thinking else (_OFF, "off")
    low, high = _x(score.low), _x(score.high)
    return [
        f'<text x="{_LEFT - 10}" y="{middle + 4}" text-anchor="end">{escape(score.task)}'
        f"<title>{escape(score.task)}, thinking {words}</title></text>",
        f'<rect x="{_LEFT}" y="{y + 4}" width="{round(_WIDTH * score.accuracy, 1)}" height="{_ROW - 8}" '
        f'fill="{color}"/>',
        f'<path d="M{low} {middle - 4}v8M{low} {middle}H{high}M{high} {middle - 4}v8" stroke="{_TEXT}" fill="none"/>',
        f'<text x="{_x(1) + 12}" y="{middle + 4}">{score.accuracy:.1%}, {score.right} of {score.total}</text>',
    ]
