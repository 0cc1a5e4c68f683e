"""Pytest plugin: which error messages did this run see? ``--every-message`` fails a run that left one unseen.

A message is a place in the package that makes one of the four error classes: a ``raise`` statement with a call in it,
or a bare construction such as ``return ConfigError(...)``. Each error made while tests run marks the places on its
stack, and its form is checked on the spot, which fails the test that made it. The workers of pytest-xdist hand what
they saw to the process that started them, which compares once all have ended. Processes that tests start are not
watched: their messages need a test that calls the same code.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from gemma4_export.configs import errors

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "plugins", "exporter", "runtime")
OURS = {kind.__name__ for kind in (errors.Gemma4Error, *errors.Gemma4Error.__subclasses__())}
# Made in one function, raised in another, which may be a few calls further out.
_DEPTH = 4
_PACKAGE = re.compile(r".*/gemma4_export/((?:" + "|".join(ROOMS) + r")/.*)")
# "{name}" in a finished message: an f-string that lost its f. JSON in a message has quotes.
_PLACEHOLDER = re.compile(r"\{[A-Za-z_][\w.]*(\[\w+\])?(![rsa])?(:[^{}'\"]*)?\}")

Place = tuple[str, int]
"""A file below the repository and the first line of the statement."""

_seen: set[Place] = set()


@cache
def places(file: str) -> dict[int, range]:
    """First line -> lines of every statement in ``file`` that makes one of our errors."""
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and _makes_error(node):
            found[node.lineno] = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return found


def _makes_error(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise) and isinstance(statement.exc, ast.Call):
        name = ast.unparse(statement.exc.func).rpartition(".")[2]
        # A helper such as damaged(...) makes one of ours; ValueError and typer.Exit are somebody else's.
        return name in OURS or not name.endswith(("Error", "Exit", "Exception"))
    calls = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
    return any(isinstance(func, ast.Name) and func.id in OURS for func in calls)


def all_places() -> Iterator[Place]:
    for room in ROOMS:
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            file = path.relative_to(REPOSITORY).as_posix()
            for line in places(file):
                yield file, line


def check_form(error: errors.Gemma4Error) -> None:
    """One line of cause, one of hint, nothing left unformatted; a contract's own words may do without a hint."""
    lines = [error.cause] if error.hint is None else [error.cause, error.hint]
    assert all(line.strip() and line.isprintable() for line in lines), f"not a line each: {lines}"
    assert not any(_PLACEHOLDER.search(line) for line in lines), f"an f-string that lost its f: {lines}"
    assert error.hint is not None or isinstance(error, errors.ContractError), f"no hint: {error.cause}"


def _mark() -> bool:
    """Mark the places on the stack of the error that is being made; whether the package, not a test, makes it."""
    frame: FrameType | None = sys._getframe(2)  # past this function and the constructor's wrapper
    is_ours = False
    for _ in range(_DEPTH):
        match = _PACKAGE.match(frame.f_code.co_filename) if frame else None
        if frame is None or match is None:
            break
        is_ours = True
        file, line = match[1], frame.f_lineno
        _seen.update((file, first) for first, lines in places(file).items() if line in lines)
        frame = frame.f_back
    return is_ours


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-message", action="store_true", help="fail when an error message was triggered by no test")


def pytest_configure(config: pytest.Config) -> None:
    original = errors.Gemma4Error.__init__

    def watched(self: errors.Gemma4Error, cause: str, *, hint: str | None = None) -> None:
        original(self, cause, hint=hint)
        if _mark():
            check_form(self)

    errors.Gemma4Error.__init__ = watched  # type: ignore[method-assign]
    config.add_cleanup(lambda: setattr(errors.Gemma4Error, "__init__", original))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist has ended."""
    _seen.update((file, line) for file, line in node.workeroutput.get("messages", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["messages"] = sorted(_seen)
    elif session.config.getoption("--every-message") and unseen() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def unseen() -> list[Place]:
    return [place for place in all_places() if place not in _seen]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--every-message") and (missing := unseen()):
        terminalreporter.section("error messages that no test triggers")
        for file, line in missing:
            terminalreporter.line(f"{file}:{line}: {source(file, line)}")


def source(file: str, line: int) -> str:
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()[line - 1 : line + 1]
    return " ".join(text.strip() for text in lines)
