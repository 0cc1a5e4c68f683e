"""Artifacts of the tiny checkpoints, built once per process, and what transformers computes for them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as ir
import tiny
from oracle import find_prompt, oracle

from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.configs.target import load_target
from gemma4_export.exporter import build, verify_graphs
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.exporter.trace import trace_decoder
from gemma4_export.runtime import Gemma4

WINDOW = 4  # of every tiny model
PROMPT_LENGTH = 60  # three buffers of W - 1 + 16 slots and a bit

_scratch = tempfile.TemporaryDirectory(prefix="gemma4-artifacts-")


def build_artifact(
    checkpoint: Path, out: Path, *, chunk: int = 7, recipe: str = "fp32", context: int | None = None
) -> Path:
    """What ``gemma4-export build --target cpu`` does, from the opened checkpoint to the finished folder."""
    with Checkpoint(checkpoint) as opened:
        options = build.resolve_options(
            opened.config,
            model_name=checkpoint.name,
            target=load_target("cpu"),
            recipe=load_recipe(recipe),
            context=context,
            chunk=chunk,
        )
        build.build_artifact(opened, options, out, lambda *progress: None)
    return out


def artifact(
    structure: str,
    *,
    chunk: int = 7,
    recipe: str = "fp32",
    context: int | None = None,
    fresh_trace: bool = True,
    **checkpoint_arguments: object,
) -> Path:
    """The artifact of ``tiny.checkpoint(structure, **checkpoint_arguments)``. Do not write into it.

    Args:
        fresh_trace: False takes the graph that was traced for an equal config before: tracing is nine tenths of a tiny
            build, and how weights are stored does not reach it.
    """
    return _artifact(structure, chunk, recipe, context, fresh_trace, tuple(sorted(checkpoint_arguments.items())))


@functools.cache
def _artifact(
    structure: str,
    chunk: int,
    recipe: str,
    context: int | None,
    fresh_trace: bool,
    checkpoint_arguments: tuple[tuple[str, object], ...],
) -> Path:
    checkpoint = tiny.checkpoint(structure, **dict(checkpoint_arguments))
    out = Path(tempfile.mkdtemp(prefix=f"{checkpoint.name}-", dir=_scratch.name)) / "artifact"
    with traces(fresh=fresh_trace):
        return build_artifact(checkpoint, out, chunk=chunk, recipe=recipe, context=context)


def scratch() -> Path:
    """A folder for further artifacts that goes away with the process."""
    return Path(_scratch.name)


@functools.cache
def model(structure: str, **arguments: object) -> Gemma4:
    """``Gemma4.load`` of `artifact` with the same arguments."""
    return Gemma4.load(artifact(structure, **arguments), check="full")


_traces: dict[ModelConfig, ir.Model] = {}


def traced(config: ModelConfig, *, fresh: bool = False) -> ir.Model:
    """The graph of ``config``, the caller's to change: traced just now, or a copy of the first one traced."""
    if fresh or config not in _traces:
        graph = trace_decoder(config)
        _traces.setdefault(config, graph.clone())
        if fresh:
            return graph
    # Always a copy, also the first time: the names that passes give to new nodes depend on it.
    return _traces[config].clone()


@contextmanager
def traces(*, fresh: bool) -> Iterator[None]:
    """Builds in this block trace, or take copies of what was traced before."""
    with (
        mock.patch.object(build, "trace_decoder", lambda config: traced(config, fresh=fresh)),
        mock.patch.multiple(verify_graphs, **{name: _traced_once(name) for name in _VERIFY_TRACES}),
    ):
        yield


_VERIFY_TRACES = ("trace_head", "trace_layer", "trace_per_layer_inputs")
_originals = {name: getattr(verify_graphs, name) for name in _VERIFY_TRACES}


def _traced_once(name: str) -> Callable[..., ir.Model]:
    """The tracing function of this name, giving out copies of what it traced for equal arguments."""

    def trace(*arguments: object) -> ir.Model:
        key = (name, *arguments)
        if key not in _part_traces:
            _part_traces[key] = _originals[name](*arguments)
        return _part_traces[key].clone()

    return trace


_part_traces: dict[tuple[object, ...], ir.Model] = {}


@dataclass(frozen=True, slots=True)
class Expected:
    """A prompt of `PROMPT_LENGTH` ids, its logits [T, V] by the oracle, and how far float32 may be off."""

    ids: list[int]
    logits: np.ndarray
    bound: float

    def difference(self, logits: np.ndarray, start: int = 0) -> float:
        """Largest difference of rows ``start`` and on; not finite where ``logits`` are not."""
        assert logits.dtype == np.float32
        return float(np.abs(logits - self.logits[start : start + len(logits)]).max())


@functools.cache
def expected(structure: str, *, weights: str = "float32", **checkpoint_arguments: object) -> Expected:
    """What transformers computes for ``tiny.checkpoint(structure, **checkpoint_arguments)``."""
    reference = oracle(tiny.checkpoint(structure, **checkpoint_arguments), weights=weights)
    ids = find_prompt(reference, length=PROMPT_LENGTH)
    return Expected(ids, reference.logits(ids), reference.bound(ids))
