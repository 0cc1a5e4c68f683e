"""Stop strings, found in text that streams in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from gemma4_export.configs.errors import ConfigError


class StopMatcher:
    """Finds the first of some strings in text that comes in pieces; holds back only what may still become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        """Raises ConfigError unless ``stop`` is a list of strings, none of them empty."""
        is_list = isinstance(stop, (list, tuple))
        if not is_list or not all(isinstance(text, str) and text for text in stop):
            raise ConfigError(
                f"stop: expected a list of strings of at least one character, found {stop!r}", hint='stop=["\\n\\n"]'
            )
        self._stop = tuple(stop)
        self._held = ""
        self.is_hit = False

    def push(self, text: str) -> str:
        """The text that is certain to precede any stop string."""
        if not self._stop:
            return text
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            # The one that ends first, however the text was cut into pieces.
            self.is_hit = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - self._num_open())

    def flush(self) -> str:
        """What was held back and turned out to be text."""
        return "" if self.is_hit else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _num_open(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for count in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:count]):
                    longest = count
                    break
        return longest
