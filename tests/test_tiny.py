"""The tiny checkpoints are what their description says, and the oracle agrees with itself."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from oracle import (
    MIN_BOUND,
    MIN_ROUTER_MARGIN,
    Oracle,
    _Float64,
    find_greedy_prompt,
    find_prompt,
    oracle,
    random_prompt,
)
from safetensors.torch import load_file
from tiny import STRUCTURES, checkpoint, hub_config, write_checkpoint
from transformers import AutoConfig, DynamicCache

HUB_CONFIGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "hub_configs"
RELEASED = {"e2b": "E2B-it", "e4b": "E4B-it", "12b": "12B-it", "26b-a4b": "26B-A4B-it", "31b": "31B-it"}
SHARING = ("e2b", "e4b")


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def text_tensors(folder: Path) -> dict[str, torch.Tensor]:
    prefix = "model.language_model."
    return {name.removeprefix(prefix): part for name, part in tensors(folder).items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------------------
# Spelling and storage


@pytest.mark.parametrize("structure", STRUCTURES)
def test_hub_and_resaved_configs_describe_one_model(structure):
    hub, resaved = checkpoint(structure), checkpoint(structure, spelling="resaved")
    assert read_config(hub) == hub_config(structure)
    assert "per_layer_config" not in read_config(hub)["text_config"]
    text = read_config(resaved)["text_config"]
    assert not {"global_head_dim", "num_global_key_value_heads"} & set(text)
    overridden = [int(layer) for layer in text["per_layer_config"]]
    assert overridden == [index for index, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    ids = random_prompt(length=24, seed=0)
    assert np.array_equal(oracle(hub).logits(ids), oracle(resaved).logits(ids))


@pytest.mark.parametrize(
    ("structure", "name", "chat"),
    [*((structure, name, True) for structure, name in RELEASED.items()), ("12b", "12B", False), ("e4b", "E4B", False)],
)
def test_hub_config_has_exactly_the_keys_of_the_released_file(structure, name, chat):
    path = HUB_CONFIGS / f"google--gemma-4-{name}" / "config.json"
    if not path.exists():
        pytest.skip(f"{path} is not here: the released configs live beside the repository")
    released, ours = json.loads(path.read_text(encoding="utf-8")), hub_config(structure, chat=chat)
    assert released.keys() == ours.keys()
    for part in ("text_config", "vision_config", "audio_config"):
        assert (released[part] is None) == (ours[part] is None)
        assert (released[part] or {}).keys() == (ours[part] or {}).keys()
        nulls, our_nulls = ({key for key, value in (c[part] or {}).items() if value is None} for c in (released, ours))
        assert nulls == our_nulls


@pytest.mark.parametrize("structure", STRUCTURES)
def test_text_only_save_computes_the_same(structure):
    folder = checkpoint(structure, text_only=True)
    assert all(name.startswith("model.") and "language_model" not in name for name in tensors(folder))
    ids = random_prompt(length=24, seed=0)
    assert np.array_equal(oracle(folder).logits(ids), oracle(checkpoint(structure)).logits(ids))


@pytest.mark.parametrize("structure", SHARING)
def test_redundant_tensors_of_shared_layers_change_nothing(structure):
    folder = checkpoint(structure, redundant_shared_kv=True)
    added = tensors(folder).keys() - tensors(checkpoint(structure)).keys()
    assert len(added) == 3 * hub_config(structure)["text_config"]["num_kv_shared_layers"]
    ids = random_prompt(length=24, seed=0)
    assert np.array_equal(oracle(folder).logits(ids), oracle(checkpoint(structure)).logits(ids))


def test_per_expert_storage_holds_the_same_experts():
    fused, split = text_tensors(checkpoint("26b-a4b")), text_tensors(checkpoint("26b-a4b", experts="per_expert"))
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in split)
    for index in (0, 15):
        expert = f"layers.1.experts.{index}"
        gate_up = torch.cat([split[f"{expert}.gate_proj.weight"], split[f"{expert}.up_proj.weight"]])
        assert torch.equal(gate_up, fused["layers.1.experts.gate_up_proj"][index])
        assert torch.equal(split[f"{expert}.down_proj.weight"], fused["layers.1.experts.down_proj"][index])
    ids = random_prompt(length=24, seed=0)
    folders = checkpoint("26b-a4b"), checkpoint("26b-a4b", experts="per_expert")
    assert np.array_equal(*(oracle(folder).logits(ids) for folder in folders))


def test_shards_hold_every_tensor_once_and_the_index_says_where():
    folder = checkpoint("e2b", shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    found = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == found
    assert len(set(found.values())) == 3
    whole = tensors(checkpoint("e2b"))
    assert whole.keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_bfloat16_checkpoint_is_the_rounded_float32_one():
    folder = checkpoint("e2b", dtype="bfloat16")
    stored = tensors(folder)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    exact = tensors(checkpoint("e2b"))
    assert stored.keys() == exact.keys()
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in stored.items())
    ids = random_prompt(length=24, seed=0)
    assert np.abs(oracle(folder).logits(ids) - oracle(checkpoint("e2b")).logits(ids)).max() > 10 * MIN_BOUND


def test_rounded_weights_are_the_matrices_only():
    rounded, exact = oracle(checkpoint("e2b"), weights="bfloat16").model, oracle(checkpoint("e2b")).model
    for (name, mine), theirs in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(mine, theirs.bfloat16().float() if theirs.ndim >= 2 else theirs), name


def test_same_arguments_give_the_same_bytes(tmp_path):
    def digests(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    first = digests(write_checkpoint("26b-a4b", tmp_path / "a"))
    assert first == digests(write_checkpoint("26b-a4b", tmp_path / "b"))
    assert first != digests(write_checkpoint("26b-a4b", tmp_path / "c", seed=1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_checkpoints_are_small(structure):
    assert sum(path.stat().st_size for path in checkpoint(structure).glob("*.safetensors")) < 3_000_000


def test_base_checkpoint_has_no_chat_files():
    folder = checkpoint("12b", chat=False)
    assert not (folder / "chat_template.jinja").exists()
    assert (checkpoint("12b") / "chat_template.jinja").exists()
    assert "eos_token_id" not in read_config(folder)
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == 1
    assert generation["suppress_tokens"] == [
        read_config(folder)["eoa_token_index"],
        read_config(folder)["eoi_token_id"],
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Structure


@pytest.mark.parametrize(("structure", "donors"), [("e2b", (3, 4)), ("e4b", (4, 2))])
def test_shared_layers_have_no_kv_and_donors_of_their_type(structure, donors):
    config = AutoConfig.from_pretrained(checkpoint(structure)).get_text_config()
    modes = config.kv_sharing_modes
    assert {index for index, mode in enumerate(modes) if mode == "store"} == set(donors)
    shared = [index for index, mode in enumerate(modes) if mode == "reuse"]
    assert {config.layer_types[index] for index in shared} == {"sliding_attention", "full_attention"}
    names = text_tensors(checkpoint(structure)).keys()
    owners = {int(name.split(".")[1]) for name in names if name.endswith("self_attn.k_proj.weight")}
    assert owners == set(range(len(modes))) - set(shared)


def test_double_wide_mlps_sit_on_shared_layers_of_e2b_only():
    for structure, factor in (("e2b", 2), ("e4b", 1)):
        config, parts = hub_config(structure)["text_config"], text_tensors(checkpoint(structure))
        widths = [len(parts[f"layers.{index}.mlp.gate_proj.weight"]) for index in range(config["num_hidden_layers"])]
        shared = config["num_kv_shared_layers"]
        assert set(widths[:-shared]) == {config["intermediate_size"]}
        assert set(widths[-shared:]) == {factor * config["intermediate_size"]}


@pytest.mark.parametrize("structure", ["12b", "26b-a4b", "31b"])
def test_global_layers_have_no_v_proj_and_fewer_kv_heads(structure):
    config, parts = hub_config(structure)["text_config"], text_tensors(checkpoint(structure))
    for index, kind in enumerate(config["layer_types"]):
        is_global = kind == "full_attention"
        assert (f"layers.{index}.self_attn.v_proj.weight" in parts) != is_global
        heads = config["num_global_key_value_heads" if is_global else "num_key_value_heads"]
        rows = heads * config["global_head_dim" if is_global else "head_dim"]
        assert len(parts[f"layers.{index}.self_attn.k_proj.weight"]) == rows
    assert config["num_global_key_value_heads"] < config["num_key_value_heads"]


def test_experts_sit_beside_the_dense_mlp_in_every_layer_and_all_are_used():
    config, parts = hub_config("26b-a4b")["text_config"], text_tensors(checkpoint("26b-a4b"))
    for index in range(config["num_hidden_layers"]):
        assert parts[f"layers.{index}.experts.gate_up_proj"].shape == (16, 2 * 32, 64)
        assert f"layers.{index}.mlp.gate_proj.weight" in parts
    reference, taken = oracle(checkpoint("26b-a4b")), []
    routers = [module for name, module in reference.model.named_modules() if name.endswith(".router")]
    hooks = [router.register_forward_hook(lambda _, __, outputs: taken.append(outputs[2])) for router in routers]
    reference.logits(random_prompt(length=64, seed=0))
    for hook in hooks:
        hook.remove()
    for rows in taken:  # [T, 8]
        assert {int(expert) for expert in rows.flatten()} == set(range(16))
        assert len({tuple(sorted(row.tolist())) for row in rows}) >= 8  # one set per sign pattern


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_tensor_is_at_its_identity(structure):
    for name, tensor in tensors(checkpoint(structure)).items():
        assert tensor.isfinite().all(), name
        assert not torch.isin(tensor, torch.tensor([0.0, 1.0])).any(), name
        if tensor.numel() > 1:
            assert tensor.std() > 0.05, name


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_text_tensor_matters(structure):
    reference = Oracle(checkpoint(structure))
    ids = find_prompt(reference, length=16)
    before, bound = reference.logits(ids), reference.bound(ids)
    inner = reference.model.model
    parts = getattr(inner, "language_model", inner).state_dict()
    assert parts.keys() == text_tensors(checkpoint(structure)).keys()
    # The final norm undoes whatever the last layer's scalar does.
    parts.pop(f"layers.{hub_config(structure)['text_config']['num_hidden_layers'] - 1}.layer_scalar")
    for name, tensor in parts.items():
        kept = tensor.clone()
        tensor.mul_(1 + 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
        difference = np.abs(reference.logits(ids) - before).max()
        tensor.copy_(kept)
        assert difference > 10 * bound, f"{name}: {difference} where the bound is {bound}"


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("changed", [{"sliding_window": 3}, {"sliding_window": 5}, {"hidden_activation": "silu"}])
def test_window_and_activation_matter(structure, changed, tmp_path):
    right = checkpoint(structure, text_only=True)
    (tmp_path / "model.safetensors").symlink_to(right / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(read_config(right) | changed), encoding="utf-8")
    ids = find_prompt(oracle(right), length=16)
    difference = np.abs(Oracle(tmp_path).logits(ids) - oracle(right).logits(ids)).max()
    assert difference > 100 * oracle(right).bound(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Oracle


@pytest.mark.parametrize("structure", STRUCTURES)
def test_logits_are_informative_and_not_saturated(structure):
    logits = oracle(checkpoint(structure)).logits(random_prompt(length=64, seed=0))
    assert logits.shape == (64, tiny.vocab_size())
    assert logits.dtype == np.float32
    assert logits.std() >= 1
    assert np.abs(logits).max() < 25


@pytest.mark.parametrize("structure", STRUCTURES)
def test_passes_with_cache_and_token_by_token_agree_with_the_full_pass(structure):
    reference = oracle(checkpoint(structure))
    ids = find_prompt(reference, length=24)
    full, bound = reference.logits(ids), reference.bound(ids)
    cached = reference.model(torch.tensor([ids]), use_cache=True).logits[0].numpy()
    assert np.abs(cached - full).max() <= bound
    cache = DynamicCache(config=reference.model.config.get_text_config())
    for position, token in enumerate(ids):
        step = reference.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, 0].numpy()
        assert np.abs(step - full[position]).max() <= bound


@pytest.mark.parametrize("structure", STRUCTURES)
def test_greedy_prompts_are_clear_and_reproducible(structure):
    reference = oracle(checkpoint(structure))
    ids, produced = find_greedy_prompt(reference, length=24, count=64)
    assert (ids, produced) == find_greedy_prompt(reference, length=24, count=64)
    assert len(produced) == 64
    assert len(set(produced)) >= 21
    logits = reference.logits(ids + produced[:-1])[len(ids) - 1 :]
    assert logits.argmax(axis=-1).tolist() == produced
    best = np.sort(logits, axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > 2 * reference.bound(ids + produced[:-1]) * 0.9
    assert not tiny.control_ids() & set(ids + produced)


def test_router_margin_counts_layers_and_is_infinite_without_experts():
    assert oracle(checkpoint("31b")).router_margin([5, 6]) == math.inf
    reference = oracle(checkpoint("26b-a4b"))
    ids = find_prompt(reference, length=100)
    assert MIN_ROUTER_MARGIN < reference.router_margin(ids) < 0.1
    # Causal: a token's decisions do not depend on later ones.
    assert reference.router_margin(ids) <= reference.router_margin(ids[:40])


@pytest.mark.parametrize("structure", ["e4b", "26b-a4b"])
def test_the_float64_twin_computes_in_float64_throughout(structure):
    reference = Oracle(checkpoint(structure))
    ids, seen = random_prompt(length=8, seed=0), set()

    def record(module, inputs, outputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seen.update(part.dtype for part in outputs if isinstance(part, torch.Tensor) and part.is_floating_point())

    for module in reference._double.modules():
        module.register_forward_hook(record)
    with _Float64():
        exact = reference._forward(reference._double, ids)
    assert seen == {torch.float64}
    difference = np.abs(reference.logits(ids) - exact.numpy()).max()
    assert 0 < difference < 1e-3
    assert reference.bound(ids) == max(2e-4, 4 * difference)


def test_media_placeholders_are_refused():
    folder = checkpoint("e2b")
    with pytest.raises(AssertionError, match="media placeholders"):
        oracle(folder).logits([5, read_config(folder)["image_token_id"]])
