"""Tiny random checkpoints of the five Gemma 4 structures, in the layout of the hub.

Each keeps what makes its structure different (reference: the released config.json files): E2B and E4B have PLE and KV
sharing (E2B also double-wide MLPs), 12B, 26B-A4B and 31B have K = V on global layers with fewer KV heads there, 26B-A4B
has experts beside the dense MLP. All have window 4, two layer types with different head_dim, and tiny vision and audio
parts. No tensor stays at the identity that modules start with, because all-ones hides a missing multiply.

The model is built by transformers from the hub-spelt config of `hub_config`, so both spellings describe one model.
"""

import functools
import json
import math
import tempfile
import zlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
)

from gemma4_export.exporter.small_tokenizer import write_small_tokenizer

transformers.utils.logging.disable_progress_bar()

STRUCTURES = ("e2b", "e4b", "12b", "26b-a4b", "31b")

_S, _F = "sliding_attention", "full_attention"

# Widths are multiples of 32, so that int4 blocks of 32 divide them as they divide the released ones.
# Donors, sliding and global: E2B 3 and 4, each the last of several candidates; E4B 4 and 2.
_SHAPES = {
    "e2b": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "layer_types": [_S, _F, _S, _S, _F, _S, _F, _S, _F],
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 32,
        "use_double_wide_mlp": True,
    },
    "e4b": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "layer_types": [_S, _S, _F, _S, _S, _F, _S, _F],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 32,
    },
    "12b": {
        "hidden_size": 32,
        "intermediate_size": 96,
        "layer_types": [_S, _S, _F, _S, _S, _F],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
    },
    "26b-a4b": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "layer_types": [_S, _F, _S, _S, _F],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 8,
        "moe_intermediate_size": 32,
    },
    "31b": {
        "hidden_size": 96,
        "intermediate_size": 128,
        "layer_types": [_S, _S, _F, _S, _S, _F],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
    },
}

_scratch = tempfile.TemporaryDirectory(prefix="gemma4-tiny-")


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary


# A few whole words, so that chat text is not all single letters; more words would only widen the tables.
_WORDS = ("thought", "user", "model", "system", "▁hello", "▁the", "▁weather", "▁is", "▁in", "▁Paris", "▁nice", "▁read")


def _write_tokenizer(folder: Path, structure: str, *, chat: bool) -> int:
    # The template of the larger sizes closes an empty thought when thinking is off; that of E2B and E4B does not.
    return write_small_tokenizer(folder, words=_WORDS, empty_thought=structure not in ("e2b", "e4b"), chat=chat)


