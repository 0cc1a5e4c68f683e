"""Comparison through polygraphy: two runners that compute alike agree, one that does not is named by layer and role.

The second runner of these tests is onnxruntime on a float32 twin: an artifact whose weights are the first one's codes
times scales, in graphs of plain matrix products.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import artifacts
import engine_twin
import numpy as np
import onnx
import pytest
import small
import tiny
from every_message import REPOSITORY
from onnx import helper, numpy_helper
from test_imports import NEVER, fresh_interpreter
from test_verify import edit_manifest, perturb, placement, replace_oracle, stamp

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError, ConfigError
from gemma4_export.configs.evidence import BOUND_FLOOR, layer_taps
from gemma4_export.configs.names import decoder_tensors, expert_tensor
from gemma4_export.exporter import commands as exporter_commands
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.exporter.stored_weights import StoredWeights
from gemma4_export.runtime import commands, polygraphy_cases, polygraphy_runners, polygraphy_verify
from gemma4_export.runtime.polygraphy_report import AgainstReport, OutputApart, text_lines
from gemma4_export.runtime.polygraphy_verify import verify_against
from gemma4_export.runtime.session_ort import open_graph

torch = pytest.importorskip("torch")
polygraphy = pytest.importorskip("polygraphy")

from polygraphy.tools import main as polygraphy_tool  # noqa: E402


def artifact(structure: str, recipe: str) -> Path:
    return artifacts.artifact(structure, recipe=recipe, fresh_trace=False)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    def make(structure: str, recipe: str) -> Path:
        return Path(shutil.copytree(artifact(structure, recipe), tmp_path / "artifact"))

    return make


@pytest.fixture(scope="module", params=["e2b", "26b-a4b"])
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A structure, and an fp32 artifact of what its int4 artifact stores."""
    structure = request.param
    stored = StoredWeights(artifact(structure, "int4"), placement(structure, "int4"))
    with Checkpoint(tiny.checkpoint(structure)) as opened:
        config, names = opened.config, set(placement(structure, "int4").weights)
    arrays = {}
    for name, spec in decoder_tensors(config).items():
        parts = [name] if name in names else [expert_tensor(name, index) for index in range(spec.shape[0])]
        whole = [stored.whole(part, torch.float32).numpy() for part in parts]
        arrays[name] = whole[0] if parts == [name] else np.stack(whole)
    out, source = tmp_path_factory.mktemp("twin") / "artifact", small.ArraySource(config, arrays)
    # The tiny checkpoint's own: its vocabulary is smaller than the small tokenizer's.
    tokenizer = artifact(structure, "int4") / "tokenizer"
    source.write_tokenizer = lambda folder: shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    small.build_artifact(source, out, recipe="fp32")
    return structure, out


def runs_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the second runner load each graph from ``folder`` instead."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    def runner(against: str, path: Path, feeds: object) -> Any:
        other = folder.joinpath(*path.parts[path.parts.index("graphs") :])
        return OnnxrtRunner(lambda: open_graph(other), name=against)

    monkeypatch.setattr(polygraphy_verify, "against_runner", runner)


