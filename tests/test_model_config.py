"""A config.json resolves into the layer table of the reference, in both spellings, or names the key that is wrong."""

from __future__ import annotations

import copy
import json
import logging
import math
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import REPOSITORY
from transformers import AutoConfig

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.model import LayerConfig, ModelConfig
from gemma4_export.configs.models import load_model, model_names, name_of
from gemma4_export.configs.names import decoder_tensors, redundant_tensors

S, F = "sliding_attention", "full_attention"


# ---------------------------------------------------------------------------------------------------------------------
# The reference's tables as data


@dataclass(frozen=True, kw_only=True)
class Size:
    """One column of the table of released decoders."""

    layers: int
    hidden: int
    heads: int
    sliding_kv_heads: int
    global_kv_heads: int
    k_eq_v: bool
    intermediate: int
    shared_intermediate: int | None
    """MLP width of KV-shared layers, where there are any."""
    first_global: int
    """Then every (first_global + 1)-th: the list is spelt out below."""
    first_shared: int
    sliding_donor: int | None
    global_donor: int | None
    window: int
    max_positions: int
    ple: int
    experts: tuple[int, int, int] | None
    """number, top-k, width"""
    bidirectional_images: bool
    text_tensors: int
    """All tensors of the multimodal checkpoint less those of its vision and audio parts."""


# Tensors of the parts that are not the decoder: vision tower of the E sizes (16 layers with clip scalars) and its
# projector, of the large ones (27 layers, std_bias, std_scale), audio tower, 12B's embedders.
_E_VISION, _LARGE_VISION, _AUDIO, _UNIFIED = 16 * 41 + 2 + 1, 27 * 13 + 4 + 1, 12 * 62 + 7 + 1, 11

# The columns are E2B, E4B, 12B, 26B-A4B and 31B, as in the reference.
_ROWS: dict[str, tuple[Any, ...]] = {
    "layers": (35, 42, 48, 30, 60),
    "hidden": (1536, 2560, 3840, 2816, 5376),
    "heads": (8, 8, 16, 16, 32),
    "sliding_kv_heads": (1, 2, 8, 8, 16),
    "global_kv_heads": (1, 2, 1, 2, 4),
    "k_eq_v": (False, False, True, True, True),
    "intermediate": (6144, 10240, 15360, 2112, 21504),
    "shared_intermediate": (12288, 10240, None, None, None),
    "first_global": (4, 5, 5, 5, 5),
    "first_shared": (15, 24, 48, 30, 60),
    "sliding_donor": (13, 22, None, None, None),
    "global_donor": (14, 23, None, None, None),
    "window": (512, 512, 1024, 1024, 1024),
    "max_positions": (131072, 131072, 262144, 262144, 262144),
    "ple": (256, 256, 0, 0, 0),
    "experts": (None, None, None, (128, 8, 704), None),
    "bidirectional_images": (False, False, True, True, True),
    "text_tensors": (
        1951 - _E_VISION - _AUDIO,
        2076 - _E_VISION - _AUDIO,
        677 - _UNIFIED,
        1013 - _LARGE_VISION,
        1188 - _LARGE_VISION,
    ),
}
SIZES = {
    name: Size(**{key: values[column] for key, values in _ROWS.items()})
    for column, name in enumerate(("e2b", "e4b", "12b", "26b-a4b", "31b"))
}
GLOBAL_LAYERS = {
    "e2b": (4, 9, 14, 19, 24, 29, 34),
    "e4b": (5, 11, 17, 23, 29, 35, 41),
    "12b": (5, 11, 17, 23, 29, 35, 41, 47),
    "26b-a4b": (5, 11, 17, 23, 29),
    "31b": (5, 11, 17, 23, 29, 35, 41, 47, 53, 59),
}

# Parameters of full-size builds: embedding, PLE table, attention, MLP, PLE projections, experts, router, norms.
PARTS = ("embedding", "ple_table", "attention", "mlp", "ple", "experts", "router", "norms")
PARAMETERS = {
    "e2b": (402_653_184, 2_348_810_240, 278_412_288, 1_557_135_360, 41_341_696, 0, 0, 216_611),
    "e4b": (671_088_640, 2_818_572_288, 587_222_272, 3_303_014_400, 82_683_136, 0, 0, 432_682),
    "12b": (1_006_632_960, 0, 2_406_510_592, 8_493_465_600, 0, 0, 0, 741_168),
    "26b-a4b": (738_197_504, 0, 1_110_197_760, 535_265_280, 0, 22_837_985_280, 10_901_760, 594_206),
    "31b": (1_409_286_144, 0, 8_477_772_800, 20_808_990_720, 0, 0, 0, 1_295_676),
}

