"""Random weights for sizing: any slice alone, the same in every format and process, and shaped like a model's."""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, random_prompt
from safetensors.numpy import save_file

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.formats import BFLOAT16, BLOCKS, FLOAT32, FP8, INT8, WeightFormat
from gemma4_export.configs.names import EMBED_TOKENS
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.exporter.dummy import DummySource
from gemma4_export.exporter.quantize import QuantizedRows, dequantize
from gemma4_export.runtime import Gemma4

FORMATS = (FLOAT32, BFLOAT16, FP8, INT8, WeightFormat("int8", 32), *(WeightFormat("int4", block) for block in BLOCKS))
# Widths that all blocks divide, and none of whose rows begin at a multiple of the generator's 32 bytes by themselves.
WIDE = {"structure": "26b-a4b", "num_layers": 2, "hidden_size": 128, "intermediate_size": 384}
few = settings(max_examples=30, deadline=None, derandomize=True)


@functools.cache
def dummy(seed: int = 0) -> DummySource:
    return DummySource(small.model_config(**WIDE), seed=seed)


def values_of(rows: np.ndarray | QuantizedRows) -> np.ndarray:
    return dequantize(rows) if isinstance(rows, QuantizedRows) else rows.astype(np.float32)


@functools.cache
def whole(name: str) -> np.ndarray:
    return values_of(dummy().rows(name, FLOAT32, 0, dummy().specs[name].row_shape[0]))


def legal(name: str, form: WeightFormat) -> bool:
    spec = dummy().specs[name]
    return not form.block or (spec.role != "decoder.norm" and spec.row_shape[1] % form.block == 0)


@few
@given(st.data())
def test_any_slice_equals_the_same_rows_of_the_whole(data):
    name = data.draw(st.sampled_from(sorted(dummy().specs)))
    form = data.draw(st.sampled_from([form for form in FORMATS if legal(name, form)]))
    count = dummy().specs[name].row_shape[0]
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    np.testing.assert_array_equal(values_of(dummy().rows(name, form, start, stop)), whole(name)[start:stop])


@few
@given(st.integers(1, 40_000), st.sampled_from(FORMATS))
def test_slices_of_any_size_join_to_the_whole(max_bytes, form):
    for name in (EMBED_TOKENS, "layers.1.experts.down_proj", "layers.0.self_attn.q_proj.weight", "norm.weight"):
        if legal(name, form):
            parts = [values_of(rows) for rows in dummy().slices(name, form, max(max_bytes, 4 * 256))]
            np.testing.assert_array_equal(np.concatenate(parts), whole(name))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_format_holds_the_same_values(form):
    checked = 0
    for name, spec in dummy().specs.items():
        if legal(name, form):
            rows = dummy().rows(name, form, 0, min(200, spec.row_shape[0]))
            assert isinstance(rows, QuantizedRows) == (form.is_quantized and spec.role != "decoder.norm")
            np.testing.assert_array_equal(values_of(rows), whole(name)[:200], err_msg=name)
            checked += 1
    assert checked > 10


def test_values_are_small_codes_times_a_power_of_two():
    for name, spec in dummy().specs.items():
        values = whole(name)
        if spec.role == "decoder.norm":
            continue
        scale = np.abs(values).max() / 7
        assert np.log2(scale) == round(np.log2(scale))
        codes = values / scale
        found, counts = np.unique(codes, return_counts=True)
        assert set(found) <= set(range(-7, 8))
        if values.size >= 10_000:
            # Sixteen nibbles, of which two mean 0: 1/16 each and 2/16; six standard deviations of such a count.
            share = np.where(found == 0, 2, 1) / 16
            assert (np.abs(counts - share * values.size) < 6 * np.sqrt(share * values.size)).all()
        # A row times inputs of unit size has unit size, but for the rounding of the scale.
        assert 0.6 < values.std() * np.sqrt(spec.row_shape[1]) < 1.5


