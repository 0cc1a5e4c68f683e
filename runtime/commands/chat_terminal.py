"""The terminal side of ``gemma4-run chat``: reading messages, showing answers, and the commands that begin with "/"."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

from gemma4_export.configs.errors import ConfigError, Gemma4Error, nearest
from gemma4_export.runtime.chat_session import ChatSession, Dropped
from gemma4_export.runtime.commands.prompts import stdin
from gemma4_export.runtime.commands.screen import show
from gemma4_export.runtime.reply import (
    Event,
    Finished,
    MalformedCallPiece,
    Reply,
    TextPiece,
    ThoughtPiece,
    ToolCallPiece,
)
from gemma4_export.runtime.tool_syntax import ToolCall

_BLOCK = '"""'

HELP = """\
/clear         forget the conversation; the system prompt stays
/system TEXT   set the system prompt; /system alone removes it
/think on|off  whether to think before answering
/stats         speed of the last answer, and how much context is left
/help          this list
/exit          leave; so does Ctrl-D
A line that ends with \\ goes on in the next, and so does all between \"\"\" and \"\"\". Ctrl-C stops an answer.
A message that begins with / needs a space in front of it."""


def read_message(read_line: Callable[[str], str], prompt: str) -> str:
    r"""One message: a line; lines that end with ``\``, joined; or a block that begins and ends with three quotes.

    Raises:
        EOFError: the input ends before the message begins; inside a message its end ends the message.
    """
    line = read_line(prompt)
    if not line.startswith(_BLOCK):
        return "\n".join(_joined(line, read_line))
    lines = [line.removeprefix(_BLOCK)]
    with contextlib.suppress(EOFError):
        while not lines[-1].rstrip().endswith(_BLOCK):
            lines.append(read_line("... "))
    return "\n".join(lines).rstrip().removesuffix(_BLOCK).strip("\n")


def _joined(line: str, read_line: Callable[[str], str]) -> Iterator[str]:
    while line.endswith("\\"):
        yield line[:-1]
        try:
            line = read_line("... ")
        except EOFError:
            return
    yield line


class ChatTerminal:
    """Reads, asks and shows until the input ends.

    Answers go to stdout, all else to stderr. Where stdin and stdout are a terminal there are prompts, line editing and
    history; Ctrl-C stops the answer, and an error ends one question, not the conversation. Elsewhere lines are read
    as they are and the first error ends the program.
    """

    def __init__(self, session: ChatSession, *, hide_thoughts: bool) -> None:
        """Raises ConfigError: standard input is closed."""
        self._session = session
        self._hide_thoughts = hide_thoughts
        self._is_interactive = stdin().isatty() and sys.stdout.isatty()
        self._doing = ""  # "thought" or "text" while such a part is open
        self._ends_line = True  # whether what was shown of it ends a line
        if self._is_interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() editing and history)
        # Bytes that are no UTF-8 come in as half characters, which the tokenizer refuses by their position.
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")

    def run(self) -> None:
        if self._is_interactive:
            self._say(opening_text(self._session))
        while True:
            try:
                message = read_message(self._read_line, self._prompt())
                if message.startswith("/") and not self._session.waiting_for:
                    self._command(message)
                elif message.strip() or self._session.waiting_for:
                    self._answer(message.strip())
            except EOFError:
                if self._is_interactive:
                    print()
                return
            except KeyboardInterrupt:
                self._say("\nnothing to stop; Ctrl-D or /exit leaves")
            except Gemma4Error as error:
                if not self._is_interactive:
                    raise
                self._say(f"error: {error}")

    def _prompt(self) -> str:
        waiting = self._session.waiting_for
        return f"result of {waiting[0].name}> " if waiting else "you> "

    def _read_line(self, prompt: str) -> str:
        if self._is_interactive:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    # -----------------------------------------------------------------------------------------------------------------
    # Answers

    def _answer(self, text: str) -> None:
        with _stopping(self._session.stop if self._is_interactive else None):
            for event in self._session.say(text):
                self._show(event)

    def _show(self, event: Event | Dropped) -> None:
        match event:
            case Dropped():
                self._say(dropped_text(event))
            case ThoughtPiece(text=text):
                self._show_thought(text)
            case TextPiece(text=text):
                self._begin("text")
                self._write(sys.stdout, text)
            case ToolCallPiece(call=call):
                self._begin("")
                self._say(call_text(call))
            case MalformedCallPiece(call=malformed):
                self._begin("")
                self._say(f"[{malformed.text}]")  # why it is no call is among the reply's problems
            case Finished(reply=reply):
                self._begin("")
                for remark in ending_texts(reply, self._session.model.context):
                    self._say(remark)

    def _show_thought(self, text: str) -> None:
        if self._begin("thought"):
            self._write(sys.stderr, "[thinking …]" if self._hide_thoughts else "[thought] ", dim=True)
        if not self._hide_thoughts:
            self._write(sys.stderr, text, dim=True)

    def _begin(self, kind: str) -> bool:
        """End the line of what came before, if it was something else; whether it was."""
        if kind == self._doing:
            return False
        if self._doing and not self._ends_line:
            self._write(sys.stdout if self._doing == "text" else sys.stderr, "\n")
        self._doing = kind
        return True

    def _say(self, text: str) -> None:
        self._write(sys.stderr, f"{text}\n", dim=True)

    def _write(self, stream: TextIO | None, text: str, *, dim: bool = False) -> None:
        show(stream, text, dim=dim)
        self._ends_line = text.endswith("\n")

    # -----------------------------------------------------------------------------------------------------------------
    # Commands

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        commands = {
            "/clear": self._clear,
            "/system": self._set_system,
            "/think": self._set_thinking,
            "/stats": self._show_stats,
            "/help": self._help,
            "/exit": self._exit,
        }
        if name not in commands:
            raise ConfigError(f"{name} is no command", hint=f"{nearest(name, commands)} (/help lists all)")
        commands[name](rest.strip())

    def _clear(self, rest: str) -> None:
        self._session.clear()
        self._say("the conversation is forgotten")

    def _set_system(self, text: str) -> None:
        self._session.system = text or None
        self._say("system prompt set" if text else "system prompt removed")

    def _set_thinking(self, word: str) -> None:
        if word not in ("on", "off"):
            raise ConfigError(f"{f'/think {word}'.rstrip()}: expected on or off", hint="/think on")
        self._session.enable_thinking = word == "on"
        self._say(f"thinking is {word}")

    def _show_stats(self, rest: str) -> None:
        for line in stats_lines(self._session):
            self._say(line)

    def _help(self, rest: str) -> None:
        self._say(HELP)

    def _exit(self, rest: str) -> None:
        raise EOFError