# hidden, MLP width, heads, KV heads sliding and global, window, backbone's hidden, ordered embeddings, max positions
DRAFTERS = {
    "E2B": (256, 2048, 4, 1, 1, 512, 1536, True, 131072),
    "12B": (1024, 8192, 16, 8, 1, 1024, 3840, False, 262144),
    "31B": (1024, 8192, 32, 16, 4, 1024, 5376, False, 262144),
}

# Folder of the real config.json -> the size, or the drafter, that it must resolve to.
HUB = {
    "google--gemma-4-E2B-it": "e2b",
    "google--gemma-4-E2B-it-qat-q4_0-unquantized": "e2b",
    "google--gemma-4-E4B": "e4b",
    "google--gemma-4-E4B-it": "e4b",
    "google--gemma-4-12B": "12b",
    "google--gemma-4-12B-it": "12b",
    "google--gemma-4-26B-A4B-it": "26b-a4b",
    "google--gemma-4-31B-it": "31b",
    "google--gemma-4-31B-it-qat-q4_0-unquantized": "31b",
}
HUB_DRAFTERS = {
    "google--gemma-4-E2B-it-assistant": "E2B",
    "google--gemma-4-E2B-it-qat-q4_0-unquantized-assistant": "E2B",
    "google--gemma-4-12B-it-assistant": "12B",
    "google--gemma-4-31B-it-assistant": "31B",
    "google--gemma-4-31B-it-qat-assistant": "31B",
}


def check_layers(config: ModelConfig, name: str) -> None:
    """Every layer of ``config`` is the one of the table."""
    size = SIZES[name]
    assert config.num_layers == size.layers
    for index, layer in enumerate(config.layers):
        is_global = index in GLOBAL_LAYERS[name]
        is_shared = index >= size.first_shared
        assert layer.index == index
        assert layer.layer_type == (F if is_global else S)
        assert (layer.num_heads, layer.head_dim) == (size.heads, 512 if is_global else 256)
        assert layer.num_kv_heads == (size.global_kv_heads if is_global else size.sliding_kv_heads)
        assert layer.sliding_window == (None if is_global else size.window)
        assert layer.is_sliding != is_global
        assert (layer.rope.theta, layer.rope.head_dim) == ((1e6, 512) if is_global else (1e4, 256))
        assert layer.rope.num_frequencies == (64 if is_global else 128)
        assert layer.kv_source == ((size.global_donor if is_global else size.sliding_donor) if is_shared else index)
        assert layer.owns_kv != is_shared
        assert layer.k_eq_v == (size.k_eq_v and is_global)
        assert layer.intermediate_size == (size.shared_intermediate if is_shared else size.intermediate)
        if size.experts is None:
            assert layer.moe is None
        else:
            assert layer.moe is not None
            assert (layer.moe.num_experts, layer.moe.top_k, layer.moe.intermediate_size) == size.experts


def check_model(config: ModelConfig, name: str) -> None:
    size = SIZES[name]
    check_layers(config, name)
    assert config.model_type == ("gemma4_unified" if name == "12b" else "gemma4")
    assert (config.vocab_size, config.hidden_size, config.rms_norm_eps) == (262144, size.hidden, 1e-6)
    assert config.final_logit_softcapping == 30.0
    assert config.max_position_embeddings == size.max_positions
    assert config.hidden_size_per_layer_input == size.ple
    assert config.has_per_layer_inputs == (size.ple > 0)
    assert config.vocab_size_per_layer_input == (262144 if size.ple else 0)
    assert config.has_bidirectional_images == size.bidirectional_images
    assert config.first_shared_layer == size.first_shared
    assert config.sliding_window == size.window
    assert config.rope(F) == config.layers[-1].rope
    assert config.drafter is None


