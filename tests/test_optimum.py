"""``optimum-cli export gemma4``: options, bytes and errors of ``gemma4-export build``, from a wheel and a checkout."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import artifacts
import pytest
import small
import tiny
import typer.main
from every_message import REPOSITORY

from gemma4_export.exporter import commands

pytest.importorskip("torch")
optimum_cli = pytest.importorskip("optimum.commands.optimum_cli")

from optimum.commands.export.base import ExportCommand  # noqa: E402

from gemma4_export.exporter import optimum_command  # noqa: E402
from gemma4_export.exporter.optimum_command import Gemma4Command  # noqa: E402

BUILD: Any = typer.main.get_command(commands.app).commands["build"]


# ---------------------------------------------------------------------------------------------------------------------
# In this process


def optimum(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of ``optimum-cli export gemma4``, from optimum's own entry point."""
    # Found by the installations below; a second checkout of ours on the path would be found twice.
    monkeypatch.setattr(optimum_cli, "load_optimum_namespace_cli_commands", lambda: [(Gemma4Command, ExportCommand)])
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "gemma4", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        optimum_cli.main()
    return int(ended.value.code or 0)


def test_the_options_are_those_of_build_with_their_words():
    parser = argparse.ArgumentParser()
    Gemma4Command.parse_args(parser)
    mine = {action.option_strings[0]: action for action in parser._actions if "--help" not in action.option_strings}
    assert set(mine) == {option.opts[0] for option in BUILD.params}
    assert {"--target", "--checkpoint", "--recipe", "--verify", "--json", "--quiet"} <= set(mine)
    for option in BUILD.params:
        # argparse knows no second spelling and no repeated option: build has none.
        assert len(option.opts) == 1
        assert (option.secondary_opts, option.multiple, option.nargs) == ([], False, 1)
        assert (mine[option.opts[0]].nargs == 0) == option.is_flag
        assert option.help in mine[option.opts[0]].help
    assert "--experts <plugin|builtin>" in parser.format_help()


def test_every_option_reaches_build_as_it_was_typed(monkeypatch):
    given: list[str] = []
    command = SimpleNamespace(params=BUILD.params, main=lambda args, prog_name: given.extend(args))
    parser = argparse.ArgumentParser()
    Gemma4Command.parse_args(parser)
    words = []
    for index, option in enumerate(BUILD.params):
        words += [option.opts[0]] if option.is_flag else [option.opts[0], f"value {index}"]
    monkeypatch.setattr(optimum_command, "_build_command", lambda: command)
    for typed in (words, words[:4], []):
        given.clear()
        arguments = parser.parse_args(typed)
        Gemma4Command(None, arguments, from_defaults_factory=True, parser=parser).run()
        assert given == typed


def test_the_bytes_are_those_of_build(monkeypatch, tmp_path):
    words = ["--checkpoint", tiny.checkpoint("12b"), "--target", "cpu", "--recipe", "int4", "--chunk", 7]
    with artifacts.traces(fresh=False):
        assert optimum(monkeypatch, *words, "--out", tmp_path / "a", "--verify", "layers") == 0
        monkeypatch.setattr(
            sys, "argv", ["gemma4-export", "build", *map(str, words), "--out", str(tmp_path / "b"), "--verify", "off"]
        )
        with pytest.raises(SystemExit) as ended:
            commands.main()
    assert not ended.value.code
    shutil.rmtree(tmp_path / "a" / "verify")  # what it found on this machine
    ours, theirs = small.files_of(tmp_path / "b"), small.files_of(tmp_path / "a")
    assert len(ours) > 12
    assert ours == theirs


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--target", "cpu"], 2, "error: give one of --checkpoint and --model\nhint: --checkpoint DIR, or --model e2b"),
        (["--target", "cpi", "--model", "e2b"], 2, "error: target 'cpi' is not known\nhint: did you mean 'cpu'?"),
        (["--model", "e2b"], 2, "Missing option '--target'"),
        (["--target", "cpu", "--weights", "dumy"], 2, "'dumy' is not one of 'model'"),
        (["--targ", "cpu"], 2, "unrecognized arguments: --targ cpu"),
        (["--target", "cpu", "--checkpoint", "/nowhere"], 2, "error: /nowhere: "),
    ],
)
def test_what_is_wrong_is_said_as_build_says_it(monkeypatch, capsys, words, code, message):
    assert optimum(monkeypatch, *words) == code
    assert message in capsys.readouterr().err


