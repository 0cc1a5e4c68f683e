"""A conversation without a terminal: what was said, what of it the model sees, what is left out when space ends."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma4_export.runtime.gemma4 import DEFAULT_MAX_NEW_TOKENS, Gemma4
from gemma4_export.runtime.reply import Event, Finished, Reply
from gemma4_export.runtime.stream import Stream
from gemma4_export.runtime.tool_syntax import ToolCall

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """The context was full: the oldest turns left the conversation for good.

    Attributes:
        num_dropped, num_kept: turns, the one that is being asked not counted.
        num_prompt_tokens: what is left of the conversation, the new question included (tokens).
        context: what the model can hold (tokens).
    """

    num_dropped: int
    num_kept: int
    num_prompt_tokens: int
    context: int


class ChatSession:
    """One conversation with a loaded model.

    A turn is a question and all that led to its answer, tool calls and their results included. Thoughts are sent back
    only inside the turn that they belong to, as the chat template wants it, and never afterwards.

    Attributes:
        system, enable_thinking: may be changed at any time; they count from the next question on.
        waiting_for: tool calls of the last reply whose results `say` expects next, one at a time.
        last: the newest reply, None before the first.
    """

    def __init__(
        self,
        model: Gemma4,
        *,
        system: str | None = None,
        enable_thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        **options: Any,
    ) -> None:
        """Start empty.

        Args:
            model: stays open when the session ends.
            system: the system prompt.
            enable_thinking: ask for a thought before the answer.
            tools: JSON schemas of what the model may call.
            max_new_tokens: longest answer (tokens).
            options: as in ``Gemma4.stream_ids``.
        Raises:
            ConfigError: a base model, tools that the checkpoint's template refuses, or options that make no sense.
            ContractError: system prompt and tools alone do not fit into the context.
        """
        self.model = model
        self.system = system
        self.enable_thinking = enable_thinking
        self.waiting_for: list[ToolCall] = []
        self.last: Reply | None = None
        self._tools = tools
        self._max_new_tokens = max_new_tokens
        self._options = options
        self._turns: list[Messages] = []
        self._open: Messages = []  # a turn in which tool calls wait for results
        self._stream: Stream | None = None
        # What no question could mend is refused before the first.
        self._stream_answer([[{"role": "user", "content": ""}]]).close()

    @property
    def num_turns(self) -> int:
        """Finished turns that the model still sees."""
        return len(self._turns)

    @property
    def num_used_tokens(self) -> int:
        """What the conversation so far takes of the context (tokens)."""
        if not self._turns and self.system is None:
            return 0
        return self._count(self._turns, add_generation_prompt=False)

    def say(self, text: str) -> Iterator[Event | Dropped]:
        """Ask, or give the result of the first call in ``waiting_for``; yield the answer as it comes.

        Nothing is answered before the results of all calls are there. A question that is refused, or that gets no text
        before it is stopped, leaves no trace.

        Raises:
            ContractError: the question alone does not fit into the context.
        """
        turn = [*self._open, self._message(text)]
        waiting = self.waiting_for[1:]
        self._open, self.waiting_for = (turn, waiting) if waiting else ([], [])
        if waiting:
            return
        kept, num_tokens = self._make_room(turn)
        self._stream = self._stream_answer([*kept, turn])
        if num_dropped := len(self._turns) - len(kept):
            context = self.model.context
            yield Dropped(num_dropped=num_dropped, num_kept=len(kept), num_prompt_tokens=num_tokens, context=context)
        self._turns = kept
        with self._stream as stream:
            for event in stream:
                if isinstance(event, Finished):  # first, so that whoever sees it last finds all in order
                    self._finish(turn, event.reply)
                yield event

    def _stream_answer(self, turns: Sequence[Messages]) -> Stream:
        return self.model.stream(
            self._messages(turns),
            self._tools,
            enable_thinking=self.enable_thinking,
            max_new_tokens=self._max_new_tokens,
            **self._options,
        )

    def stop(self) -> None:
        """End the answer that is being given, from a signal handler or another thread."""
        if self._stream is not None:
            self._stream.cancel()

    def clear(self) -> None:
        """Forget what was said; system prompt and settings stay."""
        self._turns, self._open, self.waiting_for = [], [], []

    def _message(self, text: str) -> dict[str, Any]:
        if not self.waiting_for:
            return {"role": "user", "content": text}
        number = sum(message["role"] == "tool" for message in self._open)
        return {"role": "tool", "tool_call_id": f"call_{number}", "name": self.waiting_for[0].name, "content": text}

    def _finish(self, turn: Messages, reply: Reply) -> None:
        self.last = reply
        message = reply.message()
        if reply.finish_reason == "tool_calls":
            first = sum(other["role"] == "tool" for other in turn)
            for number, call in enumerate(message["tool_calls"], first):
                call["id"] = f"call_{number}"
            self._open, self.waiting_for = [*turn, message], list(reply.tool_calls)
        elif reply.text:
            answered = [*turn, {"role": "assistant", "content": reply.text}]
            # A thought serves the turn that it belongs to.
            self._turns.append([{k: v for k, v in other.items() if k != "reasoning"} for other in answered])

    def _make_room(self, turn: Messages) -> tuple[list[Messages], int]:
        """The newest turns that leave a quarter of the context free, or a whole answer, and the prompt's length."""
        context = self.model.context
        answer = min(self._max_new_tokens, context // 4)
        num_tokens = self._count([*self._turns, turn])
        if num_tokens + answer <= context:
            return self._turns, num_tokens
        # Down to half: what moves the start of the conversation makes the model read all of it again.
        num_dropped = bisect.bisect_left(
            range(len(self._turns)),
            True,
            key=lambda number: self._count([*self._turns[number:], turn]) <= context // 2,
        )
        kept = self._turns[num_dropped:]
        return kept, self._count([*kept, turn])

    def _messages(self, turns: Sequence[Messages]) -> Messages:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *(message for turn in turns for message in turn)]

    def _count(self, turns: Sequence[Messages], **variables: Any) -> int:
        messages = self._messages(turns)
        return len(self.model.encode(messages, self._tools, enable_thinking=self.enable_thinking, **variables))
