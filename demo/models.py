"""The two tiny Gemma 4 configurations, in the hub's spelling, and the fixed parts of their weights.

Head sizes are small; ratios and code paths are those of E2B and 26B-A4B. Every width that a matrix is multiplied along
is a multiple of 32, so that each recipe takes them. Values that training does not move (layer
scalars, clip bounds, standardisation) are set to something that matters: a runtime that drops one answers wrongly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

NAMES = ("tiny-e", "tiny-moe")
_S, _F = "sliding_attention", "full_attention"
_ROPE = {
    _F: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    _S: {"rope_theta": 10000.0, "rope_type": "default"},
}


def has_audio(name: str) -> bool:
    return name == "tiny-e"


def empty_thought(name: str) -> bool:
    """Whether the chat template closes an empty thought when thinking is off, as it does for the larger sizes."""
    return name == "tiny-moe"


def config(name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json as a dict; every token id is looked up by name."""
    ids = {key: tokenizer.token_to_id(token) for key, token in _TOKENS.items()}
    text = {**_TEXT, **(_TEXT_E if name == "tiny-e" else _TEXT_MOE), "vocab_size": tokenizer.get_vocab_size()}
    text["vocab_size_per_layer_input"] = text["vocab_size"]
    vision = {**_VISION, "standardize": name == "tiny-moe", "use_clipped_linears": name == "tiny-e"}
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": dict(_AUDIO) if has_audio(name) else None,
        **ids,
        "eoa_token_index": ids["eoa_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": [tokenizer.token_to_id("<eos>"), tokenizer.token_to_id("<turn|>")],
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "5.5.0.dev0",
        "vision_config": vision,
        "vision_soft_tokens_per_image": 280,
    }


_TOKENS = {
    "audio_token_id": "<|audio|>",
    "boa_token_id": "<|audio>",
    "boi_token_id": "<|image>",
    "eoa_token_id": "<audio|>",
    "eoi_token_id": "<image|>",
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
}
_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_text",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": _ROPE,
    "sliding_window": 64,
    "tie_word_embeddings": True,
    "use_cache": True,
}
_TEXT_E: dict[str, Any] = {
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "expert_intermediate_size": None,
    "global_head_dim": 64,
    "head_dim": 32,
    "hidden_size": 192,
    "hidden_size_per_layer_input": 32,
    "intermediate_size": 352,
    "layer_types": [_S, _S, _F] * 3,
    "num_attention_heads": 4,
    "num_experts": None,
    "num_global_key_value_heads": None,
    "num_hidden_layers": 9,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 3,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_double_wide_mlp": True,
}
_TEXT_MOE: dict[str, Any] = {
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "global_head_dim": 64,
    "head_dim": 32,
    "hidden_size": 192,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 128,
    "layer_types": [_S, _S, _F] * 2,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 64,
    "num_attention_heads": 8,
    "num_experts": 14,
    "num_global_key_value_heads": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "num_kv_shared_layers": 0,
    "top_k_experts": 8,
    "use_bidirectional_attention": "vision",
    "use_double_wide_mlp": False,
}
_VISION: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "default_output_length": 280,
    "dtype": "bfloat16",
    "global_head_dim": 32,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 288,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_vision",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 512,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
}
_AUDIO: dict[str, Any] = {
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_invalid_logits_value": -1000000000.0,
    "attention_logit_cap": 50.0,
    "conv_kernel_size": 5,
    "dtype": "bfloat16",
    "gradient_clipping": 10000000000.0,
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.02,
    "model_type": "gemma4_audio",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "output_proj_dims": 128,
    "residual_weight": 0.5,
    "rms_norm_eps": 1e-06,
    "subsampling_conv_channels": [128, 32],
    "use_clipped_linears": True,
}


