"""Verification: untouched artifacts pass, a perturbed tensor is named by layer and role, a changed byte by its file.

The perturbation is noise of four times the bound relative to the tensor's own size, the smallest that must be found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import artifacts
import numpy as np
import pytest
import tiny
from oracle import oracle as transformers_oracle
from safetensors.numpy import load_file, save_file

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError, ConfigError
from gemma4_export.configs.evidence import BOUND_FLOOR, ORACLE_FILE
from gemma4_export.configs.manifest import MANIFEST_NAME, sealed
from gemma4_export.configs.models import load_model, model_names
from gemma4_export.configs.names import EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, expert_tensor
from gemma4_export.configs.recipe import load_recipe, recipe_names
from gemma4_export.configs.target import load_target
from gemma4_export.exporter import child as child_module
from gemma4_export.exporter import commands as exporter_commands
from gemma4_export.exporter import stored_weights
from gemma4_export.exporter.build import BuildOptions, kv_layout
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.exporter.child import Verdict, verify_in_child
from gemma4_export.exporter.oracle import record_oracle
from gemma4_export.exporter.quantize import dequantize, quantize
from gemma4_export.exporter.stored_weights import StoredWeights
from gemma4_export.exporter.weights import Placement, place_weights
from gemma4_export.plugins.common.drift import drift
from gemma4_export.runtime import commands
from gemma4_export.runtime import verify as verify_module
from gemma4_export.runtime.verify import clear_routes, kl_divergence, verify
from gemma4_export.runtime.verify_report import Report
from gemma4_export.runtime.verify_table import html_page, text_lines

torch = pytest.importorskip("torch")


def artifact(structure: str, recipe: str = "fp32") -> Path:
    return artifacts.artifact(structure, recipe=recipe, fresh_trace=False)


def placement(structure: str, recipe: str) -> Placement:
    with Checkpoint(tiny.checkpoint(structure)) as opened:
        return place_weights(opened.specs.values(), load_recipe(recipe), wide_scales=opened.wide_scales)


def recorded(structure: str, recipe: str = "fp32") -> dict[str, np.ndarray]:
    return load_file(artifact(structure, recipe) / ORACLE_FILE)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    def make(structure: str, recipe: str = "fp32") -> Path:
        return Path(shutil.copytree(artifact(structure, recipe), tmp_path / "artifact"))

    return make


def stamp(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed on purpose."""
    content = (folder / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, lambda values: values["files"].update({name: entry}))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text("utf-8"))
    del values["sha256"]
    edit(values)
    path.write_text(sealed(values), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Untouched


@pytest.mark.parametrize("recipe", ["fp32", "int4", pytest.param("bf16", marks=pytest.mark.full)])
@pytest.mark.parametrize("structure", tiny.STRUCTURES)
def test_an_untouched_artifact_passes(structure, recipe):
    report = verify(artifact(structure, recipe))
    assert report.passed, report.verdict
    assert report.whole_not_run is None
    (whole,) = report.whole
    # Prompts of 32 tokens in chunks of 7 through a window of 4: buffers moved several times.
    assert whole.compactions >= 3
    assert whole.bound is not None
    assert whole.greedy_agreement == "8 of 8 ids"
    assert whole.top1_agreement == 1
    assert {tap.layer for tap in report.taps} - {None} == set(range(len(tiny_layers(structure))))
    # Far below the bound: what 4 x the bound in the next tests means is then decided by the perturbation alone.
    assert max(tap.drift for tap in report.taps) < BOUND_FLOOR / 10


@pytest.mark.full
@pytest.mark.parametrize("recipe", sorted(set(recipe_names()) - {"fp32", "int4", "bf16", "fp8"}))
@pytest.mark.parametrize("structure", tiny.STRUCTURES)
def test_every_recipe_passes(structure, recipe):
    report = verify(artifact(structure, recipe))
    assert report.passed, report.verdict


def tiny_layers(structure: str) -> list[str]:
    config: Any = tiny.hub_config(structure)["text_config"]
    return list(config["layer_types"])


def test_int8_activations_are_reported_and_not_held():
    report = verify(artifact("e2b", "int4"), activations="int8")
    assert report.passed
    rounded = [tap.int8_drift for tap in report.taps if tap.role == "mlp"]
    assert min(rounded) > 10 * BOUND_FLOOR  # seen, so the layers did run with rounded activations
    assert [one.activations for one in report.whole] == ["fp32", "int8"]
    assert report.whole[0].bound is not None
    assert report.whole[1].bound is None
    assert report.whole[1].drift > 100 * report.whole[0].drift


# ---------------------------------------------------------------------------------------------------------------------
# Perturbed


def perturb(folder: Path, where: Placement, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> None:
    """Add noise of 4 x the bound times the tensor's root mean square to rows and columns of a float32 weight."""
    placed = where.weights[name]
    assert placed.format.kind == "float32"
    values = np.memmap(folder / placed.file, np.float32, "r+", placed.offset, placed.row_shape)
    noise = np.random.default_rng(0).standard_normal(placed.row_shape).astype(np.float32)
    scale = np.float32(4 * BOUND_FLOOR * np.sqrt(np.mean(np.square(values))))
    values[rows, columns] += (scale * noise)[rows, columns]
    values.flush()
    stamp(folder, placed.file)


PERTURBED = [
    ("e2b", "layers.3.self_attn.k_proj.weight", 3, "attention"),  # a donor: layers that read its KV stay inside
    ("e2b", "layers.6.self_attn.q_proj.weight", 6, "attention"),  # reads another layer's KV
    ("e2b", "layers.7.mlp.down_proj.weight", 7, "mlp"),
    ("e2b", "layers.0.mlp.gate_proj.weight", 0, "mlp"),
    ("e2b", "layers.2.per_layer_input_gate.weight", 2, "ple"),
    ("e2b", "layers.8.per_layer_projection.weight", 8, "ple"),
    ("e4b", "layers.4.self_attn.v_proj.weight", 4, "attention"),
    ("12b", "layers.5.self_attn.k_proj.weight", 5, "attention"),  # values too: K = V
    ("31b", "layers.1.input_layernorm.weight", 1, "attention"),
    ("31b", "layers.4.self_attn.o_proj.weight", 4, "attention"),
    ("31b", "layers.2.post_feedforward_layernorm.weight", 2, "mlp"),
    ("26b-a4b", "layers.1.mlp.up_proj.weight", 1, "mlp"),
    ("26b-a4b", "layers.2.router.proj.weight", 2, "experts"),
    ("26b-a4b", "layers.0.router.per_expert_scale", 0, "experts"),
    ("26b-a4b", "layers.4.post_feedforward_layernorm.weight", 4, "output"),
    ("26b-a4b", "layers.3.layer_scalar", 3, "output"),
    ("26b-a4b", expert_tensor("layers.3.experts.gate_up_proj", 5), 3, "experts"),
    ("26b-a4b", expert_tensor("layers.1.experts.down_proj", 14), 1, "experts"),
]


@pytest.mark.parametrize(("structure", "name", "layer", "role"), PERTURBED)
def test_a_perturbed_tensor_is_named_by_layer_and_role(copy, structure, name, layer, role):
    folder = copy(structure)
    perturb(folder, placement(structure, "fp32"), name)
    report = verify(folder, level="layers")
    assert not report.passed
    assert (report.first_outside.layer, report.first_outside.role) == (layer, role)
    assert {tap.layer for tap in report.taps if not tap.is_inside} == {layer}
    assert f"layer {layer}, {role}: " in report.verdict


def test_a_perturbed_row_of_the_per_layer_table_is_named(copy):
    folder, where = copy("e2b"), placement("e2b", "fp32")
    token, width = int(recorded("e2b")["ids"][1, 20]), 32
    perturb(folder, where, EMBED_TOKENS_PER_LAYER, slice(token, token + 1), slice(5 * width, 6 * width))
    report = verify(folder, level="layers")
    outside = [tap.name for tap in report.taps if not tap.is_inside]
    assert outside == ["layers.5.ple_rows"]
    assert report.first_outside.role == "ple"


def test_a_perturbed_projection_of_per_layer_inputs_is_named_with_the_layer_that_reads_it(copy):
    folder, width = copy("e4b"), 32
    perturb(folder, placement("e4b", "fp32"), "per_layer_model_projection.weight", slice(6 * width, 7 * width))
    report = verify(folder, level="layers")
    assert [tap.name for tap in report.taps if not tap.is_inside] == ["layers.6.ple_inputs"]


@pytest.mark.parametrize("is_in_a_prompt", [True, False])
def test_a_perturbed_row_of_the_token_table_is_named(copy, is_in_a_prompt):
    """The head reads the same bytes: a token that no prompt holds still has its logit."""
    folder, where = copy("12b"), placement("12b", "fp32")
    seen = set(recorded("12b")["ids"].ravel().tolist())
    token = next(row for row in range(tiny.vocab_size()) if (row in seen) == is_in_a_prompt)
    perturb(folder, where, EMBED_TOKENS, slice(token, token + 1))
    report = verify(folder, level="layers")
    assert report.first_outside.role == ("embedding" if is_in_a_prompt else "head")
    assert report.first_outside.layer is None
    assert not any(tap.layer is not None and not tap.is_inside for tap in report.taps)


def test_one_changed_code_of_an_int4_expert_is_named(copy):
    folder, where = copy("26b-a4b", "int4"), placement("26b-a4b", "int4")
    placed = where.weights[expert_tensor("layers.2.experts.down_proj", 9)]
    with (folder / placed.file).open("r+b") as file:
        file.seek(placed.offset)
        byte = file.read(1)[0]
        file.seek(placed.offset)
        file.write(bytes([byte ^ 0x08]))  # the lower code moves by half its range
    stamp(folder, placed.file)
    report = verify(folder, level="layers")
    assert (report.first_outside.layer, report.first_outside.role) == (2, "experts")


def test_a_broken_decoder_graph_fails_the_whole_model_though_every_layer_passes(copy):
    """The per-layer graphs are not the decoder's: what joins the layers is held by the whole pass alone."""
    folder = copy("31b")
    graph = folder / "graphs/decoder.onnx"
    import onnx

    model = onnx.load(graph, load_external_data=False)
    adds = [node for node in model.graph.node if node.op_type == "Add"]
    adds[2].input[1] = adds[2].input[0]  # a residual is added to itself
    onnx.save(model, graph)
    stamp(folder, "graphs/decoder.onnx")
    report = verify(folder)
    assert report.first_outside is None
    assert not report.passed
    assert report.verdict.startswith("failed: every layer passes alone, the whole model drifts")
    assert verify(folder, level="layers").passed


def test_any_changed_byte_is_named_by_its_file(copy):
    folder = copy("e2b", "int4")
    names = [*Artifact.open(folder).manifest.files, MANIFEST_NAME]
    assert len(names) > 15
    for name in names:
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        (folder / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(ArtifactError, match=re.escape(name)):
            verify(folder)
        (folder / name).write_bytes(content)
    assert verify(folder, level="layers").passed


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


@pytest.mark.parametrize("structure", tiny.STRUCTURES)
def test_the_oracle_computes_what_transformers_does(structure):
    reference, mine = transformers_oracle(tiny.checkpoint(structure)), recorded(structure)
    for ids, logits in zip(mine["ids"].tolist(), mine["logits"], strict=True):
        assert len(ids) == 32
        wanted = reference.logits(ids)[-len(logits) :]
        assert np.abs(logits - wanted).max() <= reference.bound(ids)
    produced, margin = reference.greedy(mine["ids"][0].tolist(), 8)
    assert mine["greedy_ids"].tolist() == produced
    assert margin == pytest.approx(
        float(mine["greedy_margins"].min()), abs=2 * reference.bound(mine["ids"][0].tolist())
    )


@pytest.mark.parametrize("recipe", ["bf16", "int4", "int8", "int8-blocks"])
def test_stored_weights_are_decoded_to_what_was_rounded(recipe):
    """Held to the canonical codes, which know nothing of any backend's packing."""
    where = placement("26b-a4b", recipe)
    stored = StoredWeights(artifact("26b-a4b", recipe), where)
    with Checkpoint(tiny.checkpoint("26b-a4b")) as opened:
        for weight in where.stored:
            form = weight.placed.format
            rows = np.concatenate(list(opened.slices(weight.source, form, 1 << 20))).astype(np.float32)
            if form.is_quantized:
                rows = dequantize(quantize(rows, form, weight.name))
            elif form.kind == "bfloat16":
                rows = torch.from_numpy(rows).bfloat16().float().numpy()
            found = stored.whole(weight.name, torch.float32).numpy().reshape(rows.shape)
            assert np.array_equal(found, rows), weight.name


def test_the_oracle_never_holds_more_than_a_slice(monkeypatch, tmp_path):
    sizes: list[int] = []
    rows = StoredWeights.rows

    def counted(self: StoredWeights, name: str, start: int, stop: int, dtype: Any) -> Any:
        values = rows(self, name, start, stop, dtype)
        sizes.append(values.numel())
        return values

    monkeypatch.setattr(StoredWeights, "rows", counted)
    monkeypatch.setattr(stored_weights, "_SLICE_VALUES", 256)
    folder, where = artifact("26b-a4b"), placement("26b-a4b", "fp32")
    (tmp_path / "graphs").symlink_to(folder / "graphs")
    before = recorded("26b-a4b")
    with Checkpoint(tiny.checkpoint("26b-a4b")) as opened:
        record_oracle(opened.config, where, tmp_path, torch.from_numpy(before["ids"]), identity="x")
    assert max(sizes) <= 256
    after = load_file(tmp_path / ORACLE_FILE)
    assert set(after) == set(before)
    for name, values in after.items():
        # float64 sums in another order round to the same float32, but for the odd last bit.
        if not name.startswith("rounding."):
            np.testing.assert_allclose(values, before[name], rtol=2**-22, atol=1e-12)


def replace_oracle(folder: Path, edit: Callable[[dict[str, np.ndarray]], object], **metadata: str) -> None:
    path = folder / ORACLE_FILE
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        known = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=known | metadata)
    stamp(folder, ORACLE_FILE)


def test_whoever_may_read_the_artifact_may_read_its_oracle():
    modes = {(artifact("e2b") / name).stat().st_mode for name in (ORACLE_FILE, MANIFEST_NAME)}
    assert len(modes) == 1


def test_an_oracle_of_another_model_is_refused(copy):
    folder = copy("12b")
    shutil.copy(artifact("31b") / ORACLE_FILE, folder / ORACLE_FILE)
    stamp(folder, ORACLE_FILE)
    with pytest.raises(ArtifactError, match="recorded from other weights than 12b as fp32 has\nhint: build"):
        verify(folder)


def test_an_oracle_of_another_recipe_is_refused(copy):
    folder = copy("12b", "int4")
    shutil.copy(artifact("12b", "int8") / ORACLE_FILE, folder / ORACLE_FILE)
    stamp(folder, ORACLE_FILE)
    with pytest.raises(ArtifactError, match="recorded from other weights"):
        verify(folder)


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda tensors: tensors.pop("layers.2.mlp"), "holds no layers.2.mlp"),
        (lambda tensors: tensors.pop("rounding.logits"), "holds no rounding.logits"),
        (lambda tensors: tensors.update(ids=tensors["ids"].ravel()), "ids: expected [prompts, tokens], found [64]"),
        (
            lambda tensors: tensors.update({"layers.1.key": tensors["layers.1.key"][:, :, 1:].copy()}),
            "layers.1.key: expected [2, 2, 32, 16] (manifest.json), found [2, 2, 31, 16]",
        ),
    ],
)
def test_an_oracle_that_misses_something_is_refused(copy, edit, cause):
    folder = copy("12b")
    replace_oracle(folder, edit)
    with pytest.raises(ArtifactError, match=re.escape(f"{ORACLE_FILE}: {cause}\nhint: build the artifact again")):
        verify(folder)


