"""Question sets: what to ask, which reply is right, and how sure a share of right replies is.

A question set is a JSONL file, one question a line (UTF-8; empty lines do not count)::

    {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4", "enable_thinking": true}

``messages``        the conversation to continue, as ``gemma4-run generate`` takes it. A media part names a file beside
                    the question set: ``{"type": "image", "image": "pictures/1.png"}``.
``answer``          the wanted text of the reply, its thought left out; or instead
``calls``           the wanted tool calls in order: ``[{"name": "get_weather", "arguments": {"city": "Paris"}}]``
``tools``           optional: JSON schemas of the tools that are offered
``enable_thinking`` optional, false unless given: whether the model may think first
``task``            optional: the row of the report that the question counts in; the file's name unless given
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gemma4_export.configs.errors import ConfigError, nearest
from gemma4_export.runtime.text_files import parse_json, read_text

_KEYS = ("messages", "answer", "calls", "tools", "enable_thinking", "task")
_MEDIA = ("image", "audio", "video")
_HINT = '{"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"}'
_CALLS_HINT = '"calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}]'


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question; exactly one of ``answer`` and ``calls`` is given."""

    where: str
    """File and line, for messages about it."""
    task: str
    messages: Sequence[Mapping[str, Any]]
    """Media parts hold paths that the process can open."""
    tools: Sequence[Mapping[str, Any]] | None = None
    enable_thinking: bool = False
    answer: str | None = None
    calls: Sequence[Mapping[str, Any]] | None = None

    @property
    def wanted(self) -> str:
        """The right reply in one line."""
        return json.dumps(self.calls, ensure_ascii=False) if self.answer is None else self.answer


class _Call(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...


class _Reply(Protocol):
    @property
    def text(self) -> str: ...
    @property
    def tool_calls(self) -> Sequence[_Call]: ...


def is_right(question: Question, reply: _Reply) -> bool:
    """Whether a reply is exactly the wanted one.

    Text is compared without white space at its ends, and must come without calls; calls must be the wanted ones in
    their order, whatever text stands beside them. ``true`` is not 1, but 3.0 is 3.
    """
    calls = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
    if question.answer is None:
        return _same(calls, question.calls)
    return not calls and reply.text.strip() == question.answer.strip()


def _same(left: Any, right: Any) -> bool:
    """Equal as JSON: Python's ``==`` takes True for 1."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of the share ``right / total``; the whole range where nothing was asked.

        (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    Source: E. B. Wilson 1927; Newcombe 1998, method 3.
    """
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959964, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - spread), min(1.0, middle + spread)


def read_questions(path: Path) -> list[Question]:
    """All questions of a file.

    Raises:
        ConfigError: no such file, no question in it, no UTF-8, or a line that is no question, with its number.
    """
    text = read_text(path, "give a .jsonl file with a question a line")
    # splitlines would also cut at characters that JSON strings may hold
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    questions = [_question(path, f"{path}:{number}", line) for number, line in lines]
    if not questions:
        raise ConfigError(f"{path}: no questions in {len(text)} characters", hint=f"write one a line: {_HINT}")
    return questions


def _question(path: Path, where: str, line: str) -> Question:
    value = parse_json(line, where, _HINT)
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected an object, found {type(value).__name__}", hint=_HINT)
    for key in value:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}", hint=nearest(key, _KEYS))
    if "messages" not in value:
        raise ConfigError(f"{where}: no messages", hint=_HINT)
    if ("answer" in value) == ("calls" in value):
        found = "both" if "answer" in value else "neither"
        raise ConfigError(
            f"{where}: expected one of answer and calls, found {found}", hint=f"{_HINT}, or {_CALLS_HINT}"
        )
    _check_type(where, value, "answer", str, "a text")
    _check_type(where, value, "enable_thinking", bool, "true or false")
    _check_type(where, value, "task", str, "a text")
    task = value.get("task", path.stem)
    if not task.strip() or not task.isprintable():
        raise ConfigError(f"{where}: task: expected a name on one line, found {task!r:.60}", hint='"task": "sums"')
    _check_objects(where, value, "messages", _HINT)
    if value.get("tools") is not None:
        _check_objects(where, value, "tools", "leave it out, or give a list of JSON schemas")
    if "calls" in value:
        _check_objects(where, value, "calls", _CALLS_HINT)
        for call in value["calls"]:
            if call.keys() != {"name", "arguments"}:
                raise ConfigError(f"{where}: a call has the keys {sorted(call)}", hint=_CALLS_HINT)
    messages = [_with_paths(message, path.parent, where) for message in value["messages"]]
    return Question(**{"task": path.stem, **value, "where": where, "messages": messages})


def _check_type(where: str, value: dict[str, Any], key: str, kind: type, words: str) -> None:
    if key in value and not isinstance(value[key], kind):
        raise ConfigError(f"{where}: {key}: expected {words}, found {value[key]!r}", hint=_HINT)


def _check_objects(where: str, value: dict[str, Any], key: str, hint: str) -> None:
    items = value[key]
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ConfigError(f"{where}: {key}: expected a list of objects, found {json.dumps(items)[:80]}", hint=hint)


def _with_paths(message: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """The message with the files of its media parts found beside the question set."""
    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _MEDIA and isinstance(part.get(kind), str) and "://" not in part[kind]:
            file = folder / part[kind]
            if not file.is_file():
                raise ConfigError(f"{where}: no such file {file}", hint="paths count from the question set's folder")
            part = {**part, kind: str(file)}
        parts.append(part)
    return {**message, "content": parts}
