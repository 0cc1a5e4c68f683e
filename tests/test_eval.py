"""Question sets and their scores: bad lines refused, right replies counted, and an artifact of a demo model scored."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import artifacts
import pytest
from conftest import REPOSITORY

from gemma4_export.configs.errors import ConfigError, ContractError
from gemma4_export.runtime import Gemma4, ToolCall
from gemma4_export.runtime.bars import bars
from gemma4_export.runtime.commands.eval import evaluate_command
from gemma4_export.runtime.eval import Score, evaluate
from gemma4_export.runtime.questions import Question, is_right, read_questions, wilson

DEMO = REPOSITORY / "demo"
SETS = ("sum_thinking", "tool_call", "tool_answer", "recall")
ASK = [{"role": "user", "content": "What is 2 + 2?"}]


def _file(folder: Path, *lines: object) -> Path:
    path = folder / "set.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


# ---- question sets -------------------------------------------------------------------------------------------------


def test_optional_keys_have_defaults_and_empty_lines_do_not_count(tmp_path: Path) -> None:
    path = _file(tmp_path, {"messages": ASK, "answer": "4"}, "", {"messages": ASK, "answer": "a\u2028b", "task": "t"})
    first, second = read_questions(path)
    assert (first.where, first.task, first.tools, first.enable_thinking) == (f"{path}:1", "set", None, False)
    assert (second.where, second.task, second.wanted) == (f"{path}:3", "t", "a\u2028b")


@pytest.mark.parametrize(
    ("line", "cause", "hint"),
    [
        ("{", r"set.jsonl:2: not JSON: ", "{"),
        ([1], r"set.jsonl:2: expected an object, found list", "{"),
        ({"answer": "4"}, r"set.jsonl:2: no messages", "{"),
        ({"messages": ASK}, r"set.jsonl:2: expected one of answer and calls, found neither", "calls"),
        ({"messages": ASK, "answer": "4", "calls": []}, r":2: expected one of .*, found both", "calls"),
        ({"messages": ASK, "answr": "4"}, r":2: unknown key 'answr'", "'answer'"),
        ({"messages": ASK, "answer": 4}, r":2: answer: expected a text, found 4", "{"),
        ({"messages": ASK, "answer": "4", "enable_thinking": 1}, r":2: enable_thinking: expected true or false", "{"),
        (
            {"messages": ASK, "answer": "4", "task": "a\nb"},
            r":2: task: expected a name .*, found 'a\\nb'",
            "sums",
        ),
        ({"messages": ASK, "answer": "4", "task": " "}, r":2: task: expected a name on one line, found ' '", "sums"),
        ({"messages": [], "answer": "4"}, r":2: messages: expected a list of objects, found \[\]", "{"),
        ({"messages": ASK, "answer": "4", "tools": {}}, r":2: tools: expected a list of objects", "schemas"),
        ({"messages": ASK, "calls": ["f"]}, r":2: calls: expected a list of objects", "calls"),
        ({"messages": ASK, "calls": [{"name": "f"}]}, r":2: a call has the keys \['name'\]", "arguments"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}], "answer": "4"},
            r":2: no such file .*no.png",
            "folder",
        ),
    ],
)
def test_a_bad_line_is_named_with_what_it_should_be(line: object, cause: str, hint: str, tmp_path: Path) -> None:
    path = _file(tmp_path, {"messages": ASK, "answer": "4"}, line)
    with pytest.raises(ConfigError, match=cause) as caught:
        read_questions(path)
    assert hint in (caught.value.hint or "")


def test_files_that_hold_no_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r": a folder, not a file"):
        read_questions(tmp_path)
    with pytest.raises(ConfigError, match=r"none.jsonl: no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"set.jsonl: no questions in 1 characters"):
        read_questions(_file(tmp_path, "", ""))
    (tmp_path / "set.jsonl").write_bytes(b'{"\xff')
    with pytest.raises(ConfigError, match=r"set.jsonl: byte 2 is no UTF-8"):
        read_questions(tmp_path / "set.jsonl")


def test_media_are_found_beside_the_question_set() -> None:
    for name in ("picture_digits", "speech"):
        for question in read_questions(DEMO / "data" / f"{name}.jsonl")[:3]:
            part = question.messages[0]["content"][0]
            assert Path(part[part["type"]]).is_file()


@dataclass
class _Said:
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    thought: str | None = None
    finish_reason: str = "stop"
    usage: Any = field(default_factory=lambda: SimpleNamespace(num_new_tokens=3))


def _call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def _wants(answer: str | None = None, calls: list[dict[str, Any]] | None = None, **rest: Any) -> Question:
    return Question(**{"where": "f:1", "task": "t", "messages": ASK, "answer": answer, "calls": calls, **rest})


CALLS = [{"name": "f", "arguments": {"n": 1, "on": True}}, {"name": "g", "arguments": {}}]


@pytest.mark.parametrize(
    ("question", "reply", "right"),
    [
        (_wants("4"), _Said(" 4\n"), True),
        (_wants("4"), _Said("4."), False),
        (_wants("4"), _Said("4", (_call("f"),)), False),
        (_wants(calls=CALLS), _Said("", (_call("f", on=True, n=1), _call("g"))), True),
        (_wants(calls=CALLS), _Said("", (_call("f", on=True, n=1.0), _call("g"))), True),
        (_wants(calls=CALLS), _Said("", (_call("g"), _call("f", on=True, n=1))), False),
        (_wants(calls=CALLS), _Said("", (_call("f", on=1, n=1), _call("g"))), False),
        (_wants(calls=CALLS), _Said("", (_call("f", on=True, n=1),)), False),
        (_wants(calls=CALLS), _Said(json.dumps(CALLS)), False),
    ],
)
def test_only_the_wanted_reply_is_right(question: Question, reply: _Said, right: bool) -> None:
    assert is_right(question, reply) is right


def test_confidence_interval_matches_published_values() -> None:
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


# ---- scores --------------------------------------------------------------------------------------------------------


class _Parrot:
    """Says what it is asked when it may think, and nothing when not."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def encode(self, messages: Any, tools: Any, *, enable_thinking: bool) -> str:
        if isinstance(messages[0]["content"], list):
            raise ConfigError("messages[0]: no pictures here", hint="send text only")
        return messages[0]["content"] if enable_thinking else ""

    def check_prompt(self, text: str) -> str:
        if len(text) > 9:
            raise ContractError(f"the prompt has {len(text)} tokens", hint="shorten it")
        return text

    def stream_ids(self, text: str, **options: Any) -> Any:
        self.options.append(options)
        return SimpleNamespace(wait=lambda: _Said(text, finish_reason="length"))


