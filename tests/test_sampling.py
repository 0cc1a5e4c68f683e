"""Tokens follow the distribution that the options describe, seeds repeat them anywhere, bad options are named."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma4_export.configs.errors import ConfigError, ContractError
from gemma4_export.runtime import Sampling, sampling
from gemma4_export.runtime import largest as largest_module
from gemma4_export.runtime.largest import largest
from gemma4_export.runtime.sampling import Sampler, candidates, token_logprob

VOCAB_SIZE = 1500  # above the block size, so that the selection by blocks is on the way
OFF = Sampling(top_k=0, top_p=1.0, min_p=0.0)


def logits(seed: int = 0, size: int = VOCAB_SIZE, spread: float = 3.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def reference(scores: np.ndarray[Any, Any], options: Sampling) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[V] probabilities by the definitions, with full sorts in float64: what the fast path must equal."""
    x = scores.astype(np.float64) / options.temperature
    if options.top_k:
        x[x < np.sort(x)[-min(options.top_k, len(x))]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if options.top_p < 1:  # transformers: ascending, drop while the sum stays within 1 - top_p, keep the last always
        order = np.argsort(p, kind="stable")
        dropped = order[np.cumsum(p[order]) <= 1 - options.top_p]
        p[dropped[dropped != order[-1]]] = 0
    p[p < options.min_p * p.max()] = 0
    return p / p.sum()


OPTIONS = [
    Sampling(),
    OFF,
    OFF.replace(temperature=0.3),
    OFF.replace(temperature=2.5, top_k=7),
    OFF.replace(top_p=0.6),
    OFF.replace(min_p=0.2),
    OFF.replace(temperature=1.7, min_p=0.05, top_p=0.9),
    OFF.replace(top_k=40, top_p=0.8, min_p=0.1),
    OFF.replace(top_k=10**6, top_p=0.999),
    OFF.replace(top_p=1e-9),
    OFF.replace(min_p=1.0),
]


def dense(scores: np.ndarray[Any, Any], options: Sampling) -> np.ndarray[Any, np.dtype[np.float64]]:
    ids, p = candidates(scores, options)
    result = np.zeros(len(scores))
    result[ids] = p
    return result


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [40, VOCAB_SIZE, 70_000])
def test_probabilities_equal_the_reference(options: Sampling, size: int) -> None:
    scores = logits(1, size)
    found, expected = dense(scores, options), reference(scores, options)
    assert np.array_equal(found > 0, expected > 0)
    # float32 terms of one sum over V, everything else in float64: a few float32 roundings
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS[:-2])
def test_probabilities_equal_transformers(options: Sampling) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as process

    scores = logits(2)
    x = torch.tensor(scores)[None]
    warpers: list[Any] = [process.TemperatureLogitsWarper(float(options.temperature))]
    if options.top_k:
        warpers.append(process.TopKLogitsWarper(options.top_k))
    warpers.append(process.TopPLogitsWarper(float(options.top_p)))
    if options.min_p:
        warpers.append(process.MinPLogitsWarper(options.min_p))
    for warper in warpers:
        x = warper(None, x)
    expected = torch.softmax(x[0].double(), -1).numpy()
    found = dense(scores, options)
    assert np.array_equal(found > 0, expected > 0)
    # transformers divides by the temperature in float32: |score / T| x 2^-24 in the exponent, below 3e-6 here
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_penalties_equal_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as process

    scores, prompt, answer = logits(3), [4, 9, 9, 30], [9, 77]
    options = OFF.replace(
        temperature=0.7, repetition_penalty=1.3, logit_bias={4: 2.5, 77: -1.0}, suppressed_ids=(int(scores.argmax()),)
    )
    ids = torch.tensor([prompt + answer])
    x = torch.tensor(scores)[None]
    for processor in (
        process.SequenceBiasLogitsProcessor({(4,): 2.5, (77,): -1.0}),
        process.RepetitionPenaltyLogitsProcessor(1.3),
        process.SuppressTokensLogitsProcessor(list(options.suppressed_ids), device="cpu"),
    ):
        x = processor(ids, x)
    sampler = Sampler(options, prompt_ids=prompt, vocab_size=VOCAB_SIZE)
    for token in answer:
        sampler.record(scores, token)
    np.testing.assert_array_equal(sampler._changed(scores), x[0].numpy())
    assert scores[options.suppressed_ids[0]] > -np.inf  # the model's logits stay as they are