def worst(report: AgainstReport) -> float:
    return max(output.apart / output.bound for output in report.outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Alike

NOT_FULL = [("e2b", "int4"), ("26b-a4b", "int4")]  # per-layer inputs and shared KV; experts


@pytest.mark.parametrize(
    ("structure", "recipe"),
    [
        pytest.param(structure, recipe, marks=[] if (structure, recipe) in NOT_FULL else pytest.mark.full)
        for structure in tiny.STRUCTURES
        for recipe in ("int4", "bf16")
    ],
)
def test_an_untouched_artifact_agrees_output_by_output(structure, recipe):
    report = verify_against(artifact(structure, recipe), "onnxruntime")
    assert report.passed, report.verdict
    with Checkpoint(tiny.checkpoint(structure)) as opened:
        config = opened.config
    wanted = [f"layers.{layer.index}.{tap}" for layer in config.layers for tap in layer_taps(layer, config)]
    before = ["merged_per_layer_inputs"] if config.has_per_layer_inputs else []
    assert [output.name for output in report.outputs] == [*before, *wanted, "logits.0"]
    # Held to the same oracle with the same measure as `verify`, whose drifts are below a tenth of the floor.
    assert 0 < max(output.shipped for output in report.outputs) < BOUND_FLOOR / 10


def test_a_float32_twin_of_the_stored_weights_agrees(twin, monkeypatch):
    structure, folder = twin
    runs_in(monkeypatch, folder)
    report = verify_against(artifact(structure, "int4"), "onnxruntime")
    assert report.passed, report.verdict
    assert worst(report) < 0.1
    graphs = [path / "graphs/verify/layer_00.onnx" for path in (artifact(structure, "int4"), folder)]
    ops = [{node.op_type for node in onnx.load(graph, load_external_data=False).graph.node} for graph in graphs]
    assert ["MatMulNBits" in names for names in ops] == [True, False]  # other graphs, on other bytes


@pytest.mark.parametrize("num_bits", [4, 8])
def test_the_plain_session_widens_quantised_weights_and_rounds_no_activation(num_bits, tmp_path):
    """Sums of 2048 products: float32 loses about 1e-6 of the size, activations rounded to int8 a hundredth."""
    rng, columns, rows, block = np.random.default_rng(0), 2048, 64, 32
    codes = rng.integers(0, 256, (rows, columns // block, block * num_bits // 8)).astype(np.uint8)
    scales = rng.random((rows, columns // block), np.float32)
    node = helper.make_node(
        *("MatMulNBits", ["x", "codes", "scales"], ["y"]),
        domain="com.microsoft",
        **{"K": columns, "N": rows, "bits": num_bits, "block_size": block, "accuracy_level": 4},
    )
    float32 = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", float32, ["t", columns])]
    outputs = [helper.make_tensor_value_info("y", float32, ["t", rows])]
    weights = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    graph = helper.make_graph([node], "product", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "product.onnx")
    x = rng.standard_normal((8, columns), np.float32)

    split = codes if num_bits == 8 else np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, -1, block)
    values = (split.astype(np.float64) - (1 << (num_bits - 1))) * scales[..., None]
    exact = x.astype(np.float64) @ values.reshape(rows, columns).T

    def drift(**options: Any) -> float:
        (found,) = open_graph(tmp_path / "product.onnx", **options).run(None, {"x": x})
        return float(np.abs(found - exact).max() / exact.std())

    assert drift(activations="fp32", is_plain=True) < 1e-5
    assert drift() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Not alike


def test_weights_that_were_not_rounded_do_not_agree(monkeypatch):
    runs_in(monkeypatch, artifact("e2b", "fp32"))
    report = verify_against(artifact("e2b", "int4"), "onnxruntime")
    assert report.first_apart.name == "merged_per_layer_inputs"
    assert "; onnxruntime off the oracle (" in report.verdict
    assert all(output.shipped <= output.bound for output in report.outputs)


@pytest.mark.parametrize("is_shipped", [True, False])
def test_a_changed_node_is_named_by_layer_role_and_runner(twin, copy, monkeypatch, tmp_path, is_shipped):
    structure, folder = twin
    shipped = copy(structure, "int4")
    if not is_shipped:
        folder = Path(shutil.copytree(folder, tmp_path / "mutant"))
    changed = shipped if is_shipped else folder
    graph = changed / "graphs/verify/layer_02.onnx"
    model = onnx.load(graph, load_external_data=False)
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    (kind,) = (attribute for attribute in gelu.attribute if attribute.name == "approximate")
    kind.s = b"none"  # the exact one, not by tanh: up to 5e-4 apart
    onnx.save(model, graph)
    stamp(changed, "graphs/verify/layer_02.onnx")
    runs_in(monkeypatch, folder)
    report = verify_against(shipped, "onnxruntime")
    assert (report.first_apart.layer, report.first_apart.role) == (2, "mlp")
    assert {output.layer for output in report.outputs if not output.agrees} == {2}
    assert f"; {'gemma4-run' if is_shipped else 'onnxruntime'} off the oracle (" in report.verdict
    assert next(line.split()[0] for line in text_lines(report) if line.endswith("!")) == "layers.2.mlp"


def test_a_weight_that_both_read_wrongly_is_off_the_oracle(copy):
    folder = copy("12b", "fp32")
    perturb(folder, placement("12b", "fp32"), "layers.3.self_attn.o_proj.weight")
    report = verify_against(folder, "onnxruntime")
    assert (report.first_apart.layer, report.first_apart.role) == (3, "attention")
    assert "; gemma4-run and onnxruntime off the oracle (" in report.verdict
    assert report.first_apart.apart < report.first_apart.bound < report.first_apart.shipped


def test_a_value_that_is_no_number_does_not_agree(copy):
    folder = copy("12b", "fp32")
    where = placement("12b", "fp32").weights["layers.1.mlp.down_proj.weight"]
    np.memmap(folder / where.file, np.float32, "r+", where.offset, (1,))[0] = np.nan
    stamp(folder, where.file)
    report = verify_against(folder, "onnxruntime")
    assert report.first_apart.name == "layers.1.mlp"
    assert report.first_apart.apart == np.inf
    assert json.loads(report.to_json())["first_apart"] == "layers.1.mlp"


def test_rows_near_a_tie_are_left_out_and_none_left_is_no_pass(monkeypatch):
    def unclear(logits: np.ndarray, top_k: int, bound: float) -> np.ndarray:
        rows = np.ones(logits.shape[:-1], bool)
        rows[0, 3] = False
        return rows

    monkeypatch.setattr(polygraphy_cases, "clear_routes", unclear)
    rows = {output.name: output.rows for output in verify_against(artifact("26b-a4b", "int4"), "onnxruntime").outputs}
    assert (rows["layers.2.mlp"], rows["layers.2.experts"], rows["layers.2.output"]) == (64, 62, 62)
    monkeypatch.setattr(polygraphy_cases, "clear_routes", lambda logits, *_: np.zeros(logits.shape[:-1], bool))
    report = verify_against(artifact("26b-a4b", "int4"), "onnxruntime")
    assert report.first_apart.name == "layers.0.experts"
    assert "no row that rounding cannot send elsewhere" in report.verdict


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["gemma4-run", "verify", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    return int(ended.value.code or 0), *capsys.readouterr()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_report_that_finds_no_room_is_named(tmp_path: Path) -> None:
    same = {"shipped": 0.0, "against": 0.0, "bound": 1.0, "agrees": True, "rows": 1}
    report = AgainstReport(
        model="m",
        recipe="int4",
        manifest_sha256="0",
        backend="ort-cpu",
        against="onnxruntime",
        device="x",
        versions={},
        outputs=[OutputApart(name="logits.0", layer=None, role="head", apart=0.0, **same)],
    )
    path = tmp_path / "verify" / "ort-cpu-x-against-onnxruntime.json"
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        report.save(tmp_path)
    assert caught.value.filename == str(path)


def test_the_command_writes_both_reports_and_inspect_lists_them(copy, capsys, monkeypatch):
    folder = copy("12b", "int4")
    code, out, err = run(capsys, monkeypatch, folder, "--level", "layers", "--against", "onnxruntime")
    assert code == 0, err
    assert out.count("passed: ") == 2
    assert len(list((folder / "verify").glob("*.json"))) == 2
    (path,) = (folder / "verify").glob("*-against-onnxruntime.json")
    saved = json.loads(path.read_text("utf-8"))
    assert saved["passed"] is True
    assert saved["versions"]["polygraphy"] == polygraphy.__version__
    assert {"polygraphy", "onnxruntime", "numpy", "gemma4-export"} == set(saved["versions"])
    monkeypatch.setattr(sys, "argv", ["gemma4-export", "inspect", str(folder)])
    with pytest.raises(SystemExit):
        exporter_commands.main()
    listed = capsys.readouterr().out
    assert f"verified {path.name}: passed: gemma4-run and onnxruntime agree on 31 outputs;" in listed


def test_the_command_fails_when_the_runners_do_not_agree(copy, capsys, monkeypatch):
    folder = copy("e2b", "int4")
    runs_in(monkeypatch, artifact("e2b", "fp32"))
    code, out, _ = run(capsys, monkeypatch, folder, "--level", "layers", "--against", "onnxruntime", "--json")
    assert code == 1
    report = json.loads(out)  # one object
    assert report["passed"] is True
    assert report["against"]["passed"] is False
    assert report["against"]["first_apart"] == "merged_per_layer_inputs"


def test_comparing_brings_no_torch_along():
    code = """
from pathlib import Path
from gemma4_export.runtime.polygraphy_verify import verify_against
result["passed"] = verify_against(Path(sys.argv[1]), "onnxruntime").passed
result["modules"] = sorted({name.split(".")[0] for name in sys.modules})
"""
    result = fresh_interpreter(code, artifact("31b", "int4"))
    assert result["passed"] is True
    assert set(result["modules"]) & NEVER == {"polygraphy"}


# ---------------------------------------------------------------------------------------------------------------------
# TensorRT, which no machine of these tests has


def test_tensorrt_gets_each_graph_with_its_weights_and_just_these_shapes(monkeypatch):
    """Up to TensorRT's own door: what would be parsed runs on onnxruntime, and the profile is that of the feeds."""
    from polygraphy.backend import trt

    given: dict[str, Any] = {}

    class Profile(dict):
        def add(self, name: str, **shapes: Any) -> None:
            self[name] = shapes

    monkeypatch.setattr(trt, "Profile", Profile)
    monkeypatch.setattr(trt, "CreateConfig", lambda profiles: given.update(profile=profiles[0]))
    monkeypatch.setattr(trt, "NetworkFromOnnxBytes", lambda graph, **options: given.update(options, graph=graph()))
    monkeypatch.setattr(trt, "EngineFromNetwork", lambda network, config: "engine")
    monkeypatch.setattr(trt, "TrtRunner", lambda engine, name: (engine, name))
    opened = Artifact.open(artifact("e2b", "fp32"))
    with polygraphy_verify.open_oracle(opened) as oracle:
        case = next(case for case in polygraphy_cases.cases(opened, oracle) if case.layer == 3)
    path = opened.path(case.graph.file)
    assert polygraphy_runners.against_runner("tensorrt", path, case.feeds[0]) == ("engine", "tensorrt")
    assert given["strongly_typed"] is True
    assert given["profile"]["hidden_states"] == dict.fromkeys(("min", "opt", "max"), (1, 32, 32))
    assert set(given["profile"]) == set(case.graph.inputs)
    (tmp := artifacts.scratch() / "whole.onnx").write_bytes(given["graph"])
    found = open_graph(tmp).run(None, case.feeds[0])
    for name, values in zip(case.graph.outputs, found, strict=True):
        assert np.abs(values - case.outputs[name].expected[0]).max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest))


@pytest.mark.parametrize("module", ["polygraphy", "tensorrt", "onnx"])
def test_what_is_not_installed_is_named_with_its_extra(module, monkeypatch, capsys):
    if module == "onnx":
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__spec__=object()))
    without(monkeypatch, module)
    code, out, err = run(capsys, monkeypatch, artifact("12b", "int4"), "--against", "tensorrt")
    assert code == 2
    assert out == ""
    extra = "tensorrt" if module == "tensorrt" else "polygraphy"
    assert err.splitlines() == [
        f"error: --against tensorrt: {module} is not installed",
        f'hint: pip install "gemma4-export[{extra}]"',
    ]


def test_another_version_of_polygraphy_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(polygraphy, "__version__", "0.49.26")
    wanted = (
        "--against onnxruntime: polygraphy 0.49.26 is installed, this version of ours works with 0.53.*\n"
        'hint: pip install "polygraphy==0.53.*"'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(wanted)}$"):
        verify_against(artifact("12b", "int4"), "onnxruntime")


def test_the_extra_asks_for_the_supported_version():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (wanted,) = (line for line in extras["polygraphy"] if line.startswith("polygraphy"))
    major, minor = map(int, polygraphy_runners.SUPPORTED.split("."))
    assert re.fullmatch(rf"polygraphy>={major}\.{minor}\.\d+,<{major}\.{minor + 1}", wanted)


def test_a_runner_that_fails_is_named_with_the_graph(monkeypatch):
    from polygraphy.backend.onnxrt import OnnxrtRunner

    def refuse() -> Any:
        raise RuntimeError("no kernel for MatMulNBits\nmore")

    monkeypatch.setattr(polygraphy_verify, "against_runner", lambda *_: OnnxrtRunner(refuse, name="onnxruntime"))
    folder = artifact("12b", "int4")
    wanted = (
        "graphs/verify/layer_00.onnx: gemma4-run and onnxruntime do not both run it: no kernel for MatMulNBits\n"
        f"hint: polygraphy inspect model {folder}/graphs/verify/layer_00.onnx --ignore-external-data lists"
    )
    with pytest.raises(ArtifactError, match=re.escape(wanted)):
        verify_against(folder, "onnxruntime")


def test_a_graph_that_does_not_load_keeps_its_own_message(copy):
    folder = copy("12b", "int4")
    (folder / "graphs/verify/layer_01.onnx").write_bytes(b"\x00" * 10)
    stamp(folder, "graphs/verify/layer_01.onnx")
    with pytest.raises(ArtifactError, match=r"^layer_01.onnx: onnxruntime .* does not load it"):
        verify_against(folder, "onnxruntime")


def test_an_oracle_of_another_shape_is_refused(copy):
    folder = copy("12b", "int4")
    replace_oracle(folder, lambda tensors: tensors.update({"layers.2.mlp": tensors["layers.2.mlp"][:, 1:].copy()}))
    with pytest.raises(ArtifactError, match=r"layers.2.mlp: the oracle has \[1, 31, 32\], a runner .* \[1, 32, 32\]"):
        verify_against(folder, "onnxruntime")


def test_an_artifact_without_these_graphs_is_refused(copy):
    folder = copy("12b", "int4")
    edit_manifest(folder, lambda values: values["verify"].update(graphs={}))
    with pytest.raises(ArtifactError, match="no graphs to compare layers with"):
        verify_against(folder, "onnxruntime")


# ---------------------------------------------------------------------------------------------------------------------
# Lines for a shell


def lines_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[list[str]]:
    """The words of each line that ``inspect --polygraphy`` prints."""
    monkeypatch.setattr(sys, "argv", ["gemma4-export", "inspect", str(folder), "--polygraphy"])
    with pytest.raises(SystemExit) as ended:
        exporter_commands.main()
    assert not ended.value.code
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def run_polygraphy(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]) -> str:
    """What a line prints that ends well: polygraphy's own entry point, in this process."""
    monkeypatch.setattr(sys, "argv", words)
    assert not polygraphy_tool(), capfd.readouterr()
    return capfd.readouterr().out


