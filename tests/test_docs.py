"""Every page: what its code and its command lines say is what happens; ``pytest -rs`` prints why some are not run."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import artifacts
import pytest
from conftest import REPOSITORY
from doc_pages import Block, all_blocks, blocks, broken_links, check_line, inline_commands, pages, read
from written_pages import PAGES

from gemma4_export.configs.errors import ContractError
from gemma4_export.configs.target import load_target
from gemma4_export.runtime import Gemma4

STAND_IN = "gemma4-e2b-cpu"
"""Pages call an artifact so; here it is the demo's."""
SHELL = ("sh", "console")
LANGUAGES = (*SHELL, "python", "toml", "json", "text")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a newcomer has it after `make demo`: links to its files, an artifact, the commands in .venv."""
    root = tmp_path_factory.mktemp("docs")
    for path in REPOSITORY.iterdir():
        if path.name not in (".git", ".venv", "build", "artifacts"):
            (root / path.name).symlink_to(path)
    artifact = root / STAND_IN
    artifacts.build_artifact(REPOSITORY / "demo" / "checkpoints" / "tiny-e", artifact, recipe="bf16", context=2048)
    demo = root / "build" / "demo" / "gemma4-tiny-e-cpu"
    demo.parent.mkdir(parents=True)
    shutil.copytree(artifact, demo)  # `make demo` builds it anew
    (root / "questions.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "What is 12 + 30?"}], "answer": "42"}\n', encoding="utf-8"
    )
    folder = root / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, words in {
        "gemma4-export": f"{sys.executable} -m gemma4_export.exporter",
        "gemma4-run": f"{sys.executable} -m gemma4_export.runtime",
        "optimum-cli": f"{sys.executable} -m optimum.commands.optimum_cli",
        "python": sys.executable,
        "make": f"{shutil.which('make')} BIN={folder}",
    }.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    return root


def run_line(line: str, workspace: Path) -> None:
    environment = os.environ | {
        "PATH": f"{workspace / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(workspace)]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=workspace,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def command_lines() -> Iterator[Any]:
    for block in all_blocks(*SHELL):
        for line in block.lines:
            marks = [pytest.mark.full] if line.startswith(block.full) else []
            name = " ".join(shlex.split(line, comments=True))
            yield pytest.param(block, line, id=f"{block.place} {name}", marks=marks)


@pytest.mark.parametrize(("block", "line"), list(command_lines()))
def test_a_command_line_runs(block: Block, line: str, workspace: Path) -> None:
    check_line(line)
    if reason := block.reason(line):
        pytest.skip(f"{block.place}: {line.split('  #')[0].rstrip()}: {reason}")
    run_line(line, workspace)


@pytest.mark.parametrize("page", pages())
def test_commands_within_the_text_exist(page: str) -> None:
    for span in inline_commands(page):
        check_line(span.replace("…", ""), is_whole=False)


@pytest.mark.parametrize(
    "line",
    [
        "gemma4-run nonesuch x",
        "gemma4-run verify x --levels full",
        "gemma4-run verify x --level most",
        "gemma4-run verify x y",
        "gemma4-run verify --level full",
        "gemma4-export plan --model e2b",
        "make matrx",
        "make matrix OUTT=x",
        "make matrix FLAGS=--dry",
    ],
)
def test_a_line_with_what_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        check_line(line)


def test_a_line_that_fails_is_noticed(workspace: Path) -> None:
    with pytest.raises(AssertionError, match="nowhere: "):
        run_line("gemma4-run bench nowhere", workspace)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


@pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in all_blocks()])
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.place}: ```{block.language} is none of {LANGUAGES}"
    if block.language == "text":
        assert block.reason(), f"{block.place}: text is not run, so a line <!-- not run: REASON --> belongs before it"
        pytest.skip(f"{block.place}: {block.reason()}")
    for beginning in (*block.reasons, *block.full):
        assert not beginning or any(line.startswith(beginning) for line in block.lines), (block.place, beginning)


@pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in all_blocks("toml", "json")])
def test_data_parses(block: Block) -> None:
    if reason := block.reason():
        pytest.skip(f"{block.place}: {reason}")
    tomllib.loads(block.text) if block.language == "toml" else json.loads(block.text)


def test_every_fence_is_seen() -> None:
    for page in pages():
        assert len(re.findall(r"^ *```", read(page), re.MULTILINE)) == 2 * len(blocks(page)), page
        assert not re.search(r"\n\n {4,}\S", re.sub(r"^```.*?^```$", "", read(page), flags=re.S | re.M)), page


def test_the_notes_before_a_block_are_its_own() -> None:
    first, second = blocks(
        "x.md",
        "<!-- not run (a b): because -->\n<!-- full -->\n```sh\na b c  # d\n# e\nf\n```\n\n"
        "<!-- not run: of the other -->\n\n```console\n$ g\nh\n```\n",
    )
    assert (first.lines, second.lines) == (["a b c  # d", "f"], ["g"])
    assert (first.reason("a b c"), first.reason("f"), first.full) == ("because", None, ("",))
    assert (second.reason("g"), second.full) == (None, ())


# ---------------------------------------------------------------------------------------------------------------------
# Python: the blocks of a page run top to bottom, one after the other


def run_python(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the blocks of ``page`` that have no reason against it, and only what they import of the others."""
    for block in blocks(page):
        if block.language != "python":
            continue
        code = ast.parse(block.text, block.place)
        if block.reason():
            code.body = [node for node in code.body if isinstance(node, ast.Import | ast.ImportFrom)]
        with pytest.MonkeyPatch.context() as patch:
            if "stream.cancel" in block.text:
                slow_down(names["model"], patch)
            exec(compile(code, block.place, "exec"), names)
        if "reply" in names:
            names.setdefault("first_text", names["reply"].text)  # a later block asks something else
    return names