def check_drafter(config: ModelConfig, name: str) -> None:
    hidden, width, heads, sliding_kv, global_kv, window, backbone, ordered, positions = DRAFTERS[name]
    assert [layer.layer_type for layer in config.layers] == [S, S, S, F]
    for layer in config.layers:
        is_global = layer.layer_type == F
        assert layer.kv_source is None
        assert not layer.owns_kv
        assert (layer.num_heads, layer.num_kv_heads) == (heads, global_kv if is_global else sliding_kv)
        assert layer.head_dim == layer.rope.head_dim == (512 if is_global else 256)
        assert (layer.intermediate_size, layer.moe) == (width, None)
        assert layer.sliding_window == (None if is_global else window)
    assert (config.hidden_size, config.vocab_size, config.hidden_size_per_layer_input) == (hidden, 262144, 0)
    assert (config.max_position_embeddings, config.final_logit_softcapping) == (positions, None)
    assert config.first_shared_layer == 0
    assert config.drafter is not None
    assert config.drafter.backbone_hidden_size == backbone
    assert (config.drafter.num_centroids, config.drafter.centroid_top_k) == (2048, 32)
    assert config.drafter.has_ordered_embeddings == ordered


def test_table_agrees_with_itself() -> None:
    for name, size in SIZES.items():
        assert GLOBAL_LAYERS[name] == tuple(range(size.first_global, size.layers, size.first_global + 1))
        assert GLOBAL_LAYERS[name][-1] == size.layers - 1
        if size.global_donor is not None:
            owners = range(size.first_shared)
            assert size.global_donor == max(index for index in owners if index in GLOBAL_LAYERS[name])
            assert size.sliding_donor == max(index for index in owners if index not in GLOBAL_LAYERS[name])


# ---------------------------------------------------------------------------------------------------------------------
# Shipped sizes


@pytest.mark.parametrize("name", SIZES)
def test_shipped_size_is_the_table(name: str) -> None:
    assert load_model(name).config == load_model(f"{name}-base").config
    check_model(load_model(name).config, name)


def test_short_names_mean_the_instruction_tuned_checkpoint() -> None:
    assert sorted(model_names()) == sorted([*SIZES, *(f"{name}-base" for name in SIZES)])
    for name in SIZES:
        hub_id = f"google/gemma-4-{name.upper()}"
        assert load_model(name).hub_id == f"{hub_id}-it"
        assert load_model(f"{name}-base").hub_id == hub_id
        assert load_model(f"{hub_id}-it").name == name
        assert load_model(hub_id.lower()).name == f"{name}-base"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("26b-a4", "did you mean '26b-a4b'?"), ("E2", "did you mean 'e2b'?"), ("llama", "known: 12b, 12b")],
)
def test_unknown_model_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(name)
    assert caught.value.cause == f"model {name!r} is not known"
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("google/gemma-4-E2B-it", "e2b"),
        ("gemma-4-26b-a4b", "26b-a4b-base"),  # a folder, cased as its owner likes
        ("someone/gemma-4-E2B-it-finetune", "gemma-4-E2B-it-finetune"),  # its structure is released, it is not
        ("my-model", "my-model"),
    ],
)
def test_only_a_released_checkpoint_takes_a_short_name(checkpoint: str, name: str) -> None:
    assert name_of(checkpoint) == name


def part_of(name: str) -> str:
    """The row of the reference's parameter table that counts a tensor."""
    if name == "embed_tokens.weight":
        return "embedding"
    if name == "embed_tokens_per_layer.weight":
        return "ple_table"
    if ".router." in name:
        return "router"
    if ".experts." in name:
        return "experts"
    if ".mlp." in name:
        return "mlp"
    if ".self_attn." in name:
        return "attention"  # q_norm and k_norm included
    return "ple" if "per_layer" in name else "norms"  # the two norms of PLE included


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_tensors_are_those_of_full_size_builds(name: str) -> None:
    specs = decoder_tensors(load_model(name).config)
    counts: Counter[str] = Counter()
    for spec in specs.values():
        counts[part_of(spec.name)] += spec.num_elements
        assert math.prod(spec.row_shape) == spec.num_elements == math.prod(spec.shape)
    assert tuple(counts[part] for part in PARTS) == PARAMETERS[name]
    assert len(specs) == SIZES[name].text_tensors


