"""``gemma4-run chat`` with the demo model: the conversation it keeps, plain pipes, and a real terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import artifacts
import pexpect
import pytest

from gemma4_export.configs.errors import ConfigError, ContractError
from gemma4_export.runtime import Gemma4
from gemma4_export.runtime.chat_session import ChatSession, Dropped
from gemma4_export.runtime.commands.chat import chat
from gemma4_export.runtime.commands.chat_terminal import ChatTerminal, ending_texts, opening_text, read_message
from gemma4_export.runtime.reply import Finished, FinishReason, ReplyParser, TextPiece, ThoughtPiece

DEMO = Path(__file__).parent.parent / "demo"
CONTEXT = 1200
SUM, ANSWER = "What is 48213 + 93779?", "141992"
# Its thought takes several seconds: long enough to be stopped.
LONG_SUM = f"What is {'48213' * 16} + {'93779' * 16}?"
PRICE = {
    "type": "function",
    "function": {
        "name": "get_price",
        "description": "Price of a thing.",
        "parameters": {
            "type": "object",
            "properties": {"item": {"type": "string", "description": "What to buy."}},
            "required": ["item"],
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's artifact, with a context that a short conversation fills."""
    out = tmp_path_factory.mktemp("chat") / "tiny-e"
    return artifacts.build_artifact(DEMO / "checkpoints" / "tiny-e", out, chunk=64, recipe="bf16", context=CONTEXT)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Gemma4]:
    with Gemma4.load(folder) as loaded:
        yield loaded


def ask(session: ChatSession, text: str) -> str:
    list(session.say(text))
    assert session.last is not None
    return session.last.text


def prompt_of(session: ChatSession) -> str:
    """What the model would read next."""
    ids = session.model.encode(session._messages(session._turns), enable_thinking=session.enable_thinking)
    return session.model.tokenizer.decode(ids, keep_control=True)


# ---------------------------------------------------------------------------------------------------------------------
# The conversation


def test_thoughts_never_enter_the_next_turn(model: Gemma4) -> None:
    session = ChatSession(model, enable_thinking=True, temperature=0)
    assert ask(session, SUM) == ANSWER
    assert session.last is not None
    assert session.last.thought
    prompt = prompt_of(session)
    assert ANSWER in prompt
    assert session.last.thought.strip() not in prompt
    assert "<|channel>" not in prompt.split("<|turn>model")[1]


def test_a_tools_result_goes_back_within_the_turn_and_thoughts_leave_with_it(model: Gemma4) -> None:
    session = ChatSession(model, tools=[PRICE], temperature=0, enable_thinking=True)
    ask(session, "What does a bicycle cost?")
    assert [(call.name, call.arguments) for call in session.waiting_for] == [("get_price", {"item": "bicycle"})]
    assert ask(session, "17") == "A bicycle costs 17."
    assert not session.waiting_for
    assert [message["role"] for message in session._turns[0]] == ["user", "assistant", "tool", "assistant"]
    assert not any("reasoning" in message for message in session._turns[0])


def test_a_call_without_its_result_is_forgotten_with_the_rest(model: Gemma4) -> None:
    session = ChatSession(model, tools=[PRICE], temperature=0)
    ask(session, "What does a bicycle cost?")
    session.clear()
    assert not session.waiting_for
    ask(session, "Who are you?")
    assert session.num_turns == 1


def test_a_full_context_drops_the_oldest_turns_and_says_what_was_kept(model: Gemma4) -> None:
    session = ChatSession(model, system="Be brief.", max_new_tokens=30, temperature=0)
    filler = "My number is " + "12345 " * 40
    dropped: list[Dropped] = []
    for number in range(12):
        before = session.num_turns
        events = list(session.say(f"{number}. {filler}"))
        for event in events:
            if isinstance(event, Dropped):
                assert events[0] is event
                assert event.num_dropped + event.num_kept == before
                assert event.num_prompt_tokens <= CONTEXT // 2  # room for the next turns, so that it is rare
                dropped.append(event)
        assert session.last is not None
        assert session.last.usage.num_prompt_tokens + 30 <= CONTEXT
    assert 1 <= len(dropped) <= 5
    prompt = prompt_of(session)
    assert "Be brief." in prompt
    assert "11. My number" in prompt
    assert "0. My number" not in prompt.replace("10. My number", "")