def test_another_optimum_is_refused_with_both_numbers(monkeypatch, capsys):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.1.0" if name == "optimum" else version(name))
    assert optimum(monkeypatch, "--target", "cpu", "--model", "e2b") == 2
    assert capsys.readouterr().err == (
        "error: optimum 3.1.0 is installed, optimum-cli export gemma4 works with 2.*\n"
        'hint: pip install "optimum==2.*", or use gemma4-export build, which takes the same options\n'
    )


def test_the_extra_asks_for_the_supported_version():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (wanted,) = (line for line in extras["optimum"] if line.startswith("optimum"))
    assert re.fullmatch(rf"optimum>={optimum_command.SUPPORTED}\.\d+,<{optimum_command.SUPPORTED + 1}", wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Installed


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would hand out of the package: building writes into the folder that it builds from."""
    folder = tmp_path_factory.mktemp("source")
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "lib")
    for name in ("configs", "plugins", "exporter", "runtime", "src"):
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture(scope="module")
def install(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes an environment with this package, ``wheel`` or ``editable``, and its dependencies; returns its bin."""

    def make(form: str, *, has_optimum: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = folder / "bin/python"
        (packages,) = (folder / "lib").glob("python*/site-packages")
        (links := folder / "links").mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            is_ours = "gemma4" in path.name or path.suffix == ".pth"
            if not is_ours and (has_optimum or not path.name.startswith("optimum")):
                (links / path.name).symlink_to(path)
        (packages / "links.pth").write_text(f"{links}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
        what = ["--editable", source] if form == "editable" else [source]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([*command, "--no-build-isolation", *what], check=True, env=environment, timeout=300)
        return python.parent

    return make


def run(folder: Path, *words: object, code: int = 0) -> str:
    """What a command in ``folder`` (an environment's bin) prints, run outside any checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [folder / str(words[0]), *map(str, words[1:])],
        capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=300,
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    return ended.stdout


CLI = "from optimum.commands.optimum_cli import main; main()"  # what the script optimum-cli holds


@pytest.mark.parametrize("form", ["wheel", pytest.param("editable", marks=pytest.mark.full)])
def test_optimum_finds_the_command(form, install):
    folder = install(form)
    where = run(folder, "python", "-c", "import gemma4_export; print(gemma4_export.__file__)")
    assert ("site-packages" in where) == (form == "wheel")
    listed = run(folder, "python", "-c", CLI, "export", "--help")
    assert "Export a Gemma 4 checkpoint as gemma4-export build does." in listed
    assert "--recipe <str>" in run(folder, "python", "-c", CLI, "export", "gemma4", "--help")


@pytest.fixture(scope="module")
def words() -> list[str]:
    return ["--checkpoint", str(tiny.checkpoint("e2b")), *"--target cpu --recipe int4 --verify off --out".split()]


@pytest.fixture(scope="module")
def built(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What ``gemma4-export build`` writes, in a process that starts as those of the installations do."""
    out = tmp_path_factory.mktemp("built") / "artifact"
    command = [sys.executable, "-m", "gemma4_export.exporter", "build", *words, str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return small.files_of(out)


@pytest.mark.full
@pytest.mark.parametrize("form", ["wheel", "editable"])
def test_installed_it_gives_the_bytes_of_build(form, install, words, built, tmp_path):
    run(install(form), "python", "-c", CLI, "export", "gemma4", *words, tmp_path / "artifact")
    assert len(built) > 12
    assert small.files_of(tmp_path / "artifact") == built


@pytest.mark.full
def test_without_optimum_its_folder_looks_like_none_of_its_parts(install):
    """The wheel puts a folder ``optimum`` beside other packages, which transformers takes for optimum itself.

    What it asks for next is not there, so it goes without as before: of the two questions below, training asks the
    second. Loading a GPTQ model fails for want of optimum.gptq, where it failed for want of optimum.
    """
    folder = install("wheel", has_optimum=False)
    code = "from transformers.utils import import_utils as have; import transformers.training_args; print({})"
    questions = "have.is_optimum_quanto_available(), have.is_optimum_neuron_available()"
    assert run(folder, "python", "-c", code.format(questions)).split() == ["False", "False"]
    assert run(folder, "gemma4-export", "--version").startswith("gemma4-export ")
    assert "--recipe" in run(folder, "gemma4-export", "build", "--help")
    run(folder, "python", "-c", CLI, code=1)
