"""Pages of documentation as what can be run: code blocks, command lines, and the reasons why some are not run."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from conftest import REPOSITORY
from written_pages import APPS, option_name

COMMANDS = (*APPS, "make")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOTE = re.compile(r"<!-- (?:full|not run)(?: \((?P<beginning>[^)]+)\))?(?:: (?P<reason>[^>]+?))? -->\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block of code. ``reasons``: beginning of a command line -> why it is not run; "" is the whole block.

    ``full``: beginnings of the lines that are run in the longer tier only.
    """

    page: str
    line: int
    language: str
    text: str
    reasons: dict[str, str]
    full: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def lines(self) -> list[str]:
        """Its command lines; of a ``console`` block those behind a dollar."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if shlex.split(line, comments=True)]

    def reason(self, line: str = "") -> str | None:
        """Why ``line``, or the block, is not run."""
        return next((reason for beginning, reason in self.reasons.items() if line.startswith(beginning)), None)


def pages() -> list[str]:
    """Paths of all pages, relative to the repository."""
    found = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "demo" / "README.md"]
    found += [REPOSITORY / "plugins" / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    return [path.relative_to(REPOSITORY).as_posix() for path in found]


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The blocks of a page in order; ``text`` in place of the page's own."""
    text = read(page) if text is None else text
    found = []
    for match in _FENCE.finditer(text):
        before = re.search(r"(?:<!--[^\n]*-->\n)*\Z", text[: match.start()])
        notes = list(_NOTE.finditer(before[0] if before else ""))
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start()) + 1,
                language=match[1],
                text=match[2],
                reasons={note["beginning"] or "": note["reason"] for note in notes if note["reason"]},
                full=tuple(note["beginning"] or "" for note in notes if not note["reason"]),
            )
        )
    return found


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in pages() for block in blocks(page) if not languages or block.language in languages]


def inline_commands(page: str) -> Iterator[str]:
    """Commands of ours in the running text, between backticks."""
    text = _FENCE.sub("", read(page))
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if span.startswith(tuple(f"{name} " for name in COMMANDS)):
            yield span


# ---------------------------------------------------------------------------------------------------------------------
# Do the command and each of its options exist?


def check_line(line: str, *, is_whole: bool = True) -> None:
    """Hold a command line to what exists; ``is_whole`` also asks for what the command requires.

    Raises:
        AssertionError: an unknown command, option, value, make target or variable, or something required is missing.
    """
    words = shlex.split(line, comments=True)
    program = words[0].rpartition("/")[2]
    if program == "make":
        check_make(words[1:])
    elif program in APPS:
        check_command(APPS[program], words[1:], is_whole=is_whole)


def check_command(app: typer.Typer, words: list[str], *, is_whole: bool) -> None:
    if words[0].startswith("-"):
        assert words[0] in ("--version", "--help", "--install-completion", "--show-completion"), words
        return
    commands = {command.name: command.callback for command in app.registered_commands}
    assert words[0] in commands, words
    parameters = inspect.signature(commands[words[0]], eval_str=True).parameters.values()  # type: ignore[arg-type]
    options: dict[str, Any] = {"--help": bool}
    arguments: list[Any] = []
    required: set[str] = set()
    for parameter in parameters:
        kind, info = get_args(parameter.annotation)
        if isinstance(info, typer.models.OptionInfo):
            options[option_name(parameter.name, info)] = kind
            required |= {option_name(parameter.name, info)} if parameter.default is parameter.empty else set()
        else:
            arguments.append(kind)
    given, positional = taken_apart(words[1:], options)
    if is_whole:
        assert required <= given, (words, required - given)
        assert positional or not arguments or words[0] == "doctor", (words, "an argument is missing")
    several = any(get_origin(kind) is list for kind in arguments)
    assert len(positional) <= len(arguments) or several, (words, positional)


def taken_apart(words: list[str], options: dict[str, Any]) -> tuple[set[str], list[str]]:
    """The options that are given and the arguments, up to a redirection or a pipe."""
    given: set[str] = set()
    positional: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("<", ">", "|", "&&"):
            break
        if not word.startswith("--"):
            positional.append(word)
            continue
        assert word in options, (words, word)
        given.add(word)
        kind = options[word]
        if kind is not bool:
            value = next(rest, None)
            choices = next((get_args(k) for k in (kind, *get_args(kind)) if get_origin(k) is Literal), ())
            assert value is None or not choices or value in choices or set(value.split("|")) <= set(choices), words
    return given, positional


def check_make(words: list[str]) -> None:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):(?!=)", text, flags=re.M))
    variables = set(re.findall(r"\$\((\w+)\)", text))
    for word in words:
        name, is_variable, value = word.strip("[]").partition("=")
        if is_variable:
            assert name in variables, word
        else:
            assert word in targets or re.fullmatch(r"-j[\dN]*", word), word
        if name == "FLAGS" and "…" not in value:
            check_command(APPS["gemma4-export"], ["matrix", *shlex.split(value)], is_whole=False)


# ---------------------------------------------------------------------------------------------------------------------
# Links


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str, text: str | None = None) -> list[str]:
    """Relative links of a page that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", read(page) if text is None else text)):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        name = Path(file).resolve().relative_to(REPOSITORY).as_posix() if file.exists() else ""
        if not name or (anchor and (not name.endswith(".md") or anchor not in anchors(name))):
            broken.append(target)
    return broken