@pytest.mark.parametrize(("structure", "recipe"), NOT_FULL)
def test_polygraphy_runs_every_graph_by_its_line(structure, recipe, capfd, monkeypatch):
    folder = artifact(structure, recipe)
    lines = lines_of(capfd, monkeypatch, folder)
    assert sorted(words[2] for words in lines) == sorted(str(path) for path in (folder / "graphs").rglob("*.onnx"))
    manifest = Artifact.open(folder).manifest
    wanted = {graph.file: graph.outputs for graph in [*manifest.graphs.values(), *manifest.verify.graphs.values()]}
    kinds = {"decoder.onnx", "inputs.onnx", "layer_00.onnx", "layer_04.onnx", "head_00.onnx"}
    for words in lines:
        if Path(words[2]).name in kinds:
            out = run_polygraphy(capfd, monkeypatch, words)
            assert "PASSED" in out
            assert all(f"{name} [dtype=" in out for name in wanted[str(Path(words[2]).relative_to(folder))])


def test_the_line_of_an_engine_names_plugin_profiles_and_inputs_that_its_graph_has(capfd, monkeypatch, tmp_path):
    """Without TensorRT: polygraphy takes every option, and the same inputs run on onnxruntime's float32 twin."""
    checkpoint = tiny.checkpoint("26b-a4b")
    with_plugin = engine_twin.engine_artifact(checkpoint, "int4", float_type="float32")
    builtin = engine_twin.engine_artifact(checkpoint, "int4", float_type="float32", experts="builtin")
    for folder in (with_plugin, builtin):
        lines = lines_of(capfd, monkeypatch, folder)
        assert len(lines) == len({path.name for path in (folder / "graphs").glob("*.onnx")})
        for words in (lines[0], lines[-1]):
            assert words.pop(0) == "POLYGRAPHY_USE_TENSORRT_RTX=1"
            assert ("--plugins" in words) == (folder == with_plugin)
            run_polygraphy(capfd, monkeypatch, [*words, "--gen-script", str(script := tmp_path / "script.py")])
            script = script.read_text("utf-8")
            graph = onnx.load(words[2], load_external_data=False).graph
            profiled = set(re.findall(r"\.add\('([^']+)'", script))
            assert profiled == {value.name for value in graph.input if has_free_size(value)}
            assert ("libgemma4_plugins.so" in script) == (folder == with_plugin)
    at = words.index("--trt")
    inputs = words[words.index("--input-shapes") :]
    assert "PASSED" in run_polygraphy(capfd, monkeypatch, [*words[:at], "--onnxrt", *inputs])


def test_lines_are_not_json(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gemma4-export", "inspect", "folder", "--polygraphy", "--json"])
    with pytest.raises(SystemExit) as ended:
        exporter_commands.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --polygraphy prints lines for a shell, not JSON\nhint: ")


def has_free_size(value: onnx.ValueInfoProto) -> bool:
    return any(size.dim_param for size in value.type.tensor_type.shape.dim)