def slow_down(model: Gemma4, patch: pytest.MonkeyPatch) -> None:
    """The page's timer of 50 ms goes off long before the answer's 60 tokens and more are there, on any machine."""
    forward = model.decoder.forward

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.03)
        return forward(*arguments, **options)

    patch.setattr(model.decoder, "forward", slow)


PYTHON_PAGES = sorted({block.page for block in all_blocks("python")} - {"docs/embed.md"})


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_the_python_of_a_page_runs(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    run_python(page, {})
    reasons = [f"{block.place}: {block.reason()}" for block in blocks(page) if block.language == "python"]
    if told := [reason for reason in reasons if not reason.endswith(": None")]:
        pytest.skip("; ".join(told))


@pytest.fixture(scope="module")
def after(workspace: Path) -> dict[str, Any]:
    """The names that the code of docs/embed.md leaves behind."""
    return run_python("docs/embed.md", {"FOLDER": workspace / STAND_IN})


def test_going_on_computes_new_tokens_only(after: dict[str, Any]) -> None:
    assert after["first_text"] == "I am a tiny Gemma 4 model, made for a demo."
    usage = after["second"].usage
    assert 0 < usage.num_cached_tokens < usage.num_prompt_tokens


def test_streaming_takes_thought_and_text_apart(after: dict[str, Any]) -> None:
    assert after["text"] == after["reply"].text == "141992"
    assert after["thought"] == after["reply"].thought
    assert after["thought"].startswith("48213+93779")


def test_a_budget_shortens_the_thought(after: dict[str, Any]) -> None:
    assert 8 <= after["brief"].usage.num_thought_tokens <= 11
    assert after["reply"].usage.num_thought_tokens > 50


def test_cancelling_from_a_thread_ends_the_stream(after: dict[str, Any]) -> None:
    stopped = after["stopped"]
    assert stopped.finish_reason == "cancelled"
    assert len(stopped.ids) < len(after["reply"].ids)
    assert stopped.ids == after["reply"].ids[: len(stopped.ids)]


def test_the_tool_loop_uses_the_result(after: dict[str, Any]) -> None:
    assert after["answer"].text == "A bicycle costs 450."
    assert [message["role"] for message in after["messages"]] == ["user", "assistant", "tool"]


def test_errors_have_cause_and_hint(after: dict[str, Any]) -> None:
    assert re.fullmatch(
        r"the prompt has \d+ tokens, the context 2048, and the answer needs one at least", after["too_long"]
    )
    assert after["wrong"].startswith("temperature: expected a finite number of at least 0, found -1 (")


def test_a_closed_model_says_so(after: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match="the model is closed"):
        after["model"].generate([{"role": "user", "content": "Hello!"}])


# ---------------------------------------------------------------------------------------------------------------------
# What pages say about the repository


@pytest.mark.parametrize("path", PAGES)
def test_a_page_made_from_code_is_up_to_date(path: str) -> None:
    assert read(path) == PAGES[path](), f"{path} is stale: python tests/written_pages.py"


@pytest.mark.parametrize("page", pages())
def test_relative_links_lead_somewhere(page: str) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_noticed() -> None:
    text = (
        "[a](docs/ci.md) [b](docs/nonesuch.md) [c](docs/ci.md#nonesuch) [d](docs/ci.md#the-matrix) [e](https://x.org)"
    )
    assert broken_links("README.md", text) == ["docs/nonesuch.md", "docs/ci.md#nonesuch"]


def test_the_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", read("docs/README.md") + read("docs/measurements/README.md")))
    found = {path.name for path in (REPOSITORY / "docs").rglob("*.md")} - {"README.md"}
    assert {Path(link).name for link in linked} >= found


ROOMS = ("configs", "plugins", "exporter", "runtime", "demo", "tests", "docs", "src")


def named_paths(text: str) -> set[str]:
    """Paths into the rooms that stand between backticks; demo/.work is made by training and not committed."""
    spans = re.findall(r"`([^`\s]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))
    return {span for span in spans if span.startswith(tuple(f"{room}/" for room in ROOMS)) and "/.work" not in span}


@pytest.mark.parametrize("page", pages())
def test_files_that_a_page_names_exist(page: str) -> None:
    for path in named_paths(read(page)):
        pattern = re.sub(r"<\w+>|SIZE|NAME", "*", path)
        is_future = "<" in path and "/" in path  # a file to be added: its siblings are there
        assert list(REPOSITORY.glob(pattern)) or (is_future and list(REPOSITORY.glob(re.sub(r"<\w+>.*", "*", path)))), (
            page,
            path,
        )


def test_the_tree_of_the_readme_has_every_module() -> None:
    tree = read("README.md")
    named = [path.rstrip("/") for path in named_paths(tree[tree.index("| file |") : tree.index("## Install")])]
    covered = {file for path in named for file in REPOSITORY.glob(path)}
    modules = [
        path for room in ("configs", "plugins", "exporter", "runtime") for path in (REPOSITORY / room).rglob("*.py")
    ]
    missing = [
        path.relative_to(REPOSITORY).as_posix()
        for path in modules
        if path.name not in ("__init__.py", "__main__.py") and not covered & {path, *path.parents}
    ]
    assert missing == []


COMMAND = re.compile(r"`(make \w|python |gemma4-|sh |pytest |tests/)[^`]*`|```sh\n")


def tables_without_command(page: str, text: str) -> list[str]:
    """First rows of tables of numbers in whose section, or in the page's beginning, no command stands."""
    beginning, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    missing = []
    for section in [beginning, *sections]:
        for rows in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            cells = [cell.strip() for row in rows.splitlines()[2:] for cell in row.strip("|").split("|")[1:]]
            numeric = sum(bool(re.match(r"[*~]*[\d.–, ]*\d", cell)) for cell in cells)
            if numeric * 2 > len(cells) and not COMMAND.search(section) and not COMMAND.search(beginning):
                missing.append(f"{page}: {rows.splitlines()[0]}")
    return missing


@pytest.mark.parametrize("page", [page for page in pages() if page.startswith("docs/measurements/")])
def test_tables_of_numbers_name_their_command(page: str) -> None:
    assert tables_without_command(page, read(page)) == []


def test_a_table_without_a_command_is_noticed() -> None:
    bare, named = "| what | ms |\n|---|---|\n| x | 3 |\n", "`make measure`\n\n| y | s |\n|---|---|\n| z | 4 |\n"
    text = f"# A\n\n## B\n\n{bare}\n## C\n\n{named}"
    assert tables_without_command("x.md", text) == ["x.md: | what | ms |"]


def test_the_target_of_the_page_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (block,) = [block for block in blocks("docs/extending.md") if block.language == "toml"]
    shutil.copytree(REPOSITORY / "configs" / "targets", tmp_path / "targets")
    (tmp_path / "targets" / "rtx4070.toml").write_text(block.text, encoding="utf-8")
    monkeypatch.setattr("gemma4_export.configs.target._FOLDER", tmp_path / "targets")
    assert load_target("rtx4070").compute_capability == "8.9"
