"""Resolves a Gemma 4 ``config.json`` once: one frozen ``LayerConfig`` per decoder layer, so that nobody asks again."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gemma4_export.configs.errors import ConfigError, nearest

LayerType = Literal["sliding_attention", "full_attention"]

_log = logging.getLogger(__name__)

_MODEL_TYPES = {
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gemma4_assistant": "gemma4",
    "gemma4_unified": "gemma4_unified",
    "gemma4_unified_text": "gemma4_unified",
    "gemma4_unified_assistant": "gemma4_unified",
}

# Keys of a text config that carry no arithmetic of the decoder's forward pass.
_NEUTRAL_KEYS = frozenset(
    """architectures attention_dropout bad_words_ids bos_token_id chunk_size_feed_forward dtype eos_token_id
    expert_intermediate_size id2label initializer_range is_decoder is_encoder_decoder label2id model_type _name_or_path
    output_attentions output_hidden_states pad_token_id problem_type return_dict torch_dtype transformers_version
    use_cache""".split()
)
_READ_KEYS = frozenset(
    """attention_bias attention_k_eq_v enable_moe_block final_logit_softcapping global_head_dim head_dim
    hidden_activation hidden_size hidden_size_per_layer_input intermediate_size layer_types max_position_embeddings
    moe_intermediate_size num_attention_heads num_experts num_global_key_value_heads num_hidden_layers
    num_key_value_heads num_kv_shared_layers per_layer_config quantization_config rms_norm_eps rope_parameters
    sliding_window tie_word_embeddings top_k_experts use_bidirectional_attention use_double_wide_mlp vocab_size
    vocab_size_per_layer_input""".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of one layer type: the first ``num_frequencies`` of ``head_dim // 2`` pairs turn, others stand.

    Pairs are always ``(i, i + head_dim // 2)`` and ``inv_freq[i] = theta ** (-2 i / head_dim)``: the exponent's
    denominator is the whole head_dim, also where only a part of it turns (transformers' "proportional" type).
    """

    theta: float
    head_dim: int
    num_frequencies: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Routed experts beside the dense MLP of a layer."""

    num_experts: int
    top_k: int
    intermediate_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """Everything in which one decoder layer can differ from another."""

    index: int
    layer_type: LayerType
    head_dim: int
    num_heads: int
    num_kv_heads: int
    sliding_window: int | None
    """Visible keys, the query's own included (tokens); None: all before it."""
    rope: RopeConfig
    kv_source: int | None
    """Index of the layer whose KV cache this layer reads, its own included; None: the target model's (drafters)."""
    k_eq_v: bool
    """Values are the key projection's output, taken before k_norm and RoPE; there is no v_proj."""
    intermediate_size: int
    moe: MoeConfig | None

    @property
    def owns_kv(self) -> bool:
        return self.kv_source == self.index

    @property
    def is_sliding(self) -> bool:
        return self.sliding_window is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """What a drafter (MTP assistant) adds to a decoder whose every layer reads the target model's KV."""

    backbone_hidden_size: int
    num_centroids: int
    centroid_top_k: int
    has_ordered_embeddings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The text decoder of one Gemma 4 model."""

    model_type: Literal["gemma4", "gemma4_unified"]
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float
    hidden_size_per_layer_input: int
    """Channels of the per-layer embedding (PLE) of each layer; 0: the model has none."""
    vocab_size_per_layer_input: int
    final_logit_softcapping: float | None
    max_position_embeddings: int
    has_bidirectional_images: bool
    """Image blocks see all of themselves on sliding layers (12B, 26B-A4B, 31B)."""
    drafter: DrafterConfig | None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def has_per_layer_inputs(self) -> bool:
        return self.hidden_size_per_layer_input > 0

    @property
    def first_shared_layer(self) -> int:
        """Index of the first layer that only reads KV; ``num_layers`` where every layer owns its cache."""
        return next((layer.index for layer in self.layers if not layer.owns_kv), self.num_layers)

    @property
    def sliding_window(self) -> int | None:
        return next((layer.sliding_window for layer in self.layers if layer.is_sliding), None)

    def rope(self, layer_type: LayerType) -> RopeConfig | None:
        return next((layer.rope for layer in self.layers if layer.layer_type == layer_type), None)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Resolve a hub ``config.json``, or one that transformers 5.23 saved again, multimodal or text only.

        Raises:
            ConfigError: a key is missing, contradicts another, or asks for arithmetic that this version lacks.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
            raise _error(
                f"model_type {model_type!r} is no Gemma 4 model",
                hint=nearest(str(model_type), _MODEL_TYPES),
            )
        text = config if model_type.endswith("_text") else config.get("text_config")
        if not isinstance(text, Mapping):
            raise _error(f"{model_type} needs a text_config, found {type(text).__name__}")
        unknown = sorted(set(text) - _READ_KEYS - _NEUTRAL_KEYS)
        if unknown:
            _log.warning("config.json: text_config keys not known to this version, ignored: %s", ", ".join(unknown))
        return _resolve(_Reader(text), config, is_drafter=model_type.endswith("_assistant"))


def _error(cause: str, *, hint: str = "take config.json as it was published with the checkpoint") -> ConfigError:
    return ConfigError(f"config.json: {cause}", hint=hint)


class _Reader:
    """Typed look-ups in one object of a config whose errors name the key, what was expected and what was found."""

    def __init__(self, values: Mapping[str, Any], where: str = "text_config.") -> None:
        self.values, self._where = values, where

    def __call__(self, key: str, kind: type, *, minimum: float = 1, default: Any = None) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "nothing" if value is None else repr(value)
            raise _error(f"{self._where}{key}: expected {_article(kind)}, found {found}")
        if isinstance(value, (int, float)) and kind is not bool and not minimum <= value < math.inf:
            raise _error(f"{self._where}{key}: expected at least {minimum}, found {value}")
        return value


def _article(kind: type) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", list: "a list", Mapping: "an object"}[kind]


def _resolve(read: _Reader, config: Mapping[str, Any], *, is_drafter: bool) -> ModelConfig:
    text = read.values
    _refuse_other_arithmetic(text, config)
    layers = _resolve_layers(read, is_drafter=is_drafter)
    softcap, vocab_size = text.get("final_logit_softcapping"), read("vocab_size", int)
    ple_size = read("hidden_size_per_layer_input", int, minimum=0, default=0)
    shares_kv = any(not layer.owns_kv for layer in layers)
    if shares_kv and not is_drafter and ple_size == 0:
        # transformers slices per_layer_inputs unconditionally once KV is shared, so no such model can exist.
        raise _error("num_kv_shared_layers > 0 needs hidden_size_per_layer_input > 0, found 0")
    return ModelConfig(
        model_type=_MODEL_TYPES[config["model_type"]],  # type: ignore[arg-type]  # the table holds the two literals
        vocab_size=vocab_size,
        hidden_size=read("hidden_size", int),
        layers=layers,
        rms_norm_eps=read("rms_norm_eps", float, minimum=0.0),
        hidden_size_per_layer_input=ple_size,
        # Every token looks its row up, so a shorter table would fail in the middle of a prompt.
        vocab_size_per_layer_input=read("vocab_size_per_layer_input", int, minimum=vocab_size) if ple_size else 0,
        final_logit_softcapping=None if softcap is None else read("final_logit_softcapping", float, minimum=1e-6),
        max_position_embeddings=read("max_position_embeddings", int),
        has_bidirectional_images=text.get("use_bidirectional_attention") == "vision",
        drafter=_resolve_drafter(config) if is_drafter else None,
    )


def _refuse_other_arithmetic(text: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """What no released Gemma 4 generator uses, and what would silently give other numbers."""
    wanted: dict[str, tuple[Any, ...]] = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False, None),
        "use_bidirectional_attention": (None, "vision"),
        "tie_word_embeddings": (True, None),
    }
    for key, allowed in wanted.items():
        found = text.get(key)
        if key == "tie_word_embeddings" and config.get(key) is False:
            found = False
        if found not in allowed:
            raise _error(
                f"text_config.{key}: this version computes only {allowed[0]!r}, found {found!r}",
                hint="use one of the released Gemma 4 generators, or a fine-tune that keeps their structure",
            )
    quantization = config.get("quantization_config") or text.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise _error(
            f"quantization_config ({method}): quantised checkpoints are not read by this version",
            hint="use the bf16 checkpoint it was made from (for Google's own: the name without -qat-… or -w4a16)",
        )


def _resolve_layers(read: _Reader, *, is_drafter: bool) -> tuple[LayerConfig, ...]:
    text = read.values
    num_layers = read("num_hidden_layers", int)
    layer_types: list[LayerType] = read("layer_types", list)
    if len(layer_types) != num_layers:
        raise _error(f"num_hidden_layers is {num_layers}, layer_types lists {len(layer_types)}")
    for index, layer_type in enumerate(layer_types):
        if layer_type not in ("sliding_attention", "full_attention"):
            raise _error(
                f"layer_types[{index}]: unknown type {layer_type!r}",
                hint=nearest(str(layer_type), ("sliding_attention", "full_attention")),
            )
    if layer_types[-1] != "full_attention":
        raise _error(f"the last layer must be full_attention, found {layer_types[-1]!r}")
    sources = _kv_sources(layer_types, read("num_kv_shared_layers", int, minimum=0, default=0), is_drafter=is_drafter)
    overrides = _layer_overrides(read, layer_types)
    moe = None
    if read("enable_moe_block", bool, default=False):
        moe = MoeConfig(
            num_experts=read("num_experts", int),
            top_k=read("top_k_experts", int),
            intermediate_size=read("moe_intermediate_size", int),
        )
        if moe.top_k > moe.num_experts:
            raise _error(f"top_k_experts is {moe.top_k}, num_experts only {moe.num_experts}")
    window = read("sliding_window", int) if "sliding_attention" in layer_types else None
    k_eq_v = read("attention_k_eq_v", bool, default=False)
    width = read("intermediate_size", int)
    is_double_wide = read("use_double_wide_mlp", bool, default=False)
    num_heads = read("num_attention_heads", int)
    ropes: dict[tuple[LayerType, int], RopeConfig] = {}
    layers = []
    for index, layer_type in enumerate(layer_types):
        head_dim, num_kv_heads = overrides[index]
        if num_heads % num_kv_heads:
            raise _error(
                f"layer {index} ({layer_type}): num_attention_heads {num_heads} is no multiple of "
                f"its {num_kv_heads} KV heads"
            )
        key = (layer_type, head_dim)
        if key not in ropes:
            ropes[key] = _resolve_rope(text, layer_type, head_dim)
        source = sources[index]
        layers.append(
            LayerConfig(
                index=index,
                layer_type=layer_type,
                head_dim=head_dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                sliding_window=window if layer_type == "sliding_attention" else None,
                rope=ropes[key],
                kv_source=source,
                k_eq_v=k_eq_v and layer_type == "full_attention",
                intermediate_size=width * 2 if is_double_wide and source != index and not is_drafter else width,
                moe=moe,
            )
        )
    if len(ropes) != len(set(layer_types)):
        raise _error("layers of one type have several head_dims; one RoPE table per type is computed")
    _check_donors(layers)
    return tuple(layers)


def _kv_sources(layer_types: list[LayerType], num_shared: int, *, is_drafter: bool) -> list[int | None]:
    """Layers from the first shared one on read the last layer of their own type that still owns its KV."""
    num_layers = len(layer_types)
    if is_drafter:
        if num_shared != num_layers:
            raise _error(f"a drafter shares all {num_layers} layers, num_kv_shared_layers is {num_shared}")
        return [None] * num_layers
    first_shared = num_layers - num_shared
    if first_shared < 1:
        raise _error(f"num_kv_shared_layers is {num_shared} of {num_layers} layers: none owns KV")
    donors = {layer_type: index for index, layer_type in enumerate(layer_types[:first_shared])}
    sources: list[int | None] = list(range(first_shared))
    for index in range(first_shared, num_layers):
        if layer_types[index] not in donors:
            raise _error(
                f"num_kv_shared_layers is {num_shared} of {num_layers} layers, so layer {index} must read "
                f"an earlier {layer_types[index]} layer's KV, and there is none"
            )
        sources.append(donors[layer_types[index]])
    return sources


def _layer_overrides(read: _Reader, layer_types: list[LayerType]) -> list[tuple[int, int]]:
    """(head_dim, num_kv_heads) per layer, from the hub's global_* keys or from transformers' per_layer_config."""
    text = read.values
    head_dim, num_kv_heads = read("head_dim", int), read("num_key_value_heads", int)
    per_layer = text.get("per_layer_config")
    if per_layer is None:
        if text.get("global_head_dim") is None:
            raise _error("text_config has neither global_head_dim nor per_layer_config")
        global_dim = read("global_head_dim", int)
        # The hub writes num_global_key_value_heads for every size; it acts only together with attention_k_eq_v.
        global_heads = num_kv_heads
        if text.get("attention_k_eq_v") and text.get("num_global_key_value_heads") is not None:
            global_heads = read("num_global_key_value_heads", int)
        by_type = {"sliding_attention": (head_dim, num_kv_heads), "full_attention": (global_dim, global_heads)}
        return [by_type[layer_type] for layer_type in layer_types]
    resolved = [(head_dim, num_kv_heads)] * len(layer_types)
    for key, values in read("per_layer_config", Mapping).items():
        where = f"text_config.per_layer_config.{key}"
        if not re.fullmatch("[0-9]+", str(key)) or int(key) >= len(layer_types):
            raise _error(f"{where}: names no layer of {len(layer_types)}")
        if not isinstance(values, Mapping):
            raise _error(f"{where}: expected an object, found {values!r}")
        extra = sorted(set(values) - {"head_dim", "num_key_value_heads"})
        if extra:
            raise _error(f"{where}.{extra[0]}: not known to this version")
        layer = _Reader(values, f"{where}.")
        resolved[int(key)] = (
            layer("head_dim", int, default=head_dim),
            layer("num_key_value_heads", int, default=num_kv_heads),
        )
    return resolved


def _resolve_rope(text: Mapping[str, Any], layer_type: LayerType, head_dim: int) -> RopeConfig:
    where = f"text_config.rope_parameters.{layer_type}"
    by_type = text.get("rope_parameters")
    values = by_type.get(layer_type) if isinstance(by_type, Mapping) else by_type
    if not isinstance(values, Mapping):
        raise _error(f"{where}: expected an object, found {values!r}")
    read = _Reader(values, f"{where}.")
    theta, share = read("rope_theta", float), read("partial_rotary_factor", float, minimum=0, default=1.0)
    rope_type = values.get("rope_type")
    if rope_type not in ("default", "proportional") or (rope_type == "default" and share != 1.0):
        raise _error(f"{where}.rope_type: {rope_type!r} with partial_rotary_factor {share} is not known")
    extra = sorted(set(values) - {"rope_theta", "rope_type", "partial_rotary_factor"})
    if extra:
        raise _error(f"{where}.{extra[0]}: not known to this version")
    num_frequencies = int(share * head_dim // 2)
    if num_frequencies < 1 or share > 1 or head_dim % 2:
        raise _error(f"{where}: partial_rotary_factor {share} of head_dim {head_dim} is no number of pairs")
    return RopeConfig(theta=theta, head_dim=head_dim, num_frequencies=num_frequencies)


def _check_donors(layers: list[LayerConfig]) -> None:
    """A shared layer reads its donor's cache, so both must agree on its geometry."""
    for layer in layers:
        if layer.kv_source is None:
            continue
        donor = layers[layer.kv_source]
        mine, theirs = (layer.num_kv_heads, layer.head_dim), (donor.num_kv_heads, donor.head_dim)
        if mine != theirs:
            raise _error(
                f"layer {layer.index} reads the KV of layer {donor.index}, "
                f"which has (num_kv_heads, head_dim) {theirs}, not {mine}"
            )


def _resolve_drafter(config: Mapping[str, Any]) -> DrafterConfig:
    def read(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _error(f"{key}: a drafter needs an integer, found {value!r}")
        return value

    return DrafterConfig(
        backbone_hidden_size=read("backbone_hidden_size"),
        num_centroids=read("num_centroids"),
        centroid_top_k=read("centroid_intermediate_top_k"),
        has_ordered_embeddings=bool(config.get("use_ordered_embeddings")),
    )
