"""The demo's generators: same seed, same question; answers exact; held-out questions never trained on."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # demo/ is not part of the installed package

from demo import batches, chat, pictures, scoring, speech, tasks, testsets, vocabulary

MAKERS: dict[str, Callable[[random.Random], tasks.Item]] = {
    "sum_thinking": lambda rng: tasks.make_sum(rng, thinking=True),
    "sum_direct": lambda rng: tasks.make_sum(rng, thinking=False),
    "tool_call": tasks.make_tool_call,
    "tool_answer": tasks.make_tool_answer,
    "recall": tasks.make_recall,
    "small_talk": tasks.make_small_talk,
}


@pytest.mark.parametrize("task", MAKERS)
def test_same_seed_gives_the_same_question(task: str) -> None:
    first, second = ([MAKERS[task](random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert first == second
    assert len({json.dumps(item.messages) for item in first}) > 10


def test_sums_and_every_line_of_their_working_are_true() -> None:
    rng = random.Random(7)
    for _ in range(500):
        item = tasks.make_sum(rng, thinking=True)
        assert item.text == str(eval(item.key))
        assert item.thought is not None
        head, *lines = item.thought.split("\n")
        assert head == item.key
        for number, line in enumerate(lines, start=1):
            place, step, so_far = re.fullmatch(r"(\d+):(\S+) (\d+)", line).groups()  # type: ignore[union-attr]
            left, value = step.split("=")
            assert int(place) == number
            assert eval(re.sub(r"\b0+(\d)", r"\1", left)) == int(value), line
            assert item.text.rjust(len(so_far), "0").endswith(so_far), line
        assert int(lines[-1].split()[1]) == int(item.text)


@pytest.mark.full
def test_committed_tokenizer_is_that_of_the_tasks(tmp_path: Path) -> None:
    for name in ("tiny-e", "tiny-moe"):
        vocabulary.write_tokenizer(tmp_path, empty_thought=name == "tiny-moe")
        folder = Path(testsets.__file__).parent / "checkpoints" / name
        assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_slip_in_the_working_would_be_seen() -> None:
    # the check above must be able to fail
    assert tasks.working(95, 7, "+") == "95+7\n1:5+7+0=12 2\n2:9+0+1=10 102"
    assert tasks.working(100, 1, "-") == "100-1\n1:10-1-0=9 9\n2:10-0-1=9 99\n3:01-0-1=0 099"


def test_training_never_draws_a_held_out_question() -> None:
    rng = random.Random(11)
    items = [tasks.draw_training_item(rng) for _ in range(1000)]
    assert not any(tasks.held_out(item.task, item.key) for item in items)
    share = sum(tasks.held_out("sum_thinking", f"{n}+1") for n in range(8000)) / 8000
    assert abs(share - 1 / tasks.HELD_OUT_SHARE) < 0.01


def test_recall_asks_beyond_the_sliding_window() -> None:
    folder = Path(testsets.__file__).parent / "checkpoints" / "tiny-e"
    encoder = batches.Encoder(folder)
    window = json.loads((folder / "config.json").read_text())["text_config"]["sliding_window"]
    for question in scoring.read_questions(testsets.DATA / "recall.jsonl"):
        messages = question["messages"]
        told = next(i for i, message in enumerate(messages) if question["answer"] in message["content"])
        since = [message for message in messages[told + 1 :] if message["role"] != "system"]
        # the model's own echo of the fact, where there is one, comes right after it
        echoed = since[1:] if question["answer"] in since[0]["content"] else since
        text = "".join(f"<|turn>{message['role']}\n{message['content']}<turn|>\n" for message in echoed)
        assert len(encoder.tokenizer.encode(text).ids) > window, question


@pytest.mark.parametrize("name", testsets.TEXT)
def test_committed_question_sets_are_the_generators_output(name: str) -> None:
    committed = scoring.read_questions(testsets.DATA / f"{name}.jsonl")
    assert committed == json.loads(json.dumps(testsets.text_questions(name)))


def test_wanted_calls_are_read_back_from_the_reply_that_makes_them() -> None:
    rng = random.Random(3)
    for _ in range(200):
        item = tasks.make_tool_call(rng)
        question = testsets.question(item)
        reply = scoring.take_apart(chat.wanted_reply(item, open_thought=False))
        assert scoring.is_right(question, reply)
        assert reply.thought == item.thought
        changed = json.loads(question["answer"])
        changed[0]["name"] = "other"
        assert not scoring.is_right({**question, "answer": json.dumps(changed)}, reply)


@pytest.mark.parametrize(
    ("raw", "text", "thought", "calls"),
    [
        ("5742<turn|>", "5742", None, []),
        ("<|channel>thought\n1+1=2\n<channel|>2<turn|><eos>", "2", "1+1=2", []),
        ("<|channel>thought\n<channel|>2<turn|>", "2", "", []),
        ('<|tool_call>call:f{a:<|"|>x,y:{<|"|>,b:true}<tool_call|>', "", None, [("f", {"a": "x,y:{", "b": True})]),
        ("<|channel>thought\nnever closed", "", "never closed", []),
        ("<|tool_call>call:f{broken}<tool_call|>", "", None, [("f", None)]),
    ],
)
def test_replies_are_taken_apart(raw: str, text: str, thought: str | None, calls: list[tuple[str, object]]) -> None:
    reply = scoring.take_apart(raw)
    assert (reply.text, reply.thought) == (text, thought)
    assert reply.calls == [{"name": name, "arguments": arguments} for name, arguments in calls]


def test_confidence_interval_matches_published_values() -> None:
    # Wilson's interval for 9 of 10 (Newcombe 1998, method 3)
    low, high = scoring.interval(9, 10)
    assert low == pytest.approx(0.5958, abs=5e-4)
    assert high == pytest.approx(0.9821, abs=5e-4)
    assert scoring.interval(0, 0) == (0.0, 1.0)


def test_question_without_answer_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"messages": [], "task": "t"}\n')
    with pytest.raises(ValueError, match=r"questions.jsonl:1: question without answer"):
        scoring.read_questions(file)


@pytest.mark.parametrize("budget", [70, 140, 280])
def test_patches_are_those_of_transformers(budget: int) -> None:
    processor = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4").Gemma4ImageProcessorPil()
    rng = random.Random(budget)
    for _ in range(4):
        _, drawing = pictures.make_picture(rng, budget=budget, text_pixels=(18, 60))
        image = drawing.colored()
        flat, places = pictures.patches(image, budget)
        wanted = processor(image, max_soft_tokens=budget, return_tensors="np")
        assert wanted["num_soft_tokens_per_image"][0] == len(flat) // 9
        np.testing.assert_allclose(wanted["pixel_values"][0][: len(flat)], flat / 255, atol=1e-6)
        np.testing.assert_array_equal(wanted["image_position_ids"][0][: len(flat)], places)
        # training resizes before colouring: the same but for rounding and for what overshoots 0 or 255 at edges
        grey, _ = pictures.patches(drawing.levels, budget)
        painted = pictures.colors(grey, drawing.ground, drawing.ink).reshape(len(flat), -1)
        difference = np.abs(painted.astype(int) - flat)
        assert difference.mean() < 0.02
        assert difference.max() <= 32


def test_log_mel_is_that_of_transformers() -> None:
    module = pytest.importorskip("transformers.models.gemma4.feature_extraction_gemma4")
    samples = np.random.default_rng(0).standard_normal(640 * 20).astype(np.float32) * 0.1
    wanted = module.Gemma4AudioFeatureExtractor()([samples])
    got = speech.log_mel(samples)
    assert wanted["input_features_mask"][0].all()
    np.testing.assert_allclose(got, wanted["input_features"][0], atol=2e-5)
    assert speech.soft_tokens(99) == 25
    assert speech.soft_tokens(499) == 125


def test_mu_law_and_resampling_keep_the_sound() -> None:
    time = np.arange(1600) / 16000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    assert np.abs(speech.expand(speech.compress(tone)) - tone).max() < 0.02
    assert np.abs(speech.resample(speech.resample(tone, 2205), 1600) - tone).max() < 0.02