def _asked(text: str, answer: str, **rest: Any) -> Question:
    return _wants(answer, messages=[{"role": "user", "content": text}], **rest)


def test_right_replies_are_counted_by_task_and_thinking() -> None:
    questions = [
        *(_asked("a", answer, task="x", enable_thinking=True) for answer in "aab"),
        *(_asked("", answer, task="y") for answer in ("", "b")),
        _asked("c", "c", task="y", enable_thinking=True),
    ]
    parrot, lines = _Parrot(), []
    scores = evaluate(parrot, questions, say=lines.append)  # type: ignore[arg-type]
    rows = [(score.task, score.thinking, score.right, score.total) for score in scores]
    assert rows == [("x", True, 2, 3), ("y", False, 1, 2), ("y", True, 1, 1)]
    assert scores[0].accuracy == 0.6667
    assert (scores[0].low, scores[0].high) == tuple(round(end, 4) for end in wilson(2, 3))
    assert scores[0].num_new_tokens == 9
    assert [(wrong.wanted, wrong.text, wrong.finish_reason) for wrong in scores[0].wrong] == [("b", "a", "length")]
    assert lines == ["6 of 6 questions, 4 right, 0 s"]
    assert all(options["temperature"] == 0 for options in parrot.options)


def test_thinking_and_limit_choose_what_is_asked() -> None:
    questions = [_asked("a", "a", task=task, enable_thinking=True) for task in "xxyyy"]

    def counts(**options: Any) -> list[tuple[str, bool, int]]:
        scores = evaluate(_Parrot(), questions, **options)  # type: ignore[arg-type]
        return [(score.task, score.thinking, score.total) for score in scores]

    assert counts(limit=2) == [("x", True, 2), ("y", True, 2)]
    assert counts(thinking="off", limit=1) == [("x", False, 1), ("y", False, 1)]
    assert counts(thinking="both", limit=1) == [("x", True, 1), ("x", False, 1), ("y", True, 1), ("y", False, 1)]


def test_a_question_that_cannot_be_asked_is_named() -> None:
    picture = _wants("4", messages=[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}])
    with pytest.raises(ConfigError, match=r"^f:1: messages\[0\]: no pictures here\nhint: send text only"):
        evaluate(_Parrot(), [picture])  # type: ignore[arg-type]


def test_a_late_question_that_does_not_fit_is_named_before_the_first_is_answered() -> None:
    parrot, questions = _Parrot(), [_asked("a", "a"), _asked("a" * 10, "a", enable_thinking=True)]
    with pytest.raises(ConfigError, match=r"^f:1: the prompt has 10 tokens\nhint: shorten it"):
        evaluate(parrot, questions)  # type: ignore[arg-type]
    assert parrot.options == []


