"""What each graph of ``manifest.verify.graphs`` is fed, from the oracle: any runner that gets it can be held to it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.manifest import MANIFEST_NAME, Manifest
from gemma4_export.runtime.verify_oracle import Oracle

Array = np.ndarray[Any, np.dtype[Any]]


def check_graphs(manifest: Manifest) -> None:
    """Every layer, the head and, with PLE, the per-layer inputs have a graph.

    Raises:
        ArtifactError: one is missing.
    """
    model, graphs = manifest.model, manifest.verify.graphs
    if not graphs:
        raise ArtifactError(
            "no graphs to compare layers with: this artifact is for engines, which this version cannot run yet",
            hint="build the model for --target cpu",
        )
    needed = [f"layers.{index}" for index in range(min(model.num_layers, len(graphs) + 1))]
    needed += ["head.0", *(["inputs"] if model.hidden_size_per_layer_input else [])]
    missing = [name for name in needed if name not in graphs]
    if missing:
        raise ArtifactError(
            f"{MANIFEST_NAME}: verify.graphs has no {missing[0]}, the model {model.num_layers} layers",
            hint="build the artifact again with gemma4-export build",
        )


def inputs_feeds(oracle: Oracle, prompt: int) -> dict[str, Array]:
    """What the graph ``inputs`` gets for one prompt: embeddings [1, T, E] and gathered per-layer rows [1, T, L, P]."""
    return {name: oracle.tensor(name)[prompt : prompt + 1] for name in ("inputs_embeds", "per_layer_inputs")}


def layer_feeds(manifest: Manifest, oracle: Oracle, layer: int, prompt: int) -> dict[str, Array]:
    """The oracle's inputs of a layer for one prompt, by name; ``configs/evidence.py`` has their shapes."""
    graph, one = manifest.verify.graphs[f"layers.{layer}"], slice(prompt, prompt + 1)
    prompts, tokens = oracle.ids.shape
    before = "inputs_embeds" if layer == 0 else f"layers.{layer - 1}.output"
    ends = np.arange(1, tokens + 1, dtype=np.int32)[None]
    kind: Literal["sliding", "global"] = "sliding" if "start" in graph.inputs else "global"
    cache = manifest.kv.cache_read_by(layer, kind)
    shape = (cache.num_kv_heads, tokens, cache.head_dim)
    feeds = {
        "hidden_states": oracle.tensor(before)[one],
        "rope": oracle.tensor(f"rope_{kind}"),
        "write_index": np.zeros(1, np.int64),
        "start": np.maximum(ends - np.int32(manifest.kv.sliding_window or 0), 0),
        "end": ends,
    }
    if "per_layer_input" in graph.inputs:
        feeds["per_layer_input"] = oracle.tensor("merged_per_layer_inputs")[one, :, layer]
    for part in ("key", "value"):
        owns_kv = cache.layer == layer
        full = None if owns_kv else oracle.tensor(f"layers.{cache.layer}.{part}", prompts, *shape)[one]
        feeds[f"past_{part}"] = np.zeros((1, *shape), np.float32) if full is None else full
    return {name: np.ascontiguousarray(feeds[name]) for name in graph.inputs}


def head_slices(manifest: Manifest) -> list[str]:
    """Names of the head's graphs, by the vocabulary rows that they compute."""
    names = [name for name in manifest.verify.graphs if name.startswith("head.")]
    return sorted(names, key=lambda name: manifest.verify.graphs[name].file)


def head_feeds(manifest: Manifest, oracle: Oracle) -> dict[str, Array]:
    """What every slice of the head gets: hidden states [B * R, E] of each prompt's last R tokens."""
    model, (prompts, tokens) = manifest.model, oracle.ids.shape
    rows = oracle.tensor("logits").shape[1]
    hidden = oracle.tensor(f"layers.{model.num_layers - 1}.output", prompts, tokens, model.hidden_size)[:, -rows:]
    return {"hidden_states": np.ascontiguousarray(hidden).reshape(-1, model.hidden_size)}
