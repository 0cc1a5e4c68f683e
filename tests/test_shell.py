"""Both command lines in a shell: completion, versions, how much is told, plain progress, exit codes, JSON."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import logging
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import artifacts
import pytest
import tiny
import typer

from gemma4_export import __version__
from gemma4_export.configs import command_line
from gemma4_export.configs.command_line import EXIT_CODES, set_verbosity
from gemma4_export.configs.models import model_names
from gemma4_export.configs.recipe import recipe_names
from gemma4_export.configs.target import target_names
from gemma4_export.exporter import commands as exporter_commands
from gemma4_export.exporter.commands.progress import BuildProgress
from gemma4_export.runtime import commands as runtime_commands
from gemma4_export.runtime.commands.screen import say

APPS = {"gemma4-export": exporter_commands, "gemma4-run": runtime_commands}
MODULES = {"gemma4-export": "gemma4_export.exporter.commands", "gemma4-run": "gemma4_export.runtime.commands"}
COMMANDS = [
    (name, command.name, command.callback)
    for name, module in APPS.items()
    for command in module.app.registered_commands
]


@pytest.fixture(autouse=True)
def _usual_verbosity() -> Iterator[None]:
    yield
    set_verbosity(logging.NOTSET)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of a command line."""
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with artifacts.traces(fresh=False), pytest.raises(SystemExit) as ended:
        APPS[str(words[0])].main()
    return (ended.value.code or 0, *capsys.readouterr())


@pytest.fixture(scope="module")
def folder() -> Path:
    return artifacts.artifact("31b", context=64, fresh_trace=False)


# ---------------------------------------------------------------------------------------------------------------------
# Completion


def program(tmp_path: Path, name: str) -> Path:
    """``name`` as pip would install it, whatever environment runs the tests."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nfrom {MODULES[name]} import main\nmain()\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def completed(tmp_path: Path, shell: str, line: str, word: str) -> str:
    """What a shell is told when ``line`` stands before the cursor and ends with ``word``."""
    name = line.split()[0]
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - (1 if word else 0))},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    environment = {**os.environ, **asked, variable: f"complete_{shell}"}
    ended = subprocess.run([program(tmp_path, name)], env=environment, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return ended.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "word", "expected"),
    [
        ("gemma4-export plan --target r", "r", ["rtx3090", "rtx4090", "rtx5090"]),
        ("gemma4-export build --model 26", "26", ["26b-a4b", "26b-a4b-base"]),
        ("gemma4-export build --recipe int4-", "int4-", ["int4-quality", "int4-rtn"]),
        ("gemma4-run be", "be", ["bench"]),
        ("gemma4-export build --verify ", "", ["off", "layers", "full"]),
    ],
)
def test_shells_complete_names_and_values(
    tmp_path: Path, shell: str, line: str, word: str, expected: list[str]
) -> None:
    answer = completed(tmp_path, shell, line, word)
    assert all(name in answer for name in expected)
    others = {*target_names(), *model_names(), *recipe_names(), "verify", "chat"} - set(expected)
    words = set(answer.replace('"', " ").replace("'", " ").replace(":", " ").split())
    assert not words & others


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash: its completion is not installed in one")
def test_bash_completes_after_installation(tmp_path: Path) -> None:
    path = program(tmp_path, "gemma4-export")
    environment = {
        **os.environ,
        **{"HOME": str(tmp_path), "PATH": f"{path.parent}:{os.environ['PATH']}"},
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    subprocess.run([path, "--install-completion", "bash"], env=environment, check=True, capture_output=True)
    script = """
