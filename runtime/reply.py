"""What a model's tokens say: thought, text and tool calls, told apart by control tokens while they stream.

The machine has three states (text, thought, tool call) and begins in the one that the prompt's tail leaves: some
prompts end inside an open thought. Control tokens steer it, found by name; text that merely spells them does not. Every
token belongs to exactly one part:

    text        what is in no channel and no call; stray closing tokens vanish
    thought     from ``<|channel>`` to ``<channel|>``, without the channel's name ``thought``
    tool call   from ``<|tool_call>`` to ``<tool_call|>``, or to the end where the call is complete
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gemma4_export.runtime.stop_strings import StopMatcher
from gemma4_export.runtime.tokenizer import TextStream, Tokenizer
from gemma4_export.runtime.tool_syntax import QUOTE, MalformedCallError, ToolCall, parse_call

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
Part = Literal["text", "thought", "tool_call"]

_THOUGHT_HEADERS = ("thought\n",)
_TURN_HEADERS = ("model\n", "user\n", "system\n")
_ENDS = ("<turn|>", "<eos>", "<|tool_response>")


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedCall:
    """A tool call that could not be read: what the model wrote between the tokens, and why it is no call."""

    text: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    num_new_tokens: int
    """Tokens of the answer so far, this event's included."""
    ms: float = field(compare=False)
    """Time since the request began (milliseconds)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece(_Event):
    """A piece of the answer, never half a character, never what may still become a stop string."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtPiece(_Event):
    """A piece of the thought."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallPiece(_Event):
    """A whole tool call."""

    call: ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedCallPiece(_Event):
    """A whole tool call that could not be read."""

    call: MalformedCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(_Event):
    """The last event of a stream."""

    reply: Reply


Event = TextPiece | ThoughtPiece | ToolCallPiece | MalformedCallPiece | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request."""

    num_prompt_tokens: int
    num_new_tokens: int
    """The stop token included."""
    num_thought_tokens: int
    """Those of ``num_new_tokens`` that belong to the thought, its control tokens included."""
    num_cached_tokens: int = 0
    """Those of ``num_prompt_tokens`` whose keys and values were still there from the request before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Wall-clock times of one request (milliseconds)."""

    prefill_ms: float
    """From the request to its first token."""
    decode_ms: float
    """From the first token to the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """log p of a token as the model gave it, before any sampling option; and those of the likeliest, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer.

    Attributes:
        text: what to show, without control tokens, thoughts and calls.
        thought: what was thought; "" for an empty thought, None where no thought was opened.
        tool_calls: calls to make, in order.
        malformed_calls: calls that cannot be made, with the reason; their text is in no other field.
        finish_reason: "stop" (a stop token or string), "length", "tool_calls" (stopped, and there are calls) or
            "cancelled".
        ids: every token of the answer, the stop token included.
        problems: what was wrong with the model's output, and what was made of it; a line each.
        logprobs: one per id, where asked for.
        seed: gives the same answer again when passed as ``seed`` with the same prompt and options; None: greedy.
    """

    text: str
    thought: str | None
    tool_calls: tuple[ToolCall, ...]
    malformed_calls: tuple[MalformedCall, ...]
    finish_reason: FinishReason
    ids: list[int]
    usage: Usage
    timings: Timings | None = None
    problems: tuple[str, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    seed: int | None = None

    def message(self) -> dict[str, Any]:
        """This answer as a message of the history.

        The thought stays out, except beside tool calls: there the template shows it until the next user message and
        cuts it after. Text beside calls stays out as well: templates put it behind the results and close the turn.
        """
        if not self.tool_calls:
            return {"role": "assistant", "content": self.text}
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
        return message | {"reasoning": self.thought} if self.thought else message


def parse_reply(ids: Sequence[int], *, prompt_ids: Sequence[int], tokenizer: Tokenizer) -> Reply:
    """Take the tokens of an answer apart.

    Args:
        ids: what the model produced after ``prompt_ids``, stop token included or not.
        prompt_ids: decide where the answer begins: in the text, in an open thought, in an unfinished call.
    Returns:
        a reply whose finish_reason is "length" unless ``ids`` end with a token that ends a turn.
    Raises:
        ConfigError: an id outside the vocabulary.
    """
    parser = ReplyParser(prompt_ids, tokenizer)
    for index in ids:
        parser.push(index)
    parser.finish()
    return parser.reply("stop" if parser.is_ended else "length")


class ReplyParser:
    """``parse_reply`` token by token: ids in, events out as soon as they are certain."""

    def __init__(self, prompt_ids: Sequence[int], tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        """``stop``: strings that end the text; they are looked for in text only and are not part of it."""
        self._tokenizer = tokenizer
        self._num_prompt_tokens = len(prompt_ids)
        self._started = time.perf_counter()
        self._steer = self._steering()
        self._quote = tokenizer.control.get(QUOTE)
        self._state: Part = "text"
        self._headers: tuple[str, ...] = ()
        self._head: str | None = None  # text that may still turn out to be one of the headers
        self._num_prompt_characters = 0  # of that text; they are not the answer's
        self._call: list[int] = []
        matcher, self._stop = StopMatcher(stop), StopMatcher(())  # none while the prompt is read
        self._reset()
        self._start_inside(prompt_ids)
        self._stop = matcher

    def _reset(self) -> None:
        self._stream = TextStream(self._tokenizer)
        self._events: list[Event] = []
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._has_thought = self._state == "thought"
        self._needs_break = False  # between two thoughts
        self._calls: list[ToolCall] = []
        self._malformed: list[MalformedCall] = []
        self.ids: list[int] = []
        self.parts: list[Part] = []
        """Of every id, the part that it belongs to."""
        self.num_thought_tokens = 0
        """Tokens of ``ids`` that belong to a thought."""
        self.problems: list[str] = []
        self.is_ended = False
        """Whether the newest token ends a turn."""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came; tokens after it are not looked at."""
        return self._stop.is_hit

    @property
    def is_in_thought(self) -> bool:
        """Whether a thought is open."""
        return self._state == "thought"

    def push(self, token_id: int) -> list[Event]:
        """What became certain with this token.

        Raises:
            ConfigError: an id outside the vocabulary.
        """
        index = self._tokenizer.check_id(token_id)
        self.ids.append(index)
        self._events = []
        self.is_ended = False
        if self.is_stopped:
            self.parts.append("text")
            return []
        before = self._state
        steer = self._steer.get(index)
        if steer is not None:
            steer()
        elif before == "tool_call":
            self._call.append(index)
        else:
            self._take(self._stream.push(index))
        # A token that closes belongs to what it closes, one that opens to what it opens.
        part = before if self._state == "text" else self._state
        self.parts.append(part)
        self.num_thought_tokens += part == "thought"
        return self._events

    def finish(self) -> list[Event]:
        """What was still held back; call it once, after the last token."""
        self._events = []
        if not self.is_stopped:
            self._leave("the end")
        return self._events

    def reply(
        self,
        finish_reason: FinishReason,
        *,
        num_cached_tokens: int = 0,
        timings: Timings | None = None,
        logprobs: tuple[TokenLogprob, ...] | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Everything so far; "stop" becomes "tool_calls" where there are calls."""
        return Reply(
            text="".join(self._texts),
            thought="".join(self._thoughts) if self._has_thought else None,
            tool_calls=tuple(self._calls),
            malformed_calls=tuple(self._malformed),
            finish_reason="tool_calls" if finish_reason == "stop" and self._calls else finish_reason,
            ids=list(self.ids),
            usage=self.usage(num_cached_tokens),
            timings=timings,
            problems=tuple(self.problems),
            logprobs=logprobs,
            seed=seed,
        )

    def usage(self, num_cached_tokens: int = 0) -> Usage:
        """Token counts so far."""
        return Usage(
            num_prompt_tokens=self._num_prompt_tokens,
            num_new_tokens=len(self.ids),
            num_thought_tokens=self.num_thought_tokens,
            num_cached_tokens=num_cached_tokens,
        )

    def _steering(self) -> dict[int, Callable[[], None]]:
        """Control id -> what it does; a tokenizer without one of the tokens never produces it."""
        actions = {
            "<|channel>": self._open_thought,
            "<channel|>": self._close_thought,
            "<|tool_call>": self._open_call,
            "<tool_call|>": self._close_call,
            "<|turn>": self._open_turn,
        } | dict.fromkeys(_ENDS, self._end)
        control = self._tokenizer.control
        return {control[name]: action for name, action in actions.items() if name in control}

    def _start_inside(self, prompt_ids: Sequence[int]) -> None:
        """Go through the newest turn of the prompt, for the state alone."""
        turn = self._tokenizer.control.get("<|turn>")
        start = next((at for at in range(len(prompt_ids) - 1, -1, -1) if prompt_ids[at] == turn), 0)
        for index in prompt_ids[start:]:
            if index in self._steer or self._state == "tool_call" or self._head is not None:
                self.push(index)
        self._reset()
        self._num_prompt_characters = len(self._head or "")

    def _await(self, headers: tuple[str, ...]) -> None:
        self._headers, self._head, self._num_prompt_characters = headers, "", 0

    def _open_thought(self) -> None:
        if self._state == "thought":
            self._flush()
        else:
            self._leave("<|channel>")
        self._state, self._has_thought = "thought", True
        self._await(_THOUGHT_HEADERS)
        self._needs_break = bool(self._thoughts)

    def _close_thought(self) -> None:
        if self._state == "thought":
            self._leave("<channel|>")
        elif self._state == "tool_call":
            self._call.append(self._tokenizer.control["<channel|>"])

    def _open_call(self) -> None:
        if self._state == "thought":
            self.problems.append("a thought was not closed before a tool call")
        self._leave("<|tool_call>")
        self._state, self._call = "tool_call", []

    def _close_call(self) -> None:
        if self._state == "tool_call":
            self._state = "text"
            self._end_call(may_repair=True)

    def _open_turn(self) -> None:
        self._leave("<|turn>")
        self._await(_TURN_HEADERS)

    def _end(self) -> None:
        self._leave("the end of the turn")
        self.is_ended = True

    def _leave(self, where: str) -> None:
        """Finish the part that is open, and go on with text."""
        if self._state == "tool_call":
            self._state = "text"
            self._end_call(may_repair=False, where=where)
        else:
            self._flush()
            self._state = "text"

    def _flush(self) -> None:
        """Let go of what was held back: an unfinished character, a header's beginning, a stop string's."""
        self._take(self._stream.flush())
        head, self._head = self._head, None
        if head and head + "\n" not in self._headers:
            self._give(self._own(head))
        if self._state == "text":
            self._give_text(self._stop.flush())

    def _take(self, text: str) -> None:
        """Text of the open part, past its header."""
        if self._head is not None and text:
            text = self._head = self._head + text
            if any(header.startswith(text) and header != text for header in self._headers):
                return
            header = next((header for header in self._headers if text.startswith(header)), None)
            self._head, text = None, self._own(text) if header is None else text[len(header) :]
        self._give(text)

    def _own(self, head: str) -> str:
        """``head``, which is no header, without what the prompt wrote of it."""
        known, self._num_prompt_characters = self._num_prompt_characters, 0
        return head[known:]

    def _give(self, text: str) -> None:
        if not text:
            return
        if self._state == "text":
            self._give_text(self._stop.push(text))
            return
        if self._needs_break:
            text, self._needs_break = "\n" + text, False
        self._thoughts.append(text)
        self._events.append(ThoughtPiece(text=text, num_new_tokens=len(self.ids), ms=self.ms()))

    def _give_text(self, text: str) -> None:
        if text:
            self._texts.append(text)
            self._events.append(TextPiece(text=text, num_new_tokens=len(self.ids), ms=self.ms()))

    def _end_call(self, *, may_repair: bool, where: str = "") -> None:
        segments = self._segments()
        try:
            call = parse_call(segments, may_repair=may_repair)
        except MalformedCallError as error:
            reason = f"unfinished at {where}: {error}" if where else str(error)
            malformed = MalformedCall(text=QUOTE.join(segments), reason=reason)
            self._malformed.append(malformed)
            self.problems.append(f"a tool call could not be read: {reason}")
            self._events.append(MalformedCallPiece(call=malformed, num_new_tokens=len(self.ids), ms=self.ms()))
            return
        if call.repair:
            self.problems.append(f"tool call {call.name} was malformed and mended: {call.repair}")
        self._calls.append(call)
        self._events.append(ToolCallPiece(call=call, num_new_tokens=len(self.ids), ms=self.ms()))

    def _segments(self) -> list[str]:
        """The call's text, cut at its quote tokens."""
        parts: list[list[int]] = [[]]
        for index in self._call:
            if index == self._quote:
                parts.append([])
            else:
                parts[-1].append(index)
        return [self._tokenizer.decode(part, keep_control=True) for part in parts]

    def ms(self) -> float:
        """Time since the request began."""
        return (time.perf_counter() - self._started) * 1e3
