"""The demo's generators: same seed, same question; answers exact; held-out questions never trained on."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # demo/ is not part of the installed package

from demo import batches, chat, pictures, speech, tasks, testsets, vocabulary
from gemma4_export.runtime import Tokenizer, parse_reply
from gemma4_export.runtime.questions import is_right, read_questions

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
    for question in read_questions(testsets.DATA / "recall.jsonl"):
        messages, answer = question.messages, question.wanted
        told = next(i for i, message in enumerate(messages) if answer in message["content"])
        since = [message for message in messages[told + 1 :] if message["role"] != "system"]
        # the model's own echo of the fact, where there is one, comes right after it
        echoed = since[1:] if answer in since[0]["content"] else since
        text = "".join(f"<|turn>{message['role']}\n{message['content']}<turn|>\n" for message in echoed)
        assert len(encoder.tokenizer.encode(text).ids) > window, question


@pytest.mark.parametrize("name", testsets.TEXT)
def test_committed_question_sets_are_the_generators_output(name: str) -> None:
    path = testsets.DATA / f"{name}.jsonl"
    assert [json.loads(line) for line in path.open(encoding="utf-8")] == testsets.text_questions(name)
    assert len(read_questions(path)) == testsets.TEXT[name][0]


@pytest.mark.parametrize("make", [tasks.make_tool_call, tasks.make_tool_answer, tasks.make_recall])
def test_wanted_replies_are_right_and_changed_ones_wrong(
    make: Callable[[random.Random], tasks.Item], tmp_path: Path
) -> None:
    folder = Path(testsets.__file__).parent / "checkpoints" / "tiny-e"
    tokenizer, encoder = Tokenizer.load(folder), batches.Encoder(folder)
    rng, file = random.Random(3), tmp_path / "set.jsonl"
    items = [make(rng) for _ in range(100)]
    lines = [testsets.question(item, "t") for item in items]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for item, question in zip(items, read_questions(file), strict=True):
        prompt, ids = encoder.encode(item)
        reply = parse_reply(ids, prompt_ids=prompt, tokenizer=tokenizer)
        assert is_right(question, reply), reply
        assert (reply.thought or "").strip() == (item.thought or "")
        other = chat.wanted_reply(dataclasses.replace(item, text="other", calls=[]), open_thought=False)
        ids = encoder.tokenizer.encode(other, add_special_tokens=False).ids
        assert not is_right(question, parse_reply(ids, prompt_ids=[], tokenizer=tokenizer))


def test_letters_are_spelt_and_some_are_held_out() -> None:
    rng = random.Random(5)
    drawn = [pictures.draw_text(rng, "letters") for _ in range(2000)]
    assert {len(text) for text in drawn} == {2, 3, 4, 5, 6}
    assert {*"".join(drawn)} == {*pictures.LETTERS}
    held = [tasks.held_out("picture", text) for text in drawn]
    assert 0.03 < sum(held) / len(held) < 0.1
    for test in (False, True):
        item, _ = pictures.make_picture(rng, budget=70, text_pixels=(30, 60), kind="letters", test=test)
        assert tasks.held_out("picture", item.key) == test


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