@functools.cache
def _control_tokens() -> dict[str, int]:
    """Name -> id of the tokens that are not ordinary text."""
    folder = Path(_scratch.name) / "tokenizer"
    _write_tokenizer(folder, "e2b", chat=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


@functools.cache
def vocab_size() -> int:
    """Rows of the embedding table."""
    return _write_tokenizer(Path(_scratch.name) / "tokenizer", "e2b", chat=True)


def control_ids() -> frozenset[int]:
    """Ids of pad, eos, bos, turn, tool, channel and media tokens: anything that is not ordinary text."""
    return frozenset(_control_tokens().values())


@functools.cache
def ordinary_ids() -> tuple[int, ...]:
    """Ids that a prompt of plain text may hold, ascending."""
    return tuple(index for index in range(vocab_size()) if index not in control_ids())


# ---------------------------------------------------------------------------------------------------------------------
# Config, spelt as the hub's


def hub_config(
    structure: str, *, text_only: bool = False, dtype: str = "float32", chat: bool = True
) -> dict[str, object]:
    """config.json of a tiny model with the keys, and only the keys, that the released file of that size has.

    Args:
        structure: one of `STRUCTURES`.
        text_only: the text part alone, as a `Gemma4ForCausalLM` save has it.
        dtype: what the config says that the weights are stored in.
        chat: base checkpoints have no top-level `eos_token_id`.
    """
    unified, small = structure == "12b", structure in ("e2b", "e4b")
    text = _text_config(structure, dtype)
    if text_only:
        architecture = "Gemma4UnifiedForCausalLM" if unified else "Gemma4ForCausalLM"
        return text | {"architectures": [architecture], "dtype": dtype, "transformers_version": "5.5.0.dev0"}
    ids = _control_tokens()
    config: dict[str, object] = {
        "architectures": ["Gemma4UnifiedForConditionalGeneration" if unified else "Gemma4ForConditionalGeneration"],
        "audio_config": _unified_audio_config() if unified else _audio_config(dtype) if small else None,
        "audio_token_id": ids["<|audio|>"],
        "boa_token_id": ids["<|audio>"],
        "boi_token_id": ids["<|image>"],
        "dtype": dtype,
        "eoa_token_index": ids["<audio|>"],
        "eoi_token_id": ids["<image|>"],
        "image_token_id": ids["<|image|>"],
        "initializer_range": 0.02,
        "model_type": "gemma4_unified" if unified else "gemma4",
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "5.10.0.dev0" if unified else "5.5.0.dev0",
        "video_token_id": ids["<|video|>"],
        "vision_config": _unified_vision_config(text["hidden_size"]) if unified else _vision_config(small, dtype),
    }
    if chat:
        config["eos_token_id"] = [ids["<eos>"], ids["<turn|>"]]
    if not unified:
        config |= {"eoa_token_id": ids["<audio|>"], "vision_soft_tokens_per_image": 280}
    return config


def _text_config(structure: str, dtype: str) -> dict[str, object]:
    small, unified = structure in ("e2b", "e4b"), structure == "12b"
    config: dict[str, object] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": not small,
        "bos_token_id": 2,
        "enable_moe_block": False,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 32,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "model_type": "gemma4_unified_text" if unified else "gemma4_text",
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            _F: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            _S: {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 4,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None if small else "vision",
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": vocab_size(),
        "vocab_size_per_layer_input": vocab_size(),
        **_SHAPES[structure],
    }
    config["num_hidden_layers"] = len(config["layer_types"])
    if unified:
        config["moe_intermediate_size"] = None
    elif structure != "26b-a4b":
        config["expert_intermediate_size"] = None
    if not unified:
        config["dtype"] = dtype
    return config


# What transformers wrote into every tower's config at the time of the release.
_TOWER_DEFAULTS = {
    "_name_or_path": "",
    "architectures": None,
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_range": 0.02,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
    "rms_norm_eps": 1e-06,
}


def _audio_config(dtype: str) -> dict[str, object]:
    return _TOWER_DEFAULTS | {
        "attention_chunk_size": 12,
        "attention_context_left": 13,
        "attention_context_right": 0,
        "attention_invalid_logits_value": -1000000000.0,
        "attention_logit_cap": 50.0,
        "conv_kernel_size": 5,
        "dtype": dtype,
        "gradient_clipping": 10000000000.0,
        "hidden_act": "silu",
        "hidden_size": 32,
        "model_type": "gemma4_audio",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "output_proj_dims": 48,
        "residual_weight": 0.5,
        # 128 mel bins halve twice; transformers computes the input width from channels[0] / 4, right only for 128.
        "subsampling_conv_channels": [128, 4],
        "use_clipped_linears": True,
    }


def _vision_config(small: bool, dtype: str) -> dict[str, object]:
    return _TOWER_DEFAULTS | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "default_output_length": 280,
        "dtype": dtype,
        "global_head_dim": 16,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 131072,
        "model_type": "gemma4_vision",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 256,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": not small,
        "use_clipped_linears": small,
    }


def _unified_audio_config() -> dict[str, object]:
    return _TOWER_DEFAULTS | {
        "audio_embed_dim": 640,
        "audio_samples_per_token": 640,
        "dtype": None,
        "hidden_size": 640,
        "model_type": "gemma4_unified_audio",
        "output_proj_dims": 640,
    }