def test_a_damaged_oracle_is_refused(copy):
    folder = copy("12b")
    (folder / ORACLE_FILE).write_bytes((folder / ORACLE_FILE).read_bytes()[:100])
    stamp(folder, ORACLE_FILE)
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        verify(folder)


def test_a_manifest_without_a_layers_graph_is_refused(copy):
    folder = copy("12b")
    edit_manifest(folder, lambda values: values["verify"]["graphs"].pop("layers.3"))
    with pytest.raises(ArtifactError, match=r"verify.graphs has no layers.3, the model 6 layers\nhint: build"):
        verify(folder)


def test_a_backend_that_the_artifact_lacks_is_refused():
    with pytest.raises(
        ConfigError, match="--backend ort-cuda: this artifact was packed for ort-cpu\nhint: --backend ort"
    ):
        verify(artifact("12b"), backend="ort-cuda")


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def test_drift_is_relative_to_the_row_and_takes_the_largest():
    wanted = np.array([[3.0, -4.0], [0.3, 0.4], [0.0, 0.0]])
    rms = np.sqrt(12.5)
    assert drift(wanted, wanted) == 0
    assert drift(wanted + np.array([[0.1, 0], [0, 0], [0, 0]]), wanted) == pytest.approx(0.1 / rms)
    assert drift(wanted + np.array([[0.1, 0], [0, 0.1], [0, 0]]), wanted) == pytest.approx(1 / rms)
    # A row of zeros has no size of its own.
    assert drift(wanted + np.array([[0, 0], [0, 0], [0.25, 0]]), wanted) == 0.25
    assert drift(wanted[:0], wanted[:0]) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_drift_of_what_is_no_number_is_infinite(value):
    assert drift(np.array([[1.0, value]]), np.ones((1, 2))) == np.inf