def test_presence_penalty_counts_the_answer_once_and_not_the_prompt() -> None:
    scores = logits(4)
    sampler = Sampler(OFF.replace(presence_penalty=1.5), prompt_ids=[3], vocab_size=VOCAB_SIZE)
    for token in (8, 8, 9):
        sampler.record(scores, token)
    expected = scores.copy()
    expected[[8, 9]] -= np.float32(1.5)
    np.testing.assert_array_equal(sampler._changed(scores), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Chance


def chi_square(options: Sampling, scores: np.ndarray[Any, Any], num_draws: int) -> tuple[float, int]:
    """Statistic and degrees of freedom of drawn counts against the reference; cells below 5 expected are pooled."""
    sampler = Sampler(options.replace(seed=5), prompt_ids=[], vocab_size=len(scores))
    counts = np.bincount([sampler.pick(scores) for _ in range(num_draws)], minlength=len(scores))
    expected = reference(scores, options) * num_draws
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    cells = [(counts[i], expected[i]) for i in np.flatnonzero(~rare)] + [(counts[rare].sum(), expected[rare].sum())]
    cells = [(found, wanted) for found, wanted in cells if wanted >= 5]
    return sum((found - wanted) ** 2 / wanted for found, wanted in cells), len(cells) - 1


@pytest.mark.parametrize(
    "options", [Sampling(), OFF, OFF.replace(temperature=0.5, min_p=0.05), OFF.replace(top_p=0.8, top_k=20)]
)
def test_draws_follow_the_distribution(options: Sampling) -> None:
    statistic, freedom = chi_square(options, logits(6, 600, spread=1.5), 20_000)
    # Wilson-Hilferty: (X/k)^(1/3) is normal, its mean 1 - 2/(9k), its variance 2/(9k). 4.5 sigmas are 7 in a million,
    # and the seed is fixed, so that a pass stays one.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert freedom > 5
    assert abs(z) < 4.5, (statistic, freedom)


def off_by_one_top_p(scores: Any, options: Sampling) -> Any:
    """A mutant: top-p drops the token that reaches it."""
    ids, p = candidates(scores, options)
    return (ids[:-1], p[:-1] / p[:-1].sum()) if len(ids) > 1 else (ids, p)


def warmer(scores: Any, options: Sampling) -> Any:
    return candidates(scores, options.replace(temperature=1.15 * options.temperature))


@pytest.mark.parametrize("mutant", [off_by_one_top_p, warmer])
def test_the_statistic_kills_mutants(mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "candidates", mutant)
    with pytest.raises(AssertionError):
        test_draws_follow_the_distribution(OFF.replace(top_p=0.5))


def test_a_seed_gives_the_same_tokens_in_another_process() -> None:
    program = """
import json, sys
import numpy as np
from gemma4_export.runtime.sampling import Sampler, Sampling
scores = np.sin(np.arange(3000, dtype=np.float32) * 7) * 4
sampler = Sampler(Sampling(seed=int(sys.argv[1])), prompt_ids=[], vocab_size=3000)
print(json.dumps([sampler.pick(np.roll(scores, step)) for step in range(40)]))
"""

    def drawn(seed: int) -> list[int]:
        finished = subprocess.run(
            [sys.executable, "-c", program, str(seed)], capture_output=True, text=True, check=True
        )
        tokens: list[int] = json.loads(finished.stdout)
        return tokens

    first = drawn(7)
    assert first == drawn(7)
    assert first != drawn(8)
    assert len(set(first)) > 20


def test_without_a_seed_answers_differ_and_say_their_seed() -> None:
    scores = logits(7, spread=0.1)
    samplers = [Sampler(OFF, prompt_ids=[], vocab_size=VOCAB_SIZE) for _ in range(2)]
    drawn = [[sampler.pick(scores) for _ in range(20)] for sampler in samplers]
    assert drawn[0] != drawn[1]
    again = Sampler(OFF.replace(seed=samplers[0].seed), prompt_ids=[], vocab_size=VOCAB_SIZE)
    assert [again.pick(scores) for _ in range(20)] == drawn[0]


def test_temperature_zero_takes_the_likeliest_and_the_lower_of_equals() -> None:
    scores = logits(8)
    best = int(scores.argmax())
    scores[best - 1 if best else best + 1] = scores[best]
    sampler = Sampler(Sampling().replace(temperature=0), prompt_ids=[], vocab_size=VOCAB_SIZE)
    assert sampler.seed is None
    assert sampler.pick(scores) == int(np.flatnonzero(scores == scores.max())[0])
    forbidden = Sampling(temperature=0, suppressed_ids=(best,))
    assert Sampler(forbidden, prompt_ids=[], vocab_size=VOCAB_SIZE).pick(logits(8)) == int(np.argsort(logits(8))[-2])


@pytest.mark.parametrize("size", [1, 63, 64, 65, 511, 512, 513, 40_000, 70_001])
def test_the_largest_are_found_whatever_the_size(size: int) -> None:
    scores = logits(9, size)
    for count in {1, min(5, size), min(64, size), size}:
        expected = np.flatnonzero(scores >= np.sort(scores)[size - count])
        ids, found = largest(scores, count)
    assert np.array_equal(ids, expected)
    assert np.array_equal(found, scores[expected])


def check_against_a_sort(scores: np.ndarray[Any, np.dtype[np.float32]], count: int) -> None:
    least = np.sort(scores)[len(scores) - count]
    expected = np.flatnonzero((scores >= least) & (scores > -np.inf))
    ids, found = largest(scores, count)
    assert np.array_equal(ids, expected)
    assert np.array_equal(found, scores[expected])


ODD_SIZES = [65_535, 65_536, 70_001, 262_144]


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("count", [1, 64, 129, 2049])
def test_the_largest_equal_a_plain_sort_with_ties_and_nothing(size: int, count: int) -> None:
    scores = logits(size + count, size)
    check_against_a_sort(scores, count)
    scores[-count:] += 20  # all of them in the last row, or beyond it
    check_against_a_sort(scores, count)
    check_against_a_sort(np.round(scores), count)  # ties everywhere
    scores[np.random.default_rng(0).permutation(size)[: size - 40]] = -np.inf  # fewer left than asked for
    check_against_a_sort(scores, count)


@pytest.mark.parametrize("count", [1, 65, 300])
def test_a_sample_that_misleads_costs_time_only(count: int) -> None:
    scores = logits(11, 262_144)
    is_sampled = np.arange(len(scores)) % 4096 < 64
    for change in (25.0, -25.0):
        misleading = scores + np.float32(change) * is_sampled
        check_against_a_sort(misleading, count)
        ids, found = sampling.likely(misleading, count)
        assert len(ids) >= count
        assert found.min() > misleading[np.setdiff1d(np.arange(len(scores)), ids)].max(initial=-np.inf)
    # and one that does not leaves few
    assert count <= len(sampling.likely(scores, count)[0]) < 4 * count + 1500


def first_bound_only(scores: Any, count: int) -> Any:
    """A mutant: the first bound is taken for good."""
    yield next(bounds(scores, count))


def too_few(scores: Any, count: int, mask: Any = None) -> Any:
    """A mutant: a score too few."""
    ids, found = likely(scores, count, mask)
    is_kept = found > np.sort(found)[-count]
    return ids[is_kept], found[is_kept]


bounds, likely = largest_module._bounds, largest_module.likely


def test_the_sort_kills_mutants(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(largest_module, "_bounds", first_bound_only)
        with pytest.raises(AssertionError):
            test_a_sample_that_misleads_costs_time_only(65)
    monkeypatch.setattr(largest_module, "likely", too_few)
    with pytest.raises((AssertionError, ValueError)):
        test_the_largest_equal_a_plain_sort_with_ties_and_nothing(70_001, 64)


# The short way of the default options, beside ``candidates``

FEW = [
    Sampling(),
    OFF.replace(top_k=64),
    OFF.replace(top_k=1),
    OFF.replace(temperature=2.5, top_k=7),
    OFF.replace(top_k=40, top_p=0.8, min_p=0.1),
    OFF.replace(top_k=64, min_p=1.0),
    OFF.replace(top_k=64, top_p=1e-9),
]


def check_few(options: Sampling, scores: np.ndarray[Any, Any]) -> int:
    """Tokens drawn the short way are those that a search in ``candidates`` finds; how many were drawn that way."""
    sampler, num_short = Sampler(options.replace(seed=1), prompt_ids=[], vocab_size=len(scores)), 0
    ids, probabilities = candidates(scores, options)
    cumulative = probabilities.cumsum()
    edges = [(low + high) / 2 for low, high in itertools.pairwise([0.0, *cumulative])]
    for chance in [0.0, *edges[:200], 1 - 2**-53]:
        found = sampler._draw_of_few(scores, chance)
        at = int(cumulative.searchsorted(chance * cumulative[-1], side="right"))
        if found is not None:
            num_short += 1
            assert found == ids[min(at, len(ids) - 1)], chance
    return num_short


@pytest.mark.parametrize("options", FEW)
@pytest.mark.parametrize("size", [100, 70_000])
def test_the_short_way_draws_what_candidates_say(options: Sampling, size: int) -> None:
    scores = logits(12, size)
    assert check_few(options, scores) > 1
    scores[[5, 50, 60]] = scores.max() + 1  # equals, best of all
    if options.top_k > 3:
        assert check_few(options, scores) > 1
    check_few(options, np.round(scores))
    # as many as top-k takes and one more equal to the last: not the short way's
    scores[np.argsort(-scores)[options.top_k]] = np.sort(scores)[-options.top_k]
    assert check_few(options, scores) == 0
    if options.top_k > 1:
        scores[np.argsort(scores)[: size - options.top_k + 1]] = -np.inf
        assert check_few(options, scores) == 0


def place_of_the_next(chance: float, top: list[float], options: Sampling) -> int:
    """A mutant: one place further down."""
    return min(place_of(chance, top, options) + 1, len(top) - 1)


def place_without_top_p(chance: float, top: list[float], options: Sampling) -> int:
    """A mutant: top-p is forgotten."""
    return place_of(chance, top, options.replace(top_p=1.0))


place_of = sampling.place_of


@pytest.mark.parametrize("mutant", [place_of_the_next, place_without_top_p])
def test_candidates_kill_mutants_of_the_short_way(mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "place_of", mutant)
    with pytest.raises(AssertionError):
        test_the_short_way_draws_what_candidates_say(Sampling(), 70_000)


def test_numbers_made_at_once_are_those_made_one_by_one() -> None:
    sampler = Sampler(Sampling(seed=3), prompt_ids=[], vocab_size=600)
    one_by_one = np.random.Generator(np.random.Philox(key=3))
    assert [sampler._chance() for _ in range(200)] == [one_by_one.random() for _ in range(200)]


def test_ties_at_the_edge_are_all_taken() -> None:
    scores = np.zeros(70_000, np.float32)
    scores[[3, 60_000]] = 1
    assert len(largest(scores, 64)[0]) == 70_000
    scores[100:] = -np.inf
    scores[60_000] = 1
    assert set(largest(scores, 64)[0].tolist()) == {*range(100), 60_000}


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_logits_without_a_largest_are_refused(value: float) -> None:
    for size, at in ((600, 7), (9000, 7), (70_000, 7), (70_000, 69_999)):
        scores = np.full(size, -np.inf, np.float32)
        scores[at] = value
        if not value < np.inf:
            scores[100:500] = 1  # enough others to choose among
        for options in (Sampling(), OFF, OFF.replace(top_p=0.5), Sampling(temperature=0)):
            with pytest.raises(ContractError, match=rf"^logits: the largest of {size} is {value}, so there is no next"):
                Sampler(options, prompt_ids=[], vocab_size=size).pick(scores)


def test_logprobs_are_the_models_own() -> None:
    scores = logits(10)
    x = scores.astype(np.float64)
    expected = x - (x.max() + np.log(np.exp(x - x.max()).sum()))
    sampler = Sampler(
        Sampling(temperature=0.1, logit_bias={5: 50.0}), prompt_ids=[], vocab_size=VOCAB_SIZE, num_logprobs=3
    )
    assert sampler.pick(scores) == 5
    (found,) = sampler.logprobs or ()
    assert found.id == 5
    assert found.logprob == pytest.approx(expected[5], abs=1e-5)
    order = np.argsort(-expected)[:3]
    assert [index for index, _ in found.top] == order.tolist()
    assert [value for _, value in found.top] == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert token_logprob(scores, 5, 0).top == ()


# ---------------------------------------------------------------------------------------------------------------------
# Options

FINITE = "expected a finite number"


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"temperature": -0.1}, "temperature: expected a finite number of at least 0, found -0.1"),
        ({"temperature": math.nan}, "temperature: expected a finite number of at least 0, found nan"),
        ({"temperature": "1"}, "temperature: expected a finite number of at least 0, found '1'"),
        ({"temperature": True}, "temperature: expected a finite number of at least 0, found True"),
        ({"top_k": -1}, "top_k: expected an integer of at least 0, found -1"),
        ({"top_k": 1.5}, "top_k: expected an integer of at least 0, found 1.5"),
        ({"top_p": 0}, "top_p: expected a finite number above 0 and at most 1, found 0"),
        ({"top_p": 1.01}, "top_p: expected a finite number above 0 and at most 1, found 1.01"),
        ({"min_p": 2}, "min_p: expected a finite number of at least 0 and at most 1, found 2"),
        ({"repetition_penalty": 0}, f"repetition_penalty: {FINITE} of at least 1e-06 and at most 1e+06, found 0"),
        (
            {"repetition_penalty": 1e-30},
            f"repetition_penalty: {FINITE} of at least 1e-06 and at most 1e+06, found 1e-30",
        ),
        ({"presence_penalty": math.inf}, f"presence_penalty: {FINITE} of at least -1e+06 and at most 1e+06, found inf"),
        (
            {"presence_penalty": -1e300},
            f"presence_penalty: {FINITE} of at least -1e+06 and at most 1e+06, found -1e+300",
        ),
        ({"logit_bias": {5: 1e300}}, f"logit_bias[5]: {FINITE} of at least -1e+06 and at most 1e+06, found 1e+300"),
        ({"temperature": 1e-300}, "temperature: expected 0 or at least 1e-06, found 1e-300"),
        ({"seed": "7"}, "seed: expected an integer of at least 0 and at most 18446744073709551615, found '7'"),
        ({"seed": -1}, "seed: expected an integer of at least 0 and at most 18446744073709551615, found -1"),
        ({"seed": 2**64}, f"seed: expected an integer of at least 0 and at most {2**64 - 1}, found {2**64}"),
        ({"logit_bias": [1]}, "logit_bias: expected token id -> number, found list"),
        ({"logit_bias": {"a": 1}}, "logit_bias: token id: expected an integer of at least 0, found 'a'"),
        ({"logit_bias": {5: "x"}}, f"logit_bias[5]: {FINITE} of at least -1e+06 and at most 1e+06, found 'x'"),
        ({"suppressed_ids": 5}, "suppressed_ids: expected token ids, found int"),
        ({"suppressed_ids": (-5,)}, "suppressed_ids: expected an integer of at least 0, found -5"),
        (
            {"logit_bias": {5: 1}, "suppressed_ids": (5,)},
            "token 5: logit_bias 1, and in suppressed_ids, never to be picked",
        ),
        ({"temperature": 0, "top_k": 5}, "temperature 0 picks the most likely token, top_k 5 would change nothing"),
        ({"temperature": 0, "top_p": 0.5}, "temperature 0 picks the most likely token, top_p 0.5 would change nothing"),
        ({"temprature": 1}, "no sampling option is called 'temprature'"),
    ],
)
def test_bad_options_are_named_with_a_hint(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling().replace(**options)
    assert caught.value.cause == cause
    assert caught.value.hint
    if "temprature" in options:
        assert caught.value.hint == "did you mean 'temperature'?"


@pytest.mark.parametrize(
    ("options", "num_logprobs", "cause"),
    [
        ({"logit_bias": {600: 1}}, None, "logit_bias: 600 is outside the vocabulary of 600"),
        ({"suppressed_ids": (5, 700)}, None, "suppressed_ids: 700 is outside the vocabulary of 600"),
        ({"suppressed_ids": tuple(range(600))}, None, "suppressed_ids: all 600 tokens"),
        ({}, 65, "logprobs: expected an integer of at least 0 and at most 64, found 65"),
        ({}, True, "logprobs: expected an integer of at least 0 and at most 64, found True"),
    ],
)
def test_options_that_the_vocabulary_refuses(options: dict[str, Any], num_logprobs: Any, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampler(Sampling(**options), prompt_ids=[], vocab_size=600, num_logprobs=num_logprobs)
    assert caught.value.cause == cause
    assert caught.value.hint


def test_defaults_are_the_checkpoints(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "hub_configs/google--gemma-4-12B-it"
    assert Sampling.from_checkpoint(folder) == Sampling(suppressed_ids=(258883, 258882))
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": false, "top_k": 20}')
    assert Sampling.from_checkpoint(tmp_path) == Sampling(temperature=0.0, top_k=20)
    path.write_text('{"top_p": 7}')
    with pytest.raises(ConfigError) as caught:
        Sampling.from_checkpoint(tmp_path)
    assert caught.value.cause == f"{path}: top_p: expected a finite number above 0 and at most 1, found 7"
