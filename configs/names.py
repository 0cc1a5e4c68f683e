"""Every tensor name: the decoder's weights with their shapes and roles, and the inputs and outputs of its graph.

Shape letters, one legend for Python, C++ and docs: B batch, T tokens in this call, S cached tokens, C cache slots,
W sliding window, R output rows, N soft tokens, L layers, Hq and Hkv heads, D head_dim, E hidden_size, X experts,
F intermediate_size, P hidden_size_per_layer_input, V vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from gemma4_export.configs.errors import CheckpointError
from gemma4_export.configs.model import LayerConfig, ModelConfig

Role = Literal[
    "decoder.attention",
    "decoder.mlp",
    "decoder.experts",
    "decoder.router",
    "decoder.per_layer",
    "decoder.head",
    "decoder.norm",
    "embeddings.tokens",
    "embeddings.per_layer",
]
RECIPE_ROLES: tuple[Role, ...] = tuple(role for role in get_args(Role) if role != "decoder.norm")
"""Roles whose format a recipe chooses."""

EMBED_TOKENS = "embed_tokens.weight"
LM_HEAD = "lm_head.weight"
"""The decoder's head. Its values are the token table's; it may be stored in another format."""
EMBED_TOKENS_PER_LAYER = "embed_tokens_per_layer.weight"

# Prefixes under which checkpoints store the decoder: multimodal classes, then text-only ones.
TEXT_PREFIXES = ("model.language_model.", "model.")
NOT_PACKED_PREFIXES = (
    "model.vision_tower.",
    "model.embed_vision.",
    "model.vision_embedder.",
    "model.audio_tower.",
    "model.embed_audio.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One weight of the decoder: canonical name (the hub's, prefix removed), shape and what it is for."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_shape(self) -> tuple[int, int]:
        """(rows, columns): all leading axes are rows. The unit in which weights are read, converted and written."""
        columns = self.shape[-1]
        return self.num_elements // columns, columns


def decoder_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every weight that the text decoder reads, in the order in which an artifact stores them."""
    specs: list[TensorSpec] = []

    def add(role: Role, name: str, *shape: int) -> None:
        specs.append(TensorSpec(name=name, shape=shape, role=role))

    hidden, ple = config.hidden_size, config.hidden_size_per_layer_input
    add("embeddings.tokens", EMBED_TOKENS, config.vocab_size, hidden)
    if ple:
        add("embeddings.per_layer", EMBED_TOKENS_PER_LAYER, config.vocab_size_per_layer_input, config.num_layers * ple)
        add("decoder.per_layer", "per_layer_model_projection.weight", config.num_layers * ple, hidden)
        add("decoder.norm", "per_layer_projection_norm.weight", ple)
    for layer in config.layers:
        at = f"layers.{layer.index}."
        for norm in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):
            add("decoder.norm", f"{at}{norm}.weight", hidden)
        queries, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        add("decoder.attention", f"{at}self_attn.q_proj.weight", queries, hidden)
        add("decoder.norm", f"{at}self_attn.q_norm.weight", layer.head_dim)
        if layer.owns_kv:
            add("decoder.attention", f"{at}self_attn.k_proj.weight", keys, hidden)
            add("decoder.norm", f"{at}self_attn.k_norm.weight", layer.head_dim)
            if not layer.k_eq_v:
                add("decoder.attention", f"{at}self_attn.v_proj.weight", keys, hidden)
        add("decoder.attention", f"{at}self_attn.o_proj.weight", hidden, queries)
        add("decoder.mlp", f"{at}mlp.gate_proj.weight", layer.intermediate_size, hidden)
        add("decoder.mlp", f"{at}mlp.up_proj.weight", layer.intermediate_size, hidden)
        add("decoder.mlp", f"{at}mlp.down_proj.weight", hidden, layer.intermediate_size)
        if layer.moe:
            experts, width = layer.moe.num_experts, layer.moe.intermediate_size
            for norm in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
                add("decoder.norm", f"{at}{norm}.weight", hidden)
            add("decoder.router", f"{at}router.proj.weight", experts, hidden)
            add("decoder.norm", f"{at}router.scale", hidden)
            add("decoder.norm", f"{at}router.per_expert_scale", experts)
            add("decoder.experts", f"{at}experts.gate_up_proj", experts, 2 * width, hidden)
            add("decoder.experts", f"{at}experts.down_proj", experts, hidden, width)
        if ple:
            add("decoder.per_layer", f"{at}per_layer_input_gate.weight", ple, hidden)
            add("decoder.per_layer", f"{at}per_layer_projection.weight", hidden, ple)
            add("decoder.norm", f"{at}post_per_layer_input_norm.weight", hidden)
        add("decoder.norm", f"{at}layer_scalar", 1)
    add("decoder.norm", "norm.weight", hidden)
    return {spec.name: spec for spec in specs}