def test_a_question_longer_than_the_context_leaves_the_conversation_as_it_was(model: Gemma4) -> None:
    session = ChatSession(model, temperature=0)
    ask(session, "Who are you?")
    with pytest.raises(ContractError, match=rf"the prompt has \d+ tokens, the context {CONTEXT}"):
        list(session.say("12345 " * CONTEXT))
    assert session.num_turns == 1
    assert ask(session, "Hello!")
    assert session.num_turns == 2


def test_a_stopped_answer_keeps_its_text_and_a_stopped_thought_nothing(model: Gemma4) -> None:
    session = ChatSession(model, temperature=0)
    for event in session.say("Who are you?"):
        if isinstance(event, TextPiece):
            session.stop()
    assert session.last is not None
    assert session.last.finish_reason == "cancelled"
    assert session.num_turns == 1
    assert session._turns[0][-1] == {"role": "assistant", "content": session.last.text}
    session.enable_thinking = True
    for event in session.say(SUM):
        if isinstance(event, ThoughtPiece):
            session.stop()
    assert session.num_turns == 1


def test_what_no_question_could_mend_is_refused_at_the_start(model: Gemma4) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        ChatSession(model, temperature=-1)
    with pytest.raises(ContractError, match="the context"):
        ChatSession(model, system="12345 " * CONTEXT)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["one\\"], "one"),
        (['"""one', "", "two\\", '"""', "next"], "one\n\ntwo\\"),
        (['"""', "  one", 'two"""'], "  one\ntwo"),
        (['"""one"""', "next"], "one"),
        (['"""one', "two"], "one\ntwo"),
        ([""], ""),
    ],
)
def test_messages_of_several_lines(lines: list[str], message: str) -> None:
    left = iter(lines)

    def read_line(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    assert read_message(read_line, "you> ") == message


# ---------------------------------------------------------------------------------------------------------------------
# Pipes


def piped(folder: Path, text: str | bytes, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma4_export.runtime", "chat", str(folder), "--temperature", "0", *options]
    content = text.encode() if isinstance(text, str) else text
    done = subprocess.run(command, input=content, capture_output=True, timeout=120, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_pipe_gets_answers_on_stdout_and_all_else_on_stderr(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([PRICE]))
    done = piped(
        folder,
        f"{SUM}\n/think off\n/clear\n\nWhat does a bicycle cost?\n17\n/stats\n",
        *("--thinking", "--tools", str(tmp_path / "tools.json")),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ANSWER}\nA bicycle costs 17.\n"
    assert "[thought] 48213+93779\n" in done.stderr
    assert "[calls get_price(item='bicycle')]\n" in done.stderr
    assert "\x1b" not in done.stderr
    assert re.search(rf"^context \d+ of {CONTEXT} tokens, turns: 1, \d+ tokens left$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "options", "code", "message"),
    [
        ("/cleer\nHello!\n", (), 2, "error: /cleer is no command\nhint: did you mean '/clear'? (/help lists all)\n"),
        ("/think maybe\n", (), 2, "error: /think maybe: expected on or off\nhint: /think on\n"),
        (b"caf\xe9\n", (), 2, "error: text: character "),
        ("12345 " * 2000, (), 1, "error: the prompt has "),
        ("Hello!\n", ("--top-p", "2"), 2, "error: top_p: expected a finite number above 0 and at most 1, found 2.0\n"),
        ("Hello!\n", ("--tools", "nowhere.json"), 2, "error: nowhere.json: no such file\n"),
    ],
)
def test_a_pipe_ends_at_the_first_error(
    text: str | bytes, options: tuple[str, ...], code: int, message: str, folder: Path
) -> None:
    done = piped(folder, text, *options)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(message)


def test_a_malformed_call_is_shown_as_text_with_its_reason(
    model: Gemma4, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ChatSession(model)
    ids = session.model.tokenizer.encode("<|tool_call>call:get_price{item<tool_call|><|tool_response>")
    parser = ReplyParser([], model.tokenizer)
    events = [event for index in ids for event in parser.push(index)] + parser.finish()
    reply = parser.reply("stop")
    assert reply.malformed_calls
    monkeypatch.setattr(session, "say", lambda text: iter([*events, Finished(reply=reply, num_new_tokens=9, ms=1.0)]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("What does a bicycle cost?\n"))
    ChatTerminal(session, hide_thoughts=False).run()
    shown = capsys.readouterr()
    assert shown.out == ""
    reason = reply.malformed_calls[0].reason
    assert shown.err == (
        f"[call:get_price{{item]\n[a tool call could not be read: {reason}]\n[no answer, so the question is not kept]\n"
    )


_CALL = '<|tool_call>call:get_price{item:<|"|>hat<|"|>}<tool_call|>'


@pytest.mark.parametrize(
    ("said", "finish_reason", "endings"),
    [
        ("yes", "stop", []),
        ("", "stop", ["[no answer, so the question is not kept]"]),
        (_CALL, "stop", []),  # its result is asked for
        ("yes", "cancelled", ["[stopped]"]),
        (_CALL, "cancelled", ["[stopped; no answer yet, so the question is not kept]"]),
        (_CALL, "length", ["[cut off: the context of 4 tokens is full; no answer yet, so the question is not kept]"]),
    ],
)
def test_an_ending_says_what_is_not_kept(
    said: str, finish_reason: FinishReason, endings: list[str], model: Gemma4
) -> None:
    parser = ReplyParser([], model.tokenizer)
    for index in model.tokenizer.encode(said):
        parser.push(index)
    parser.finish()
    reply = parser.reply(finish_reason)
    assert list(ending_texts(reply, context=4)) == endings
    session = ChatSession(model)
    session._finish([{"role": "user", "content": "What does a hat cost?"}], reply)
    assert (session.num_turns + len(session.waiting_for) == 0) == any("not kept" in ending for ending in endings)


# Called here and not as a process, so that their messages count as triggered.
@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("[", "tools.json: not JSON: "),
        ('[{"function": {}, "function": {}}]', "tools.json: key 'function' stands twice in one object"),
        ('{"type": "function"}', "tools.json: expected a list of tools"),
    ],
)
def test_tools_that_are_no_list_are_refused(content: str, cause: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        chat(folder, tools=tmp_path / "tools.json")
    assert cause in caught.value.cause


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("/cleer", "/cleer is no command"),
        ("/think maybe", "/think maybe: expected on or off"),
        ("/think", "/think: expected on or off"),
    ],
)
def test_a_command_that_is_none_is_refused(
    line: str, cause: str, model: Gemma4, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\n"))
    with pytest.raises(ConfigError, match=f"^{cause}"):
        ChatTerminal(ChatSession(model), hide_thoughts=False).run()


def test_the_opening_line_says_who_answers(model: Gemma4) -> None:
    rest = f"context {CONTEXT} tokens; /help lists commands, Ctrl-D leaves"
    assert opening_text(ChatSession(model)) == f"tiny-e (bf16), thinking off, {rest}"
    assert opening_text(ChatSession(model, enable_thinking=True)) == f"tiny-e (bf16), thinking on, {rest}"


def test_ctrl_c_at_the_prompt_ends_nothing(
    model: Gemma4, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    terminal, endings = ChatTerminal(ChatSession(model), hide_thoughts=False), iter([KeyboardInterrupt, EOFError])

    def read_line(prompt: str) -> str:
        raise next(endings)

    monkeypatch.setattr(terminal, "_read_line", read_line)
    terminal.run()
    assert capsys.readouterr().err == "\nnothing to stop; Ctrl-D or /exit leaves\n"


def test_a_closed_stdin_is_refused(model: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match=r"^standard input is closed") as caught:
        ChatTerminal(ChatSession(model), hide_thoughts=False)
    assert "gemma4-run generate" in str(caught.value.hint)


# ---------------------------------------------------------------------------------------------------------------------
# A real terminal


def _environment(*, no_color: bool) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return kept | {"TERM": "xterm", "INPUTRC": "/dev/null"} | ({"NO_COLOR": "1"} if no_color else {})


def terminal(folder: Path, *options: str, no_color: bool = False) -> pexpect.spawn:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "gemma4_export.runtime", "chat", str(folder), "--temperature", "0", *options],
        env=_environment(no_color=no_color),
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 200),
    )
    child.expect_exact("you> ")
    return child


def answer(child: pexpect.spawn, text: str) -> str:
    """What the terminal shows between a line typed and the next prompt."""
    child.sendline(text)
    child.expect_exact("you> ")
    return str(child.before)


def leave(child: pexpect.spawn) -> None:
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)


