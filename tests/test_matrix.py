"""A matrix of artifacts: its file is read strictly, its cells are keyed by content, and each ends whole or as it was.

Builds are stood in for by a copy of a finished artifact where only what surrounds them is tested; `test_make.py` has
real ones.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import artifacts
import pytest
import tiny
from hub_server import HubServer, only_hub

from gemma4_export.configs.errors import ArtifactError, CheckpointError, ConfigError
from gemma4_export.configs.manifest import LOCK_NAME
from gemma4_export.configs.matrix import DEFAULT_MATRIX, Cell, load_matrix, one_cell
from gemma4_export.configs.toml import line_of
from gemma4_export.exporter import cell_key, commands, hub, matrix
from gemma4_export.exporter.cell_folder import BOOKS, CellFolder
from gemma4_export.exporter.child import Verdict
from gemma4_export.exporter.dependencies import source_hashes
from gemma4_export.exporter.file_hashes import FileHashes
from gemma4_export.exporter.matrix import Builds, Result, exit_code, run_matrix
from gemma4_export.exporter.matrix_table import markdown_lines, text_lines
from gemma4_export.plugins import compile as compiler

# ---------------------------------------------------------------------------------------------------------------------
# The file


def write_matrix(folder: Path, text: str) -> Path:
    path = folder / "matrix.toml"
    path.write_text(text, encoding="utf-8")
    return path


HEAD = 'recipes = ["int4"]\n[targets.cpu]\n[targets.rtx4090]\nengines = "later"\n'


def test_cells_are_models_by_targets_by_recipes(tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.copy(DEFAULT_MATRIX.parent / "recipes" / "int8.toml", tmp_path / "own.toml")
    text = f"""{HEAD}