def test_norms_are_spread_and_those_behind_a_block_are_small():
    for name, spec in dummy().specs.items():
        if spec.role == "decoder.norm":
            values, level = whole(name), 0.02 if ".post_" in name else 1.0
            assert (np.abs(values / level - 1) < 0.14).all(), name
            assert values.size < 64 or np.unique(values).size > 20
            np.testing.assert_array_equal(values, torch.from_numpy(values).bfloat16().float().numpy())


def test_tensors_and_seeds_differ_from_each_other():
    first = {name: whole(name)[:50].tobytes() for name in dummy().specs}
    other = {name: values_of(dummy(1).rows(name, FLOAT32, 0, min(50, len(whole(name))))).tobytes() for name in first}
    assert len({*first.values(), *other.values()}) > 2 * len(first) - 8  # the layer scalars have 256 values only


DIGEST = """
import hashlib, json, sys
from gemma4_export.configs.formats import FLOAT32
from gemma4_export.configs.model import ModelConfig
from gemma4_export.exporter.dummy import DummySource
source, sums = DummySource(ModelConfig.from_hf(json.loads(sys.argv[1]))), hashlib.sha256()
for name in ("embed_tokens.weight", "layers.0.experts.gate_up_proj", "layers.1.router.scale", "norm.weight"):
    sums.update(source.rows(name, FLOAT32, 0, 1).tobytes())
print(sums.hexdigest()[:16])
"""


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_other_processes_and_other_days_draw_the_same(hash_seed):
    """The digest was made once; when it changes, so do the speeds that were measured with such weights."""
    found = subprocess.run(
        [sys.executable, "-c", DIGEST, json.dumps(small.hub_config(**WIDE))],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
    )
    assert found.stdout.strip() == "37bb326a9d4280f8"


def test_all_experts_of_deep_layers_are_used():
    """As many experts as 26B-A4B, and tokens for twelve choices of each; a uniform router would leave none out.

    A model this narrow spreads its tokens with post-norms of 1.0 as well: what those do at full width it cannot show.
    """
    hub = small.hub_config(
        "26b-a4b", num_layers=12, num_experts=128, top_k_experts=8, hidden_size=128, moe_intermediate_size=32
    )
    config = small.ModelConfig.from_hf(hub)
    used = experts_used(hub, DummySource(config))
    print(f"experts used by 192 tokens, layer by layer: {used}")
    assert min(used) >= 120
    assert max(used) <= 128


def experts_used(hub: dict[str, object], source: DummySource) -> list[int]:
    """Distinct experts that transformers chooses in each layer for one prompt."""
    arrays = {
        f"model.{name}": values_of(source.rows(name, FLOAT32, 0, spec.row_shape[0])).reshape(spec.shape)
        for name, spec in source.specs.items()
    }
    folder = Path(small.scratch_folder())
    (folder / "config.json").write_text(json.dumps(hub), encoding="utf-8")
    save_file(arrays, folder / "model.safetensors")
    reference, chosen = Oracle(folder), []
    routers = [module for name, module in reference.model.named_modules() if name.endswith(".router")]
    for router in routers:
        router.register_forward_hook(
            lambda module, inputs, outputs: chosen.append(outputs[0].topk(8).indices.unique().numel())
        )
    reference.logits(random_prompt(length=192, seed=0))
    assert len(chosen) == len(routers) == hub["num_hidden_layers"]
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Artifacts


@functools.cache
def built(recipe: str) -> Path:
    out = Path(small.scratch_folder()) / "artifact"
    source = DummySource(small.model_config("e2b", num_layers=2))
    small.build_artifact(source, out, recipe=recipe, has_dummy_weights=True, activations="fp32")
    return out


@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", "int4-quality", "int8-blocks"])
def test_artifacts_of_every_recipe_compute_the_same(recipe):
    model, plain = Gemma4.load(built(recipe)), Gemma4.load(built("fp32"))
    ids = random_prompt(length=20, seed=1)
    want = plain.forward(ids)
    assert np.abs(want).max() > 1
    assert np.abs(model.forward(ids) - want).max() < 2e-4
    for role, entry in model.artifact.manifest.census.items():
        assert entry.relative_error == 0, role
        is_codes = load_recipe(recipe).format_of(role).is_quantized
        assert entry.codes_kept == entry.codes == (entry.parameters if is_codes else 0)


