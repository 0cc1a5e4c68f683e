"""Accuracy of an artifact on question sets: every question answered greedily, every reply right or wrong."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gemma4_export.configs.errors import ConfigError, Gemma4Error
from gemma4_export.runtime.gemma4 import Gemma4
from gemma4_export.runtime.questions import Question, is_right, wilson
from gemma4_export.runtime.reply import Reply

Thinking = Literal["asked", "on", "off", "both"]
_SAY_EVERY = 10.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """A reply that is not the wanted one."""

    where: str
    wanted: str
    text: str
    thought: str | None
    calls: Sequence[Mapping[str, Any]]
    finish_reason: str


@dataclass(slots=True, kw_only=True)
class _Tally:
    right: int = 0
    total: int = 0
    num_new_tokens: int = 0
    seconds: float = 0.0
    wrong: list[Wrong] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One row of the report: the questions of a task, with thinking or without."""

    task: str
    thinking: bool
    right: int
    total: int
    accuracy: float
    low: float
    """Lower end of the 95 % confidence interval (Wilson)."""
    high: float
    num_new_tokens: int
    seconds: float
    wrong: Sequence[Wrong]
    """Every wrong reply."""


def evaluate(
    model: Gemma4,
    questions: Sequence[Question],
    *,
    thinking: Thinking = "asked",
    limit: int | None = None,
    max_new_tokens: int = 1024,
    say: Callable[[str], None] = lambda _: None,
) -> list[Score]:
    """Answer ``questions`` greedily and count.

    Args:
        thinking: as each question asks; "on" or "off" for all of them; or "both": each of them twice.
        limit: only so many questions of each task, the first ones.
        max_new_tokens: longest answer, its thought included; one that is cut off counts as it stands.
        say: takes a line of progress now and then.
    Returns:
        a score for each task and thinking mode, in the order of the questions.
    Raises:
        ConfigError: a question that this artifact cannot be asked, with its file and line, before any is answered.
    """
    chosen = [(question, on) for question in _first(questions, limit) for on in _modes(question, thinking)]
    # All before the first answer: what cannot be asked must not cost the answers before it.
    asked = [(question, on, _prompt(model, question, on)) for question, on in chosen]
    tallies: dict[tuple[str, bool], _Tally] = {}
    started = last = time.perf_counter()
    for number, (question, on, prompt) in enumerate(asked, 1):
        before = time.perf_counter()
        reply = model.stream_ids(prompt, max_new_tokens=max_new_tokens, temperature=0).wait()
        now = time.perf_counter()
        _count(tallies.setdefault((question.task, on), _Tally()), question, reply, now - before)
        if now - last > _SAY_EVERY or number == len(asked):
            last = now
            right = sum(tally.right for tally in tallies.values())
            say(f"{number} of {len(asked)} questions, {right} right, {now - started:.0f} s")
    return [_score(task, on, tally) for (task, on), tally in tallies.items()]


def _first(questions: Iterable[Question], limit: int | None) -> list[Question]:
    """At most ``limit`` questions of each task."""
    seen: dict[str, int] = {}
    kept = []
    for question in questions:
        seen[question.task] = seen.get(question.task, 0) + 1
        if limit is None or seen[question.task] <= limit:
            kept.append(question)
    return kept


def _modes(question: Question, thinking: Thinking) -> tuple[bool, ...]:
    return {"asked": (question.enable_thinking,), "on": (True,), "off": (False,), "both": (True, False)}[thinking]


def _prompt(model: Gemma4, question: Question, enable_thinking: bool) -> list[int]:
    try:
        return model.check_prompt(model.encode(question.messages, question.tools, enable_thinking=enable_thinking))
    except Gemma4Error as error:
        raise ConfigError(f"{question.where}: {error.cause}", hint=error.hint) from error


def _count(tally: _Tally, question: Question, reply: Reply, seconds: float) -> None:
    tally.total += 1
    tally.num_new_tokens += reply.usage.num_new_tokens
    tally.seconds += seconds
    if is_right(question, reply):
        tally.right += 1
        return
    tally.wrong.append(
        Wrong(
            where=question.where,
            wanted=question.wanted,
            text=reply.text,
            thought=reply.thought,
            calls=[dataclasses.asdict(call) for call in reply.tool_calls],
            finish_reason=reply.finish_reason,
        )
    )


def _score(task: str, on: bool, tally: _Tally) -> Score:
    low, high = wilson(tally.right, tally.total)
    return Score(
        task=task,
        thinking=on,
        right=tally.right,
        total=tally.total,
        accuracy=round(tally.right / tally.total, 4),
        low=round(low, 4),
        high=round(high, 4),
        num_new_tokens=tally.num_new_tokens,
        seconds=tally.seconds,
        wrong=tally.wrong,
    )
