"""One answer while it is made: events to iterate, counts and times to read, and a way to stop it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Iterator
from types import TracebackType
from typing import Self

from gemma4_export.configs.errors import ContractError
from gemma4_export.runtime.reply import Event, Finished, FinishReason, Reply, ReplyParser, Timings, Usage
from gemma4_export.runtime.sampling import Sampler


class Stream:
    """Iterate it for events; the last is ``Finished``. Nothing is computed before the first is asked for.

    One thread at a time iterates; ``cancel`` and ``close`` may be called from any. As a context manager it is closed at
    the end of the block.
    """

    def __init__(
        self,
        tokens: Callable[[Callable[[], bool]], Generator[int]],
        parser: ReplyParser,
        sampler: Sampler,
        *,
        stop_ids: Collection[int],
        num_cached_tokens: int,
    ) -> None:
        """``tokens`` makes the iterator of new ids, given what tells it to stop early."""
        self._parser, self._sampler, self._stop_ids = parser, sampler, stop_ids
        self._num_cached_tokens = num_cached_tokens
        self._cancelled = threading.Event()
        self._iterating = threading.Lock()
        self._is_closed = False
        self._prefill_ms = self._last_ms = 0.0
        self._reply: Reply | None = None
        self._tokens = tokens(self._cancelled.is_set)
        self._events = self._run()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        """Raises ContractError: another thread is in here, or the model was closed."""
        if not self._iterating.acquire(blocking=False):
            raise ContractError(
                "the stream is being iterated by another thread",
                hint="one thread iterates; any may call stream.cancel()",
            )
        try:
            event = next(self._events)
        finally:
            self._iterating.release()
            if self._is_closed:
                self._end()
        if self._is_closed:  # by another thread, while the event was made
            raise StopIteration
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def cancel(self) -> None:
        """Stop before the next token (or the next chunk of the prompt); from any thread.

        The iteration then ends with ``Finished``, whose reply holds what was said so far.
        """
        self._cancelled.set()

    def close(self) -> None:
        """Stop, without further events; what was said is not kept as a reply. From any thread.

        An iteration that is under way in another thread ends like one that has come to its end.
        """
        self._is_closed = True
        self._cancelled.set()
        self._end()

    def _end(self) -> None:
        """Close the generators, unless a thread is inside them: it does that itself when it comes out."""
        if self._iterating.acquire(blocking=False):
            try:
                self._events.close()
                self._tokens.close()
            finally:
                self._iterating.release()

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return self._parser.usage(self._num_cached_tokens)

    @property
    def timings(self) -> Timings:
        """Times so far."""
        return Timings(prefill_ms=self._prefill_ms, decode_ms=max(0.0, self._last_ms - self._prefill_ms))

    @property
    def reply(self) -> Reply:
        """The whole answer.

        Raises:
            ContractError: the stream has not ended, or was closed before its end.
        """
        if self._reply is None and self._is_closed:
            raise ContractError(
                f"the stream was closed after {self.usage.num_new_tokens} tokens",
                hint="stream.cancel() stops it as well, and keeps what was said",
            )
        if self._reply is None:
            raise ContractError(
                f"the stream has not ended: {self.usage.num_new_tokens} tokens so far",
                hint="iterate it to its end, or call stream.wait()",
            )
        return self._reply

    def wait(self) -> Reply:
        """Run to the end and return the whole answer."""
        for _ in self:
            pass
        return self.reply

    def _run(self) -> Generator[Event]:
        parser, newest = self._parser, None
        for newest in self._tokens:
            self._last_ms = parser.ms()
            self._prefill_ms = self._prefill_ms or self._last_ms
            yield from parser.push(newest)
            if parser.is_stopped:
                break
        self._tokens.close()
        if self._is_closed:
            return
        yield from parser.finish()
        self._reply = parser.reply(
            self._reason(newest),
            num_cached_tokens=self._num_cached_tokens,
            timings=self.timings,
            logprobs=self._sampler.logprobs,
            seed=self._sampler.seed,
        )
        yield Finished(reply=self._reply, num_new_tokens=len(self._reply.ids), ms=parser.ms())

    def _reason(self, newest: int | None) -> FinishReason:
        if self._parser.is_stopped or newest in self._stop_ids:
            return "stop"
        return "cancelled" if self._cancelled.is_set() else "length"