@contextlib.contextmanager
def _stopping(stop: Callable[[], None] | None) -> Iterator[None]:
    """Ctrl-C calls ``stop`` instead of ending the program, so that no step of the model is torn in two."""
    if stop is None:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one stop is enough, and a second must not come amid the first
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def opening_text(session: ChatSession) -> str:
    """Who answers, and how to go on."""
    manifest, thinking = session.model.artifact.manifest, "on" if session.enable_thinking else "off"
    name = f"{manifest.model.name} ({manifest.recipe}), thinking {thinking}"
    return f"{name}, context {manifest.context} tokens; /help lists commands, Ctrl-D leaves"


def dropped_text(event: Dropped) -> str:
    """What left the conversation, and what stayed."""
    turns = "turn" if event.num_dropped == 1 else f"{event.num_dropped} turns"
    kept = f"the last {event.num_kept} and your question" if event.num_kept else "your question"
    return (
        f"[context full: the oldest {turns} dropped; kept {kept}, {event.num_prompt_tokens} of {event.context} tokens]"
    )


def call_text(call: ToolCall) -> str:
    """A tool call on one line."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"[calls {call.name}({arguments})]"


def ending_texts(reply: Reply, context: int) -> Iterator[str]:
    """What one should know about how an answer ended."""
    yield from (f"[{problem}]" for problem in reply.problems)
    kept = "" if reply.text else "; no answer yet, so the question is not kept"
    if reply.finish_reason == "cancelled":
        yield f"[stopped{kept}]"
    elif reply.finish_reason == "length":
        usage = reply.usage
        is_full = usage.num_prompt_tokens + usage.num_new_tokens >= context
        if is_full:
            yield f"[cut off: the context of {context} tokens is full{kept}]"
        else:
            yield f"[cut off after {usage.num_new_tokens} tokens: give a larger --max-new-tokens{kept}]"
    elif reply.finish_reason == "stop" and not reply.text:
        yield "[no answer, so the question is not kept]"


def stats_lines(session: ChatSession) -> Iterator[str]:
    """Speed of the last answer, and what the conversation takes of the context."""
    reply = session.last
    if reply is None or reply.timings is None:
        yield "no answer yet"
    else:
        usage, timings = reply.usage, reply.timings
        num_read = usage.num_prompt_tokens - usage.num_cached_tokens
        yield (
            f"read    {usage.num_prompt_tokens} tokens, {usage.num_cached_tokens} of them known from before: "
            f"{_rate(num_read, timings.prefill_ms)}"
        )
        # The first token comes with the reading.
        thought = f", {usage.num_thought_tokens} of them thought" if usage.num_thought_tokens else ""
        yield f"wrote   {usage.num_new_tokens} tokens{thought}: {_rate(usage.num_new_tokens - 1, timings.decode_ms)}"
    used, context = session.num_used_tokens, session.model.context
    yield f"context {used} of {context} tokens, turns: {session.num_turns}, {context - used} tokens left"


def _rate(num_tokens: int, ms: float) -> str:
    return f"{1000 * num_tokens / ms:.1f} tok/s" if num_tokens > 0 and ms > 0 else "too short to tell its speed"