def test_dummy_weights_are_stamped_and_said_on_load(caplog):
    with caplog.at_level(logging.WARNING):
        model = Gemma4.load(built("int4"))
    assert model.artifact.manifest.has_dummy_weights
    assert list(model.artifact.manifest.sources) == ["dummy weights, seed 0"]
    assert "random weights, for sizes and speed; what it says means nothing" in caplog.text
    reply = model.generate([{"role": "user", "content": "Hello"}], max_new_tokens=4)
    assert 1 <= len(reply.ids) <= 4


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"checkpoint": Path("x")}, "--weights dummy needs --model, the size to draw"),
        ({"model": "somebody/gemma-4-tuned"}, "--weights dummy knows released sizes only"),
        ({"model": "e3b"}, "model 'e3b' is not known"),
    ],
)
def test_dummy_weights_need_a_released_size(arguments, cause):
    from gemma4_export.exporter.commands.build import build

    with pytest.raises(ConfigError, match=cause):
        build(target="cpu", recipe="int4", weights="dummy", **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Memory

BUILD = r"""
import json, sys
from pathlib import Path
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.configs.target import load_target
from gemma4_export.exporter import build
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.exporter.dummy import DummySource

folder, kind = Path(sys.argv[1]), sys.argv[2]
config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
source = Checkpoint(folder) if kind == "checkpoint" else DummySource(config)
options = build.resolve_options(
    source.config, model_name="moderate", target=load_target("cpu"), recipe=load_recipe("int4")
)
build.build_artifact(source, options, folder / kind, lambda *progress: None)
"""
MODERATE = {  # 1.5 GB of bfloat16: tables of the released vocabulary, one of them wide, and two layers
    "structure": "e2b",
    "num_layers": 2,
    "hidden_size": 1024,
    "intermediate_size": 16384,
    "hidden_size_per_layer_input": 640,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["dummy", "checkpoint"])
def test_a_build_holds_slices_not_the_model(tmp_path, kind):
    hub = small.hub_config(**MODERATE)
    specs = small.decoder_tensors(small.ModelConfig.from_hf(hub))
    source_bytes = 2 * sum(spec.num_elements for spec in specs.values())
    assert source_bytes > 1.4e9
    (tmp_path / "config.json").write_text(json.dumps(hub), encoding="utf-8")
    small.write_small_tokenizer(tmp_path, vocab_size=262144)
    if kind == "checkpoint":
        write_sparse_checkpoint(tmp_path / "model.safetensors", specs)
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path), kind])
    peak = watch(child)
    seconds = time.monotonic() - started
    assert child.returncode == 0
    print(f"{kind}: {source_bytes / 1e9:.2f} GB of bf16 source in {seconds:.0f} s, {peak / 1e9:.2f} GB at the peak")
    assert peak <= 1.2e9
    assert peak > 1e8  # it was measured at all


def write_sparse_checkpoint(path: Path, specs: dict[str, small.TensorSpec]) -> None:
    """A bfloat16 checkpoint of zeros that takes no room on disk; zeros are read and rounded like anything else."""
    header, end = {}, 0
    for spec in specs.values():
        size = 2 * spec.num_elements
        header[f"model.{spec.name}"] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def watch(child: subprocess.Popen[bytes]) -> int:
    """Peak of the anonymous memory of a process and all its children, in bytes, looked at every 20 ms."""
    peak = 0
    done = threading.Event()
    waiter = threading.Thread(target=lambda: (child.wait(), done.set()))
    waiter.start()
    while not done.wait(0.02):
        peak = max(peak, sum(anonymous_bytes(process) for process in tree(child.pid)))
    waiter.join()
    return peak


def tree(root: int) -> list[int]:
    """A process and its children, their children included."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue  # it ended while we looked
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def anonymous_bytes(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0  # it ended while we looked
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
