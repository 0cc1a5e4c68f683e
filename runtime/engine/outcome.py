"""What a builder hands back, and how its complaints become an error with a cause and a hint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from gemma4_export.configs.errors import ArtifactError, ConfigError, Gemma4Error
from gemma4_export.runtime.engine.record import TensorRecord
from gemma4_export.runtime.engine.request import EngineRequest

OUTCOME_NAME = "outcome.json"
Progress = Callable[[str, int, int], None]
"""(phase, steps done, steps in all)"""
_LEVELS = ("INTERNAL ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
ERROR, INFO = 1, 3
DATA_TYPES = (
    "float32",
    "float16",
    "int8",
    "int32",
    "bool",
    "uint8",
    "float8_e4m3",
    "bfloat16",
    "int64",
    "int4",
    "float4",
)
"""nvinfer1::DataType by number."""

_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_SCRATCH = re.compile(r"Max Scratch Memory: (\d+) bytes")
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|bad_alloc|bad allocation", re.IGNORECASE)
_RESOURCE = re.compile(r"Unable to load library: (libnvinfer_builder_resource\S+?)(?=[:\s]|$)")
_CAPABILITY = re.compile(r"Compute capability is invalid or not supported")
_DATA_TYPE = re.compile(
    r"Cannot compile for target\(s\) (.+?), because the model contains HW-specific datatypes: (\w+)"
)
_NO_PLUGIN = re.compile(r"Plugin not found")
_NOISE = "catchCudaError"  # every error is followed by one that says that there is no driver


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What the parser made of a graph: the tensors that an engine is fed and gives."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]


@dataclass(slots=True)
class BuildLog:
    """Everything the library said: to a file, with errors and figures kept."""

    file: TextIO
    path: str
    """Where the reader of an error will find it."""
    errors: list[str] = field(default_factory=list)
    weights_bytes: int = 0
    scratch_bytes: int = 0

    def __call__(self, severity: int, message: str) -> None:
        if severity <= INFO:
            self.file.write(f"[{_LEVELS[severity]}] {message}\n")
            self.file.flush()  # the library may end the process with its next line
        if severity <= ERROR:
            self.errors.append(message)
        self.weights_bytes = _largest(_WEIGHTS, message, self.weights_bytes)
        self.scratch_bytes = _largest(_SCRATCH, message, self.scratch_bytes)


def _largest(pattern: re.Pattern[str], message: str, so_far: int) -> int:
    match = pattern.search(message)
    return max(so_far, int(match[1])) if match else so_far


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportFailure:
    """What the ONNX parser says about one node."""

    reason: str
    node: int
    name: str
    operator: str

    def __str__(self) -> str:
        reason = "; ".join(line for line in self.reason.splitlines() if _NOISE not in line)
        return f"node {self.node} {self.name or '(no name)'} ({self.operator or 'no op type'}): {reason}"


def import_error(request: EngineRequest, failures: list[ImportFailure]) -> Gemma4Error:
    """The parser refused the graph; the first node it names is the cause, the others follow from it."""
    cause = f"{request.graph.name}: {request.builder} does not import it: {failures[0]}"
    if _NO_PLUGIN.search(failures[0].reason) and not request.plugins:
        return ArtifactError(f"{cause}; no plugin library was given", hint="make plugins compiles ours")
    if failures[0].node < 0:
        return ArtifactError(cause, hint="the file is damaged: copy or build the artifact again")
    return ArtifactError(cause, hint=f"{request.builder} cannot run this op: pack other backends with --backends")


def plugin_error(library: Path, errors: list[str]) -> Gemma4Error:
    cause = errors[0] if errors else "no reason given"
    return ArtifactError(f"{library}: not a plugin library: {cause}", hint="make plugins compiles it again")


def build_error(request: EngineRequest, log: BuildLog) -> Gemma4Error:
    """The builder gave no engine; the first of its errors is the cause."""
    text = "\n".join(log.errors)
    name = request.graph.name
    resource = _RESOURCE.search(text)
    if resource:
        return ArtifactError(
            f"{name}: {request.builder} lacks {resource[1]}, the kernels of this GPU's architecture",
            hint="install the builder resource of that architecture beside libnvinfer",
        )
    if _OUT_OF_MEMORY.search(text):
        return out_of_memory(request)
    if _CAPABILITY.search(text):
        return ConfigError(
            f"{request.builder} refuses a compute capability among {list(request.compute_capabilities)}",
            hint="tensorrt-rtx compiles for 75, 80, 86, 89, 120 and 121; other GPUs need the tensorrt backend",
        )
    data_type = _DATA_TYPE.search(text)
    if data_type:
        return ConfigError(
            f"{name}: {data_type[1]} cannot compute with {data_type[2]} weights",
            hint="fp8 needs compute capability 8.9 or newer, int4 8.0: choose another --recipe or leave that GPU out",
        )
    cause = log.errors[0] if log.errors else "no reason given"
    return ArtifactError(f"{name}: {request.builder} builds no engine: {cause}", hint=f"the whole log: {log.path}")


def out_of_memory(request: EngineRequest) -> Gemma4Error:
    return ArtifactError(
        f"{request.graph.name}: out of memory while building {request.weights_bytes / 1e9:.2f} GB of weights",
        hint="give a smaller --build-memory, so that fewer groups are built at once, or close other programs",
    )


def ended(request: EngineRequest, status: int, log: Path) -> Gemma4Error:
    """The child is gone and left no outcome: the library ended its process, or the system did."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    last = lines[-1] if lines else "nothing"
    if status == -9 or _OUT_OF_MEMORY.search(last):  # SIGKILL: what Linux sends when memory runs out
        return out_of_memory(request)
    how = f"signal {-status}" if status < 0 else f"exit code {status}"
    return ArtifactError(
        f"{request.graph.name}: {request.builder} ended its process ({how}); its last words: {last}",
        hint=f"the whole log: {log}",
    )