def test_only_tokens_whose_routes_rounding_cannot_change_are_compared():
    logits = np.zeros((1, 3, 4))
    logits[0] = [[2, 1, 0, -1], [2, 1, 0.999, -1], [2, 1, 1, 1]]
    assert clear_routes(logits, 2, 1e-4).tolist() == [[True, True, False]]
    assert clear_routes(logits, 2, 1e-3).tolist() == [[True, False, False]]
    assert clear_routes(logits, 4, 1.0).all()  # all experts are taken, whatever their logits


def test_a_token_near_a_tie_is_left_out_and_counted(monkeypatch):
    def unclear(logits: np.ndarray, top_k: int, bound: float) -> np.ndarray:
        rows = np.ones(logits.shape[:-1], bool)
        rows[0, 3] = False
        return rows

    monkeypatch.setattr(verify_module, "clear_routes", unclear)
    report = verify(artifact("26b-a4b"), level="layers")
    taps = {tap.name: tap for tap in report.taps}
    assert (taps["layers.2.experts"].rows, taps["layers.2.experts"].rows_near_a_tie) == (63, 1)
    assert (taps["layers.2.mlp"].rows, taps["layers.2.mlp"].rows_near_a_tie) == (64, 0)
    assert any("1 tokens a layer whose last expert" in line for line in report.not_covered)


