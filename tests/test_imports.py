"""Imports run one way between the rooms, and the runtime stays light: no torch, and nothing heavy before it is used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import artifacts
import pytest
from conftest import REPOSITORY

PACKAGE = "gemma4_export"
STANDARD = sys.stdlib_module_names
TORCH = {"torch", "onnx", "onnxscript"}
EXPORT = TORCH | {"onnx_ir", "ml_dtypes"}

# What a room may import: other rooms, and packages as an import statement names them. Anything else is an error.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "configs": (set(), set()),
    "plugins": ({"configs"}, {"numpy"}),
    "exporter": ({"configs", "plugins"}, {"numpy", "huggingface_hub", "tokenizers", "jinja2", "safetensors"} | EXPORT),
    "runtime": ({"configs", "plugins"}, {"numpy", "onnxruntime", "tokenizers", "jinja2", "PIL", "safetensors"}),
}
COMMANDS = {"typer", "rich"}
TORCH_SUFFIXES = ("torch_op.py", "torch_ops.py")


def python_files(room: str) -> list[Path]:
    return sorted((REPOSITORY / room).rglob("*.py"))


def allowed(path: Path) -> tuple[set[str], set[str]]:
    """Rooms and packages that one file may import."""
    room = path.relative_to(REPOSITORY).parts[0]
    rooms, packages = ROOMS[room]
    if "commands" in path.parts:
        packages = packages | COMMANDS
    if room == "runtime" and path.name.startswith("polygraphy_"):
        packages = packages | {"polygraphy"}
    if path.name == "optimum_command.py":
        packages = packages | COMMANDS | {"optimum"}
    if room == "plugins" and path.name.endswith(TORCH_SUFFIXES):
        packages = packages | TORCH
    return rooms | {room}, packages


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also of those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides which room it reaches"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(source: str, rooms: set[str], packages: set[str]) -> list[str]:
    found = []
    for line, name in imports(source):
        top, _, rest = name.partition(".")
        if top == PACKAGE:
            inside = rest.split(".")[0]
            if inside in ROOMS and inside not in rooms:
                found.append(f"{line}: {name}: this room must not reach {inside}")
            elif inside and inside not in ROOMS and inside != "__version__":
                found.append(f"{line}: {name}: no such room")
        elif top not in STANDARD and top not in packages:
            found.append(f"{line}: {name}: not among {', '.join(sorted(packages)) or 'the standard library'}")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    files = python_files(room)
    assert len(files) > 5
    found = []
    for path in files:
        problems = violations(path.read_text(encoding="utf-8"), *allowed(path))
        found += [f"{path.relative_to(REPOSITORY)}:{problem}" for problem in problems]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "is_allowed"),
    [
        ("configs/a.py", "import numpy", False),
        ("configs/a.py", "def f():\n    from gemma4_export.plugins import linear", False),
        ("configs/a.py", "import json\nfrom gemma4_export.configs.names import Role", True),
        ("plugins/linear/reference.py", "import torch", False),
        ("plugins/linear/torch_op.py", "import torch", True),
        ("plugins/linear/torch_op.py", "import transformers", False),
        ("exporter/a.py", "from gemma4_export.runtime import Gemma4", False),
        ("exporter/a.py", "import gemma4_export.runtime.rope", False),
        ("exporter/a.py", "from gemma4_export import runtime", False),
        ("exporter/a.py", "import transformers", False),
        ("runtime/a.py", "from gemma4_export.exporter import build", False),
        ("runtime/a.py", "def f():\n    import torch", False),
        ("runtime/a.py", "import onnx_ir", False),
        ("runtime/a.py", "import typer", False),
        ("runtime/commands/a.py", "import typer", True),
        ("runtime/a.py", "from gemma4_export import __version__", True),
    ],
)
def test_the_rule_bites(path: str, source: str, is_allowed: bool) -> None:
    assert (violations(source, *allowed(REPOSITORY / path)) == []) == is_allowed


def test_runtime_reaches_no_torch_op_of_a_plugin() -> None:
    for path in python_files("runtime"):
        names = [name for _, name in imports(path.read_text(encoding="utf-8"))]
        assert not [name for name in names if "torch_op" in name], path


# ---------------------------------------------------------------------------------------------------------------------
# A fresh interpreter


NEVER = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "polygraphy"}
LATER = {"onnxruntime", "PIL", "typer", "rich", "tokenizers", "jinja2", "safetensors", "huggingface_hub"}


def fresh_interpreter(code: str, *arguments: object) -> dict[str, object]:
    """What ``code`` leaves in ``result``, run in an interpreter of its own that prints nothing else."""
    program = f"import json, sys, time\nresult = {{}}\n{code}\nprint(json.dumps(result))"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    result: dict[str, object] = json.loads(finished.stdout)
    return result


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    code = "import gemma4_export.runtime\nresult['modules'] = sorted({name.split('.')[0] for name in sys.modules})"
    modules = set(fresh_interpreter(code)["modules"])
    assert "gemma4_export" in modules
    assert not modules & (NEVER | LATER)


def test_importing_the_runtime_costs_little_more_than_numpy() -> None:
    # Processor time: what the import itself takes, however many others wait for the same cores.
    timed = "start = time.process_time()\nimport {}\nresult['seconds'] = time.process_time() - start"
    seconds: dict[str, list[float]] = {"numpy": [], "gemma4_export.runtime": []}
    # Interleaved, and the best of each, so that a busy machine slows both; more rounds only while it is too busy.
    for round_number in range(15):
        for module, times in seconds.items():
            times.append(float(fresh_interpreter(timed.format(module))["seconds"]))
        extra = min(seconds["gemma4_export.runtime"]) - min(seconds["numpy"])
        if round_number >= 2 and extra <= 0.15:
            break
    assert 0 < extra <= 0.15, seconds


def test_generating_loads_no_torch_and_prints_nothing() -> None:
    code = """
from gemma4_export.runtime import Gemma4
model = Gemma4.load(sys.argv[1])
reply = model.generate([{"role": "user", "content": "hello"}], max_new_tokens=3)
result["ids"] = reply.ids
result["modules"] = sorted({name.split(".")[0] for name in sys.modules})
"""
    result = fresh_interpreter(code, artifacts.artifact("31b", context=64, fresh_trace=False))
    assert len(result["ids"]) == 3
    assert {"onnxruntime", "tokenizers", "jinja2"} <= set(result["modules"])
    assert not set(result["modules"]) & (NEVER | {"PIL", "typer", "rich", "safetensors", "huggingface_hub"})


def test_commands_of_the_runtime_load_no_torch() -> None:
    code = "import gemma4_export.runtime.commands\nresult['modules'] = sorted({n.split('.')[0] for n in sys.modules})"
    modules = set(fresh_interpreter(code)["modules"])
    assert "typer" in modules
    assert not modules & NEVER
