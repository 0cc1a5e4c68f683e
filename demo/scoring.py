"""Question sets as JSONL, and the score of replies: standard library only, so that any backend can use it.

One question per line::

    {"messages": [...], "tools": [...] or null, "enable_thinking": bool, "answer": "...", "task": "..."}

Media parts of a message name a file beside the JSONL file (``{"type": "image", "image": "pictures/0001.png"}``).
``answer`` is the wanted text of the reply without its thought; where the reply must be tool calls, it is their JSON, a
list of ``{"name": ..., "arguments": {...}}``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STRING = re.compile(r'<\|"\|>(.*?)<\|"\|>', re.DOTALL)
_CALL = re.compile(r"<\|tool_call>call:(\w+)\{(.*?)\}<tool_call\|>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A generated reply taken apart."""

    text: str
    thought: str | None
    calls: list[dict[str, Any]]


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a file; a line that lacks a field is an error that names it."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        question = json.loads(line)
        missing = {"messages", "answer", "task"} - question.keys()
        if missing:
            raise ValueError(f"{path}:{number}: question without {', '.join(sorted(missing))}")
        questions.append(question)
    return questions


def take_apart(raw: str) -> Reply:
    """A reply with its control tokens, as decoded, into thought, calls and text.

    The open thought that the template leaves at the end of a prompt must have been put back in front.
    """
    thought = None
    if raw.startswith("<|channel>"):
        thought, _, raw = raw.removeprefix("<|channel>").partition("<channel|>")
        thought = thought.removeprefix("thought\n").removesuffix("\n")
    calls = [{"name": name, "arguments": _arguments(body)} for name, body in _CALL.findall(raw)]
    for stop in ("<turn|>", "<eos>", "<|tool_response>", "<|tool_call>"):
        raw = raw.split(stop)[0]
    return Reply(text=raw.strip(), thought=thought, calls=calls)


def _arguments(body: str) -> dict[str, Any] | None:
    """``city:<|"|>Paris<|"|>,days:3`` as a mapping; None if it is not of that form."""
    strings = _STRING.findall(body)
    plain = _STRING.sub(lambda _: '""', body)
    pairs: dict[str, Any] = {}
    remaining = iter(strings)
    for part in plain.split(",") if plain else []:
        key, colon, value = part.partition(":")
        if not colon or not key.isidentifier():
            return None
        try:
            pairs[key] = next(remaining) if value == '""' else json.loads(value)
        except json.JSONDecodeError:
            return None
    return pairs


def is_right(question: dict[str, Any], reply: Reply) -> bool:
    """Whether a reply is exactly the wanted one: calls where the answer is calls, else the text."""
    answer = question["answer"]
    if answer.startswith('[{"'):
        return reply.calls == json.loads(answer)
    return not reply.calls and reply.text == answer


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959964, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - spread), min(1.0, middle + spread)


def summary(results: Iterable[bool]) -> dict[str, Any]:
    """``{"right", "total", "accuracy", "low", "high"}`` of a list of scores."""
    scores = list(results)
    low, high = interval(sum(scores), len(scores))
    accuracy = sum(scores) / len(scores) if scores else 0.0
    return {
        "right": sum(scores),
        "total": len(scores),
        "accuracy": round(accuracy, 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }
