"""Our plugin library in real engines: compiled, loaded by TensorRT-RTX, its node built for two GPUs without one."""

from __future__ import annotations

from pathlib import Path

import engine_graphs
import pytest
from test_engine_build import HAS_WHEEL

from gemma4_export.configs.errors import ArtifactError
from gemma4_export.plugins import compile as compiler
from gemma4_export.plugins.moe.contract import MOE
from gemma4_export.runtime.engine import EngineRequest, build_engine
from gemma4_export.runtime.engine import build as build_module
from gemma4_export.runtime.engine.library import RtxLibrary
from gemma4_export.runtime.engine.plugins import library_contracts

pytestmark = pytest.mark.skipif(not HAS_WHEEL, reason="nvcc and TensorRT-RTX: wheels for Linux on x86-64 only")


@pytest.fixture(scope="module")
def plugins() -> Path:
    return engine_graphs.quick_plugins()


def request_for(graph: engine_graphs.Linear, plugins: Path, *, experts: int = 16, most: int = 64) -> EngineRequest:
    def shapes(tokens: int) -> dict[str, tuple[int, ...]]:
        return {"x": (1, tokens, 256), "router_logits": (1, tokens, experts)}

    ranges = {name: (shapes(1)[name], shapes(8)[name], shapes(most)[name]) for name in shapes(1)}
    return EngineRequest(
        graph=graph.graph,
        data=(graph.data,),
        profiles={"all": ranges},
        compute_capabilities=(89, 120),
        plugins=(plugins,),
    )


def test_the_library_states_the_contracts_it_was_compiled_from(plugins: Path) -> None:
    assert library_contracts(plugins) == {MOE.name: MOE.version}


@pytest.mark.parametrize("weights", ["int4", "int8", "float"])
def test_an_engine_with_the_plugin_builds_without_a_gpu(plugins: Path, tmp_path: Path, weights: str) -> None:
    graph = engine_graphs.moe(tmp_path, weights=weights)
    record = build_engine(request_for(graph, plugins), tmp_path / "engines").record
    assert record.plugins == {"Gemma4MoE": 1}
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in record.outputs] == [("y", "bfloat16", (1, -1, 256))]
    # Codes reach the plugin as they are: nothing is widened.
    assert graph.packed_bytes >= 4e6
    assert record.weights_bytes == pytest.approx(graph.packed_bytes, rel=0.1)
    # 4 * T * top_k * (E + F) bytes of workspace, T = 64, and no expanded weight.
    assert 4 * 64 * 8 * (256 + 768) <= record.scratch_bytes <= 3 * 4 * 64 * 8 * (256 + 768)


def test_what_the_kernel_cannot_do_is_said_in_the_contract_s_words(plugins: Path, tmp_path: Path) -> None:
    graph = engine_graphs.moe(tmp_path, weights="int4", wrong_scales=True)
    with pytest.raises(ArtifactError) as caught:
        build_engine(request_for(graph, plugins), tmp_path / "engines")
    (log,) = (tmp_path / "engines").glob("*.log")
    assert "Gemma4MoE: types or shapes of its inputs are not those of plugins/moe/README.md" in log.read_text()
    assert caught.value.cause.startswith("moe-int4.onnx: tensorrt-rtx ")
    graph = engine_graphs.moe(tmp_path, weights="int4", num_experts=4)
    with pytest.raises(ArtifactError):
        build_engine(request_for(graph, plugins, experts=4), tmp_path / "few")
    (log,) = (tmp_path / "few").glob("*.log")
    assert "gemma4::Gemma4MoE top_k: expected 1..min(X, 32), found 8" in log.read_text()


def test_without_its_links_the_parser_ends_the_process(
    plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why there are links at all, and what a library that ends its process looks like."""
    monkeypatch.setattr(RtxLibrary, "link_into", lambda self, folder: folder)
    with pytest.raises(ArtifactError, match=r"ended its process \((signal|exit code) \d+\); its last words: "):
        build_engine(request_for(engine_graphs.moe(tmp_path), plugins), tmp_path / "engines")
    assert build_module.free_engines(tmp_path / "engines", []) == []


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArtifactError) as caught:
        compiler.compile_library(tmp_path / "lib.so")
    assert str(caught.value) == (
        'nvcc is not installed: it compiles the plugins\nhint: pip install "gemma4-export[kernels]"'
    )


def test_a_library_that_does_not_compile(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not compile the plugins: .*Unsupported gpu architecture"):
        compiler.compile_library(tmp_path / "lib.so", architectures=("sm_10",))