def redundant_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """K/V weights of KV-shared layers: the first E2B and E4B uploads carry them, no forward pass reads them."""
    redundant: dict[str, tuple[int, ...]] = {}
    for layer in config.layers:
        if not layer.owns_kv:
            at, keys = f"layers.{layer.index}.self_attn.", layer.num_kv_heads * layer.head_dim
            redundant[f"{at}k_proj.weight"] = redundant[f"{at}v_proj.weight"] = (keys, config.hidden_size)
            redundant[f"{at}k_norm.weight"] = (layer.head_dim,)
    return redundant


def expert_tensor(name: str, expert: int) -> str:
    """``layers.3.experts.down_proj`` -> ``layers.3.experts.7.down_proj``: one expert's slice of a fused weight."""
    base, kind = name.rsplit(".", 1)
    return f"{base}.{expert}.{kind}"


def past_key(layer: LayerConfig) -> str:
    return f"past_key_values.{layer.index}.key"


def past_value(layer: LayerConfig) -> str:
    return f"past_key_values.{layer.index}.value"


def present_key(layer: LayerConfig) -> str:
    return f"present.{layer.index}.key"


def present_value(layer: LayerConfig) -> str:
    return f"present.{layer.index}.value"


def decoder_inputs(config: ModelConfig) -> list[str]:
    """Inputs of the decoder graph in order, caches last.

    ``inputs_embeds`` [B, T, E], embedding rows times the embedding scale; ``per_layer_inputs`` [B, T, L, P], PLE rows
    times sqrt(P); ``rope_sliding``, ``rope_global`` [B, T, 2, num_frequencies] cos and sin of this call's positions;
    ``*_write_index`` [B] int64, slot of this call's first token; ``sliding_start``, ``sliding_end``, ``global_end``
    [B, T] int32, the run of slots that each query sees; ``output_rows`` [R] int64, R >= 1, indices into b * T + t;
    ``past_key_values.{i}.key/value`` [B, Hkv, slots, D] for each layer i that owns its KV.
    """
    has_sliding = config.sliding_window is not None
    names = ["inputs_embeds"]
    if config.has_per_layer_inputs:
        names.append("per_layer_inputs")
    names += ["rope_sliding", "rope_global"] if has_sliding else ["rope_global"]
    names += ["sliding_write_index", "global_write_index"] if has_sliding else ["global_write_index"]
    names += ["sliding_start", "sliding_end", "global_end"] if has_sliding else ["global_end"]
    names.append("output_rows")
    for layer in config.layers:
        if layer.owns_kv:
            names += [past_key(layer), past_value(layer)]
    return names


SLIDING_START = "sliding_start"
GLOBAL_SLOTS = "global_slots"
"""[S] int32, 0 to S - 1: the slots of global caches that an engine reads, at least ``max(global_end)`` of them."""
LOGIT_BIAS = "logit_bias"
"""[1, V] float32, added to an engine's logits before the best are taken; -inf rules an id out."""
MERGED_PER_LAYER_INPUTS = "merged_per_layer_inputs"
"""[1, T, L, P] float32, from an engine's first group to the others."""
ENGINE_OUTPUTS = ("top_logits", "top_ids", "logsumexp")
"""[R, 64] float32, [R, 64] int64 and [R, 1] float32: the best logits, falling, and the log of the sum of all exps."""


def decoder_outputs(config: ModelConfig) -> list[str]:
    """``logits`` [R, V] float32, then the caches with this call's tokens written, bound in place of the inputs."""
    names = ["logits"]
    for layer in config.layers:
        if layer.owns_kv:
            names += [present_key(layer), present_value(layer)]
    return names


def check_shape(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    """Raise CheckpointError when a stored tensor is not the one that the config describes."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{name}: expected shape {list(expected)} (from config.json), found {list(found)}",
            hint="config.json and the safetensors files belong to different models; download both again",
        )
