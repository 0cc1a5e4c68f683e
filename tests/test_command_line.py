"""How a command ends that cannot print, or is stopped before it began: an exit code and one line, never a traceback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import artifacts
import pytest
from conftest import REPOSITORY

from gemma4_export.runtime import bench
from gemma4_export.runtime.commands.bench import bench as bench_command

APPS = ("gemma4-run", "gemma4-export")


def command(app: str) -> list[str]:
    """What the installed script of this name does, as pyproject.toml has it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"][app].partition(":")
    return [sys.executable, "-c", f"import sys; from {module} import {function}; sys.exit({function}())"]


def run(app: str, arguments: str, *, to: str, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of a command line whose standard output a shell leads elsewhere."""
    line = f"{shlex.join(command(app))} {arguments} {to}"
    # PYTHONUNBUFFERED decides whether a write fails at once or when the process ends
    environment = {"PYTHONUNBUFFERED": "", **os.environ, **environment}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("app", APPS)
def test_output_that_cannot_be_written_is_an_error(app: str, unbuffered: str) -> None:
    full = "error: standard output: No space left on device\n"
    assert run(app, "--version", to=">/dev/full", PYTHONUNBUFFERED=unbuffered) == (1, full)
    assert run(app, "--version", to=">&-", PYTHONUNBUFFERED=unbuffered) == (1, "error: standard output: closed\n")
    assert run(app, "--version", to=">&- 2>&-", PYTHONUNBUFFERED=unbuffered) == (1, "")
    assert run(app, "--version", to=">/dev/null", PYTHONUNBUFFERED=unbuffered) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_error(unbuffered: str) -> None:
    folder = shlex.quote(str(artifacts.artifact("31b", context=64, fresh_trace=False)))
    to = "| true; exit ${PIPESTATUS[0]}"
    assert run("gemma4-export", f"inspect {folder}", to=to, PYTHONUNBUFFERED=unbuffered) == (1, "")


@pytest.mark.parametrize("options", ["", "--json"])
def test_an_answer_that_is_lost_is_an_error(options: str) -> None:
    folder = shlex.quote(str(artifacts.artifact("31b", context=64, fresh_trace=False)))
    line = f"generate {folder} --prompt hello --max-new-tokens 2 --hide-thoughts {options}"
    assert run("gemma4-run", line, to=">/dev/full") == (1, "error: standard output: No space left on device\n")


@pytest.mark.parametrize("library", ["numpy", "typer"])
@pytest.mark.parametrize("app", APPS)
def test_ctrl_c_while_libraries_are_imported_ends_quietly(app: str, library: str, tmp_path: Path) -> None:
    if (app, library) == ("gemma4-export", "numpy"):
        pytest.skip("it is imported when a build has begun, where Ctrl-C has a test of its own")
    # in place of the library, what a user types at that moment
    code = "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / f"{library}.py").write_text(code)
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    assert run(app, "--version", to="", PYTHONPATH=path) == (130, "")


def test_bench_says_what_it_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "plain_read", lambda: 1.0)
    folder = artifacts.artifact("31b", context=64, fresh_trace=False)
    bench_command(folder, prompt_tokens=2, new_tokens=1, repeats=1)
    assert capsys.readouterr().out.splitlines()[0] == "model     31b, fp32"