@pytest.mark.parametrize(("name", "expected"), [("e2b", 60), ("e4b", 54), ("12b", 0), ("26b-a4b", 0), ("31b", 0)])
def test_redundant_tensors_are_those_of_the_first_uploads(name: str, expected: int) -> None:
    config = load_model(name).config
    redundant = redundant_tensors(config)
    assert len(redundant) == expected
    assert not redundant.keys() & decoder_tensors(config).keys()
    for index in range(config.first_shared_layer, config.num_layers):
        layer = config.layers[index]
        at = f"layers.{index}.self_attn."
        assert redundant[f"{at}k_norm.weight"] == (layer.head_dim,)
        rows = layer.num_kv_heads * layer.head_dim
        assert redundant[f"{at}k_proj.weight"] == redundant[f"{at}v_proj.weight"] == (rows, config.hidden_size)


# ---------------------------------------------------------------------------------------------------------------------
# Real configs, and what transformers makes of them


def real_config(shared_data: Path, folder: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((shared_data / "hub_configs" / folder / "config.json").read_text("utf-8"))
    return values


@pytest.mark.parametrize(("folder", "name"), HUB.items())
def test_real_config_is_the_table_and_the_shipped_size(shared_data: Path, folder: str, name: str) -> None:
    config = ModelConfig.from_hf(real_config(shared_data, folder))
    check_model(config, name)
    assert config == load_model(name).config


@pytest.mark.parametrize(("folder", "name"), HUB_DRAFTERS.items())
def test_real_drafter_is_the_table(shared_data: Path, folder: str, name: str) -> None:
    check_drafter(ModelConfig.from_hf(real_config(shared_data, folder)), name)


def test_no_real_config_is_left_out(shared_data: Path) -> None:
    folders = {path.parent.name for path in (shared_data / "hub_configs").glob("*/config.json")}
    assert folders == HUB.keys() | HUB_DRAFTERS.keys()


def test_no_key_of_a_real_config_is_unknown(shared_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for folder in [*HUB, *HUB_DRAFTERS]:
            ModelConfig.from_hf(real_config(shared_data, folder))
    assert caplog.messages == []


def test_unknown_key_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    values = shipped("31b")
    values["text_config"] |= {"rope_scale": 2, "altup_num_inputs": 4}
    with caplog.at_level(logging.WARNING):
        ModelConfig.from_hf(values)
    assert caplog.messages == [
        "config.json: text_config keys not known to this version, ignored: altup_num_inputs, rope_scale"
    ]


@pytest.mark.parametrize("folder", [*HUB, *HUB_DRAFTERS])
def test_config_saved_again_by_transformers_is_the_same_model(shared_data: Path, folder: str, tmp_path: Path) -> None:
    source = shared_data / "hub_configs" / folder
    AutoConfig.from_pretrained(source).save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert not {"global_head_dim", "num_global_key_value_heads"} & again["text_config"].keys()
    assert "per_layer_config" in again["text_config"]
    assert ModelConfig.from_hf(again) == ModelConfig.from_hf(real_config(shared_data, folder))


@pytest.mark.parametrize("name", SIZES)
def test_shipped_config_saved_again_by_transformers_is_the_same_model(name: str, tmp_path: Path) -> None:
    values = shipped(name)
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    for part in (config, config.get_text_config()):  # multimodal, and as a text-only save has it
        again = json.loads(json.dumps(part.to_dict()))
        assert ModelConfig.from_hf(again) == load_model(name).config


@pytest.mark.parametrize("structure", tiny.STRUCTURES)
def test_tiny_checkpoints_are_the_same_model_in_every_spelling(structure: str) -> None:
    spellings = ({}, {"spelling": "resaved"}, {"text_only": True}, {"text_only": True, "spelling": "resaved"})
    folders = [tiny.checkpoint(structure, **arguments) for arguments in spellings]
    configs = [ModelConfig.from_hf(json.loads((folder / "config.json").read_text("utf-8"))) for folder in folders]
    assert configs == configs[:1] * len(configs)


def test_per_layer_config_may_name_one_of_the_two() -> None:
    values = resaved("e2b")  # E2B's global layers differ in head_dim only
    assert all(set(entry) == {"head_dim"} for entry in values["text_config"]["per_layer_config"].values())
    assert ModelConfig.from_hf(values) == load_model("e2b").config


def test_num_global_key_value_heads_acts_only_with_k_eq_v() -> None:
    values = shipped("31b")
    values["text_config"]["attention_k_eq_v"] = False
    config = ModelConfig.from_hf(values)
    assert {layer.num_kv_heads for layer in config.layers} == {16}
    assert not any(layer.k_eq_v for layer in config.layers)


def test_global_layers_only_need_no_window() -> None:
    values = shipped("31b")
    values["text_config"] |= {"layer_types": [F] * 60, "sliding_window": None}
    config = ModelConfig.from_hf(values)
    assert config.sliding_window is None
    assert config.rope(S) is None


# ---------------------------------------------------------------------------------------------------------------------
# Contradictions


def shipped(name: str) -> dict[str, Any]:
    """A released config as the hub spells it, to be edited."""
    path = REPOSITORY / "configs" / "models" / f"{name}.toml"
    config: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["config"]
    return config


def resaved(name: str) -> dict[str, Any]:
    """A released config with per_layer_config in place of the hub's global_* keys."""
    values = shipped(name)
    text = values["text_config"]
    override = {"head_dim": text.pop("global_head_dim")}
    if heads := text.pop("num_global_key_value_heads", None):
        override["num_key_value_heads"] = heads
    layers = [index for index, kind in enumerate(text["layer_types"]) if kind == F]
    text["per_layer_config"] = {f"{index:02}": dict(override) for index in layers}
    return values


def drafter() -> dict[str, Any]:
    """31B's drafter."""
    values = shipped("31b")
    text = values["text_config"]
    text |= {"num_hidden_layers": 4, "num_kv_shared_layers": 4, "layer_types": [S, S, S, F]}
    text |= {"hidden_size": 1024, "intermediate_size": 8192}
    del text["final_logit_softcapping"]
    return values | {
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": 5376,
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
        "use_ordered_embeddings": False,
    }


BASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: lambda name=name: shipped(name) for name in SIZES},  # type: ignore[misc]
    **{f"{name}-resaved": lambda name=name: resaved(name) for name in SIZES},  # type: ignore[misc]
    "drafter": drafter,
}
ABSENT = object()

