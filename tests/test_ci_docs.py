"""docs/ci.md and the workflow in docs/examples: what they name exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from doc_pages import blocks, check_line

from gemma4_export.configs.matrix import load_matrix

WORKFLOW = REPOSITORY / "docs" / "examples" / "engines.yml"
PAGE = REPOSITORY / "docs" / "ci.md"


def workflow() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))


def steps() -> list[dict[str, Any]]:
    return [step for job in workflow()["jobs"].values() for step in job["steps"]]


def command_lines() -> list[list[str]]:
    lines = [line for step in steps() for line in step.get("run", "").splitlines()]
    lines += [line for block in blocks("docs/ci.md") if block.language == "sh" for line in block.lines]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_every_target_variable_and_option_exists(words):
    check_line(shlex.join(words))


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