def test_a_layer_of_which_no_token_can_be_judged_does_not_pass(monkeypatch):
    monkeypatch.setattr(verify_module, "clear_routes", lambda logits, *_: np.zeros(logits.shape[:-1], bool))
    report = verify(artifact("26b-a4b"), level="layers")
    assert not report.passed
    cause = "not compared: every token, all 64, is too near a tie between two experts"
    assert report.verdict == f"failed: layer 0, experts: layers.0.experts {cause}"
    assert "no token / " in next(line for line in text_lines(report) if line.startswith("layer 0"))
    assert "<td>no token</td>" in html_page(report)


def test_kl_divergence_of_known_distributions():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    wanted = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert kl_divergence(np.log(p) + 3, np.log(q) - 7) == pytest.approx(wanted)
    assert kl_divergence(np.log(p), np.log(p)) == 0


def test_the_whole_model_is_left_out_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(verify_module, "available_bytes", lambda: 1 << 20)
    report = verify(artifact("12b"))
    assert report.whole == []
    assert re.fullmatch(r"it needs 0\.\d GB of memory, 0\.0 GB are free", report.whole_not_run)
    assert report.passed
    assert any("the whole model was not run" in line for line in report.not_covered)


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def outside(structure: str, folder: Path) -> Report:
    perturb(folder, placement(structure, "fp32"), "layers.1.mlp.up_proj.weight")
    return verify(folder, level="layers")