def build(hub_config: dict[str, Any], *, seed: int) -> Any:
    """A transformers model in fp32 with our own initial weights."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    torch.manual_seed(seed)
    model = Gemma4ForConditionalGeneration(Gemma4Config(**json.loads(json.dumps(hub_config)))).float()
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # attention has no 1/sqrt(head_dim): the norms start with it
            parameter.fill_(parameter.shape[0] ** -0.25)
        elif name.endswith("router.proj.weight"):
            parameter.normal_(std=1.0)  # the router's input has length 1
        elif "embed_tokens" in name:
            parameter.normal_(std=(192 if "per_layer" not in name else 32) ** -0.5)
        elif "position_embedding_table" in name:
            parameter.normal_(std=0.1)
        elif parameter.dim() >= 2:
            fan_in = math.prod(parameter.shape[1:]) if "experts" not in name else parameter.shape[-1]
            parameter.normal_(std=0.7 * fan_in**-0.5)
    # numbers that training does not move; all are exact in bf16
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_((0.8125, 1.125, 0.9375, 1.25, 0.875)[_layer(name) % 5])
        elif name.endswith("std_bias"):
            buffer.copy_(torch.randint(-16, 17, buffer.shape) / 2)
        elif name.endswith("std_scale"):
            buffer.copy_(2.0 ** torch.randint(-6, -3, buffer.shape))
    set_clip_bounds(model)


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


@torch.no_grad()
def set_clip_bounds(model: torch.nn.Module) -> None:
    """Set the four bounds of every clipped linear, slightly different from layer to layer and on both sides."""
    for name, buffer in model.named_buffers():
        layer = _layer(name)
        if name.endswith(("input_max", "input_min", "output_max", "output_min")):
            low, side = name.endswith("min"), name.rsplit(".", 1)[1].split("_")[0]
            bound = _clip_bound(name, side) * (1 + layer / (32 if low else 16))
            buffer.fill_(float(torch.tensor(-bound if low else bound).bfloat16()))


def _clip_bound(name: str, side: str) -> float:
    """Bounds that cut off the outermost values of a trained tower now and then, and no more.

    The products of gate and up, and what ``down_proj`` makes of them, are large: a norm follows.
    Nothing keeps them small.
    """
    if "vision_tower" in name:
        if "down_proj" in name:
            return 96.0 if side == "input" else 80.0
        if "o_proj" in name:
            return 3.25 if side == "input" else 6.0
        return 4.75 if side == "input" else 10.0
    if side == "output":
        return 6.0
    return 6.0 if "layer_2" in name or "post" in name else 4.0


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every stored tensor by its hub name (the tied output head is not one)."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def save(model: torch.nn.Module, folder: Path, *, hub_config: dict[str, Any], processor: dict[str, Any]) -> None:
    """Write config.json, processor_config.json and model.safetensors (bf16); the tokenizer files are there already."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().to(torch.bfloat16).contiguous() for name, tensor in state(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file, content in (("config.json", hub_config), ("processor_config.json", processor)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def processor_config(*, audio: bool) -> dict[str, Any]:
    """processor_config.json with the published values."""
    image = {
        "do_convert_rgb": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "Gemma4ImageProcessor",
        "image_seq_length": 280,
        "image_std": [1.0, 1.0, 1.0],
        "max_soft_tokens": 280,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
    }
    video = {
        **{key: value for key, value in image.items() if key not in ("image_processor_type", "image_seq_length")},
        "do_normalize": True,
        "do_sample_frames": True,
        "max_soft_tokens": 70,
        "num_frames": 32,
        "return_metadata": False,
        "video_processor_type": "Gemma4VideoProcessor",
    }
    mel = {
        "dither": 0.0,
        "feature_extractor_type": "Gemma4AudioFeatureExtractor",
        "feature_size": 128,
        "fft_length": 512,
        "fft_overdrive": False,
        "frame_length": 320,
        "hop_length": 160,
        "input_scale_factor": 1.0,
        "max_frequency": 8000.0,
        "mel_floor": 0.001,
        "min_frequency": 0.0,
        "padding_side": "right",
        "padding_value": 0.0,
        "per_bin_mean": None,
        "per_bin_stddev": None,
        "preemphasis": 0.0,
        "preemphasis_htk_flavor": True,
        "return_attention_mask": True,
        "sampling_rate": 16000,
    }
    return {
        "audio_ms_per_token": 40,
        "audio_seq_length": 750,
        **({"feature_extractor": mel} if audio else {}),
        "image_processor": image,
        "image_seq_length": 280,
        "processor_class": "Gemma4Processor",
        "video_processor": video,
    }


def count(model: torch.nn.Module, prefixes: Sequence[str] = ("",)) -> dict[str, int]:
    """Stored numbers under each prefix."""
    tensors = state(model)
    return {prefix: sum(t.numel() for name, t in tensors.items() if name.startswith(prefix)) for prefix in prefixes}
