"""From logits to the next token: which options there are, in which order they apply, and how chance is made.

Order, as in transformers (presence penalty after repetition penalty, as in vLLM):

    logit bias -> repetition penalty -> presence penalty -> suppressed ids          (also when greedy)
    -> temperature -> top-k -> top-p -> min-p -> draw

Top-p keeps the shortest run of likeliest tokens whose probabilities reach it, renormalised over what top-k left; min-p
keeps what is at least that share of the likeliest. Tokens tied with the last one that top-k takes are taken too.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_export.configs.errors import ConfigError, nearest
from gemma4_export.runtime import checks
from gemma4_export.runtime.largest import largest, likely, most_likely
from gemma4_export.runtime.reply import TokenLogprob
from gemma4_export.runtime.tokenizer import load_suppressed_ids

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Float64 = np.ndarray[Any, np.dtype[np.float64]]
Int64 = np.ndarray[Any, np.dtype[np.int64]]

MAX_LOGPROBS = 64
_FEW = 64
"""Tokens that are quicker to draw from one by one than in arrays: the released checkpoints' top-k."""
_DRAWS = 64
"""Random numbers made at once, which are the same ones."""
_FIRST_GUESS = 256
"""Tokens that nearly always hold what top-p or min-p keep."""
_MAX_SEED = 2**64 - 1
_MAX_CHANGE = 1e6
"""Largest penalty or bias: logits are below 1e3, and float32 must hold what becomes of them."""
_FILTERS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are picked. Defaults are those of the released instruction-tuned checkpoints.

    Attributes:
        temperature: divides the logits; 0 picks the most likely token, without chance.
        top_k: the likeliest tokens to choose among; 0: all.
        top_p: choose among the likeliest that together reach this probability; 1: all.
        min_p: choose among those at least this share as likely as the likeliest; 0: all.
        repetition_penalty: divides positive logits of tokens in prompt or answer, multiplies negative ones; 1: off.
        presence_penalty: subtracted from logits of tokens in the answer; 0: off.
        logit_bias: token id -> what is added to its logit.
        suppressed_ids: tokens never picked.
        seed: makes the answer reproducible, on any machine with the same logits; None: another one each time.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    suppressed_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError: a value of the wrong type or out of range, or two that contradict each other."""
        _check_number("temperature", self.temperature, 0, None, "0 picks the most likely token")
        if 0 < self.temperature < 1 / _MAX_CHANGE:
            raise ConfigError(
                f"temperature: expected 0 or at least {1 / _MAX_CHANGE:g}, found {self.temperature!r}",
                hint="0 picks the most likely token",
            )
        checks.integer("top_k", self.top_k, 0, None, "0 means all tokens")
        _check_number("top_p", self.top_p, 0, 1, "1 means all tokens", is_open=True)
        _check_number("min_p", self.min_p, 0, 1, "0 means all tokens")
        _check_number("repetition_penalty", self.repetition_penalty, 1 / _MAX_CHANGE, _MAX_CHANGE, "1 means none")
        _check_number("presence_penalty", self.presence_penalty, -_MAX_CHANGE, _MAX_CHANGE, "0 means none")
        _check_bias(self.logit_bias)
        _check_ids(self.suppressed_ids)
        if self.seed is not None:
            checks.integer("seed", self.seed, 0, _MAX_SEED, "leave it out for another answer each time")
        if both := sorted(set(self.logit_bias) & set(self.suppressed_ids)):
            raise ConfigError(
                f"token {both[0]}: logit_bias {self.logit_bias[both[0]]}, and in suppressed_ids, never to be picked",
                hint="name it in one of the two",
            )

    @classmethod
    def from_checkpoint(cls, folder: Path | str) -> Sampling:
        """The defaults of the checkpoint whose generation_config.json lies in ``folder``.

        Raises:
            ConfigError: no such file, not JSON, or values out of range.
        """
        path = Path(folder) / "generation_config.json"
        suppressed = load_suppressed_ids(folder)
        config = json.loads(path.read_text(encoding="utf-8"))
        known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values = {name: config[name] for name in known if config.get(name) is not None}
        if config.get("do_sample") is False:
            values["temperature"] = 0.0
        try:
            return cls(suppressed_ids=suppressed, **values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.cause}", hint="copy the checkpoint's file again") from error

    def replace(self, **overrides: Any) -> Sampling:
        """A copy with other values; None leaves a value as it is.

        Raises:
            ConfigError: an unknown option, a value out of range, or options that contradict each other.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        names = [option.name for option in fields(self)]
        for name in given:
            if name not in names:
                raise ConfigError(f"no sampling option is called {name!r}", hint=nearest(name, names))
        result = replace(self, **given)
        if result.temperature == 0:
            for name in _FILTERS:
                if name in given and "temperature" in given:
                    raise ConfigError(
                        f"temperature 0 picks the most likely token, {name} {given[name]} would change nothing",
                        hint=f"leave {name} out, or set a temperature above 0",
                    )
        return result


