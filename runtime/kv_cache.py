"""KV caches of one sequence: sliding buffers that compact, linear caches that grow, and where a call writes and looks.

A sliding buffer has ``W - 1 + T_max`` slots, whatever the context. Position p lies in slot ``p - base``. When a call
would write past the end, the newest ``W - 1`` entries move to slot 0 and ``base`` rises, so every write is linear and
the window that a query sees is one contiguous run of slots; nothing wraps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma4_export.configs.errors import ContractError
from gemma4_export.configs.manifest import CacheEntry, KVLayout

Array = np.ndarray[Any, np.dtype[Any]]
Int32 = np.ndarray[Any, np.dtype[np.int32]]

_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass(frozen=True, slots=True)
class CallSlots:
    """Where one call of T tokens writes, and the run of slots ``[start, end)`` that each query sees, [1, T]."""

    sliding_write_index: int
    global_write_index: int
    sliding_start: Int32
    sliding_end: Int32
    global_end: Int32


class KVCache:
    """The keys and values of one sequence, [1, Hkv, slots, D] per layer that owns its KV.

    Buffers only hold and move values, so bfloat16, which NumPy has not, lies in them as the uint16 of its bits.
    """

    def __init__(self, layout: KVLayout, context: int) -> None:
        self.layout, self.context = layout, context
        self.length = 0
        """Tokens written so far; the next one has this position."""
        self.base = 0
        """Position that lies in slot 0 of the sliding buffers."""
        self.num_compactions = 0
        self.num_reallocations = 0
        """Rises whenever a buffer is replaced, so that a session knows to bind again."""
        self._global_slots = min(layout.global_bucket, context)
        self.buffers = {entry.layer: self._allocate(entry) for entry in layout.caches}

    @property
    def num_bytes(self) -> int:
        return sum(key.nbytes + value.nbytes for key, value in self.buffers.values())

    def reserve(self, num_tokens: int) -> CallSlots:
        """Make room for the next ``num_tokens`` tokens and say where they go.

        Raises:
            ContractError: the sequence would pass the context, or the call is longer than the longest chunk.
        """
        end = self.length + num_tokens
        if end > self.context:
            raise ContractError(
                f"{end} tokens do not fit the context of {self.context}",
                hint="shorten the prompt, or build with a larger --context",
            )
        window, slots = self.layout.sliding_window, self.layout.sliding_slots
        if window is not None:
            if num_tokens > slots - (window - 1):
                raise ContractError(
                    f"a call of {num_tokens} tokens is longer than the chunk of {slots - (window - 1)}",
                    hint="let forward cut the ids into chunks",
                )
            if end - self.base > slots:
                self._compact(window - 1)
        if end > self._global_slots:
            self._grow(end)
        return self._slots(end)

    def _slots(self, end: int) -> CallSlots:
        """Of the tokens from ``length`` to ``end``; of one without arithmetic on arrays, which takes it 15 µs."""
        base, window = self.base, self.layout.sliding_window or 0
        if end - self.length == 1:
            ends = np.array([[end]], np.int32)
            sliding_start = np.array([[max(end - window, 0) - base]], np.int32)
            sliding_end = np.array([[end - base]], np.int32)
        else:
            ends = np.arange(self.length + 1, end + 1, dtype=np.int32)[None]
            sliding_start = np.maximum(ends - window, 0) - base
            sliding_end = ends - base
        return CallSlots(
            sliding_write_index=self.length - base,
            global_write_index=self.length,
            sliding_start=sliding_start,
            sliding_end=sliding_end,
            global_end=ends,
        )

    def advance(self, num_tokens: int) -> None:
        """Count tokens that a call has written."""
        self.length += num_tokens

    def rollback(self, length: int) -> bool:
        """Forget all but the first ``length`` tokens; False, and nothing changes, where that cannot be exact.

        Later entries stay in their slots, where no query sees them before they are written again. What a compaction has
        pushed out of a sliding buffer cannot come back: position ``length`` must still see the W - 1 before it.
        """
        window = self.layout.sliding_window
        first_seen = 0 if window is None else max(0, length - (window - 1))
        if not 0 <= length <= self.length or (window is not None and self.base > first_seen):
            return False
        self.length = length
        return True

    def _allocate(self, entry: CacheEntry) -> tuple[Array, Array]:
        slots = self.layout.sliding_slots if entry.kind == "sliding" else self._global_slots
        shape = (1, entry.num_kv_heads, slots, entry.head_dim)
        dtype = _STORED[self.layout.dtype]
        return np.zeros(shape, dtype), np.zeros(shape, dtype)

    def _compact(self, keep: int) -> None:
        """Move the newest ``keep`` entries of every sliding buffer to slot 0 (source and target may overlap)."""
        keep = min(keep, self.length)
        first = self.length - keep - self.base
        for entry in self.layout.caches:
            if entry.kind == "sliding":
                for buffer in self.buffers[entry.layer]:
                    move_slots(buffer, first, keep)
        self.base = self.length - keep
        self.num_compactions += 1

    def _grow(self, needed: int) -> None:
        """Double the linear caches until ``needed`` slots fit, the context at most."""
        while self._global_slots < needed:
            self._global_slots = min(self._global_slots * 2, self.context)
        for entry in self.layout.caches:
            if entry.kind == "global":
                grown = self._allocate(entry)
                for old, new in zip(self.buffers[entry.layer], grown, strict=True):
                    new[:, :, : self.length] = old[:, :, : self.length]
                self.buffers[entry.layer] = grown
        self.num_reallocations += 1


def move_slots(buffer: Array, first: int, count: int) -> None:
    """Move slots ``first … first + count - 1`` of [1, Hkv, slots, D] to slot 0, in place, head by head."""
    for head in buffer[0]:
        # NumPy copies through scratch where the two runs overlap.
        head[:count] = head[first : first + count]
