"""Gemma 4's own syntax of tool calls: ``call:NAME{key:value,…}``, which is not JSON.

Keys are bare text up to the colon. Strings stand between two ``<|"|>`` tokens, and nothing inside them is escaped: only
the token delimits, so quotes, braces and backslashes are literal. Numbers, ``true``, ``false`` and ``null`` are bare;
objects and arrays nest. White space between tokens is free.

A malformed call is mended only where exactly one reading exists (a string left open, a string in single quotes), and
the call says so; every other one is given back with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import whitespace
from typing import Any, NoReturn

QUOTE = '<|"|>'

_MAX_DEPTH = 64
"""Objects and arrays inside each other; keeps hostile brackets from using up Python's stack."""

_HEAD = re.compile(r"\s*call:\s*([\w./-]+(?::[\w./-]+)*)\s*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?")
_WORD = re.compile(r"[^,:{}\[\]\s]*")
_BARE_KEY = re.compile(r'[^,:{}\[\]"]+')
_CONSTANTS = {"true": True, "false": False, "null": None}
_SPACE = re.compile(r"\s*")
_NEXT_KEY = re.compile(r",\s*[\w.-]+\s*:\s*\Z")
_SINGLE_QUOTED = re.compile(r"'([^']*)'\s*\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model wants made.

    ``repair`` says how a malformed call was read; None: it was well formed. Nothing but the model's own words was used,
    so an app that runs commands may still refuse a call that was mended.
    """

    name: str
    arguments: dict[str, Any]
    repair: str | None = None


class MalformedCallError(ValueError):
    """Why text is no tool call; for ``parse_call``'s caller, never for a user."""


def parse_call(segments: Sequence[str], *, may_repair: bool) -> ToolCall:
    """Read what stands between ``<|tool_call>`` and its end.

    Args:
        segments: the text, cut at every ``<|"|>`` token: n tokens make n + 1 segments, and those with odd index are the
            insides of strings as long as the call is well formed.
        may_repair: mend a malformed call that has exactly one reading.
    Raises:
        MalformedCallError: it is none; the message is the reason.
    Source: reference gemma4.md §10.4; repairs after ollama#15315 and vllm#39440.
    """
    try:
        return _Reader(segments).call()
    except MalformedCallError:
        if not may_repair:
            raise
        if (mended := _only_reading(segments)) is None:
            raise
        return mended


class _Reader:
    """Recursive descent over the segments; a position is (segment, offset)."""

    def __init__(self, segments: Sequence[str]) -> None:
        self._segments = segments
        self._index, self._at = 0, 0

    def call(self) -> ToolCall:
        head = _HEAD.match(self._segments[0])
        if head is None:
            raise MalformedCallError(f"expected call:NAME{{…}}, found {_shown(self._segments[0])}")
        self._at = head.end()
        if self._peek() != "{":
            raise MalformedCallError(f"expected {{ after the name {head[1]}, found {self._found()}")
        arguments = self._object(0)
        if self._peek() or self._is_at_quote():
            raise MalformedCallError(f"expected the end after the arguments, found {self._found()}")
        return ToolCall(name=head[1], arguments=arguments)

    def _object(self, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}

        def item() -> None:
            key = self._key()
            if key in result:
                raise MalformedCallError(f"key {_shown(key)} stands there twice")
            if self._peek() != ":":
                raise MalformedCallError(f"expected : after the key {_shown(key)}, found {self._found()}")
            self._at += 1
            result[key] = self._value(depth + 1)

        self._items(item, "}", depth)
        return result

    def _array(self, depth: int) -> list[Any]:
        result: list[Any] = []
        self._items(lambda: result.append(self._value(depth + 1)), "]", depth)
        return result

    def _items(self, item: Callable[[], None], close: str, depth: int) -> None:
        """What stands between brackets, commas between items; one after the last is let pass."""
        if depth >= _MAX_DEPTH:
            raise MalformedCallError(f"nested deeper than {_MAX_DEPTH} levels")
        self._at += 1
        while self._peek() != close:
            item()
            if self._peek() == ",":
                self._at += 1
            elif self._peek() != close:
                raise MalformedCallError(f"expected , or {close}, found {self._found()}")
        self._at += 1

    def _key(self) -> str:
        if self._is_at_quote():
            return self._string()
        match = _BARE_KEY.match(self._segments[self._index], self._at)
        if match is None or not match[0].strip():
            raise MalformedCallError(f"expected a key, found {self._found()}")
        self._at = match.end()
        return match[0].strip()

    def _value(self, depth: int) -> Any:
        first = self._peek()
        if first == "{":
            return self._object(depth)
        if first == "[":
            return self._array(depth)
        if self._is_at_quote():
            return self._string()
        match = _WORD.match(self._segments[self._index], self._at)
        assert match is not None  # it matches the empty word
        if not match[0]:
            _no_value(self._found())
        self._at = match.end()
        return _scalar(match[0])

    def _string(self) -> str:
        if self._index + 2 >= len(self._segments):
            raise MalformedCallError(f"the string {_shown(self._segments[-1])} has no end")
        text = self._segments[self._index + 1]
        self._index, self._at = self._index + 2, 0
        return text

    def _peek(self) -> str:
        """The next character that is no white space; "" at the end of a segment."""
        segment = self._segments[self._index]
        space = _SPACE.match(segment, self._at)
        assert space is not None  # it matches no space at all
        self._at = space.end()
        return segment[self._at : self._at + 1]

    def _is_at_quote(self) -> bool:
        return not self._peek() and self._index + 1 < len(self._segments)

    def _found(self) -> str:
        rest = self._segments[self._index][self._at :]
        return _shown(rest) if rest else QUOTE if self._is_at_quote() else "the end"


def _scalar(word: str) -> Any:
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    number = _NUMBER.fullmatch(word)
    if number is None:
        _no_value(_shown(word))
    try:
        value = float(word) if number[1] or number[2] else int(word)
    except ValueError as error:  # Python refuses to read integers of thousands of digits
        raise MalformedCallError(f"a number of {len(word)} digits") from error
    if value in (float("inf"), float("-inf")):
        raise MalformedCallError(f"the number {_shown(word)} is too large for a float64")
    return value


def _no_value(found: str) -> NoReturn:
    raise MalformedCallError(f"expected a string between {QUOTE}, a number, true, false, null, {{ or [, found {found}")


def _only_reading(segments: Sequence[str]) -> ToolCall | None:
    """The one call that a single repair makes of ``segments``, or None where there is none or a choice."""
    readings: list[tuple[ToolCall, str]] = []
    for candidate, how in _repairs(segments):
        try:
            call = _Reader(candidate).call()
        except MalformedCallError:
            continue
        if all(repr(call.arguments) != repr(other.arguments) for other, _ in readings):
            readings.append((call, how))
    if len(readings) != 1:
        return None
    call, how = readings[0]
    return ToolCall(name=call.name, arguments=call.arguments, repair=how)


def _repairs(segments: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Segments with one thing mended, and its name."""
    if len(segments) % 2 == 0:  # an odd number of quotes: one is missing, or one too many
        yield from _closed_strings(segments)
        yield from _without_single_quotes(segments)


def _closed_strings(segments: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """An end put to an open string: before the next key, or before the brackets that end the call."""
    for index in range(1, len(segments), 2):
        text = segments[index]
        ends = [match.start() for match in [_NEXT_KEY.search(text)] if match]
        if index == len(segments) - 1:
            first = len(text.rstrip("}]" + whitespace))
            ends += [at for at in range(first, len(text)) if text[at] in "}]"]
        for end in ends:
            mended = [*segments[:index], text[:end], text[end:], *segments[index + 1 :]]
            yield mended, f"the string {_shown(text[:end])} had no end"


def _without_single_quotes(segments: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """'…'<|"|> read as a string: the opening token was written as a quotation mark, the closing one doubled."""
    for index in range(0, len(segments) - 1, 2):
        if match := _SINGLE_QUOTED.search(segments[index]):
            text = segments[index]
            mended = [*segments[:index], text[: match.start()], match[1], *segments[index + 1 :]]
            yield mended, f"the string {_shown(match[1])} stood in single quotes"


def _shown(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