# Base -> path of the key (in text_config, or /at the top), its new value, and the cause after "config.json: ", or
# from the colon on where it begins with the key.
CONTRADICTIONS: dict[str, list[tuple[str, Any, str]]] = {
    "e2b": [
        ("/model_type", "gemma3", "model_type 'gemma3' is no Gemma 4 model"),
        ("/model_type", ABSENT, "model_type None is no Gemma 4 model"),
        ("/model_type", ["gemma4"], "model_type ['gemma4'] is no Gemma 4 model"),
        ("/text_config", ABSENT, "gemma4 needs a text_config, found NoneType"),
        ("/text_config", [], "gemma4 needs a text_config, found list"),
        (
            "num_kv_shared_layers",
            31,
            "num_kv_shared_layers is 31 of 35 layers, so layer 4 must read an earlier full_attention layer's KV, "
            "and there is none",
        ),
        ("num_kv_shared_layers", 35, "num_kv_shared_layers is 35 of 35 layers: none owns KV"),
        ("num_kv_shared_layers", -1, ": expected at least 0, found -1"),
        ("hidden_size_per_layer_input", 0, "num_kv_shared_layers > 0 needs hidden_size_per_layer_input > 0, found 0"),
        ("vocab_size_per_layer_input", ABSENT, ": expected an integer, found nothing"),
    ],
    "31b": [
        ("hidden_size", ABSENT, ": expected an integer, found nothing"),
        ("hidden_size", "5376", ": expected an integer, found '5376'"),
        ("hidden_size", 5376.0, ": expected an integer, found 5376.0"),
        ("hidden_size", True, ": expected an integer, found True"),
        ("hidden_size", 0, ": expected at least 1, found 0"),
        ("rms_norm_eps", "1e-6", ": expected a number, found '1e-6'"),
        ("rms_norm_eps", -1, ": expected at least 0.0, found -1.0"),
        ("rms_norm_eps", math.nan, ": expected at least 0.0, found nan"),
        ("final_logit_softcapping", 0, ": expected at least 1e-06, found 0.0"),
        ("attention_k_eq_v", "yes", ": expected true or false, found 'yes'"),
        ("layer_types", ABSENT, ": expected a list, found nothing"),
        ("layer_types", [S, F], "num_hidden_layers is 60, layer_types lists 2"),
        ("num_hidden_layers", 59, "num_hidden_layers is 59, layer_types lists 60"),
        ("layer_types.7", "local", "layer_types[7]: unknown type 'local'"),
        ("layer_types.7", [S], "layer_types[7]: unknown type ['sliding_attention']"),
        ("layer_types.59", S, "the last layer must be full_attention, found 'sliding_attention'"),
        ("sliding_window", ABSENT, ": expected an integer, found nothing"),
        (
            "num_key_value_heads",
            12,
            "layer 0 (sliding_attention): num_attention_heads 32 is no multiple of its 12 KV heads",
        ),
        (
            "num_global_key_value_heads",
            5,
            "layer 5 (full_attention): num_attention_heads 32 is no multiple of its 5 KV heads",
        ),
        ("global_head_dim", ABSENT, "text_config has neither global_head_dim nor per_layer_config"),
    ],
    "26b-a4b": [
        ("top_k_experts", 129, "top_k_experts is 129, num_experts only 128"),
        ("moe_intermediate_size", ABSENT, ": expected an integer, found nothing"),
        ("num_experts", None, ": expected an integer, found nothing"),
    ],
    "12b": [
        ("hidden_activation", "silu", ": this version computes only 'gelu_pytorch_tanh', found 'silu'"),
        ("attention_bias", True, ": this version computes only False, found True"),
        ("use_bidirectional_attention", "all", ": this version computes only None, found 'all'"),
        ("tie_word_embeddings", False, ": this version computes only True, found False"),
        (
            "/tie_word_embeddings",
            False,
            "text_config.tie_word_embeddings: this version computes only True, found False",
        ),
        (
            "/quantization_config",
            {"quant_method": "gptq", "bits": 4},
            "quantization_config (gptq): quantised checkpoints are not read by this version",
        ),
        (
            "quantization_config",
            {"bits": 4},
            "quantization_config (unknown): quantised checkpoints are not read by this version",
        ),
        (
            "/quantization_config",
            "awq",
            "quantization_config (awq): quantised checkpoints are not read by this version",
        ),
        ("rope_parameters", ABSENT, "text_config.rope_parameters.sliding_attention: expected an object, found None"),
        (
            "rope_parameters",
            "default",
            "text_config.rope_parameters.sliding_attention: expected an object, found 'default'",
        ),
        ("rope_parameters.full_attention.rope_theta", "1e6", ": expected a number, found '1e6'"),
        ("rope_parameters.full_attention.rope_theta", -1.0, ": expected at least 1, found -1.0"),
        ("rope_parameters.full_attention.rope_type", "yarn", ": 'yarn' with partial_rotary_factor 0.25 is not known"),
        (
            "rope_parameters.full_attention.rope_type",
            "default",
            ": 'default' with partial_rotary_factor 0.25 is not known",
        ),
        ("rope_parameters.sliding_attention.factor", 8.0, ": not known to this version"),
        (
            "rope_parameters.full_attention.partial_rotary_factor",
            1.5,
            "text_config.rope_parameters.full_attention: "
            "partial_rotary_factor 1.5 of head_dim 512 is no number of pairs",
        ),
        ("rope_parameters.full_attention.partial_rotary_factor", "0.25", ": expected a number, found '0.25'"),
        (
            "rope_parameters.full_attention.partial_rotary_factor",
            0.001,
            "text_config.rope_parameters.full_attention: "
            "partial_rotary_factor 0.001 of head_dim 512 is no number of pairs",
        ),
        (
            "head_dim",
            255,
            "text_config.rope_parameters.sliding_attention: "
            "partial_rotary_factor 1.0 of head_dim 255 is no number of pairs",
        ),
    ],
    "31b-resaved": [
        ("per_layer_config", [], ": expected an object, found []"),
        ("per_layer_config.60", {"head_dim": 512}, ": names no layer of 60"),
        ("per_layer_config.last", {"head_dim": 512}, ": names no layer of 60"),
        ("per_layer_config.²", {"head_dim": 512}, ": names no layer of 60"),
        ("per_layer_config.05", 512, ": expected an object, found 512"),
        ("per_layer_config.05.num_attention_heads", 8, ": not known to this version"),
        ("per_layer_config.05.head_dim", "512", ": expected an integer, found '512'"),
        (
            "per_layer_config.05.head_dim",
            128,
            "layers of one type have several head_dims; one RoPE table per type is computed",
        ),
    ],
    "e4b-resaved": [
        (
            "per_layer_config.29.num_key_value_heads",
            4,
            "layer 29 reads the KV of layer 23, which has (num_kv_heads, head_dim) (2, 512), not (4, 512)",
        ),
    ],
    "drafter": [
        ("num_kv_shared_layers", 3, "a drafter shares all 4 layers, num_kv_shared_layers is 3"),
        ("/backbone_hidden_size", ABSENT, "backbone_hidden_size: a drafter needs an integer, found None"),
        ("/num_centroids", "2048", "num_centroids: a drafter needs an integer, found '2048'"),
    ],
}