source "$HOME/.bashrc"
COMP_WORDS=(gemma4-export plan --model e2b --target h); COMP_CWORD=5
$(complete -p gemma4-export | sed 's/.*-F \\([^ ]*\\).*/\\1/') gemma4-export
printf '%s\\n' "${COMPREPLY[@]}"
"""
    ended = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["h100", "h200"]


# ---------------------------------------------------------------------------------------------------------------------
# Versions


@pytest.mark.parametrize("name", APPS)
def test_version_names_what_matters_and_imports_nothing_heavy(name: str) -> None:
    code = (
        f"import sys\nsys.argv = ['{name}', '--version']\nfrom {MODULES[name]} import main\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line, heavy = ended.stdout.splitlines()
    assert line.startswith(f"{name} {__version__} (Python ")
    for package in ("numpy", "onnxruntime", "torch"):
        assert f", {package} {importlib.metadata.version(package)}" in line
    assert heavy == "[]"


def test_a_package_that_is_absent_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "_VERSIONS", ("numpy", "no-such-package-of-ours"))
    assert command_line.installed_versions() == {
        "gemma4-export": __version__,
        "numpy": importlib.metadata.version("numpy"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# How much is told


@pytest.mark.parametrize(("app", "name", "command"), COMMANDS, ids=[f"{app} {name}" for app, name, _ in COMMANDS])
def test_every_command_can_be_quiet_and_all_but_a_conversation_speak_json(app: str, name: str, command: object) -> None:
    parameters = inspect.signature(command).parameters  # type: ignore[arg-type]
    assert {"quiet", "verbose"} <= set(parameters)
    assert ("as_json" in parameters) == (name != "chat")


def test_quiet_leaves_results_and_no_progress(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = ("gemma4-run", "verify", shutil.copytree(folder, artifacts.scratch() / "quiet"), "--level", "layers")
    code, out, err = run(monkeypatch, capsys, *verify)
    assert (code, "layer" in err) == (0, True)
    assert not set(out + err) & set("\r\x1b")
    code, quiet_out, quiet_err = run(monkeypatch, capsys, *verify, "--quiet")
    assert (code, quiet_err) == (0, "")
    assert quiet_out.splitlines()[0] == out.splitlines()[0]


def test_a_build_tells_stages_in_plain_lines_or_nothing_and_ends_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny.checkpoint("31b")
    build = ("gemma4-export", "build", "--checkpoint", checkpoint, "--target", "cpu", "--context", 64)
    code, out, err = run(monkeypatch, capsys, *build, "--out", tmp_path / "a", "--json")
    assert code == 0
    values = json.loads(out)
    assert values["artifact"] == str(tmp_path / "a")
    assert (values["target"], values["recipe"], values["context"]) == ("cpu", "bf16", 64)
    assert (values["verified"], values["engines"]) == (True, [])
    listed = json.loads((tmp_path / "a/manifest.json").read_text(encoding="utf-8"))
    assert values["bytes"] == sum(entry["bytes"] for entry in listed["files"].values())
    assert values["census"] == listed["census"]
    assert not set(err) & set("\r\x1b")
    assert err.startswith("tracing the graph: ")
    code, out, err = run(monkeypatch, capsys, *build, "--out", tmp_path / "b", "--json", "--quiet", "--verify", "off")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert (values["verified"], values["verdict"]) == (None, None)


def test_quiet_and_verbose_contradict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(monkeypatch, capsys, "gemma4-run", "doctor", "--quiet", "--verbose")
    assert (code, out) == (2, "")
    assert err == "error: --quiet and --verbose contradict each other\nhint: leave one of them out\n"


def test_verbose_says_where_an_error_came_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_nowhere = ("gemma4-export", "inspect", "nowhere")
    code, _, err = run(monkeypatch, capsys, *inspect_nowhere, "--verbose")
    assert code == 1
    assert "gemma4_export: where this error came from:\nTraceback (most recent call last):\n" in err
    assert err.splitlines()[-2] == "error: nowhere: no such folder"
    code, _, err = run(monkeypatch, capsys, *inspect_nowhere)
    assert "Traceback" not in err


def test_modules_are_heard_at_their_level(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("gemma4_export.runtime.gemma4")
    heard = {}
    for level in (logging.WARNING, logging.INFO, logging.DEBUG):
        set_verbosity(level)
        log.debug("a step")
        say("progress")
        heard[level] = capsys.readouterr().err
    assert heard == {
        logging.WARNING: "",
        logging.INFO: "progress\n",
        logging.DEBUG: "gemma4_export.runtime.gemma4: a step\nprogress\n",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Terminals


def in_terminal(code: str, **environment: str) -> str:
    """What a program writes to stdout and stderr where both are a terminal."""
    parent, child = pty.openpty()
    values = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    values |= {"TERM": "xterm-256color", **environment}
    ended = subprocess.Popen([sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, env=values)
    os.close(child)
    written = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # EIO: the last writer is gone
            break
        if not piece:
            break
        written += piece
    os.close(parent)
    assert ended.wait() == 0
    return written.decode()


COLOURS = [f"\x1b[{number}m" for number in range(30, 38)] + ["\x1b[38", "\x1b[1;3", "\x1b[9"]
PROGRESS = """
from gemma4_export.exporter.commands.progress import BuildProgress
with BuildProgress() as progress:
    for done in range(3):
        progress("weights", "layers.0", done, 2)
"""


def has_colour(text: str) -> bool:
    return any(colour in text for colour in COLOURS)


def test_no_color_is_heeded_in_help_and_progress() -> None:
    help_code = (
        "import sys\nsys.argv = ['gemma4-run', '--help']\nfrom gemma4_export.runtime.commands import main\nmain()"
    )
    assert has_colour(in_terminal(help_code))
    assert not has_colour(in_terminal(help_code, NO_COLOR="1"))
    assert has_colour(in_terminal(PROGRESS))
    plain = in_terminal(PROGRESS, NO_COLOR="1")
    assert not has_colour(plain)
    assert "writing weights" in plain


def test_progress_on_a_terminal_is_silent_when_quiet() -> None:
    quiet = "from gemma4_export.configs.command_line import set_verbosity\nset_verbosity(30)"
    assert in_terminal(quiet + PROGRESS) == ""


def test_progress_elsewhere_is_a_plain_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with BuildProgress() as progress:
        for done in range(3):
            progress("package", "tokenizer", done, 2)
    assert capsys.readouterr().err == "packaging: 0.0 s\n"


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes


@pytest.mark.parametrize("name", APPS)
def test_help_lists_every_exit_code(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = run(monkeypatch, capsys, name, "--help")
    assert code == 0
    assert "Exit codes: " + "; ".join(f"{number} {meaning}" for number, meaning in EXIT_CODES.items()) in out


def test_exit_codes_are_what_the_help_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def code(*words: str) -> object:
        return run(monkeypatch, capsys, *words)[0]

    seen = {
        code("gemma4-run", "--version"),
        code("gemma4-run", "bench", "nowhere"),
        code("gemma4-export", "plan", "--model", "e2b", "--target", "nonesuch"),
        code("gemma4-run", "bench", "--no-such-option"),
    }
    assert seen == {0, 1, 2}

    def interrupted() -> None:
        raise KeyboardInterrupt

    app = typer.Typer()
    app.command()(interrupted)
    monkeypatch.setattr(sys, "argv", ["gemma4-run"])
    with pytest.raises(SystemExit) as ended:
        command_line.run(app)
    assert ended.value.code == 130
    assert {0, 1, 2, 130} <= set(EXIT_CODES)