def test_a_page_needs_nothing_from_elsewhere_and_marks_what_is_outside(copy):
    good, bad = verify(artifact("e2b")), outside("e2b", copy("e2b"))
    for report in (good, bad):
        page = html_page(report)
        assert not re.search(r"https?:|src=|href=|<script|@import|url\(", page)
        assert page.count("<polyline") == 2 * 4  # drift and bound of attention, mlp, ple and output
        points = re.findall(r'points="([^"]+)"', page)
        assert all(len(line.split()) == 9 for line in points)
        assert page.count("<tr>") + page.count('<tr class="outside">') == len(report.taps) + 1
        assert all(tap.name in page for tap in report.taps)
    assert html_page(good).count("<circle") == 1  # the legend's
    assert html_page(bad).count("<circle") >= 2
    assert "layer 1, mlp" in html_page(bad)


def test_the_picture_names_its_axes_and_every_line(copy):
    picture = re.search(r"<svg.*</svg>", html_page(outside("e2b", copy("e2b"))), re.DOTALL)
    drawn = ElementTree.fromstring(picture.group())
    words = ["".join(text.itertext()) for text in drawn.iter("text")]
    roles = ["attention", "mlp", "ple", "output"]
    assert words[:6] == [*roles, "its bound", "outside"]
    assert {"layer", "drift: largest error / rms of its row", *map(str, range(9))} <= set(words)
    # the line beside each role in the legend has the colour of that role's two lines below
    named = [line.get("stroke") for line in drawn.iter("line")][:4]
    assert [line.get("stroke") for line in drawn.iter("polyline")] == [colour for colour in named for _ in range(2)]
    assert len(set(named)) == 4
    width = float(drawn.get("viewBox").split()[2])
    assert all(0 <= float(text.get("x")) <= width for text in drawn.iter("text"))


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (4, "2 prompts of 32 tokens, longer than the sliding window of 4"),
        (32, "2 prompts of 32 tokens, within the sliding window of 32"),
        (None, "2 prompts of 32 tokens; no layer slides"),
    ],
)
def test_the_lengths_that_were_verified_are_said(window, said):
    report = verify(artifact("12b"), level="layers")
    assert report.sliding_window == 4
    told = dataclasses.replace(report, sliding_window=window)
    assert said in text_lines(told)
    assert said in html_page(told)
    assert json.loads(told.to_json())["sliding_window"] == window


