"""The builder through NVIDIA's Python modules: every call exists in their bindings, and is made in the right order."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_graphs
import pytest
from test_engine_build import HAS_WHEEL, request_for

from gemma4_export.configs.errors import ArtifactError
from gemma4_export.runtime.engine import EngineRequest, library, module
from gemma4_export.runtime.engine.outcome import DATA_TYPES, BuildLog

# class -> name -> what its signature must hold, as the module's docstrings print it; "" for a property.
CALLS = {
    "Builder": {
        "__init__": "logger: tensorrt_bindings.tensorrt.ILogger",
        "create_builder_config": "-> tensorrt_bindings.tensorrt.IBuilderConfig",
        "create_network": "flags: ",
        "create_optimization_profile": "-> tensorrt_bindings.tensorrt.IOptimizationProfile",
        "get_plugin_registry": "-> tensorrt_bindings.tensorrt.IPluginRegistry",
        "build_serialized_network_to_stream": "network: tensorrt_bindings.tensorrt.INetworkDefinition, "
        "config: tensorrt_bindings.tensorrt.IBuilderConfig, writer: tensorrt_bindings.tensorrt.IStreamWriter) -> bool",
    },
    "IBuilderConfig": {
        "add_optimization_profile": "profile: tensorrt_bindings.tensorrt.IOptimizationProfile) -> int",
        "progress_monitor": "",
    },
    "IOptimizationProfile": {"set_shape": "input: str, min: tensorrt_bindings.tensorrt.Dims, opt: "},
    "INetworkDefinition": {
        "num_inputs": "",
        "num_outputs": "",
        "get_input": "-> tensorrt_bindings.tensorrt.ITensor",
        "get_output": "-> tensorrt_bindings.tensorrt.ITensor",
    },
    "ITensor": {"name": "", "shape": "", "dtype": ""},
    "OnnxParser": {
        "__init__": "network: tensorrt_bindings.tensorrt.INetworkDefinition, logger: ",
        "parse_from_file": "model: str) -> bool",
        "num_errors": "",
        "get_error": "index: ",
    },
    "ParserError": {"desc": "-> str", "node": "-> int", "node_name": "-> str", "node_operator": "-> str"},
    "IPluginRegistry": {"load_library": "plugin_path: str) -> "},
    "ILogger": {"__init__": "", "log": "msg: str) -> None"},
    "IProgressMonitor": {
        "__init__": "",
        "phase_start": "phase_name: str, parent_phase: ",
        "step_complete": "phase_name: str, step: ",
        "phase_finish": "phase_name: str",
    },
    "IStreamWriter": {"__init__": "", "write": "-> int"},
}
_ASK = """
import json, os, sys
sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
import tensorrt_bindings as trt
found = {}
for owner, names in json.loads(sys.argv[1]).items():
    kind = getattr(trt, owner, None)
    found[owner] = {name: getattr(getattr(kind, name, None), "__doc__", None) for name in names}
    found[owner] |= {name: "" for name in names if found[owner][name] is None and hasattr(kind, name)}
found["data types"] = [kind.name for kind in sorted(trt.DataType.__members__.values(), key=int)]
found["severities"] = [kind.name for kind in sorted(trt.ILogger.Severity.__members__.values(), key=int)]
found["has strongly typed"] = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
print(json.dumps(found))
"""


@pytest.mark.skipif(not HAS_WHEEL, reason="the bindings wheel is tried on Linux x86-64 only")
def test_every_call_is_in_the_published_bindings(tmp_path: Path) -> None:
    """The bindings wheel has no library; RTX's under its name is enough to import it (lazily: nothing is called)."""
    found_library = library.find_rtx_library()
    (tmp_path / "libnvinfer.so.11").symlink_to(found_library.core)
    (tmp_path / "libnvonnxparser.so.11").symlink_to(found_library.parser)
    source = "int initLibNvInferPlugins(void* logger, const char* space) { return logger != 0 && space != 0; }"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / "libnvinfer_plugin.so.11")]
    subprocess.run(command, input=source, text=True, check=True)
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, json.dumps({owner: list(names) for owner, names in CALLS.items()})],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr
    found = json.loads(asked.stdout)
    missing = [
        f"{owner}.{name}: {found[owner][name]!r} lacks {expected!r}"
        for owner, names in CALLS.items()
        for name, expected in names.items()
        if found[owner][name] is None or expected not in found[owner][name]
    ]
    assert not missing
    spelled = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3", "FP4": "float4"}
    assert [spelled.get(name, name.lower()) for name in found["data types"]][: len(DATA_TYPES)] == list(DATA_TYPES)
    assert found["severities"] == ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"]


