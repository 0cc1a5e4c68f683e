"""The committed checkpoints: the hub's layout and names, small enough, and right about held-out questions."""

from __future__ import annotations

import json
import math
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent))  # demo/ is not part of the installed package

from demo import models
from demo.evaluate import DATA, Judge
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.runtime.questions import is_right, read_questions

CHECKPOINTS = Path(__file__).parent.parent / "demo" / "checkpoints"
HUB = Path(__file__).parent.parent.parent / "shared" / "data" / "hub_configs"
TWIN = {"tiny-e": "google--gemma-4-E2B-it", "tiny-moe": "google--gemma-4-26B-A4B-it"}


@cache
def _judge(name: str) -> Judge:
    return Judge(CHECKPOINTS / name)


def _tensors(name: str) -> dict[str, tuple[list[int], str]]:
    with safe_open(CHECKPOINTS / name / "model.safetensors", "np") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (piece.get_shape(), piece.get_dtype()) for key, piece in slices.items()}


@pytest.mark.parametrize("name", models.NAMES)
def test_weights_are_small_and_in_bf16(name: str) -> None:
    assert (CHECKPOINTS / name / "model.safetensors").stat().st_size <= 12_000_000
    assert {dtype for _, dtype in _tensors(name).values()} == {"BF16"}


@pytest.mark.parametrize("name", models.NAMES)
def test_tensor_names_are_the_hubs(name: str) -> None:
    tensors = _tensors(name)
    config = json.loads((CHECKPOINTS / name / "config.json").read_text())
    text = config["text_config"]
    prefix = "model.language_model."
    assert "lm_head.weight" not in tensors
    assert tensors[f"{prefix}embed_tokens.weight"][0] == [text["vocab_size"], text["hidden_size"]]
    first_shared = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    for layer, kind in enumerate(text["layer_types"]):
        here = f"{prefix}layers.{layer}."
        assert tensors[f"{here}layer_scalar"][0] == [1]
        is_global = kind == "full_attention"
        head = text["global_head_dim"] if is_global else text["head_dim"]
        assert tensors[f"{here}self_attn.q_norm.weight"][0] == [head]
        assert (f"{here}self_attn.k_proj.weight" in tensors) == (layer < first_shared)
        has_value = layer < first_shared and not (text["attention_k_eq_v"] and is_global)
        assert (f"{here}self_attn.v_proj.weight" in tensors) == has_value
    if name == "tiny-e":
        assert f"{prefix}embed_tokens_per_layer.weight" in tensors
        assert "model.vision_tower.encoder.layers.0.mlp.down_proj.input_max" in tensors
        assert "model.audio_tower.layers.0.lconv1d.depthwise_conv1d.weight" in tensors
        narrow = tensors[f"{prefix}layers.0.mlp.gate_proj.weight"][0][0]
        assert tensors[f"{prefix}layers.{first_shared}.mlp.gate_proj.weight"][0][0] == 2 * narrow
    else:
        shape = [text["num_experts"], 2 * text["moe_intermediate_size"], text["hidden_size"]]
        assert tensors[f"{prefix}layers.0.experts.gate_up_proj"][0] == shape
        assert {"model.vision_tower.std_bias", "model.vision_tower.std_scale"} <= tensors.keys()
        assert not any("audio" in key for key in tensors)


@pytest.mark.parametrize("name", models.NAMES)
def test_blocks_of_32_divide_every_row_that_a_recipe_may_quantise(name: str) -> None:
    blocks = WeightFormat.parse("int4/32")
    rows = {key: shape for key, (shape, _) in _tensors(name).items() if "language_model" in key and len(shape) >= 2}
    assert len(rows) > 30
    for key, shape in rows.items():
        blocks.check_columns(shape[-1], "decoder.mlp", key)


@pytest.mark.parametrize("name", models.NAMES)
def test_config_has_the_hubs_keys(name: str) -> None:
    twin = HUB / TWIN[name] / "config.json"
    if not twin.exists():
        pytest.skip(f"the published config.json is not at hand ({twin})")
    ours, hubs = json.loads((CHECKPOINTS / name / "config.json").read_text()), json.loads(twin.read_text())
    # what the hub's files carry from transformers' base class and what means nothing here
    ballast = {"_name_or_path", "architectures", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"}
    ballast |= {"is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"}
    for part in ("text_config", "vision_config", "audio_config"):
        if hubs[part] is None:
            assert ours[part] is None
        else:
            assert set(ours[part]) == set(hubs[part]) - ballast, part
    assert set(ours) == set(hubs)


@pytest.mark.parametrize("name", models.NAMES)
def test_token_ids_are_those_of_the_names(name: str) -> None:
    config = json.loads((CHECKPOINTS / name / "config.json").read_text())
    vocab = json.loads((CHECKPOINTS / name / "tokenizer.json").read_text())["model"]["vocab"]
    assert config["image_token_id"] == vocab["<|image|>"]
    assert config["boa_token_id"] == vocab["<|audio>"]
    assert config["text_config"]["vocab_size"] == len(vocab) <= 4096
    stops = json.loads((CHECKPOINTS / name / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [vocab[token] for token in ("<eos>", "<turn|>", "<|tool_response>")]
    # a digit is one token and part of no other
    assert [token for token in vocab if re.search(r"\d", token) and not re.match(r"<0x|<unused", token)] == list(
        "0123456789"
    )


@pytest.mark.parametrize("name", models.NAMES)
def test_constants_that_training_does_not_move_matter(name: str) -> None:
    buffers = dict(_judge(name).model.named_buffers())
    scalars = {float(buffer) for key, buffer in buffers.items() if key.endswith("layer_scalar")}
    assert len(scalars) > 2
    clips = [float(buffer) for key, buffer in buffers.items() if key.endswith(("_min", "_max"))]
    assert all(map(math.isfinite, clips))
    assert bool(clips) == (name == "tiny-e")


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize(
    ("questions", "number", "budget"),
    [
        ("sum_thinking", 6, 280),
        ("tool_call", 6, 280),
        ("tool_answer", 4, 280),
        ("recall", 6, 280),
        ("picture_digits", 3, 70),
    ],
)
def test_held_out_questions_are_answered(name: str, questions: str, number: int, budget: int) -> None:
    chosen = sorted(read_questions(DATA / f"{questions}.jsonl"), key=lambda q: len(str(q.messages)))[:number]
    replies = _judge(name).answer(chosen, budget=budget)
    right = list(map(is_right, chosen, replies))
    # measured accuracies are 98 % and more: one slip in so few is possible on another machine, two are not
    assert sum(right) >= number - 1, [(q.wanted, r) for q, r, ok in zip(chosen, replies, right, strict=True) if not ok]
    if questions == "sum_thinking":
        assert all(reply.thought for reply in replies)


def test_spoken_digits_are_heard() -> None:
    chosen = read_questions(DATA / "speech.jsonl")[:6]
    replies = _judge("tiny-e").answer(chosen)
    assert sum(map(is_right, chosen, replies)) >= 5, [reply.text for reply in replies]


def test_deaf_model_says_so() -> None:
    question = read_questions(DATA / "speech.jsonl")[0]
    with pytest.raises(ValueError, match="has no audio tower"):
        _judge("tiny-moe").answer([question])