[models.e2b]
weights = "dummy"
[models.mine]
checkpoint = "mine"
context = 512
chunk = 64
targets = ["cpu"]
recipes = ["bf16", "own.toml"]
[models."someone/gemma-4-E2B-it-tuned"]
"""
    cells = load_matrix(write_matrix(tmp_path, text))
    assert [cell.name for cell in cells] == [
        *("e2b-cpu-int4", "e2b-rtx4090-int4"),
        *("mine-cpu-bf16", "mine-cpu-own"),
        *("gemma-4-E2B-it-tuned-cpu-int4", "gemma-4-E2B-it-tuned-rtx4090-int4"),
    ]
    assert [cell.engines for cell in cells[:2]] == [None, "later"]
    assert [cell.has_dummy_weights for cell in cells] == [True, True, False, False, False, False]
    mine = cells[3]
    assert (mine.context, mine.chunk, mine.checkpoint) == (512, 64, tmp_path / "mine")
    assert matrix._build_arguments(mine, Path("out")) == [
        *("--checkpoint", str(tmp_path / "mine"), "--target", "cpu", "--recipe", str(tmp_path / "own.toml")),
        *("--context", "512", "--chunk", "64", "--verify", "off", "--out", "out"),
    ]
    assert matrix._build_arguments(cells[1], Path("out")) == [
        *("--model", "e2b", "--target", "rtx4090", "--recipe", "int4", "--weights", "dummy", "--engines", "later"),
        *("--verify", "off", "--out", "out"),
    ]


def test_the_shipped_matrix_builds_what_lies_in_the_repository():
    cells = load_matrix(DEFAULT_MATRIX)
    assert len(cells) == 4
    assert all(cell.checkpoint is not None and (cell.checkpoint / "config.json").is_file() for cell in cells)


@pytest.mark.parametrize(
    ("text", "line", "cause", "hint"),
    [
        (f"{HEAD}\n[models.e2c]\n", 6, "model 'e2c' is not known", "did you mean 'e2b'?"),
        (f'{HEAD}[models.x]\ncheckpoint = "absent"\n', 5, "model x: no folder", "where the file lies"),
        (f"# rtx4091\n{HEAD}[targets.rtx4091]\n[models.e2b]\n", 6, "target 'rtx4091' is not", "'rtx4090'?"),
        (f'{HEAD}[targets.h200]\nengines = "latr"\n[models.e2b]\n', 6, "engines 'latr' is not known", "'later'?"),
        ('recipes = ["int4"]\n[targets.cpu]\nengines = "later"\n[models.e2b]\n', 2, "target cpu has none", "leave"),
        (
            'recipes = [\n  "int4",  # int5\n  "int5",\n]\n[targets.cpu]\n[models.e2b]\n',
            3,
            "recipe 'int5' is not known",
            "did you mean 'int8'?",
        ),
        (f'{HEAD}[models.e2b]\nrecipes = ["x.toml"]\n', 6, "not a readable TOML file", "--recipe int4"),
        (f'{HEAD}[models.e2b]\nrecipes = ["int4", 4]\n', 6, "expected a list of names, found ['int4', 4]", "recipes ="),
        ("[targets.cpu]\n[models.e2b]\n", None, "recipes: expected a list of names, found nothing", "recipes ="),
        (f'{HEAD}[models.e2b]\ntargets = ["l4"]\n', 6, "[targets.l4] is not in this file", "known: cpu, rtx4090"),
        (f'{HEAD}[models.e2b]\nchekpoint = "x"\n', 6, "unknown key 'chekpoint'", "did you mean 'checkpoint'?"),
        (f'{HEAD}[models.e2b]\nweights = "dumy"\n', 6, "weights 'dumy' is not known", "did you mean 'dummy'?"),
        (f'{HEAD}[models.e2b]\ncontext = "8k"\n', 6, "context: expected a number, found '8k'", "docs/ci.md"),
        (f"{HEAD}[models.e2b]\ncontext = true\n", 6, "context: expected a number, found True", "docs/ci.md"),
        (f"{HEAD}[models]\ne2b = 1\n", 6, "e2b: expected a table, found 1", "docs/ci.md"),
        (f"{HEAD}[models]\n", 5, "models: nothing in it", "add a line [models.e2b]"),
        (HEAD, None, "no models in this file", "add a line [models.e2b]"),
        ('recipes = ["int4"]\n[models.e2b]\n', None, "no targets in this file", "add a line [targets.cpu]"),
        (f'{HEAD}[models."a/b"]\nweights = "dummy"\n', 5, "drawn for released sizes only, not a/b", "take e2b"),
        (f'{HEAD}[models.x]\nweights = "dummy"\ncheckpoint = "."\n', 5, "a checkpoint and dummy weights", "leave one"),
        (f'{HEAD}[models."a/x"]\n[models."b/x"]\n', 6, "two artifacts would be called x-cpu-int4", "rename"),
        (f"{HEAD}[models.e2b\n", None, "not a readable TOML file (Expected ']' at the end of a table", "docs/ci.md"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(tmp_path, text, line, cause, hint):
    path = write_matrix(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load_matrix(path)
    assert refused.value.cause.startswith(f"{path}: " if line is None else f"{path}:{line}: ")
    assert cause in refused.value.cause
    assert hint in (refused.value.hint or "")


def test_the_line_of_a_value_is_the_one_that_spells_it():
    text = '# b\na = "b"  # b\nb = ["a",\n "b"]\n[t.b]\nc = 1\n'
    assert line_of(text, ("a",)) == 2
    assert line_of(text, ("b", 0)) == 3
    assert line_of(text, ("b", 1)) == 4
    assert line_of(text, ("t", "b")) == 5
    assert line_of(text, ("t", "b", "c")) == 6
    assert line_of(text, ("absent",)) is None
    assert line_of('a = "\\u0062"\n', ("a",)) is None  # spelt otherwise than it reads


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def cell(**changes: Any) -> Cell:
    chosen = {"model": "e2b", "target": "cpu", "recipe": "int4", "checkpoint": None, "has_dummy_weights": True}
    return one_cell(**chosen | {"context": None, "chunk": None, "engines": None} | changes)


def inputs(of: Cell, tmp_path: Path) -> cell_key.Inputs:
    return cell_key.inputs_of(of, FileHashes(tmp_path / "hashes.json"))


def test_inputs_that_differ_are_named(tmp_path):
    before = inputs(cell(), tmp_path)
    assert cell_key.changes(before, inputs(cell(), tmp_path)) == ""
    assert cell_key.changes(before, inputs(cell(context=99), tmp_path)) == "options"
    assert cell_key.changes(before, inputs(cell(recipe="int8"), tmp_path)) == "recipe int4, recipe int8"
    other = inputs(cell(target="rtx4090", engines="later"), tmp_path)
    assert cell_key.changes(before, other).endswith("more")
    assert cell_key.key_of(before) != cell_key.key_of(other)


def test_a_cell_depends_on_the_code_that_makes_it_and_on_no_other(tmp_path):
    cpu, gpu = inputs(cell(), tmp_path), inputs(cell(target="rtx4090", engines="later"), tmp_path)
    checkpoint = inputs(cell(checkpoint=tiny.checkpoint("31b"), has_dummy_weights=False), tmp_path)
    code = {name for made in (cpu, gpu, checkpoint) for name in made if name.endswith((".py", ".jinja"))}
    on = {
        name: "".join(letter for letter, made in zip("cgk", (cpu, gpu, checkpoint), strict=True) if name in made)
        for name in code
    }
    expected = {
        "exporter/quantize.py": "cgk",
        "exporter/build.py": "cgk",
        "plugins/moe/torch_op.py": "cgk",
        "configs/names.py": "cgk",
        "exporter/lower.py": "ck",
        "exporter/passes/lower_linear.py": "ck",
        "exporter/verify_graphs.py": "ck",
        "exporter/lower_tensorrt.py": "g",
        "exporter/passes/trt_linear.py": "g",
        "exporter/dummy.py": "cg",
        "exporter/small_chat_template.jinja": "cg",
        "exporter/checkpoint.py": "k",
    }
    assert {name: on.get(name) for name in expected} == expected
    assert not code & {"exporter/hub.py", "exporter/plan.py", "exporter/matrix.py", "exporter/commands/build.py"}
    assert not any(name.startswith("runtime/sampling") for name in code)


def test_engines_with_our_kernels_depend_on_their_sources_and_nothing_else_does(tmp_path):
    """The kernels of routed experts are in the engines of models that have them, where these are compiled here."""

    def kernels(**changes: Any) -> set[str]:
        return {name for name in inputs(cell(**changes), tmp_path) if name.endswith((".cu", ".cuh", ".cpp", ".h"))}

    found = kernels(model="26b-a4b", target="rtx4090")
    assert {"plugins/moe/kernel_cuda.cu", "plugins/moe/kernel_common.cuh", "plugins/common/tensorrt_plugin.h"} <= found
    assert not any("driver" in name for name in found)  # no part of the library
    moe = {"model": None, "checkpoint": tiny.checkpoint("26b-a4b"), "has_dummy_weights": False}
    assert kernels(**moe, target="rtx4090") == found
    compiled, later = (set(inputs(cell(target="rtx4090", engines=engines), tmp_path)) for engines in (None, "later"))
    assert later < compiled
    assert {"runtime/engine/build.py", "version of onnxruntime-ep-nv-tensorrt-rtx-cu13"} <= compiled - later
    assert not {name for name in compiled if re.match(r"runtime/(?!engine/|__init__|memory|checks)", name)}
    assert kernels(**moe, target="rtx4090", engines="later") == kernels(**moe) == kernels(target="rtx4090") == set()


def test_what_the_library_of_plugins_includes_is_among_its_sources():
    sources = {path.name for path in compiler.library_sources()}
    for path in compiler.library_sources():
        included = re.findall(r'^#include "(?:[\w./]*/)?([\w.]+)"', path.read_text(encoding="utf-8"), flags=re.M)
        assert set(included) <= sources, path


def test_the_library_of_plugins_is_compiled_when_its_sources_changed(tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho run >>"$0.log"\nfor last; do :; done\necho library >"$last"\n', encoding="utf-8")
    nvcc.chmod(0o755)
    source = tmp_path / "kernel.cu"
    source.write_text("one", encoding="utf-8")
    monkeypatch.setattr(compiler, "LIBRARY", tmp_path / "lib" / "plugins.so")
    monkeypatch.setattr(compiler, "find_nvcc", lambda: (nvcc, tmp_path))
    monkeypatch.setattr(compiler, "library_sources", lambda: [source])

    def runs() -> int:
        compiler.ensure_library(lambda line: None)
        return len((tmp_path / "nvcc.log").read_text(encoding="utf-8").splitlines())

    assert runs() == 1
    assert runs() == 1
    source.write_text("two", encoding="utf-8")
    assert runs() == 2
    compiler.LIBRARY.unlink()
    assert runs() == 3
    nvcc.write_text('#!/bin/sh\necho run >>"$0.log"\nexit 1\n', encoding="utf-8")
    source.write_text("three", encoding="utf-8")
    with pytest.raises(ArtifactError, match="does not compile the plugins"):
        runs()
    source.write_text("two", encoding="utf-8")  # the library of these is there, but nvcc may have written into it
    with pytest.raises(ArtifactError, match="does not compile the plugins"):
        runs()


@pytest.mark.parametrize("module", [*cell_key._OF_CPU, *cell_key._OF_ENGINES, *cell_key._OF_DOWNLOADS])
def test_what_cells_leave_out_is_a_module_that_builds_reach(module):
    """Else a module that was renamed would quietly be an input of every cell."""
    assert f"{module.replace('.', '/')}.py" in source_hashes(["exporter.requested"], without=())


def test_a_checkpoint_is_its_content_whatever_its_times(tmp_path):
    folder = shutil.copytree(tiny.checkpoint("31b"), tmp_path / "checkpoint")
    of = cell(checkpoint=folder, has_dummy_weights=False)
    before = inputs(of, tmp_path)
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    (folder / "README.md").write_text("no input", encoding="utf-8")
    assert inputs(of, tmp_path) == before
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(1, 1))
    assert cell_key.changes(before, inputs(of, tmp_path)) == "checkpoint model.safetensors"


def test_a_remembered_hash_is_not_read_again_and_not_trusted_after_a_change(tmp_path, monkeypatch):
    from gemma4_export.exporter import file_hashes

    path, memory = tmp_path / "weights", tmp_path / "hashes.json"
    path.write_bytes(b"one")
    read: list[Path] = []
    original = file_hashes.file_hash
    monkeypatch.setattr(file_hashes, "file_hash", lambda file: read.append(file) or original(file))
    hashes = FileHashes(memory)
    first = hashes.hash_of(path)
    assert hashes.hash_of(path) == first
    assert len(read) == 2  # changed just now: its clock may not have moved on since
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", -1)
    assert hashes.hash_of(path) == first
    hashes.save()
    assert FileHashes(memory).hash_of(path) == first
    assert len(read) == 3
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert FileHashes(memory).hash_of(path) != first
    for damaged in ("{", "[]", '{"a": 1}'):
        memory.write_text(damaged, encoding="utf-8")
        assert FileHashes(memory).hash_of(path) != first


def test_a_model_of_the_hub_is_its_commit(tmp_path, monkeypatch):
    hub_id = "someone/tuned"
    of = cell(model=hub_id, has_dummy_weights=False)
    with HubServer(hub_id, {"config.json": b"{}"}) as server, only_hub(server, tmp_path):
        before = inputs(of, tmp_path)
        assert cell_key.changes(before, inputs(of, tmp_path)) == ""
        server.publish({"config.json": b"{ }"})
        assert cell_key.changes(before, inputs(of, tmp_path)) == f"commit of {hub_id}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="holds nothing of its revision main"):
            hub.current_commit("someone/else")


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of a cell


@pytest.fixture
def built_with(monkeypatch) -> list[Sequence[str]]:
    """Builds copy a finished artifact and say what they were told."""
    told: list[Sequence[str]] = []
    made = artifacts.artifact("31b", context=64, fresh_trace=False)

    def run(self: Builds, arguments: Sequence[str], log: Path, *, held: int) -> int:
        told.append(arguments)
        log.write_text("built\n", encoding="utf-8")
        shutil.copytree(made, arguments[arguments.index("--out") + 1])
        return 0

    monkeypatch.setattr(Builds, "run", run)
    monkeypatch.setattr(matrix, "verify_in_child", lambda folder, level: Verdict(True, "passed: all", ""))
    return told


def run(cells: Sequence[Cell], out: Path, **options: Any) -> list[Result]:
    return run_matrix(cells, out, **{"verify": "layers", "jobs": 1, "say": lambda line: None} | options)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> inode and time of the last change: what rewriting a file would change."""
    found = {path: path.lstat() for path in sorted(folder.rglob("*"))}
    return {path.relative_to(folder).as_posix(): (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def test_a_cell_is_built_once(tmp_path, built_with):
    (first,) = run([cell()], tmp_path)
    assert (first.state, first.reason, first.verified) == ("built", "new", "layers: passed: all")
    assert first.bytes == sum(file.stat().st_size for file in payload(tmp_path / "e2b-cpu-int4"))
    before = tree(tmp_path)
    (second,) = run([cell()], tmp_path)
    assert second.state == "up to date"
    assert (second.bytes, second.verified, second.key) == (first.bytes, first.verified, first.key)
    assert tree(tmp_path) == before
    assert len(built_with) == 1


def payload(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]


def test_a_change_replaces_the_artifact_and_leaves_nothing_behind(tmp_path, built_with):
    run([cell()], tmp_path)
    (again,) = run([cell(context=64)], tmp_path)
    assert (again.state, again.reason) == ("built", "changed: options")
    books = tmp_path / BOOKS / "e2b-cpu-int4"
    assert sorted(file.name for file in books.iterdir()) == ["build.log", "built.json", "lock"]
    assert [folder.name for folder in tmp_path.iterdir() if folder.name != BOOKS] == ["e2b-cpu-int4"]


def truncate(folder: Path) -> None:
    os.truncate(folder / "graphs" / "weights" / "decoder.bin", 5)


def replace_by_another(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(artifacts.artifact("31b", context=64, recipe="int4", fresh_trace=False), folder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "damaged: .*no manifest.json in it"),
        (truncate, "damaged: .*decoder.bin: expected .* bytes, found 5"),
        (shutil.rmtree, "damaged: it is gone"),
        (replace_by_another, "damaged: it is not the one that was built"),
    ],
)
def test_a_damaged_artifact_is_built_again(tmp_path, built_with, damage: Callable[[Path], None], reason):
    run([cell()], tmp_path)
    damage(tmp_path / "e2b-cpu-int4")
    (again,) = run([cell()], tmp_path)
    assert again.state == "built"
    assert re.match(reason, again.reason)
    assert run([cell()], tmp_path)[0].state == "up to date"


def test_engines_that_were_added_later_are_kept(tmp_path, built_with):
    run([cell()], tmp_path)
    engines = tmp_path / "e2b-cpu-int4" / "engines"
    engines.mkdir()
    assert run([cell()], tmp_path)[0].state == "up to date"
    assert engines.is_dir()


def test_what_no_matrix_built_is_not_replaced(tmp_path, built_with):
    mine = tmp_path / "e2b-cpu-int4"
    mine.mkdir()
    (refused,) = run([cell()], tmp_path)
    assert (refused.state, built_with) == ("failed", [])
    assert refused.reason == f"{mine}: exists, and no matrix built it"
    assert refused.hint == f"give another --out, or remove it: rm -r {mine}"


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_kill_while_an_artifact_gets_its_place_is_mended(tmp_path, built_with, monkeypatch, step):
    """The steps: the notes are written, the old artifact leaves, the new one comes."""
    run([cell()], tmp_path)
    steps: list[Path] = []
    rename, replace = Path.rename, Path.replace

    def counting(original: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def move(self: Path, to: Path) -> Path:
            if to.name in ("built.json", "old") or to.parent == tmp_path:
                steps.append(to)
                if len(steps) == step:
                    raise KeyboardInterrupt
            return original(self, to)

        return move

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counting(rename))
        patch.setattr(Path, "replace", counting(replace))
        with pytest.raises(KeyboardInterrupt):
            run([cell(context=64)], tmp_path)
    (mended,) = run([cell(context=64)], tmp_path)
    assert mended.state == "built"
    assert mended.reason.startswith("interrupted before")
    assert len(built_with) == 2  # the finished artifact was taken, not built again
    assert run([cell(context=64)], tmp_path)[0].state == "up to date"


def test_an_artifact_that_fails_verification_does_not_get_its_place(tmp_path, built_with, monkeypatch):
    run([cell()], tmp_path)
    before = tree(tmp_path / "e2b-cpu-int4")
    monkeypatch.setattr(matrix, "verify_in_child", lambda folder, level: Verdict(False, "failed: layer 3", ""))
    (failed,) = run([cell(context=64)], tmp_path)
    assert (failed.state, failed.reason) == ("failed", "built, not verified: failed: layer 3")
    assert failed.hint == f"gemma4-run verify {tmp_path / BOOKS / 'e2b-cpu-int4' / failed.key}"
    assert tree(tmp_path / "e2b-cpu-int4") == before
    monkeypatch.setattr(matrix, "verify_in_child", lambda *args: Verdict(False, None, "error: no memory\nhint: more\n"))
    assert run([cell(context=64)], tmp_path)[0].reason == "built, not verified: no memory"
    unsaved = Verdict(False, "passed: all", "error: verify/cpu.json: No space left on device\n")
    monkeypatch.setattr(matrix, "verify_in_child", lambda *args: unsaved)
    assert run([cell(context=64)], tmp_path)[0].reason.endswith("verified: verify/cpu.json: No space left on device")
    (unverified,) = run([cell(context=64)], tmp_path, verify=None)
    assert (unverified.state, unverified.verified) == ("built", "no: verification is off")
    assert len(built_with) == 2


def test_hashes_that_cannot_be_saved_cost_no_result(tmp_path, built_with, monkeypatch):
    def full(self: FileHashes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "hashes.json")

    monkeypatch.setattr(FileHashes, "save", full)
    told: list[str] = []
    assert run([cell()], tmp_path, say=told.append)[0].state == "built"
    assert told[-1].startswith("hashes are not remembered, ")
    assert told[-1].endswith("No space left on device: 'hashes.json'")


def test_inputs_that_change_during_a_build_do_not_pass_for_its_inputs(tmp_path, built_with, monkeypatch):
    keys = iter([{"a": "1"}, {"a": "2"}, {"a": "2"}, {"a": "2"}])
    monkeypatch.setattr(matrix, "inputs_of", lambda *args: next(keys))
    (late,) = run([cell()], tmp_path)
    assert (late.state, late.reason, late.hint) == ("failed", "changed during the build: a", "run it again")
    assert run([cell()], tmp_path)[0].state == "built"
    assert len(built_with) == 2


def test_a_second_run_waits_for_the_first(tmp_path, built_with, monkeypatch):
    original, has_begun, may_end = Builds.run, threading.Event(), threading.Event()

    def slow(self: Builds, arguments: Sequence[str], log: Path, *, held: int) -> int:
        has_begun.set()
        assert may_end.wait(30)
        return original(self, arguments, log, held=held)

    monkeypatch.setattr(Builds, "run", slow)
    said: list[str] = []
    results: dict[str, Result] = {}

    def work(name: str) -> None:
        def say(line: str) -> None:
            said.append(line)
            if line.endswith("waiting for another run"):
                may_end.set()

        (results[name],) = run([cell()], tmp_path, say=say)

    first = threading.Thread(target=work, args=("first",))
    first.start()
    assert has_begun.wait(30)
    second = threading.Thread(target=work, args=("second",))
    second.start()
    for thread in (first, second):
        thread.join(30)
    assert {name: result.state for name, result in results.items()} == {"first": "built", "second": "up to date"}
    assert "e2b-cpu-int4: waiting for another run" in said
    assert len(built_with) == 1


def test_what_cannot_fit_is_left_out_and_the_rest_is_built(tmp_path, built_with):
    large = cell(model="31b", target="rtx4090", recipe="bf16", engines="later")
    skipped, built = run([large, cell()], tmp_path)
    assert (skipped.state, built.state) == ("skipped", "built")
    assert skipped.reason.startswith("31b as bf16 with 262144 tokens needs ")
    assert skipped.reason.endswith("rtx4090 has 25.8 GB")
    assert "fits" in skipped.hint
    assert len(built_with) == 1
    small = cell(checkpoint=tiny.checkpoint("31b"), has_dummy_weights=False, target="rtx4090", engines="later")
    (fits,) = run([small], tmp_path)
    assert (fits.state, fits.verified) == ("built", "layers: passed: all")
    (no_products,) = run([cell(recipe="fp8")], tmp_path)
    assert (no_products.state, no_products.hint) == ("skipped", "--recipe int8 takes as many bytes")


def test_a_build_that_fails_says_why_and_the_rest_is_built(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}", encoding="utf-8")
    of = cell(model=None, checkpoint=broken, has_dummy_weights=False)
    (failed,) = run([of], tmp_path / "out")  # a real build
    assert failed.state == "failed"
    assert "model_type" in failed.reason
    assert failed.hint
    monkeypatch.setattr(Builds, "run", lambda self, arguments, log, held: log.write_bytes(b"") or -signal.SIGKILL)
    (killed,) = run([of], tmp_path / "out")
    log = tmp_path / "out" / BOOKS / "broken-cpu-int4" / "build.log"
    assert (killed.reason, killed.hint) == ("the build ended with killed by signal 9", f"its words are in {log}")
    (tmp_path / "file").write_text("", encoding="utf-8")
    (nowhere,) = run([of], tmp_path / "file" / "out")
    assert nowhere.state == "failed"
    assert "Not a directory" in nowhere.reason


def test_an_interrupt_ends_builds_and_starts_no_more(tmp_path):
    builds = Builds()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    builds._running.add(sleeper)
    started = time.monotonic()
    builds.stop()
    assert sleeper.wait(30) == -signal.SIGTERM
    assert time.monotonic() - started < 30
    with pytest.raises(matrix._CellEndError, match="interrupted"):
        builds.run([], tmp_path / "log", held=0)


# ---------------------------------------------------------------------------------------------------------------------
# What is shown

RESULTS = [
    Result(cell="a", model="m", target="cpu", recipe="r", state="built", folder="o/a", bytes=1_500_000, seconds=2.5),
    Result(cell="b", model="m", target="l4", recipe="r", state="skipped", folder="o/b", reason="a|b", hint="less"),
]


def test_the_tables():
    assert text_lines(RESULTS) == [
        "cell  state    MB   seconds  verified  reason",
        "a     built    1.5  2.5",
        "b     skipped                          a|b",
        "hint for b: less",
        "2 artifacts: 1 built, 1 skipped",
    ]
    assert markdown_lines(RESULTS) == [
        "### Artifacts",
        "",
        "| cell | state | MB | seconds | verified | reason |",
        "|---|---|---|---|---|---|",
        "| a | built | 1.5 | 2.5 |  |  |",
        "| b | skipped |  |  |  | a\\|b; less |",
        "",
        "2 artifacts: 1 built, 1 skipped",
    ]


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["built", "up to date"], 0),
        (["to build"], 0),
        (["built", "skipped"], 3),
        (["skipped", "failed"], 1),
        ([], 0),
    ],
)
def test_exit_codes(states, code):
    results = [Result(cell="a", model="", target="", recipe="", folder="", state=state) for state in states]
    assert exit_code(results) == code


