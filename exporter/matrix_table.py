"""What became of a matrix, as text and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gemma4_export.exporter.matrix import Result

_HEAD = ("cell", "state", "MB", "seconds", "verified", "reason")


def text_lines(results: Sequence[Result]) -> list[str]:
    """A table in columns, the hints of what is missing, and a line that counts."""
    rows = [_HEAD, *map(_row, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    hints = [f"hint for {result.cell}: {result.hint}" for result in results if result.hint]
    return [*lines, *hints, _count(results)]


def markdown_lines(results: Sequence[Result]) -> list[str]:
    """The same for a GitHub step summary."""
    lines = ["### Artifacts", "", "| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for result in results:
        reason = f"{result.reason}; {result.hint}" if result.hint else result.reason
        cells = (*_row(result)[:-1], reason)
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return [*lines, "", _count(results)]


def _row(result: Result) -> tuple[str, ...]:
    is_there = bool(result.bytes)
    return (
        result.cell,
        result.state,
        f"{result.bytes / 1e6:.1f}" if is_there else "",
        f"{result.seconds:.1f}" if is_there else "",
        result.verified,
        result.reason,
    )


def _count(results: Sequence[Result]) -> str:
    counts = Counter(result.state for result in results)
    noun = "artifact" if len(results) == 1 else "artifacts"
    return f"{len(results)} {noun}: " + ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