@pytest.mark.parametrize("name", model_names())
def test_the_cache_that_a_layer_reads_is_its_kv_source(name):
    config = load_model(name).config
    options = BuildOptions(
        model_name=name,
        target=load_target("cpu"),
        recipe=load_recipe("int4"),
        activations="int8",
        has_dummy_weights=True,
        context=128,
        chunk=8,
        float_type="float32",
        experts="plugin",
    )
    layout = kv_layout(config, options)
    for layer in config.layers:
        kind = "sliding" if layer.is_sliding else "global"
        assert layout.cache_read_by(layer.index, kind).layer == layer.kv_source


def test_text_of_a_model_name_cannot_become_markup(copy):
    folder = copy("12b")
    edit_manifest(folder, lambda values: values["model"].update(name="<script>alert(1)</script>"))
    assert "<script" not in html_page(verify(folder, level="layers"))


def test_a_table_has_a_line_per_layer_and_marks_what_is_outside(copy):
    lines = text_lines(outside("31b", copy("31b")))
    assert sum(line.startswith("layer ") for line in lines) == 6
    assert [line.split()[1] for line in lines if line.startswith("layer ") and "!" in line] == ["1"]
    assert lines[-1].startswith("failed: layer 1, mlp: layers.1.mlp drifts")


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["gemma4-run", "verify", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    return int(ended.value.code or 0), *capsys.readouterr()


def test_the_command_writes_its_report_into_the_artifact(copy, capsys, monkeypatch, tmp_path):
    folder = copy("12b", "int4")
    code, out, _ = run(capsys, monkeypatch, folder, "--html", tmp_path / "page.html")
    assert code == 0
    (path,) = (folder / "verify").glob("*.json")
    assert path.name.startswith("ort-cpu-")
    saved = json.loads(path.read_text("utf-8"))
    assert saved["passed"] is True
    assert saved["first_outside"] is None
    assert saved["manifest_sha256"] == hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    assert out.splitlines()[-2].startswith("passed: ")
    assert "<svg" in (tmp_path / "page.html").read_text("utf-8")
    Artifact.open(folder, check="full")  # a report beside the files of the manifest changes nothing


def test_a_report_that_cannot_be_saved_is_shown_all_the_same(copy, capsys, monkeypatch):
    folder = copy("12b", "int4")
    (folder / "verify").write_text("no folder")
    code, out, err = run(capsys, monkeypatch, folder, "--level", "layers")
    assert code == 1
    assert out.splitlines()[-1].startswith("passed: ")
    assert err.splitlines()[-1] == f"error: {folder / 'verify'}: File exists"


def test_the_command_fails_with_exit_code_1(copy, capsys, monkeypatch):
    folder = copy("31b")
    outside("31b", folder)
    code, out, _ = run(capsys, monkeypatch, folder, "--json", "--level", "layers")
    report = json.loads(out)
    assert code == 1
    assert report["passed"] is False
    assert report["first_outside"] == "layers.1.mlp"
    (path,) = (folder / "verify").glob("*.json")
    assert json.loads(path.read_text("utf-8"))["passed"] is False


def test_the_command_refuses_a_backend_with_exit_code_2(copy, capsys, monkeypatch):
    folder = copy("12b")
    code, out, err = run(capsys, monkeypatch, folder, "--backend", "tensorrt")
    assert (code, out) == (2, "")
    assert err.endswith("error: --backend tensorrt: this artifact was packed for ort-cpu\nhint: --backend ort-cpu\n")
    assert not (folder / "verify").exists()


def test_a_drift_that_is_no_number_is_null_in_json(copy):
    folder, where = copy("31b"), placement("31b", "fp32")
    placed = where.weights["layers.2.mlp.up_proj.weight"]
    values = np.memmap(folder / placed.file, np.float32, "r+", placed.offset, placed.row_shape)
    values[3, 3] = np.nan
    values.flush()
    stamp(folder, placed.file)
    report = verify(folder, level="layers")
    assert (report.first_outside.layer, report.first_outside.role) == (2, "mlp")
    saved = json.loads(report.to_json())
    assert next(tap for tap in saved["taps"] if tap["name"] == "layers.2.mlp")["drift"] is None
    assert "<svg" in html_page(report)


# ---------------------------------------------------------------------------------------------------------------------
# In a build, and in inspect


def exporter_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["gemma4-export", *map(str, words)])
    with artifacts.traces(fresh=False), pytest.raises(SystemExit) as ended:
        exporter_commands.main()
    return int(ended.value.code or 0), *capsys.readouterr()


