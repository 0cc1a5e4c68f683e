"""What the figures rest on: llama.cpp runs the same model, and each side does the work that it is said to do."""

from __future__ import annotations

import json

import gguf
import numpy as np
import onnx_ir as ir
import pytest
import small
from artifacts import artifact, expected
from gguf import GGMLQuantizationType as Type
from measure import every_row_graph
from measure_llama import CONTEXT, NEW, PROMPT, recipe_with_block, speeds, summary
from random_checkpoint import released_hub_config, write_random_checkpoint
from random_gguf import type_of, write_random_gguf

from gemma4_export.configs.formats import FLOAT32
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.models import load_model
from gemma4_export.configs.names import decoder_tensors
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.exporter.dummy import DummySource
from gemma4_export.exporter.source import open_source
from gemma4_export.runtime import Gemma4
from gemma4_export.runtime.session_ort import OrtSession


@pytest.mark.parametrize("structure", ["e2b", "26b-a4b"])
def test_random_checkpoint_is_sharded_and_holds_the_dummy_weights(structure, tmp_path):
    hub = small.hub_config(structure)
    total = write_random_checkpoint(tmp_path, hub, shard_bytes=100_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    drawn = DummySource(ModelConfig.from_hf(hub))
    with open_source(tmp_path) as source:
        assert source.specs == drawn.specs
        assert total == sum(2 * spec.num_elements for spec in source.specs.values())
        for spec in source.specs.values():
            rows = np.concatenate(list(source.slices(spec.name, FLOAT32, 1 << 30)))
            np.testing.assert_array_equal(rows, drawn.rows(spec.name, FLOAT32, 0, spec.row_shape[0]), spec.name)


def test_released_config_is_that_of_the_model():
    assert ModelConfig.from_hf(released_hub_config("26b-a4b")) == load_model("26b-a4b").config


@pytest.mark.parametrize("structure", ["e2b", "26b-a4b"])
def test_random_gguf_holds_every_decoder_weight_of_the_model(structure, tmp_path):
    hub = small.hub_config(structure, hidden_size=256)
    config = ModelConfig.from_hf(hub)
    write_random_gguf(tmp_path / "model.gguf", config)
    (tmp_path / "config.json").write_text(json.dumps(hub), encoding="utf-8")
    with open_source(tmp_path) as source:  # refuses missing, unread and misshapen tensors, and wrong factors of RoPE
        assert source.config == config
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name.removeprefix("gemma4."): field.contents() for name, field in reader.fields.items()}
    layers = config.layers
    assert fields["feed_forward_length"] == [layer.intermediate_size for layer in layers]
    assert fields["attention.head_count_kv"] == [layer.num_kv_heads for layer in layers]
    assert fields["attention.sliding_window_pattern"] == [layer.is_sliding for layer in layers]
    assert fields["attention.shared_kv_layers"] == sum(not layer.owns_kv for layer in layers)
    assert fields["attention.key_length"] == max(layer.head_dim for layer in layers)
    assert fields["attention.key_length_swa"] == min(layer.head_dim for layer in layers)
    for tensor in reader.tensors:
        if tensor.tensor_type in (Type.Q4_0, Type.Q6_K):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            # Products of unit inputs have about unit size: nothing overflows, whatever the width.
            assert np.sqrt(np.square(values).mean() * values.shape[-1]) == pytest.approx(1, rel=0.1), tensor.name
    kinds = {spec.role: type_of(spec) for spec in decoder_tensors(config).values()}
    assert (kinds["decoder.mlp"], kinds["embeddings.tokens"], kinds["decoder.norm"]) == (Type.Q4_0, Type.Q6_K, Type.F32)


def test_every_row_graph_gives_the_same_logits_from_more_work():
    folder, ids = artifact("e2b", fresh_trace=False), expected("e2b").ids[:7]
    skipping, whole = Gemma4.load(folder), Gemma4.load(folder)
    path = every_row_graph(folder / "graphs" / "decoder.onnx")
    whole.decoder._session = OrtSession(path)
    for rows in ([6], [2, 0]):
        # Sums of other lengths may be split over other vectors: a few ulp of logits below 30.
        assert np.abs(whole.forward(ids, rows=rows) - skipping.forward(ids, rows=rows)).max() < 1e-4
    # The wanted rows are taken in one place, before the head; nothing in front of it knows of them.
    (rows,) = (value for value in ir.load(path).graph.inputs if value.name == "output_rows")
    assert [node.op_type for node, _ in rows.uses()] == ["Gather"]
    (gather,) = (node for node, _ in rows.uses())
    assert gather.outputs[0].uses()[0].node.op_type in ("Gemm", "Reshape")
    path.unlink()


def test_other_blocks_change_all_but_the_per_layer_table(tmp_path):
    recipe, usual = load_recipe(str(recipe_with_block(128, tmp_path))), load_recipe("int4")
    changed = {role: str(form) for role, form in recipe.formats.items() if form != usual.formats[role]}
    roles = ("decoder.attention", "decoder.mlp", "decoder.experts", "decoder.head", "embeddings.tokens")
    assert changed == dict.fromkeys(roles, "int4/128")


def test_speeds_count_the_tokens_of_each_measurement():
    asked = []

    def measure(prompt: list[int], new: int) -> dict[str, float]:
        asked.append((len(prompt), new))
        return {"prefill_s": 4.0, "decode_s": 2.0}

    assert speeds(measure) == (PROMPT / 4, NEW / 2)
    assert asked == [(PROMPT, 0), (CONTEXT, NEW)]


def test_summary_takes_ratios_within_rounds():
    # The machine halves its speed after the first round: medians of both sides cannot be divided by each other.
    found = {"ours": [(20.0, 3.0), (10.0, 1.5), (11.0, 1.4)], "llama.cpp": [(10.0, 2.0), (5.0, 1.0), (5.0, 1.0)]}
    assert summary(found) == {"ours": [11.0, 1.5, 2.0, 1.5], "llama.cpp": [5.0, 1.0, 1.0, 1.0]}