class FakeTrt:
    """A module that notes what is asked of it and answers as a willing builder would."""

    def __init__(self, *, imports: bool = True, builds: bool = True, loads: bool = True) -> None:
        self.imports, self.builds, self.loads = imports, builds, loads
        self.calls: list[tuple[Any, ...]] = []
        for name in ("ILogger", "IProgressMonitor", "IStreamWriter"):
            setattr(self, name, type(name, (), {"__init__": lambda this: None}))
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)

    def ComputeCapability(self, value: int) -> str:  # noqa: N802
        return f"SM{value}"

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        logger.log(3, "Total Weights Memory: 123 bytes")
        config = SimpleNamespace(
            add_optimization_profile=lambda profile: 0, set_compute_capability=self._note("capability", True)
        )
        tensors = [SimpleNamespace(name=name, dtype=1, shape=(-1, engine_graphs.K)) for name in ("x", "y")]
        network = SimpleNamespace(
            num_inputs=1, num_outputs=1, get_input=lambda i: tensors[0], get_output=lambda i: tensors[1]
        )
        return SimpleNamespace(
            create_builder_config=lambda: config,
            create_network=self._note("network", network),
            create_optimization_profile=lambda: SimpleNamespace(set_shape=self._note("shape", None)),
            get_plugin_registry=lambda: SimpleNamespace(load_library=self._note("load", 1 if self.loads else None)),
            build_serialized_network_to_stream=self._build,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        error = SimpleNamespace(
            desc=lambda: "no such op", node=lambda: 7, node_name=lambda: "layers.0", node_operator=lambda: "Foo"
        )
        return SimpleNamespace(
            parse_from_file=self._note("parse", self.imports), num_errors=1, get_error=lambda i: error
        )

    def _build(self, network: Any, config: Any, writer: Any) -> bool:
        config.progress_monitor.phase_start("Building", None, 4)
        assert config.progress_monitor.step_complete("Building", 2)
        config.progress_monitor.phase_finish("Building")
        return self.builds and writer.write(b"engine") == 6

    def _note(self, name: str, answer: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return answer

        return call


@pytest.fixture
def request_of_rtx(tmp_path: Path) -> EngineRequest:
    return request_for(engine_graphs.linear(tmp_path, weights="int8"), capabilities=(86, 89))


def build(fake: FakeTrt, request: EngineRequest) -> tuple[bytes, list[tuple[str, int, int]], BuildLog]:
    log, file, progress = BuildLog(io.StringIO(), "build.log"), io.BytesIO(), []
    module.ModuleBuilder(fake, log).build(request, file, lambda *step: progress.append(step))
    return file.getvalue(), progress, log


def test_a_module_is_asked_for_what_the_request_says(request_of_rtx: EngineRequest) -> None:
    fake = FakeTrt()
    request = replace(request_of_rtx, plugins=(Path("libours.so"),))
    engine, progress, log = build(fake, request)
    assert engine == b"engine"
    assert progress == [("Building", 3, 4)]
    assert log.weights_bytes == 123
    shapes = [("shape", "x", *ranges["x"]) for ranges in request.profiles.values()]
    assert fake.calls == [
        ("network", 2),
        ("load", "libours.so"),
        ("parse", str(request.graph)),
        *shapes,
        ("capability", "SM86", 0),
        ("capability", "SM89", 1),
    ]


def test_a_module_that_refuses(request_of_rtx: EngineRequest) -> None:
    with pytest.raises(ArtifactError, match=r"does not import it: node 7 layers\.0 \(Foo\): no such op"):
        build(FakeTrt(imports=False), request_of_rtx)
    with pytest.raises(ArtifactError, match=r"builds no engine: no reason given\nhint: the whole log: build\.log"):
        build(FakeTrt(builds=False), request_of_rtx)
    with pytest.raises(ArtifactError, match=r"libours\.so: not a plugin library: no reason given"):
        build(FakeTrt(loads=False), replace(request_of_rtx, plugins=(Path("libours.so"),)))


def test_tensorrt_asks_for_no_other_gpu_than_the_one_here(
    request_of_rtx: EngineRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "device_capability", lambda: 90)
    request = replace(request_of_rtx, builder="tensorrt", compute_capabilities=(90,))
    fake = FakeTrt()
    build(fake, request)
    assert not [call for call in fake.calls if call[0] == "capability"]
    with pytest.raises(ArtifactError, match=r"capability 8\.6, 8\.9 was asked for, this machine's has 9\.0"):
        build(FakeTrt(), replace(request, compute_capabilities=(86, 89)))
