"""Pictures as SVG text: elements with their values escaped, and the picture around them."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

TEXT, GRID = "#24292f", "#d8dee4"


def element(name: str, content: str = "", **values: str | float) -> str:
    """``<name …>content</name>``: an attribute per value, ``_`` as ``-``, numbers to a tenth of a pixel.

    Args:
        content: markup; text comes from ``text``.
    """
    attributes = "".join(f' {key.replace("_", "-")}="{_written(value)}"' for key, value in values.items())
    return f"<{name}{attributes}>{content}</{name}>" if content else f"<{name}{attributes}/>"


def text(x: float, y: float, words: str, *, hover: str = "", **values: str | float) -> str:
    """``words`` with their baseline at ``y``; ``hover`` is shown under the pointer."""
    title = element("title", escape(hover)) if hover else ""
    return element("text", escape(words) + title, x=x, y=y, **values)


def line(x1: float, y1: float, x2: float, y2: float, **values: str | float) -> str:
    """Grey unless ``stroke`` is among the values."""
    drawn: dict[str, str | float] = {"stroke": GRID, **values}
    return element("line", "", x1=x1, y1=y1, x2=x2, y2=y2, **drawn)


def picture(width: int, height: int, label: str, parts: Iterable[str], *, is_file: bool) -> str:
    """The ``svg`` element: a document of its own, or a part of an HTML page, which scales it to its own width."""
    values: dict[str, str | float] = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria_label": label}
    values |= {"font_family": "sans-serif", "font_size": 13, "fill": TEXT}
    if is_file:
        values |= {"xmlns": "http://www.w3.org/2000/svg", "width": width, "height": height}
    return element("svg", "\n".join(["", *parts, ""]), **values)


def _written(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{round(value, 1):g}"
