"""One answer while it is made: events, counts, a cancel, stop strings, reuse of what is known, and memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import artifacts
import numpy as np
import pytest

from gemma4_export.configs.errors import ArtifactError, ConfigError, ContractError
from gemma4_export.configs.step_bytes import PROCESS_BYTES, cpu_memory_bytes
from gemma4_export.runtime import Finished, Gemma4, TextPiece, ThoughtPiece, memory
from gemma4_export.runtime.kv_cache import KVCache
from gemma4_export.runtime.stream import Stream

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder() -> Path:
    return artifacts.artifact("e2b", context=128, fresh_trace=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Gemma4]:
    with Gemma4.load(folder) as opened:
        yield opened


def scripted(model: Gemma4, monkeypatch: pytest.MonkeyPatch, text: str) -> list[int]:
    """Make ``model`` say ``text``: its logits point at the tokens of it, one after the other."""
    ids = model.tokenizer.encode(text)
    said = iter(ids)
    forward = model.decoder.forward

    def point(tokens: Any, cache: KVCache, **arguments: Any) -> Any:
        logits = forward(tokens, cache, **arguments)
        if len(logits):
            logits[:] = 0
            logits[:, next(said)] = 100
        return logits

    monkeypatch.setattr(model.decoder, "forward", point)
    return ids


def test_events_put_together_are_the_reply(model: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = scripted(model, monkeypatch, "<|channel>thought\nso<channel|>a b c<turn|>")
    stream = model.stream(HELLO, seed=1)
    with pytest.raises(ContractError, match=r"^the stream has not ended: 0 tokens so far"):
        _ = stream.reply
    events = list(stream)
    *pieces, last = events
    assert isinstance(last, Finished)
    reply = last.reply
    assert reply is stream.reply
    assert reply.ids == ids
    assert (reply.thought, reply.text, reply.finish_reason, reply.seed) == ("so", "a b c", "stop", 1)
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)) == reply.text
    assert "".join(piece.text for piece in pieces if isinstance(piece, ThoughtPiece)) == reply.thought
    counts, times = [event.num_new_tokens for event in events], [event.ms for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == len(ids) == stream.usage.num_new_tokens
    assert times == sorted(times)
    assert reply.timings is not None
    assert 0 < reply.timings.prefill_ms <= times[0]
    assert reply.timings.prefill_ms + reply.timings.decode_ms <= times[-1]


def test_the_same_seed_answers_the_same(model: Gemma4) -> None:
    first, again, other = (
        model.generate(HELLO, max_new_tokens=12, temperature=2.0, top_k=0, top_p=1.0, seed=seed) for seed in (3, 3, 4)
    )
    assert first.ids == again.ids
    assert first.ids != other.ids


def test_a_stop_string_across_tokens_ends_the_answer(model: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = scripted(model, monkeypatch, "one two three four<turn|>")
    reply = model.generate(HELLO, stop=["o thr"])
    assert (reply.text, reply.finish_reason) == ("one tw", "stop")
    assert reply.ids == ids[: len(reply.ids)]
    assert len(reply.ids) < len(ids)


def test_cancel_from_another_thread(model: Gemma4) -> None:
    stream = model.stream(HELLO, max_new_tokens=60, suppressed_ids=model.stop_ids, seed=1)
    for _ in stream:
        thread = threading.Thread(target=stream.cancel)
        thread.start()
        thread.join()
    assert stream.reply.finish_reason == "cancelled"
    assert 0 < stream.usage.num_new_tokens < 60
    # the model goes on being usable, and a stream cancelled before its first token computes nothing
    early = model.stream(HELLO)
    early.cancel()
    reply = early.wait()
    assert (reply.ids, reply.text, reply.finish_reason) == ([], "", "cancelled")
    assert len(model.generate(HELLO, max_new_tokens=2).ids) in (1, 2)


def test_cancel_is_seen_between_the_chunks_of_a_prompt(model: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = model.decoder.forward
    stream = model.stream_ids(list(range(300, 340)))

    def counted(tokens: Any, cache: KVCache, **arguments: Any) -> Any:
        calls.append(len(tokens))
        stream.cancel()
        return forward(tokens, cache, **arguments)

    monkeypatch.setattr(model.decoder, "forward", counted)
    assert stream.wait().finish_reason == "cancelled"
    assert calls == [model.artifact.manifest.chunk]


def test_closing_a_stream_ends_it_without_events(model: Gemma4) -> None:
    with model.stream(HELLO) as stream:
        pass
    assert list(stream) == []


def long_stream(model: Gemma4) -> Stream:
    """An answer of 60 tokens, unless something ends it."""
    return model.stream(HELLO, max_new_tokens=60, suppressed_ids=model.stop_ids, seed=1)


def test_closing_a_stream_in_its_middle_ends_the_iteration(model: Gemma4) -> None:
    stream = long_stream(model)
    seen = []
    for event in stream:
        seen.append(event)
        stream.close()
    assert len(seen) == 1
    with pytest.raises(ContractError, match=r"^the stream was closed after \d+ tokens") as caught:
        stream.wait()
    assert caught.value.hint == "stream.cancel() stops it as well, and keeps what was said"
    stream.close()
    assert stream.usage.num_new_tokens < 60


def test_a_stream_that_has_ended_keeps_its_reply_when_it_is_closed(model: Gemma4) -> None:
    with model.stream(HELLO, max_new_tokens=2, seed=1) as stream:
        reply = stream.wait()
    assert stream.reply is reply


@pytest.mark.parametrize("ends", ["close", "cancel"])
def test_another_thread_may_end_a_stream_while_a_token_is_computed(
    ends: str, model: Gemma4, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, calls = long_stream(model), []
    forward = model.decoder.forward

    def ended_meanwhile(tokens: Any, cache: KVCache, **arguments: Any) -> Any:
        calls.append(len(tokens))
        if len(calls) == 4:  # from inside a step, so that the iterating thread is certainly in one
            other = threading.Thread(target=getattr(stream, ends))
            other.start()
            other.join()
        return forward(tokens, cache, **arguments)

    monkeypatch.setattr(model.decoder, "forward", ended_meanwhile)
    events = list(stream)
    assert len(calls) == 4
    if ends == "cancel":
        assert stream.reply.finish_reason == "cancelled"
    else:
        assert not any(isinstance(event, Finished) for event in events)
        with pytest.raises(ContractError, match=r"^the stream was closed after \d+ tokens"):
            _ = stream.reply
    monkeypatch.undo()
    assert len(model.generate(HELLO, max_new_tokens=2).ids) in (1, 2)


def test_two_threads_do_not_iterate_one_stream(model: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, caught = long_stream(model), []
    forward = model.decoder.forward

    def iterate() -> None:
        try:
            next(stream)
        except ContractError as error:
            caught.append(error)

    def interrupted(tokens: Any, cache: KVCache, **arguments: Any) -> Any:
        other = threading.Thread(target=iterate)
        other.start()
        other.join()
        return forward(tokens, cache, **arguments)

    monkeypatch.setattr(model.decoder, "forward", interrupted)
    assert len(stream.wait().ids) == 60
    assert len(caught) >= 60
    assert caught[0].cause == "the stream is being iterated by another thread"
    assert caught[0].hint


def test_closing_the_model_ends_a_stream_with_an_error(folder: Path) -> None:
    model = Gemma4.load(folder)
    stream = long_stream(model)
    next(stream)
    made = stream.usage.num_new_tokens
    model.close()
    with pytest.raises(ContractError, match=r"^the model is closed"):
        list(stream)
    assert stream.usage.num_new_tokens == made
    cancelled = long_stream(Gemma4.load(folder))
    cancelled.cancel()
    assert cancelled.wait().finish_reason == "cancelled"


def test_a_thought_is_closed_at_its_budget(model: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(model, monkeypatch, "<|channel>thought\na b c d e f g h i j k<channel|>x<turn|>")
    reply = model.generate(HELLO, thinking_budget=6, max_new_tokens=8, logprobs=1)
    assert reply.ids[6] == model.tokenizer.control["<channel|>"]
    assert (reply.usage.num_thought_tokens, reply.thought is not None) == (7, True)
    assert reply.logprobs is not None
    assert [entry.id for entry in reply.logprobs] == reply.ids
    # picked against a logit of 100: all but impossible, and said so
    assert reply.logprobs[6].logprob == pytest.approx(-100, abs=1)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"max_new_tokens": True}, "max_new_tokens: expected an integer of at least 1, found True"),
        ({"thinking_budget": 0}, "thinking_budget: expected an integer of at least 1, found 0"),
        ({"temprature": 0}, "no sampling option is called 'temprature'"),
        ({"logprobs": -1}, "logprobs: expected an integer of at least 0 and at most 64, found -1"),
        ({"stop": "x"}, "stop: expected a list of strings of at least one character, found 'x'"),
    ],
)
def test_bad_options_are_refused_at_the_call(model: Gemma4, options: dict[str, Any], cause: str) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(ConfigError) as caught:
            call(HELLO, **options)
        assert caught.value.cause == cause


def test_a_budget_needs_a_token_that_closes_thoughts(model: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    without = {name: index for name, index in model.tokenizer.control.items() if name != "<channel|>"}
    monkeypatch.setattr(model.tokenizer, "control", without)
    with pytest.raises(
        ConfigError, match=r"^thinking_budget: the tokenizer has no <channel\|> to close a thought with"
    ):
        model.stream(HELLO, thinking_budget=5)


def test_nothing_is_printed_or_logged_by_default(
    model: Gemma4, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model.generate(HELLO, max_new_tokens=2)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


# ---------------------------------------------------------------------------------------------------------------------
# What the request before left behind


def next_logits(model: Gemma4, cache: KVCache, ids: list[int]) -> Any:
    return model.forward(ids, rows=[len(ids) - 1], cache=cache)


@pytest.mark.parametrize("structure", ["e2b", "26b-a4b"])
def test_a_rolled_back_cache_equals_a_fresh_one(structure: str) -> None:
    """For every length that can be rolled back to, before and after compactions; the others are refused."""
    model = Gemma4.load(artifacts.artifact(structure, context=128, fresh_trace=False))
    ids = [int(index) for index in np.random.default_rng(0).integers(100, 400, 40)]
    other = [int(index) for index in np.random.default_rng(1).integers(100, 400, 3)]
    window = model.artifact.manifest.kv.sliding_window or 0
    outcomes = set()
    for length in range(1, 40):
        cache = model.new_cache()
        model.forward(ids, rows=[], cache=cache)
        first_kept = cache.base
        was_possible = cache.rollback(length)
        assert was_possible == (max(0, length - (window - 1)) >= first_kept)
        outcomes.add(was_possible)
        if not was_possible:
            assert cache.length == 40
            continue
        fresh = next_logits(model, model.new_cache(), ids[:length] + other)
        # The same values from chunks cut elsewhere: float32 sums in another order, as in every test of chunks.
        np.testing.assert_allclose(next_logits(model, cache, other), fresh, atol=2e-4, rtol=0)
    assert outcomes == {True, False}


def test_a_rollback_that_forgets_nothing_would_show() -> None:
    """The mutant: one token too many stays visible."""
    model = Gemma4.load(artifacts.artifact("e2b", context=128, fresh_trace=False))
    ids = [int(index) for index in np.random.default_rng(0).integers(100, 400, 40)]
    cache = model.new_cache()
    model.forward(ids, rows=[], cache=cache)
    fresh = next_logits(model, model.new_cache(), [*ids[:-1], 7])
    assert np.abs(next_logits(model, cache, [7]) - fresh).max() > 0.01


def test_the_next_turn_computes_only_what_is_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gemma4.load(folder)
    first = model.stream_ids(list(range(300, 312)), max_new_tokens=4, temperature=0, suppressed_ids=model.stop_ids)
    answer = first.wait()
    assert answer.usage.num_cached_tokens == 0
    prompt = [*range(300, 312), *answer.ids, 320, 321, 322]
    fed: list[int] = []
    forward = model.decoder.forward

    def counted(tokens: Any, cache: KVCache, **arguments: Any) -> Any:
        fed.extend(tokens)
        return forward(tokens, cache, **arguments)

    monkeypatch.setattr(model.decoder, "forward", counted)
    second = model.stream_ids(prompt, max_new_tokens=1, temperature=0).wait()
    # the answer's last token was never fed
    assert second.usage.num_cached_tokens == 12 + len(answer.ids) - 1
    assert fed == prompt[second.usage.num_cached_tokens :]
    assert second.ids == Gemma4.load(folder).generate_ids(prompt, max_new_tokens=1, temperature=0)
    # another conversation shares nothing, and the same prompt again all but its last token
    assert model.stream_ids([350, 351], max_new_tokens=1).wait().usage.num_cached_tokens == 0
    assert model.stream_ids([350, 351], max_new_tokens=1).wait().usage.num_cached_tokens == 1


def test_two_streams_at_a_time_do_not_share_a_cache(folder: Path) -> None:
    model = Gemma4.load(folder)
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "suppressed_ids": model.stop_ids}
    prompts = [list(range(300, 310)), [*range(300, 310), 350]]
    alone = [Gemma4.load(folder).generate_ids(prompt, **options) for prompt in prompts]
    streams = [model.stream_ids(prompt, **options) for prompt in prompts]
    done = [False, False]
    while not all(done):
        for number, stream in enumerate(streams):
            done[number] = next(stream, None) is None
    assert [stream.reply.ids for stream in streams] == alone


# ---------------------------------------------------------------------------------------------------------------------
# Closing, threads, memory


def test_a_closed_model_says_so(folder: Path) -> None:
    with Gemma4.load(folder) as model:
        stream = model.stream(HELLO)
    model.close()
    for use in (lambda: model.generate(HELLO), model.new_cache, lambda: model.forward([5]), stream.wait):
        with pytest.raises(ContractError) as caught:
            use()
        assert caught.value.cause == "the model is closed"
        assert caught.value.hint == "load it again: Gemma4.load(folder)"


@pytest.mark.parametrize("num_threads", [0, -1, 1.5, True, "2"])
def test_thread_counts_that_are_none_are_refused(folder: Path, num_threads: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Gemma4.load(folder, num_threads=num_threads)
    assert (
        caught.value.cause == f"num_threads: expected an integer of at least 1 and at most 1024, found {num_threads!r}"
    )


def test_more_threads_than_any_machine_has_cores_are_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^num_threads: expected an integer of at least 1 and at most 1024, found 100000"
    ):
        Gemma4.load(folder, num_threads=100_000)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, r"messages\[0\]: content is None, expected text or a list of parts"),
        ({"a": 1}, r"messages\[0\]: content is \{'a': 1\}, expected text"),
        ([], r"messages\[0\]: content is \[\], expected text"),
        (["Hello"], r"messages\[0\]: part 0 is 'Hello', expected a text part"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": 5}], r"messages\[0\]: part 1 is \{'type'"),
        ([{"type": "poem", "text": "a"}], r"messages\[0\]: part 0 is \{'type': 'poem'"),
        ([{"type": "image", "image": "a.png"}], r"messages\[0\]: image parts are not read by this version"),
    ],
)
def test_content_that_a_template_would_pass_over_is_refused(model: Gemma4, content: Any, cause: str) -> None:
    for role in ("user", "system"):
        with pytest.raises(ConfigError, match=rf"^{cause}") as caught:
            model.encode([{"role": role, "content": content}])
        assert caught.value.hint
    assert model.encode([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]) == model.encode(
        [{"role": "user", "content": "Hi"}]
    )


def test_a_turn_of_tool_calls_needs_no_content(model: Gemma4) -> None:
    call = {"function": {"name": "now", "arguments": {}}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    assert len(model.encode([*turns, {"role": "user", "content": "So?"}])) > len(model.encode(turns[:1]))


@pytest.mark.parametrize("messages", [None, 5])
def test_messages_that_are_no_list_are_refused(model: Gemma4, messages: Any) -> None:
    with pytest.raises(ConfigError, match=r"^messages: expected a list of mappings, got "):
        model.generate(messages)


def test_threads_reach_the_backend(folder: Path) -> None:
    session = Gemma4.load(folder, num_threads=1).decoder._session
    assert session._session.get_session_options().intra_op_num_threads == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("usable", "threads"), [({0}, 1), ({0, 1, 2, 3}, 0)], ids=["a taskset", "all: onnxruntime's"])
def test_threads_are_of_the_processors_left_to_the_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, usable: set[int], threads: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: usable)
    session = Gemma4.load(folder).decoder._session
    assert session._session.get_session_options().intra_op_num_threads == threads  # type: ignore[attr-defined]


def test_a_load_beyond_the_cap_is_refused_before_it_happens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Gemma4.load(folder, max_memory_bytes=10**9).artifact.manifest
    weights = sum(cpu_memory_bytes(manifest.census, activations="int8").values())
    kv = manifest.kv.num_bytes(128)
    needed = weights + kv + PROCESS_BYTES
    Gemma4.load(folder, max_memory_bytes=needed)
    monkeypatch.setattr("gemma4_export.runtime.decoder.open_session", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ArtifactError) as caught:
        Gemma4.load(folder, max_memory_bytes=needed - 1)
    name = manifest.model.name
    assert caught.value.cause == (
        f"{name}: needs {needed / 1e9:.2f} GB (weights {weights / 1e6:.2f} MB, KV of 128 tokens {kv} bytes, "
        f"process 0.37 GB), max_memory_bytes is {(needed - 1) / 1e9:.2f} GB"
    )
    assert caught.value.hint
    with pytest.raises(ArtifactError, match=r"max_memory_bytes is 1\.00 MB\n"):
        Gemma4.load(folder, max_memory_bytes=10**6)
    for value in (0, 1.5, True, "4GB"):
        with pytest.raises(ConfigError, match=r"^max_memory_bytes: expected an integer of at least 1, found "):
            Gemma4.load(folder, max_memory_bytes=value)


def test_a_second_load_beyond_memory_is_refused_with_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Gemma4.load(folder).artifact.manifest
    weights = sum(cpu_memory_bytes(manifest.census, activations="int8").values())
    monkeypatch.setattr(memory, "available_bytes", lambda: weights)
    Gemma4.load(folder)
    monkeypatch.setattr(memory, "available_bytes", lambda: weights - 1)
    with pytest.raises(ArtifactError) as caught:
        Gemma4.load(folder)
    assert caught.value.cause == (
        f"{manifest.model.name}: weights of {weights / 1e6:.2f} MB in memory, "
        f"{(weights - 1) / 1e6:.2f} MB are left on this machine"
    )
    assert caught.value.hint == "close another model, or build with a smaller recipe: --recipe int4"


def test_memory_left_is_the_least_of_system_and_container(tmp_path: Path) -> None:
    assert memory.available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5000 kB\n")
    assert memory.available_bytes(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", "1000000\n"), ("current", "900000\n"), ("stat", "anon 400000\nfile 500000\n")):
        (group / f"memory.{name}").write_text(text)
    # the page cache of 500000 can be dropped
    assert memory.available_bytes(tmp_path) == 600_000
    (group / "memory.max").write_text("max\n")
    assert memory.available_bytes(tmp_path) == 5000 * 1024
    assert (memory.available_bytes() or 0) > 1e6  # the machine's own
