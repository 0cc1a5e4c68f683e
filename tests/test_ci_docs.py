"""docs/ci.md and the workflow in docs/examples: what they name exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import click
import pytest
import typer
import yaml
from conftest import REPOSITORY

from gemma4_export.configs.matrix import load_matrix
from gemma4_export.exporter import commands as exporter_commands
from gemma4_export.runtime import commands as runtime_commands

WORKFLOW = REPOSITORY / "docs" / "examples" / "engines.yml"
PAGE = REPOSITORY / "docs" / "ci.md"
APPS = {"gemma4-export": exporter_commands.app, "gemma4-run": runtime_commands.app}


def workflow() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))


def steps() -> list[dict[str, Any]]:
    return [step for job in workflow()["jobs"].values() for step in job["steps"]]


def lines_of_page() -> Iterator[str]:
    for block in re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        yield from (line.partition("#")[0] for line in block.splitlines())


def command_lines() -> list[list[str]]:
    lines = [line for step in steps() for line in step.get("run", "").splitlines()]
    return [words for line in [*lines, *lines_of_page()] if (words := shlex.split(line))]


def makefile() -> tuple[set[str], set[str]]:
    """Its targets and the variables that it reads."""
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+):(?!=)", text, flags=re.M)), set(re.findall(r"\$\((\w+)\)", text))


def options_of(app: typer.Typer, command: str) -> set[str]:
    group = typer.main.get_command(app)
    context = click.Context(group)
    found = group.get_command(context, command)
    assert found is not None, command
    return {option for parameter in found.params for option in parameter.opts}


def check_make(words: list[str]) -> None:
    targets, variables = makefile()
    for word in words:
        name, is_variable, value = word.partition("=")
        if is_variable:
            assert name in variables, word
        else:
            assert word in targets or re.fullmatch(r"-j\d*", word), word
        if name == "FLAGS":
            check_options(exporter_commands.app, "matrix", shlex.split(value))


def check_options(app: typer.Typer, command: str, words: list[str]) -> None:
    used = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert used <= options_of(app, command)


def check(words: list[str]) -> None:
    program = words[0].rpartition("/")[2]
    if program == "make":
        check_make(words[1:])
    else:
        check_options(APPS[program], words[1], words[2:])


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_every_target_variable_and_option_exists(words):
    check(words)


@pytest.mark.parametrize(
    "line",
    [
        "make matrx",
        "make matrix OUTT=x",
        "make matrix FLAGS=--dry",
        "gemma4-run verify x --levels full",
        "gemma4-export matrxi",
    ],
)
def test_what_does_not_exist_would_be_noticed(line):
    with pytest.raises(AssertionError):
        check(shlex.split(line))


def test_the_workflow_builds_what_its_other_steps_take():
    jobs = workflow()["jobs"]
    assert all(job["runs-on"] and job["steps"] for job in jobs.values())
    assert all(("uses" in step) != ("run" in step) for step in steps())
    assert any("-j2 matrix" in step.get("run", "") for step in steps())
    built = {cell.name for cell in load_matrix(REPOSITORY / "configs" / "matrix.toml")}
    taken = set(re.findall(r"artifacts/([\w.-]+)", "\n".join(step.get("run", "") for step in steps())))
    assert taken
    assert taken <= built


def test_make_says_nothing_else_about_these_lines():
    """`make -n` takes each of the page's and the workflow's lines."""
    for words in command_lines():
        if words[0] == "make":
            done = subprocess.run([*words, "-n", "BIN=/there"], cwd=REPOSITORY, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "/there/gemma4-export matrix --out artifacts" in done.stdout


def test_the_matrix_on_the_page_is_one(tmp_path):
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = block.replace("../demo", str(REPOSITORY / "demo"))
    path = tmp_path / "matrix.toml"
    path.write_text(text, encoding="utf-8")
    assert [cell.name for cell in load_matrix(path)] == [
        *("e2b-cpu-int4", "e2b-rtx4090-int4"),
        *("mine-cpu-int8", "mine-cpu-int4"),
    ]


def test_the_page_lists_every_variable_of_both_targets():
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    between = text[text.index("OUT ?=") : text.index("test: ")]
    for name in re.findall(r"^(\w+) \?=", between, flags=re.M):
        assert f"`{name}`" in PAGE.read_text(encoding="utf-8"), name