def _unified_vision_config(hidden_size: object) -> dict[str, object]:
    return _TOWER_DEFAULTS | {
        "dtype": None,
        "mm_embed_dim": hidden_size,
        "mm_posemb_size": 256,
        "model_patch_size": 48,
        "model_type": "gemma4_unified_vision",
        "num_soft_tokens": 280,
        "output_proj_dims": hidden_size,
        "patch_size": 16,
        "pooling_kernel_size": 3,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _draw(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Random float32 values of one tensor; the same for a text-only save, whose names differ in the prefix only."""
    name = name.removeprefix("model.language_model.").removeprefix("model.")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    last = name.rsplit(".", 1)[-1]
    if last in ("input_min", "output_min", "input_max", "output_max"):
        bound = 2 + 0.3 * noise.abs()
        return -bound if last.endswith("min") else bound
    if name == "norm.weight":
        # With random signs a row times itself comes to nothing; else the tied head repeats the last id for ever.
        return (1 + 0.3 * noise) * torch.sign(torch.randn(shape, generator=generator))
    if last == "layer_scalar":
        return 1 + 0.3 * noise.clamp(-1.5, 1.5)  # a scalar near 0 would cut off the layers before it
    is_norm = last == "weight" and len(shape) == 1
    if is_norm or last in ("scale", "per_expert_scale", "std_scale"):
        return 1 + 0.3 * noise
    return 0.2 * noise


_ROUTING_CHANNELS = slice(0, 3)


def _make_routing_clear(weights: dict[str, torch.Tensor]) -> None:
    """Give the experts decisions that rounding cannot flip.

    Sixteen random router scores lie so close together that every longer prompt has a token whose 8th and 9th expert
    differ by less than 1e-4; there float32 takes another expert than float64, and the oracle disagrees with itself by
    0.3. So three channels of the residual stream carry one sign each from the token's embedding to all routers, and
    experts j and j + 8 look for the three signs that spell j. Their scores are 3, 1, -1 or -3 times an amplitude plus
    noise; the upper 8 are, but for rare noise, those of the experts that differ in at most one sign. Each of the 8 sign
    patterns still has its own 8 experts, and each token its own weights.
    """
    for name, weight in weights.items():
        if "vision_tower" in name or weight.dim() == 0:
            continue
        routing = weight[..., _ROUTING_CHANNELS]  # a view
        if name.endswith("embed_tokens.weight"):
            # 6 after the scale sqrt(hidden_size), where other channels have about 1.6
            routing.copy_(torch.sign(routing) * 6 / math.sqrt(weight.shape[1]) + routing / 4)
        elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            routing *= 0.1  # what layers add must not drown the signs
        elif name.endswith(".norm.weight"):
            routing *= 0.1  # else the tied head prefers ids with the signs of the last id, and routing never changes
        elif name.endswith("router.scale"):
            routing.copy_(1 + (routing - 1) / 4)  # a channel that outweighs the other two would split the upper 8
        elif name.endswith("router.proj.weight"):
            signs = [[1.0 if j >> bit & 1 else -1.0 for bit in range(3)] for j in range(8)]
            weight[:, 3:] *= 0.4
            routing.copy_(4 * torch.tensor(signs + signs) * (1 + routing / 4))


def _quieten_control_tokens(weights: dict[str, torch.Tensor]) -> None:
    """Keep stop and media tokens out of greedy continuations: the tied head gives a small row a small logit."""
    rows = sorted(control_ids())
    for name, weight in weights.items():
        if name.endswith("embed_tokens.weight"):
            weight[rows] *= 0.3


def write_checkpoint(
    structure: str,
    folder: Path | str,
    *,
    seed: int = 0,
    spelling: str = "hub",
    text_only: bool = False,
    shards: int = 1,
    dtype: str = "float32",
    experts: str = "fused",
    redundant_shared_kv: bool = False,
    chat: bool = True,
) -> Path:
    """Write a whole checkpoint folder; the same arguments give the same bytes.

    Args:
        structure: one of `STRUCTURES`.
        folder: made when absent; files of these names in it are replaced.
        seed: of all random weights.
        spelling: "hub": config.json with the released files' keys; "resaved": as transformers writes it.
        text_only: the text part alone (tensors `model.*` instead of `model.language_model.*`).
        shards: 1 writes model.safetensors, more write that many files and an index.
        dtype: "float32" or "bfloat16", of every stored tensor.
        experts: "fused" (`experts.gate_up_proj`) or "per_expert" (`experts.{j}.gate_proj.weight`, …).
        redundant_shared_kv: add the unused k_proj, v_proj and k_norm of KV-shared layers, as the first E2B/E4B uploads.
        chat: False makes a base checkpoint: no chat template, no turn end among the stop ids.
    Returns:
        `folder`.
    """
    assert structure in STRUCTURES, structure
    assert spelling in ("hub", "resaved"), spelling
    assert experts in ("fused", "per_expert"), experts
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hub = hub_config(structure, text_only=text_only, dtype=dtype, chat=chat)
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    config_path.write_text(json.dumps(hub, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    model = model_class(structure, text_only=text_only)(AutoConfig.from_pretrained(folder))
    weights = {name: _draw(name, tensor.shape, seed) for name, tensor in sorted(model.state_dict().items())}
    _quieten_control_tokens(weights)
    if structure == "26b-a4b":
        _make_routing_clear(weights)
    weights.pop("lm_head.weight")  # tied
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"], missing
    assert not unexpected, unexpected
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if spelling == "hub":
        config_path.write_text(json.dumps(hub, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_tokenizer(folder, structure, chat=chat)
    if structure == "12b":
        _suppress_media_ends(folder / "generation_config.json")

    stored = load_file(weights_path)
    if redundant_shared_kv:
        stored |= _unused_kv_tensors(stored, hub.get("text_config", hub), seed)
    if experts == "per_expert":
        stored = _split_experts(stored)
    weights_path.unlink()
    _write_shards(stored, folder, shards)
    return folder


def model_class(structure: str, *, text_only: bool) -> type:
    """The transformers class that reads this checkpoint."""
    if structure == "12b":
        return Gemma4UnifiedForCausalLM if text_only else Gemma4UnifiedForConditionalGeneration
    return Gemma4ForCausalLM if text_only else Gemma4ForConditionalGeneration


def _suppress_media_ends(path: Path) -> None:
    """12B's generation_config.json forbids the ends of audio and images."""
    ids = _control_tokens()
    config = json.loads(path.read_text(encoding="utf-8")) | {"suppress_tokens": [ids["<audio|>"], ids["<image|>"]]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _unused_kv_tensors(
    stored: dict[str, torch.Tensor], text_config: dict[str, object], seed: int
) -> dict[str, torch.Tensor]:
    """k_proj, v_proj and k_norm for layers that read another layer's cache: shapes of the donor, other values."""
    layer_types = text_config["layer_types"]
    first_shared = len(layer_types) - text_config["num_kv_shared_layers"]
    assert first_shared < len(layer_types), "only E2B and E4B share KV"
    prefix = next(name for name in stored if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    unused = {}
    for layer in range(first_shared, len(layer_types)):
        donor = max(index for index in range(first_shared) if layer_types[index] == layer_types[layer])
        for part in ("k_proj", "v_proj", "k_norm"):
            name = f"{prefix}layers.{layer}.self_attn.{part}.weight"
            twin = stored[f"{prefix}layers.{donor}.self_attn.{part}.weight"]
            unused[name] = _draw(name, twin.shape, seed).to(twin.dtype)
    return unused


def _split_experts(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fused [X, 2F, E] and [X, E, F] -> per expert gate and up [F, E], down [E, F]."""
    split = {}
    for name, tensor in stored.items():
        if name.endswith("experts.gate_up_proj"):
            for index, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                split[name.replace("gate_up_proj", f"{index}.gate_proj.weight")] = gate.clone()
                split[name.replace("gate_up_proj", f"{index}.up_proj.weight")] = up.clone()
        elif name.endswith("experts.down_proj"):
            for index, expert in enumerate(tensor):
                split[name.replace("down_proj", f"{index}.down_proj.weight")] = expert.clone()
        else:
            split[name] = tensor
    return split


def _write_shards(stored: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata=metadata)
        return
    names = sorted(stored)
    weight_map = {}
    for index in range(shards):
        file_name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: stored[name] for name in names[index::shards]}
        save_file(part, folder / file_name, metadata=metadata)
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.nbytes for tensor in stored.values())
    index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n", encoding="utf-8")


@functools.cache
def checkpoint(structure: str, **arguments: object) -> Path:
    """`write_checkpoint` into a folder of this process that is made once per set of arguments. Do not write into it."""
    spelt = "-".join([structure, *(f"{key}={value}" for key, value in sorted(arguments.items()))])
    return write_checkpoint(structure, Path(_scratch.name) / spelt, **arguments)