def edit(values: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """``values`` with the key at ``path`` set, or removed when ``value`` is ABSENT."""
    values = copy.deepcopy(values)
    at: Any = values if path.startswith("/") else values["text_config"]
    *parents, last = path.removeprefix("/").split(".")
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    place = int(last) if isinstance(at, list) else last
    if value is ABSENT:
        del at[place]
    else:
        at[place] = value
    return values


@pytest.mark.parametrize(
    ("base", "path", "value", "cause"),
    [
        pytest.param(base, *case, id=f"{base}-{case[0]}={'absent' if case[1] is ABSENT else ascii(case[1])}"[:70])
        for base, cases in CONTRADICTIONS.items()
        for case in cases
    ],
)
def test_contradiction_is_named(base: str, path: str, value: object, cause: str) -> None:
    values = BASES[base]()
    ModelConfig.from_hf(values)  # right before the edit
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(edit(values, path, value))
    key = f"text_config.{path}" if cause.startswith(":") else ""
    assert caught.value.cause == f"config.json: {key}{cause}"
    assert caught.value.hint


def test_misspelt_types_get_the_nearest_as_hint() -> None:
    for path, value, hint in (
        ("/model_type", "gemma-4", "did you mean 'gemma4'?"),
        ("layer_types.3", "sliding_atention", "did you mean 'sliding_attention'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            ModelConfig.from_hf(edit(shipped("31b"), path, value))
        assert caught.value.hint == hint


def test_quantised_checkpoint_gets_the_name_of_the_other_one_as_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(shipped("e2b") | {"quantization_config": {"quant_method": "compressed-tensors"}})
    assert caught.value.hint == (
        "use the bf16 checkpoint it was made from (for Google's own: the name without -qat-… or -w4a16)"
    )


def paths_of(values: object, prefix: str = "/") -> list[str]:
    """Every key in a config, nested ones with dots; of a list its first entry."""
    items = list(values.items()) if isinstance(values, dict) else [("0", values[0])] if isinstance(values, list) else []
    return [name for key, value in items for name in (f"{prefix}{key}", *paths_of(value, f"{prefix}{key}."))]


BAD_VALUES = [ABSENT, None, True, -1, 0, 1, 0.5, math.nan, math.inf, 10**30, "", "x", [], [[]], {}, {"x": {}}, {"0": 1}]


@pytest.mark.parametrize("base", BASES)
def test_any_value_in_any_place_is_resolved_or_refused(base: str) -> None:
    values, causes = BASES[base](), []
    for path in paths_of(values):
        for value in BAD_VALUES:
            try:
                config = ModelConfig.from_hf(edit(values, path, value))
            except ConfigError as error:
                causes.append(error.cause)
            else:
                # What resolves is whole: nothing later may stumble over an odd value.
                assert all(isinstance(layer, LayerConfig) for layer in config.layers), (path, value)
                assert all(number > 0 for spec in decoder_tensors(config).values() for number in spec.shape), (
                    path,
                    value,
                )
    assert len(causes) > 300
    assert all(cause.startswith("config.json: ") and "\n" not in cause for cause in causes)
