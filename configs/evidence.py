"""What an artifact carries to be verified: the oracle's tensors and the taps of the per-layer graphs, by name.

``oracle.safetensors`` holds, for B prompts of T tokens each, what the exporter's modules computed in float64 on the
weights as they are stored, rounded to float32:

* ``ids`` [B, T] int64; ``inputs_embeds`` [B, T, E]; ``rope_sliding``, ``rope_global`` [1, T, 2, num_frequencies]; with
  PLE ``per_layer_inputs`` [B, T, L, P], the rows as the host gathers them, and ``merged_per_layer_inputs``, as layers
  read them.
* ``layers.{i}.{tap}`` [B, T, …] for each output of that layer's graph; ``key`` and ``value`` are [B, Hkv, T, D], what
  the layer has written to its cache. A layer reads ``layers.{i - 1}.output``, the first one ``inputs_embeds``.
* ``logits`` [B, R, V] of each prompt's last R tokens.
* ``rounding.{name}`` float32 scalars: how far the same modules in float32 were from that, as a drift.
* Below a billion parameters ``rounding.model``, the same for logits of a whole float32 pass; ``greedy_ids`` [G] after
  the first prompt, and ``greedy_margins`` [G], the best logit less the second best.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from gemma4_export.configs.model import LayerConfig, ModelConfig

if TYPE_CHECKING:
    from gemma4_export.configs.manifest import CensusEntry, FileEntry

ORACLE_FILE = "oracle.safetensors"
GRAPHS_FOLDER = "graphs"
VERIFY_GRAPHS_FOLDER = f"{GRAPHS_FOLDER}/verify"
REPORTS_FOLDER = "verify"
IDENTITY_KEY = "made_from"
"""Key of the oracle's metadata whose value is ``oracle_identity`` of its artifact."""

VerifiedRole = Literal["embedding", "attention", "mlp", "experts", "ple", "output", "head"]
TAP_ROLES: dict[str, VerifiedRole] = {
    "key": "attention",
    "value": "attention",
    "attention": "attention",
    "mlp": "mlp",
    "router": "experts",
    "experts": "experts",
    "ple": "ple",
    "output": "output",
}
"""Outputs of a layer's graph in the order in which a layer computes them; each is blamed on one role.

``attention``, ``mlp``, ``experts`` and ``ple`` are taken behind the norm that closes the block, before the residual is
added; ``output`` is left with what joins the blocks: layer_scalar, and the last norm of a layer with experts.
"""

BOUND_FLOOR = 2e-4
"""Smallest bound of a drift.

A float32 sum of K products, in any order, is off by about sqrt(K) roundings of 2 ** -24 relative to its root mean
square: 147 of them for the widest row, 21504. Three matrices in a row and the worst of 10^5 values, at 4.5 times the
mean, make 147 x 2 ** -24 x sqrt(3) x 4.5 = 0.7e-4; an error of the weights that matters is far above.
"""
BOUND_FACTOR = 4.0
"""What the oracle's own float32 lost may be lost four times: two implementations order their sums differently."""


def bound_of(rounding: float) -> float:
    """Largest drift that passes, from what the oracle's own float32 pass drifted from its float64 one."""
    return max(BOUND_FLOOR, BOUND_FACTOR * rounding)


def layer_taps(layer: LayerConfig, config: ModelConfig) -> list[str]:
    """The outputs of this layer's graph, in order."""
    absent = set()
    if not layer.owns_kv:
        absent |= {"key", "value"}
    if layer.moe is None:
        absent |= {"router", "experts"}
    if not config.has_per_layer_inputs:
        absent.add("ple")
    return [tap for tap in TAP_ROLES if tap not in absent]


def layer_inputs(layer: LayerConfig, config: ModelConfig) -> list[str]:
    """The inputs of this layer's graph, in order.

    ``hidden_states`` [1, T, E]; ``per_layer_input`` [1, T, P]; ``rope`` [1, T, 2, num_frequencies]; ``write_index`` [1]
    int64 where the layer owns its KV; ``start`` on sliding layers, ``end`` [1, T] int32; ``past_key``, ``past_value``
    [1, Hkv, C, D], of the donor where the layer owns none.
    """
    names = ["hidden_states"]
    if config.has_per_layer_inputs:
        names.append("per_layer_input")
    names.append("rope")
    if layer.owns_kv:
        names.append("write_index")
    return [*names, *(["start"] if layer.is_sliding else []), "end", "past_key", "past_value"]


def oracle_identity(census: Mapping[str, CensusEntry], sources: Mapping[str, FileEntry]) -> str:
    """What an oracle was made from: the checkpoint's files and the formats that they were stored in."""
    formats = {role: entry.format for role, entry in census.items()}
    files = {name: [entry.bytes, entry.sha256] for name, entry in sources.items()}
    return hashlib.sha256(json.dumps([formats, files], sort_keys=True).encode()).hexdigest()