def test_a_build_verifies_what_it_built(tmp_path, capsys, monkeypatch):
    build = ("build", "--checkpoint", tiny.checkpoint("12b"), "--target", "cpu", "--recipe", "int4", "--out")
    code, out, _ = exporter_run(capsys, monkeypatch, *build, tmp_path / "a", "--verify", "full")
    assert code == 0
    verdict, hint = out.splitlines()[-2:]
    assert re.fullmatch(r"verify full: passed: 32 drifts inside their bounds, \d+ files .*", verdict)
    assert hint == f'next: gemma4-run generate {tmp_path / "a"} --prompt "Hello"'
    _, out, _ = exporter_run(capsys, monkeypatch, "inspect", tmp_path / "a")
    assert re.search(r"^verified ort-cpu-\S+\.json: passed: 32 drifts", out, re.MULTILINE)
    code, out, _ = exporter_run(capsys, monkeypatch, *build, tmp_path / "b", "--verify", "off")
    assert code == 0
    assert "passed" not in out
    _, out, _ = exporter_run(capsys, monkeypatch, "inspect", tmp_path / "b")
    assert f"verified never: gemma4-run verify {tmp_path / 'b'}" in out
    assert (tmp_path / "b" / ORACLE_FILE).read_bytes() == (tmp_path / "a" / ORACLE_FILE).read_bytes()