Command = Callable[[str], tuple[int, str]]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys) -> Command:
    """`gemma4-export matrix` with these words in an empty folder: exit code and stdout."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def call(words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gemma4-export", "matrix", *words.split()])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        code = ended.value.code
        return code if isinstance(code, int) else 0, capsys.readouterr().out

    yield call
    signal.signal(signal.SIGTERM, handler)


def test_the_command_and_its_summary(command, built_with, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code, shown = command("--model e2b --weights dummy --target cpu --recipe int4")
    assert code == 0
    assert shown.splitlines()[-1] == "1 artifact: 1 built"
    assert (tmp_path / "artifacts" / "e2b-cpu-int4" / "manifest.json").is_file()
    assert summary.read_text(encoding="utf-8").startswith("before\n### Artifacts\n")
    write_matrix(tmp_path, f'{HEAD}[models.31b]\nweights = "dummy"\nrecipes = ["bf16"]\n')
    code, shown = command("--matrix matrix.toml --json --verify off")
    told = json.loads(shown)
    assert code == told["exit_code"] == 3
    assert {one["cell"]: one["state"] for one in told["cells"]} == {
        "31b-cpu-bf16": "built",
        "31b-rtx4090-bf16": "skipped",
    }
    code, shown = command("--dry-run")
    assert code == 0
    assert shown.count("to build") == 5  # four cells of the shipped matrix, and the count
    assert len(built_with) == 2


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("--model e2b", "--model and --checkpoint are of one artifact, which needs --target"),
        ("--target cpu", "neither a model nor a checkpoint is given"),
        ("--target cpu --model e2b --matrix x.toml", "--matrix and --target exclude each other"),
        ("--target cpu --model e2b --engines later", "engines 'later': target cpu has none"),
        ("--matrix x.toml", "x.toml: not a readable TOML file"),
    ],
)
def test_misuse_of_the_command(tmp_path, monkeypatch, capsys, words, cause):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gemma4-export", "matrix", *words.split()])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {cause}")
    assert "\nhint: " in shown.err
    assert not list(tmp_path.iterdir())


def test_a_runner_that_is_told_to_end_takes_its_builds_with_it(tmp_path):
    """SIGTERM, as CI sends it: no build goes on without anybody who waits for it."""
    out = tmp_path / "out"
    line = ["--model", "e2b", "--weights", "dummy", "--target", "cpu", "--recipe", "int4", "--out", str(out)]
    runner = subprocess.Popen([sys.executable, "-m", "gemma4_export.exporter", "matrix", *line])
    try:
        books = out / BOOKS / "e2b-cpu-int4"
        wait_for(lambda: list(books.glob("*.partial")))
        runner.terminate()
        assert runner.wait(60) == 128 + signal.SIGTERM
        (work,) = books.glob("*.partial")
        # its build is gone: nobody holds the work folder's lock
        with (work / LOCK_NAME).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        runner.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_runner_that_waits_for_another_can_be_ended(tmp_path, number):
    line = ["--model", "e2b", "--weights", "dummy", "--target", "cpu", "--recipe", "int4", "--out", str(tmp_path)]
    books = tmp_path / BOOKS / "e2b-cpu-int4"
    books.mkdir(parents=True)
    with (books / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "gemma4_export.exporter", "matrix", *line]
        runner = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert runner.stderr is not None
        assert runner.stderr.readline() == "e2b-cpu-int4: waiting for another run\n"
        runner.send_signal(number)
        _, words = runner.communicate(timeout=30)
        assert runner.returncode not in (0, -signal.SIGKILL)
        assert "Traceback" not in words


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("model", "recipe", "rest", "line", "cause"),
    [
        ("e2b", "a\\u0000.toml", "", None, "a name has printable characters"),
        ("a\\u001bb", "int4", "", None, "no name for a folder"),
        ("a" * 300, "int4", "", 3, "no name for a folder"),
        ("e2b", "int4", "context = -5", 4, "context: expected 1 token or more, found -5"),
    ],
)
def test_names_that_no_folder_has_and_lengths_below_one_are_refused_by_line(tmp_path, model, recipe, rest, line, cause):
    path = tmp_path / "matrix.toml"
    text = f'# one cell\nrecipes = ["{recipe}"]\n[models."{model}"]\n{rest}\n[targets.cpu]\n'
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=cause) as caught:
        load_matrix(path)
    where = "matrix.toml:" if line is None else f"matrix.toml:{line}:"  # a name in escapes is not found in the text
    assert where in str(caught.value)


@pytest.mark.parametrize("name", ["inputs", "files_sha256", "bytes", "seconds", "verified"])
def test_books_of_another_kind_are_no_books(tmp_path, name):
    folder = CellFolder(tmp_path, "a-cpu-int4")
    right = {"inputs": {}, "files_sha256": "0", "bytes": 1, "seconds": 0.5, "verified": "passed"}
    folder.books.mkdir(parents=True)
    (folder.books / "built.json").write_text(json.dumps(right), encoding="utf-8")
    assert folder.built() is not None
    (folder.books / "built.json").write_text(json.dumps(right | {name: []}), encoding="utf-8")
    assert folder.built() is None