def _score(task: str, right: int, total: int, *, thinking: bool = True) -> Score:
    low, high = wilson(right, total)
    counts = {"right": right, "total": total, "num_new_tokens": 1, "seconds": 1.0}
    return Score(task=task, thinking=thinking, accuracy=right / total, low=low, high=high, wrong=(), **counts)


def test_bars_are_as_long_as_the_accuracies() -> None:
    svg = ElementTree.fromstring(bars("a <b> & c", [_score("x<y", 10, 10), _score("z", 1, 4, thinking=False)]))
    name = "{http://www.w3.org/2000/svg}"
    texts = ["".join(text.itertext()) for text in svg.iter(f"{name}text")]
    assert "a <b> & c" in texts
    assert "25.0%, 1 of 4" in texts
    drawn = [rect for rect in svg.iter(f"{name}rect") if rect.get("height") == "18"]
    full, quarter = (float(rect.get("width", 0)) for rect in drawn)
    assert quarter == full / 4
    assert drawn[0].get("fill") != drawn[1].get("fill")
    # nothing is fetched: no element refers to another file
    assert not any("href" in key for element in svg.iter() for key in element.attrib)


# ---- build, run, eval ----------------------------------------------------------------------------------------------


@cache
def _artifact(name: str, recipe: str) -> Path:
    out = artifacts.scratch() / f"{name}-{recipe}"
    with artifacts.traces(fresh=False):
        return artifacts.build_artifact(DEMO / "checkpoints" / name, out, chunk=64, recipe=recipe)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma4_export.runtime", "eval", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_demo_artifact_is_scored_from_the_command_line(tmp_path: Path) -> None:
    files = [str(DEMO / "data" / f"{name}.jsonl") for name in SETS]
    picture = tmp_path / "bars.svg"
    artifact = _artifact("tiny-e", "bf16")
    done = _run(str(artifact), *files, "--limit", "4", "--json", "--image", str(picture))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["recipe"] == "bf16"
    rows = report["scores"]
    assert {row["task"] for row in rows} == set(SETS)
    assert sum(row["total"] for row in rows) == 16
    # every set is answered to 98 % and more in full: one slip in 16 is possible on another machine, three are not
    assert sum(row["right"] for row in rows) >= 14, rows
    assert "16 of 16 questions" in done.stderr
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    plain = _run(str(artifact), files[0], "--limit", "1", "--thinking", "both", "--max-new-tokens", "2")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.startswith(
        "tiny-e-bf16 (bf16)\nsum_thinking  thinking on     0.0%  0 of 1  (95 %: 0.0% to 79.3%)"
    )
    assert "1 answers were cut off" in plain.stdout


def test_misuse_of_the_command_ends_with_2_and_a_hint(tmp_path: Path) -> None:
    artifact = str(_artifact("tiny-e", "bf16"))
    bad = _run(artifact, str(_file(tmp_path, "{")))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "set.jsonl:1: not JSON" in bad.stderr
    with pytest.raises(ConfigError, match=r"--image bars.png: only SVG is drawn\nhint: --image bars.svg"):
        evaluate_command(artifact, [_file(tmp_path, {"messages": ASK, "answer": "4"})], image=Path("bars.png"))
    pictures = _run(artifact, str(DEMO / "data" / "picture_digits.jsonl"), "--limit", "1")
    assert pictures.returncode == 2
    assert "picture_digits.jsonl:1: " in pictures.stderr


def _right(artifact: Path, name: str, limit: int, **options: Any) -> int:
    with Gemma4.load(artifact) as model:
        questions = read_questions(DEMO / "data" / f"{name}.jsonl")
        return sum(score.right for score in evaluate(model, questions, limit=limit, **options))


@pytest.mark.parametrize("recipe", ["int8-blocks", "int4-rtn"])
@pytest.mark.parametrize("name", ["tiny-e", "tiny-moe"])
def test_block_recipes_take_both_demo_models(name: str, recipe: str) -> None:
    # measured on whole sets: docs/measurements/accuracy.md
    assert _right(_artifact(name, recipe), "tool_call", 5) >= 4


def test_one_wrong_constant_is_seen_in_the_score(tmp_path: Path) -> None:
    broken = tmp_path / "checkpoint"
    shutil.copytree(DEMO / "checkpoints" / "tiny-moe", broken)
    values = json.loads((broken / "config.json").read_text())
    values["text_config"]["rope_parameters"]["sliding_attention"]["rope_theta"] = 1000.0
    (broken / "config.json").write_text(json.dumps(values))
    artifact = artifacts.build_artifact(broken, tmp_path / "artifact", chunk=64, recipe="bf16")
    assert _right(artifact, "sum_thinking", 6) <= 2 < 5 <= _right(_artifact("tiny-moe", "bf16"), "sum_thinking", 6)
