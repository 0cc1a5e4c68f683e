"""The per-layer graphs of an artifact as cases for any pair of runners: feeds, what is right, and how far it may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.evidence import TAP_ROLES, VerifiedRole
from gemma4_export.configs.manifest import GraphEntry, Manifest
from gemma4_export.plugins.common.drift import row_scale
from gemma4_export.runtime.verify import BEHIND_THE_ROUTER, clear_routes
from gemma4_export.runtime.verify_feeds import check_graphs, head_feeds, head_slices, inputs_feeds, layer_feeds
from gemma4_export.runtime.verify_oracle import Oracle

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One output of a graph: what the oracle recorded, one array per run of the graph."""

    name: str
    """As reports spell it, such as ``layers.3.mlp``."""
    role: VerifiedRole
    bound: float
    """The largest drift from the oracle that passes."""
    expected: list[Array]
    scales: list[Array]
    """What differences are divided by, broadcast over each row: then the largest one is the drift of ``verify``."""
    clear: list[Array] | None = None
    """Per run, rows [1, T] that count; None: all. The others may differ by rounding alone."""

    def scaled(self, run: int, values: Array) -> Array:
        """``values`` in units of a row's size, float64; 0 in rows that do not count.

        Raises:
            ArtifactError: they have another shape than the oracle's.
        """
        wanted = self.expected[run].shape
        if values.shape != wanted:
            raise ArtifactError(
                f"{self.name}: the oracle has {list(wanted)}, a runner computed {list(values.shape)}",
                hint="build the artifact again with gemma4-export build",
            )
        scaled = values.astype(np.float64) / self.scales[run]
        return scaled if self.clear is None else np.where(self.clear[run][..., None], scaled, 0.0)

    @property
    def rows(self) -> int:
        """Rows that count, in all runs."""
        if self.clear is not None:
            return sum(int(rows.sum()) for rows in self.clear)
        return sum(one.size // one.shape[-1] for one in self.expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One graph of ``manifest.verify.graphs``."""

    graph: GraphEntry
    layer: int | None
    feeds: list[dict[str, Array]]
    outputs: dict[str, Output]
    """By the graph's own names."""


def cases(artifact: Artifact, oracle: Oracle) -> Iterator[Case]:
    """Every graph, in the order in which a forward pass computes; one case in memory at a time.

    Raises:
        ArtifactError: a graph or a tensor of the oracle is missing.
    """
    manifest = artifact.manifest
    check_graphs(manifest)
    if manifest.model.hidden_size_per_layer_input:
        yield _inputs_case(manifest, oracle)
    for layer in range(manifest.model.num_layers):
        yield _layer_case(manifest, oracle, layer)
    yield from _head_cases(manifest, oracle)


def _inputs_case(manifest: Manifest, oracle: Oracle) -> Case:
    name = "merged_per_layer_inputs"
    output = _output(oracle, name, "ple", _by_prompt(oracle.tensor(name)))
    feeds = [inputs_feeds(oracle, prompt) for prompt in range(len(oracle.ids))]
    return Case(graph=manifest.verify.graphs["inputs"], layer=None, feeds=feeds, outputs={name: output})


def _layer_case(manifest: Manifest, oracle: Oracle, layer: int) -> Case:
    graph = manifest.verify.graphs[f"layers.{layer}"]
    outputs: dict[str, Output] = {}
    clear: list[Array] | None = None
    for tap in graph.outputs:
        name = f"layers.{layer}.{tap}"
        output = _output(oracle, name, TAP_ROLES[tap], _by_prompt(oracle.tensor(name)))
        outputs[tap] = replace(output, clear=clear) if tap in BEHIND_THE_ROUTER else output
        if tap == "router":
            clear = [clear_routes(one, manifest.model.top_k_experts, output.bound) for one in output.expected]
    feeds = [layer_feeds(manifest, oracle, layer, prompt) for prompt in range(len(oracle.ids))]
    return Case(graph=graph, layer=layer, feeds=feeds, outputs=outputs)


def _head_cases(manifest: Manifest, oracle: Oracle) -> Iterator[Case]:
    logits = oracle.tensor("logits")
    whole = _output(oracle, "logits", "head", [logits.reshape(-1, logits.shape[-1])])
    names = head_slices(manifest)
    # As the exporter cuts them: equal slices, the last one shorter. A row's size is that of the whole row.
    step = -(-logits.shape[-1] // len(names))
    for index, name in enumerate(names):
        rows = slice(index * step, (index + 1) * step)
        part = replace(whole, name=f"logits.{index}", expected=[whole.expected[0][:, rows]])
        feeds = [head_feeds(manifest, oracle)]
        yield Case(graph=manifest.verify.graphs[name], layer=None, feeds=feeds, outputs={"logits": part})


def _output(oracle: Oracle, name: str, role: VerifiedRole, expected: list[Array]) -> Output:
    scales = [row_scale(one) for one in expected]
    return Output(name=name, role=role, bound=oracle.bound(name), expected=expected, scales=scales)


def _by_prompt(values: Array) -> list[Array]:
    return [values[prompt : prompt + 1] for prompt in range(len(values))]