class Sampler:
    """Picks the tokens of one answer.

    Chance is Philox, a counter-based generator keyed by the seed: one 64-bit draw a token, the same everywhere.
    """

    def __init__(
        self, sampling: Sampling, *, prompt_ids: Sequence[int], vocab_size: int, num_logprobs: int | None = None
    ) -> None:
        """Raises ConfigError: ids outside the vocabulary, all ids suppressed, or ``num_logprobs`` out of range."""
        for name, ids in (("logit_bias", sampling.logit_bias), ("suppressed_ids", sampling.suppressed_ids)):
            _check_vocabulary(name, ids, vocab_size)
        if len(set(sampling.suppressed_ids)) >= vocab_size:
            raise ConfigError(f"suppressed_ids: all {vocab_size} tokens", hint="leave one to pick")
        if num_logprobs is not None:
            most = min(MAX_LOGPROBS, vocab_size)
            checks.integer("logprobs", num_logprobs, 0, most, "0 gives the picked token's alone")
        self._sampling, self._num_logprobs = sampling, num_logprobs
        self.seed: int | None = None
        """What makes this answer again; None: no chance is involved."""
        if sampling.temperature > 0:
            self.seed = int.from_bytes(os.urandom(8)) if sampling.seed is None else int(sampling.seed)
            self._random = np.random.Generator(np.random.Philox(key=self.seed))
            self._draws: list[float] = []
        self._suppressed = np.asarray(sampling.suppressed_ids, np.int64)
        self._bias_ids = np.asarray(list(sampling.logit_bias), np.int64)
        self._bias = np.asarray(list(sampling.logit_bias.values()), np.float32)
        self._seen = set(prompt_ids) if sampling.repetition_penalty != 1 else set()
        self._answered: set[int] = set()
        self._changes = bool(
            len(self._suppressed) or len(self._bias) or sampling.repetition_penalty != 1 or sampling.presence_penalty
        )
        self._logprobs: list[TokenLogprob] = []
        # Kept: the system hands out and clears a fresh megabyte page by page.
        self._scores = np.empty(vocab_size if self._changes else 0, np.float32)
        self._mask = np.empty(vocab_size, np.bool_)

    def pick(self, logits: Float32) -> int:
        """The next token for the model's ``logits`` [V], which stay as they are.

        Raises:
            ContractError: no logit is a number above -inf.
        """
        scores = self._changed(logits) if self._changes else logits
        return self.record(logits, self._draw(scores) if self.seed is not None else most_likely(scores))

    def record(self, logits: Float32, token: int) -> int:
        """Count ``token`` as picked from ``logits``, however it was found, and return it."""
        self._answered.add(token)
        if self._num_logprobs is not None:
            self._logprobs.append(token_logprob(logits, token, self._num_logprobs))
        return token

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """One per token so far; None where none were asked for."""
        return None if self._num_logprobs is None else tuple(self._logprobs)

    def _changed(self, logits: Float32) -> Float32:
        scores, sampling = self._scores, self._sampling
        np.copyto(scores, logits)
        scores[self._bias_ids] += self._bias
        if sampling.repetition_penalty != 1:
            ids = np.fromiter(self._seen | self._answered, np.int64)
            seen, penalty = scores[ids], np.float32(sampling.repetition_penalty)
            scores[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
        if sampling.presence_penalty:
            scores[np.fromiter(self._answered, np.int64)] -= np.float32(sampling.presence_penalty)
        scores[self._suppressed] = -np.inf
        return scores

    def _draw(self, scores: Float32) -> int:
        sampling, chance = self._sampling, self._chance()
        if 0 < sampling.top_k <= min(_FEW, len(scores) - 1):
            token = self._draw_of_few(scores, chance)
            if token is not None:
                return token
        ids, probabilities = candidates(scores, sampling)
        cumulative = probabilities.cumsum()
        # below 1 as drawn; the product may round up to the sum
        at = int(cumulative.searchsorted(chance * cumulative[-1], side="right"))
        return int(ids[min(at, len(ids) - 1)])

    def _draw_of_few(self, scores: Float32, chance: float) -> int | None:
        """What a search in ``candidates``' running sum finds, in plain floats: of 64 quicker than NumPy's calls.

        None: more than top-k are to be taken, because some equal the last, or there is nothing to draw from.
        """
        count = self._sampling.top_k
        ids, found = likely(scores, count + 1, self._mask)
        top: list[float] = np.partition(found, len(found) - count - 1)[len(found) - count - 1 :].tolist()
        if not sum(top) < math.inf:  # a NaN is in every sum
            return None
        top.sort(reverse=True)
        if top[count] == top[count - 1]:
            return None
        at = place_of(chance, top[:count], self._sampling)
        (equals,) = (found == top[at]).nonzero()
        return int(ids[equals[at - top.index(top[at])]])

    def _chance(self) -> float:
        """The next number of this seed's, in [0, 1)."""
        if not self._draws:
            self._draws = self._random.random(_DRAWS).tolist()[::-1]
        return self._draws.pop()


def place_of(chance: float, top: list[float], sampling: Sampling) -> int:
    """Index into ``top``, the scores that top-k took, best first, of the one that ``chance`` in [0, 1) picks."""
    best, temperature = top[0], sampling.temperature
    weights = [math.exp((score - best) / temperature) for score in top]
    reached = list(accumulate(weights))
    kept = len(reached)
    if sampling.top_p < 1:
        kept = min(kept, bisect_left(reached, sampling.top_p * reached[-1]) + 1)
    if sampling.min_p > 0:
        kept = min(kept, sum(weight >= sampling.min_p for weight in weights))
    return min(bisect_right(reached, chance * reached[kept - 1], 0, kept), kept - 1)


def candidates(scores: Float32, sampling: Sampling) -> tuple[Int64, Float64]:
    """The tokens to choose among and their probabilities.

    Args:
        scores: [V] logits, penalties applied; -inf where a token must not be picked.
    Returns:
        ids [N] int64, likeliest first (of equals the lower id) unless all are taken; probabilities [N] float64, sum 1.
    Raises:
        ContractError: no score is a number above -inf.
    """
    if not sampling.top_k and sampling.top_p == 1 and sampling.min_p == 0:
        best = scores[most_likely(scores)]
        ids = np.flatnonzero(scores > -np.inf)
        found = _weights(scores[ids], best, sampling.temperature)
        return ids, found / found.sum()
    total = math.inf
    if not sampling.top_k and sampling.top_p < 1:
        total = _sum_of_all(scores, float(scores[most_likely(scores)]), sampling.temperature)
    # Without top-k, as many as the other two can need, found by taking more until it is enough.
    count = sampling.top_k or _FIRST_GUESS
    while True:
        ids, values = largest(scores, min(count, len(scores)))
        order = np.lexsort((ids, -values))
        ids, values = ids[order], values[order]
        found = _weights(values, values[0], sampling.temperature)
        if sampling.top_k or found[-1] < sampling.min_p or count >= len(scores):
            break
        if sampling.top_p < 1 and found.sum() >= sampling.top_p * total:
            break
        count *= 8
    if sampling.top_p < 1:
        # Top-p measures what top-k left, all of it where there is no top-k.
        reached = found.cumsum()
        kept = int(reached.searchsorted(sampling.top_p * (reached[-1] if sampling.top_k else total))) + 1
        ids, found = ids[:kept], found[:kept]
    if sampling.min_p > 0:
        kept = max(1, int(np.count_nonzero(found >= sampling.min_p)))
        ids, found = ids[:kept], found[:kept]
    return ids, found / found.sum()


def _weights(values: Float32, best: np.float32, temperature: float) -> Float64:
    """exp((value - best) / temperature), in float64."""
    return np.exp((values.astype(np.float64) - np.float64(best)) / temperature)


def token_logprob(logits: Float32, token: int, count: int) -> TokenLogprob:
    """log softmax of ``logits`` at ``token`` and at the ``count`` likeliest."""
    best = float(logits.max())
    log_sum = best + math.log(_sum_of_all(logits, best, 1.0))
    top = np.zeros(0, np.int64)
    if count:
        top, values = largest(logits, count)
        top = top[np.lexsort((top, -values))][:count]
    return TokenLogprob(
        id=token,
        logprob=float(logits[token]) - log_sum,
        top=tuple((int(index), float(logits[index]) - log_sum) for index in top),
    )


def _sum_of_all(scores: Float32, best: float, temperature: float) -> float:
    """Sum of exp((score - best) / temperature) over V, in float32 terms summed pairwise."""
    terms = scores - np.float32(best)
    if temperature != 1:
        terms /= np.float32(temperature)
    return float(np.exp(terms, out=terms).sum(dtype=np.float64))


def _check_number(
    name: str, value: Any, low: float | None, high: float | None, hint: str, *, is_open: bool = False
) -> None:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    fits = is_number and math.isfinite(value)
    if fits and low is not None:
        fits = value > low if is_open else value >= low
    if not fits or (high is not None and value > high):
        least = "" if low is None else f" above {low:g}" if is_open else f" of at least {low:g}"
        most = "" if high is None else f" and at most {high:g}"
        raise ConfigError(f"{name}: expected a finite number{least}{most}, found {value!r}", hint=hint)


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, Mapping):
        raise ConfigError(
            f"logit_bias: expected token id -> number, found {type(bias).__name__}", hint="logit_bias={5: -2.0}"
        )
    for index, value in bias.items():
        checks.integer("logit_bias: token id", index, 0, None, "logit_bias={5: -2.0}")
        _check_number(f"logit_bias[{index}]", value, -_MAX_CHANGE, _MAX_CHANGE, "suppressed_ids=(id,) forbids a token")


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, (tuple, list)):
        raise ConfigError(
            f"suppressed_ids: expected token ids, found {type(ids).__name__}", hint="suppressed_ids=(5, 6)"
        )
    for index in ids:
        checks.integer("suppressed_ids", index, 0, None, "suppressed_ids=(5, 6)")


def _check_vocabulary(name: str, ids: Collection[int], vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        raise ConfigError(
            f"{name}: {max(ids)} is outside the vocabulary of {vocab_size}",
            hint="model.tokenizer.encode(text) gives the ids of a text",
        )