def test_a_build_is_told_what_does_not_pass(copy):
    folder = copy("31b")
    perturb(folder, placement("31b", "fp32"), "layers.1.mlp.up_proj.weight")
    verdict = verify_in_child(folder, "layers")
    assert not verdict.passed
    assert verdict.text.startswith("failed: layer 1, mlp: layers.1.mlp drifts ")


def test_a_verification_that_cannot_begin_says_why(copy):
    folder = copy("12b")
    (folder / ORACLE_FILE).write_bytes(b"short")
    passed, text, error = verify_in_child(folder, "layers")
    assert (passed, text) == (False, None)
    assert error.startswith(f"error: {ORACLE_FILE}: expected ")
    assert len(error.splitlines()) == 2


def test_a_verdict_that_cannot_be_saved_is_no_success(capsys, monkeypatch, tmp_path):
    verify_child = child_module.verify_in_child
    reports = tmp_path / "a" / "verify"

    def without_room(folder: Path, level: Any) -> Verdict:
        reports.write_text("", encoding="utf-8")  # a file where their folder goes: refused to root too
        return verify_child(folder, level)

    monkeypatch.setattr(child_module, "verify_in_child", without_room)
    build = ("build", "--checkpoint", tiny.checkpoint("12b"), "--target", "cpu", "--recipe", "int4", "--out")
    code, out, err = exporter_run(capsys, monkeypatch, *build, tmp_path / "a", "--verify", "layers")
    assert code == 1
    assert out.splitlines()[-1].startswith("verify layers: passed: ")
    assert re.search(rf"^error: {re.escape(str(reports))}: File exists$", err, re.MULTILINE)


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        ("os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("print('reading 3 files', file=sys.stderr); os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("print('{\"passed\": tr', flush=True); os.kill(os.getpid(), 9)", "ended by signal 9"),
        ('print(\'{"passed": true, "verdict": "passed: all"}\'); sys.exit(1)', "ended by exit code 1"),
        ("sys.exit(70)", "ended by exit code 70"),
    ],
)
def test_a_verification_that_ends_without_a_word_is_told_by_how_it_ended(tmp_path, monkeypatch, ends, error):
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport os, sys\n{ends}\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    verdict = verify_in_child(tmp_path, "layers")
    assert not verdict.passed
    assert verdict.error == f"error: gemma4-run verify {error}\nhint: gemma4-run verify {tmp_path}\n"


def test_inspect_knows_a_report_of_other_files_and_what_is_no_report(copy, capsys, monkeypatch):
    folder = copy("12b")
    verify(folder, level="layers").save(folder)
    (folder / "verify" / "zz.json").write_text("[]", encoding="utf-8")
    edit_manifest(folder, lambda values: values["model"].update(name="other"))
    _, out, _ = exporter_run(capsys, monkeypatch, "inspect", folder)
    first, second = [line for line in out.splitlines() if line.startswith("verified ")]
    assert ": of other files than these, so not verified: passed" in first
    assert second.startswith("verified zz.json: not a report")