def test_a_conversation_in_a_real_terminal(folder: Path) -> None:
    child = terminal(folder)
    assert "tiny-e (bf16), thinking off" in str(child.before)
    assert "I am a tiny Gemma 4 model" in answer(child, "Who are you?")
    assert "thinking is on" in answer(child, "/think on")
    shown = answer(child, SUM)
    assert "\x1b[2m[thought] \x1b[0m" in shown
    assert shown.rstrip().endswith(ANSWER)
    stats = answer(child, "/stats")
    assert re.search(r"wrote   \d+ tokens, \d+ of them thought: \d+\.\d tok/s", stats)
    assert re.search(rf"context \d+ of {CONTEXT} tokens, turns: 2, \d+ tokens left", stats)
    assert "system prompt set" in answer(child, "/system You are a tiny demo model.")
    assert "turns: 0," in answer(child, "/clear") + answer(child, "/stats")
    assert "did you mean '/stats'?" in answer(child, "/stat")
    child.sendline('"""What is 20 +')
    child.expect_exact("... ")
    child.sendline('22?"""')
    child.expect_exact("you> ")
    assert str(child.before).rstrip().endswith("42")
    assert "/system TEXT" in answer(child, "/help")
    leave(child)


def test_ctrl_c_stops_the_answer_and_not_the_program(folder: Path) -> None:
    child = terminal(folder, "--thinking")
    child.sendline(LONG_SUM)
    child.expect_exact("[thought]")
    child.sendintr()
    child.expect_exact("[stopped; no answer yet, so the question is not kept]")
    child.expect_exact("you> ")
    assert "turns: 0," in answer(child, "/stats")
    assert answer(child, SUM).rstrip().endswith(ANSWER)
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)


def test_an_error_ends_one_question_and_arrow_up_brings_it_back(folder: Path) -> None:
    child = terminal(folder, "--hide-thoughts", "--thinking", no_color=True)
    shown = answer(child, SUM)
    assert "[thinking …]" in shown
    assert "48213+93779" not in shown
    assert "\x1b[2m" not in shown
    assert "error: the prompt has " in answer(child, "1234567 " * 400)
    answer(child, "/clear")
    child.send("\x1b[A\x1b[A\x1b[A")
    assert answer(child, "").rstrip().endswith(ANSWER)
    leave(child)


def test_a_full_context_is_said_in_the_middle_of_a_chat(folder: Path) -> None:
    child = terminal(folder, "--max-new-tokens", "40")
    shown = "".join(answer(child, f"My number is {'123456 ' * 40}") for _ in range(6))
    found = re.search(
        r"\[context full: the oldest (?:turn|\d turns) dropped; kept (.*), (\d+) of (\d+) tokens\]", shown
    )
    assert found
    assert found[1] in ("your question", *(f"the last {number} and your question" for number in range(1, 6)))
    assert int(found[2]) <= CONTEXT // 2
    leave(child)
