"""`make matrix` and `make engines` for real: two tiny models for two targets, from a copy of this repository.

Every `gemma4-export build` that is started leaves a line in a file, whatever the tables say.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small
from conftest import REPOSITORY

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.manifest import LOCK_NAME

A, B = ("a-cpu-int4", "a-rtx4090-int4"), ("b-cpu-int8", "b-rtx4090-int8")
CELLS = {*A, *B}
MATRIX = """
[targets.cpu]
[targets.rtx4090]
engines = "later"
[models.a]
checkpoint = "a"
recipes = ["int4"]
[models.b]
checkpoint = "b"
recipes = ["int8"]
"""
# Runs when Python starts, before anything else.
COUNTER = """
import os, sys
if sys.orig_argv[1:4] == ["-m", "gemma4_export.exporter", "build"]:
    with open(os.environ["COUNT"], "a") as file:
        file.write(" ".join(sys.orig_argv[4:]) + "\\n")
"""


@dataclass(frozen=True)
class Place:
    """A copy of the repository, two checkpoints, and a matrix of them."""

    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self, *words: str, flags: str = "--json") -> subprocess.Popen[str]:
        """`make` with these words, in a process group of its own."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        environment |= {
            "PYTHONPATH": f"{self.folder / 'counter'}:{self.repository / 'src'}",
            "PYTHONDONTWRITEBYTECODE": "1",  # an edit within a second of another keeps size and time
            "COUNT": str(self.folder / "count"),
        }
        line = ["make", "--silent", "-C", str(self.repository), f"BIN={Path(sys.executable).parent}", f"FLAGS={flags}"]
        return subprocess.Popen(
            [*line, f"OUT={self.out}", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def matrix(self, flags: str = "--json") -> subprocess.Popen[str]:
        return self.start("-j2", "matrix", f"MATRIX={self.folder / 'matrix.toml'}", flags=flags)

    def builds(self) -> int:
        """How many were ever started."""
        count = self.folder / "count"
        return len(count.read_text(encoding="utf-8").splitlines()) if count.exists() else 0

    def to_build(self) -> set[str]:
        """What a run would build now."""
        return states(self.matrix("--json --dry-run")).get("to build", set())

    def files(self, *cells: str) -> dict[str, tuple[int, int]]:
        """Of everything below OUT, or of some artifacts: path -> inode and time of the last change."""
        roots = [self.out / cell for cell in cells] or [self.out]
        paths = sorted(path for root in roots for path in root.rglob("*"))
        return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in paths}


def ended(process: subprocess.Popen[str], code: int = 0) -> Any:
    """What a run told, as JSON."""
    out, err = process.communicate(timeout=480)
    assert process.returncode == code, err
    return json.loads(out)


def states(process: subprocess.Popen[str]) -> dict[str, set[str]]:
    """State -> cells."""
    found: dict[str, set[str]] = {}
    for cell in ended(process)["cells"]:
        found.setdefault(cell["state"], set()).add(cell["cell"])
    return found


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def children_of(process: int) -> list[int]:
    """Processes that this one started and that run."""
    children = Path(f"/proc/{process}/task/{process}/children")
    return [int(pid) for pid in children.read_text(encoding="utf-8").split()]


def copy_repository(to: Path) -> None:
    for name in ("Makefile", "src", "configs", "plugins", "exporter", "runtime"):
        path, ignored = REPOSITORY / name, shutil.ignore_patterns("__pycache__", "lib")
        if path.is_dir():
            shutil.copytree(path, to / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(path, to / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    place = Place(tmp_path_factory.mktemp("make"))
    (place.folder / "counter").mkdir()
    (place.folder / "counter" / "sitecustomize.py").write_text(COUNTER, encoding="utf-8")
    place.repository.mkdir()
    copy_repository(place.repository)
    small.write_checkpoint(place.folder / "a", structure="e2b", num_layers=2)
    small.write_checkpoint(place.folder / "b", structure="26b-a4b", num_layers=2)
    (place.folder / "matrix.toml").write_text(MATRIX, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def built(place) -> Place:
    """The four artifacts, after a run that was killed and two at once that went on from there."""
    first = place.matrix()
    books = place.out / ".matrix"
    # One artifact has its place and another one is being made.
    wait_for(lambda: any((place.out / cell).exists() for cell in CELLS) and list(books.glob("*/*.partial")))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    finished = {cell for cell in CELLS if (place.out / cell).exists()}
    assert 0 < len(finished) < 4
    before, started = place.files(*finished), place.builds()

    second, third = place.matrix(), place.matrix()
    found = [states(second), states(third)]
    for state in found:
        assert set().union(*state.values()) == CELLS
    built = [state.get("built", set()) for state in found]
    assert built[0] | built[1] == CELLS - finished
    assert not built[0] & built[1]
    assert place.builds() - started <= 4 - len(finished)  # fewer: what was killed after its build is not built again
    assert place.files(*finished) == before
    return place


def test_a_matrix_is_built_through_a_kill_and_two_runs_at_once(built):
    for cell in CELLS:
        manifest = Artifact.open(built.out / cell, check="full").manifest
        assert (manifest.model.name, manifest.target, manifest.recipe) == tuple(cell.split("-"))
        assert not list((built.out / ".matrix" / cell).glob("*.partial"))
    assert {path.name for path in built.out.iterdir()} == CELLS | {".matrix"}


def test_a_second_run_does_nothing(built):
    before, started = built.files(), built.builds()
    told = ended(built.matrix())
    assert {cell["state"] for cell in told["cells"]} == {"up to date"}
    verdicts = {cell["cell"]: cell["verified"] for cell in told["cells"]}
    assert all(verdicts[cell].startswith("layers: passed") for cell in ("a-cpu-int4", "b-cpu-int8"))
    assert built.files() == before
    assert built.builds() == started


@contextlib.contextmanager
def edited(path: Path, old: str, new: str) -> Iterator[None]:
    text = path.read_text(encoding="utf-8")
    assert old in text, path
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


CPU, GPU = {A[0], B[0]}, {A[1], B[1]}
EDITS = [
    ("configs/recipes/int4.toml", '"decoder.per_layer" = "int8"', '"decoder.per_layer" = "bfloat16"', set(A)),
    ("configs/recipes/int4.toml", "title", "# a remark\ntitle", set()),
    ("configs/targets/rtx4090.toml", "chunk = 2048", "chunk = 1024", GPU),
    ("configs/targets/rtx5090.toml", "chunk = 2048", "chunk = 1024", set()),
    ("../a/config.json", "{", "{ ", set(A)),
    ("exporter/quantize.py", "\n", "\n\n", CELLS),
    ("exporter/passes/lower_linear.py", "\n", "\n\n", CPU),
    ("exporter/passes/trt_linear.py", "\n", "\n\n", GPU),
    ("exporter/plan.py", "\n", "\n\n", set()),
    ("runtime/sampling.py", "\n", "\n\n", set()),
]


def test_a_change_builds_what_depends_on_it_and_nothing_else(built):
    found = {}
    for index, (name, old, new, _) in enumerate(EDITS):
        with edited(built.repository / name, old, new):
            found[index] = built.to_build()
    assert found == {index: expected for index, (*_, expected) in enumerate(EDITS)}
    for path in (*built.repository.rglob("*"), *(built.folder / "a").iterdir()):
        os.utime(path, follow_symlinks=False)  # a time is no change
    assert built.to_build() == set()


def test_an_edited_recipe_is_built_into_its_artifacts(built):
    others, started = built.files(*B), built.builds()
    name, old, new, _ = EDITS[0]
    with edited(built.repository / name, old, new):
        told = ended(built.matrix())
    assert {cell["cell"]: cell["reason"] for cell in told["cells"] if cell["state"] == "built"} == dict.fromkeys(
        A, "changed: recipe int4"
    )
    for cell in A:
        assert Artifact.open(built.out / cell).manifest.census["decoder.per_layer"].format == "bfloat16"
    assert built.files(*B) == others
    assert built.builds() == started + 2


@pytest.mark.full
def test_a_kernel_that_changes_is_compiled_into_the_engines_that_hold_it(place):
    """Of two models for two targets, engines compiled here, one artifact has a kernel of ours."""
    path = place.folder / "matrix.toml"
    text = path.read_text(encoding="utf-8")
    short = text.replace('engines = "later"\n', "").replace('checkpoint = "', 'context = 64\ncheckpoint = "')
    with edited(path, text, short):
        ended(place.matrix())
        assert place.to_build() == set()
        with edited(place.repository / "plugins" / "moe" / "kernel_cuda.cu", "\n", "\n\n"):
            told = ended(place.matrix())
    assert {cell["cell"]: cell["reason"] for cell in told["cells"] if cell["state"] == "built"} == {
        B[1]: "changed: plugins/moe/kernel_cuda.cu"
    }
    assert Artifact.open(place.out / B[1], check="full").manifest.engines.compiled is not None


def test_a_runner_that_is_killed_alone_leaves_a_build_that_the_next_one_takes(place):
    words = ("engines", "MODEL=alone", "TARGET=cpu", "RECIPE=int4", f"CHECKPOINT={place.folder / 'b'}")
    started, books = place.builds(), place.out / ".matrix" / "alone-cpu-int4"
    first = place.start(*words)
    wait_for(lambda: list(books.glob(f"*.partial/{LOCK_NAME}")))
    (runner,) = children_of(first.pid)
    os.kill(runner, signal.SIGKILL)
    first.communicate()
    assert first.returncode == 2
    second = place.start(*words)
    (cell,) = ended(second)["cells"]
    assert cell["state"] == "built"
    assert place.builds() == started + 1


def test_make_says_when_a_cell_does_not_fit(place):
    """Its exit code is always 2; the command's own is in what it prints."""
    process = place.start("engines", "MODEL=31b", "TARGET=rtx4090", "RECIPE=bf16", "ENGINES=later", flags="")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "31b-rtx4090-bf16  skipped" in out
    assert re.search(r"rtx4090 has 25\.8 GB\nhint for 31b-rtx4090-bf16: --recipe int4\S* --context \d+ fits", out)
    assert "Error 3" in err


def test_make_engines_asks_for_a_target(place):
    process = place.start("engines", "MODEL=e2b")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "TARGET=rtx4090" in out


def test_an_environment_that_is_given_is_left_alone(place):
    """With BIN no target installs; without it `demo` says what it downloads, and how much, before it does."""
    given = subprocess.run(["make", "-n", "demo", "test", "matrix", "BIN=/there"], cwd=REPOSITORY, capture_output=True)
    assert given.returncode == 0
    assert b"pip" not in given.stdout
    line = ["make", "-n", "demo", f"VENV={place.folder / 'venv'}"]
    own = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    installs = [index for index, command in enumerate(own) if "pip install" in command]
    assert len(installs) == 2
    for index in installs:
        assert re.match(r"echo .downloading .* GB", own[index - 1])
