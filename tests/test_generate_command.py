"""``gemma4-run generate``: prompts from arguments, standard input and files; answers where they belong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import artifacts
import pytest
from typer.testing import CliRunner

from gemma4_export.configs.errors import ConfigError
from gemma4_export.runtime import Gemma4
from gemma4_export.runtime.commands import app, prompts
from gemma4_export.runtime.commands.generate import generate


@pytest.fixture(scope="module")
def folder() -> Path:
    return artifacts.artifact("31b", context=64, fresh_trace=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def give_stdin(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the model will say, a text a prompt, in place of what its random weights would."""
    texts: list[str] = []
    run = Gemma4._run

    def scripted(model: Gemma4, ids: Any, cache: Any, *rest: Any) -> Any:
        if not texts:
            return run(model, ids, cache, *rest)
        return (index for index in model.tokenizer.encode(texts.pop(0)))

    monkeypatch.setattr(Gemma4, "_run", scripted)
    yield texts
    assert texts == []


def test_text_goes_to_stdout_and_thoughts_to_stderr(
    folder: Path, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said.append("<|channel>thought\nhmm<channel|>yes<turn|>")
    generate(folder, prompt="hello")
    assert capsys.readouterr() == ("yes\n", "hmm\n")
    said.append("<|channel>thought\nhmm<channel|>yes<turn|>")
    generate(folder, prompt="hello", hide_thoughts=True)
    assert capsys.readouterr() == ("yes\n", "")


def test_thoughts_are_dimmed_in_a_terminal_unless_colour_is_unwanted(
    folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for no_colour, expected in (("", "\x1b[2mhmm\x1b[0m\n"), ("1", "hmm\n")):
        monkeypatch.setenv("NO_COLOR", no_colour)
        monkeypatch.setenv("TERM", "xterm")
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        said.append("<|channel>thought\nhmm<channel|>yes<turn|>")
        generate(folder, prompt="hello")
        # each piece by itself, so that Ctrl-C never leaves a dimmed terminal behind
        assert terminal.getvalue().replace("\x1b[0m\x1b[2m", "") == expected


def test_a_terminal_shows_what_would_steer_it_and_a_file_keeps_it(
    folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stdout, expected in ((Terminal(), "a�]0;title�b\n"), (io.StringIO(), "a\x1b]0;title\x07b\n")):
        monkeypatch.setattr(sys, "stdout", stdout)
        said.append("a\x1b]0;title\x07b<turn|>")
        generate(folder, prompt="hello")
        assert stdout.getvalue() == expected


def test_calls_and_problems_are_shown(folder: Path, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said.append('<|tool_call>call:f{a:<|"|>é<|"|>}<tool_call|><|tool_call>call:g(1)<tool_call|><|tool_response>')
    generate(folder, prompt="hello")
    out, err = capsys.readouterr()
    assert out == 'call f {"a": "é"}\n\n'
    assert err == (
        "malformed call:g(1)\nnote: a tool call could not be read: expected { after the name g, found '(1)'\n"
    )


def test_json_has_everything_a_line_a_prompt(
    folder: Path, said: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("first\n\n second \r\n", encoding="utf-8")
    said += ["one<turn|>", "<|channel>thought\nhmm<channel|>two<turn|>"]
    generate(folder, prompt_file=str(path), as_json=True, seed=5)
    out, err = capsys.readouterr()
    replies = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert [(reply["text"], reply["thought"]) for reply in replies] == [("one", None), ("two", "hmm")]
    assert set(replies[0]) == {
        *("text", "thought", "tool_calls", "malformed_calls", "finish_reason", "ids", "usage"),
        *("timings", "problems", "logprobs", "seed", "load_s"),
    }
    assert (replies[0]["seed"], replies[0]["finish_reason"]) == (5, "stop")
    assert replies[0]["usage"]["num_new_tokens"] == len(replies[0]["ids"])


def test_options_reach_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ids(**options: Any) -> list[int]:
        generate(folder, prompt="hello", as_json=True, max_new_tokens=6, **options)
        found: list[int] = json.loads(capsys.readouterr().out)["ids"]
        return found

    assert ids(temperature=0) == ids(temperature=0) == ids(top_k=1)
    hot = {"temperature": 3.0, "top_k": 0, "top_p": 1.0}
    assert ids(seed=1, **hot) == ids(seed=1, **hot) != ids(seed=2, **hot)
    assert ids(seed=1, **hot) != ids(seed=1, **hot | {"min_p": 1.0})
    assert ids(temperature=0)[0] not in ids(temperature=0, presence_penalty=1e6)[1:]


class ReachedError(Exception):
    """Stands for an answer."""


@pytest.mark.parametrize(
    ("command", "text"), [(["generate", "--prompt", "hello"], "hello"), (["chat"], "")], ids=["generate", "chat"]
)
def test_every_option_of_a_command_line_reaches_the_model(
    command: list[str], text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.6, "min_p": 0.1, "seed": 8}
    given |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "thinking_budget": 9}

    def reached(model: Gemma4, ids: list[int], **options: Any) -> None:
        assert options == given | {"stop": ["x", "y"]}
        assert ids == model.encode([{"role": "user", "content": text}], enable_thinking=True)
        session = model.decoder._session._session  # type: ignore[attr-defined]
        assert session.get_session_options().intra_op_num_threads == 3
        raise ReachedError

    monkeypatch.setattr(Gemma4, "stream_ids", reached)
    typed = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    line = [*command, str(folder), *typed, "--stop", "x", "--stop", "y", "--thinking", "--threads", "3"]
    with pytest.raises(ReachedError):
        CliRunner().invoke(app, line, catch_exceptions=False)


def test_raw_text_has_no_chat_around_it(folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    stream_ids = Gemma4.stream_ids

    def watched(model: Gemma4, ids: list[int], **options: Any) -> Any:
        seen.append(ids)
        assert ids == model.encode_raw("hello")
        return stream_ids(model, ids, **options)

    monkeypatch.setattr(Gemma4, "stream_ids", watched)
    said.append("yes<turn|>")
    generate(folder, prompt="hello", raw=True)
    assert len(seen) == 1


def test_conversations_with_tools_come_from_jsonl(
    folder: Path, said: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "chats.jsonl"
    user = {"role": "user", "content": "hi"}
    tool = {"type": "function", "function": {"name": "f", "description": "d"}}
    path.write_text("\ufeff" + json.dumps([user]) + "\n" + json.dumps({"messages": [user], "tools": [tool]}) + "\n")
    found = prompts.read_prompts(str(path))
    assert [(list(each.messages), each.tools, each.text) for each in found] == [
        ([user], None, None),
        ([user], [tool], None),
    ]
    said += ["one<turn|>"]
    path.write_text(json.dumps([user]))
    generate(folder, prompt_file=str(path))
    assert capsys.readouterr().out == "one\n"
    with pytest.raises(ConfigError, match=r"^--raw continues text, a \.jsonl file holds conversations"):
        generate(folder, prompt_file=str(path), raw=True)


def test_standard_input_is_one_prompt_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, "a\nb é\n".encode())
    assert prompts.read_prompt("-").text == "a\nb é\n"
    give_stdin(monkeypatch, "a\nb é\n".encode())
    assert [each.text for each in prompts.read_prompts("-")] == ["a", "b é"]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"", "standard input is empty"),
        (b" \n", "standard input is empty"),
        (b"a\xff", "standard input: byte 1 is no UTF-8"),
    ],
)
def test_standard_input_that_holds_no_prompt_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: bytes, cause: str
) -> None:
    give_stdin(monkeypatch, text)
    with pytest.raises(ConfigError) as caught:
        prompts.read_prompt("-")
    assert caught.value.cause == cause
    assert caught.value.hint


def test_standard_input_that_is_closed_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match=r"^standard input is closed"):
        prompts.read_prompt("-")
    command = [sys.executable, "-m", "gemma4_export.runtime", "generate", str(folder), "--prompt", "-"]
    line = 'exec "$@" <&-'
    finished = subprocess.run(["sh", "-c", line, "sh", *command], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == (
        'error: standard input is closed\nhint: pipe text into it, or: gemma4-run generate ARTIFACT --prompt "Hello"\n'
    )


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.txt", b"\n \n", "{path}: no prompts in 3 characters"),
        ("a.txt", b"a\xff", "{path}: byte 1 is no UTF-8"),
        (
            "a.jsonl",
            b"\n{",
            "{path}:2: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (
            "a.jsonl",
            b'[{"role": "user", "content": "a", "content": "b"}]',
            "{path}:1: key 'content' stands twice in one object",
        ),
        ("a.jsonl", b"5", "{path}:1: expected a list of messages or an object with messages"),
        ("a.jsonl", b"{}", "{path}:1: expected a list of messages or an object with messages"),
        ("a.jsonl", b'{"messages": [], "tool": 1}', "{path}:1: unknown key 'tool'"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        prompts.read_prompts(str(path))
    assert caught.value.cause == cause.format(path=path)
    assert caught.value.hint


def test_a_folder_is_no_prompt_file_and_a_pipe_is_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prompts.read_prompts(str(tmp_path))
    assert caught.value.cause == f"{tmp_path}: a folder, not a file"
    os.mkfifo(tmp_path / "pipe")  # as <(command) in a shell
    with subprocess.Popen(["sh", "-c", 'echo hello > "$0"', str(tmp_path / "pipe")]):
        assert [each.text for each in prompts.read_prompts(str(tmp_path / "pipe"))] == ["hello"]
