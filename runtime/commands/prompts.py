"""Prompts from an argument, from standard input and from files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from gemma4_export.configs.errors import ConfigError
from gemma4_export.runtime.text_files import parse_json, read_text

STDIN = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation to answer; ``text`` where it is one user message, which a base model can continue as it is."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    text: str | None = None


def from_text(text: str) -> Prompt:
    """One user message."""
    return Prompt(messages=[{"role": "user", "content": text}], text=text)


def read_prompt(argument: str) -> Prompt:
    """``argument`` itself, or all of standard input where it is ``-``.

    Raises:
        ConfigError: it is empty, or standard input is closed or no UTF-8.
    """
    text = _read_stdin() if argument == STDIN else argument
    if not text.strip():
        where = "standard input" if argument == STDIN else "--prompt"
        raise ConfigError(f"{where} is empty", hint='gemma4-run generate ARTIFACT --prompt "Hello"')
    return from_text(text)


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file, or of standard input where ``path`` is ``-``; empty lines do not count.

    A file whose name ends in ``.jsonl`` has a JSON value a line: a list of messages, or an object with ``messages`` and
    perhaps ``tools``. Every other has a user message a line.

    Raises:
        ConfigError: no such file, none in it, no UTF-8, or a line of a ``.jsonl`` file that is no conversation.
    """
    text = _read_stdin() if path == STDIN else read_text(Path(path), "--prompt-file - reads standard input")
    is_json = path.endswith(".jsonl")
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    prompts = [_conversation(f"{path}:{number}", line) if is_json else from_text(line) for number, line in lines]
    if not prompts:
        raise ConfigError(f"{path}: no prompts in {len(text)} characters", hint="write one a line")
    return prompts


def stdin() -> TextIO:
    """Standard input.

    Raises:
        ConfigError: it is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError(
            "standard input is closed", hint='pipe text into it, or: gemma4-run generate ARTIFACT --prompt "Hello"'
        )
    return sys.stdin


def _read_stdin() -> str:
    try:
        return stdin().read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: byte {error.start} is no UTF-8", hint="pipe UTF-8 text into it") from error


def _conversation(where: str, line: str) -> Prompt:
    hint = '{"messages": [{"role": "user", "content": "Hello"}]}'
    value = parse_json(line, where, hint)
    if isinstance(value, list):
        return Prompt(messages=value)
    if not isinstance(value, dict) or "messages" not in value:
        raise ConfigError(f"{where}: expected a list of messages or an object with messages", hint=hint)
    if unknown := sorted(set(value) - {"messages", "tools"}):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}", hint=hint)
    return Prompt(messages=value["messages"], tools=value.get("tools"))
