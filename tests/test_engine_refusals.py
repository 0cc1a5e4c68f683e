"""What the engine builder refuses: cause with numbers, and a hint that can be typed."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import engine_graphs
import pytest
from engine_graphs import K
from test_engine_build import HAS_WHEEL, request_for

from gemma4_export.configs.errors import ArtifactError, ConfigError, ContractError, Gemma4Error
from gemma4_export.runtime.engine import EngineRecord, EngineRequest, build_engine, library, module, read_record
from gemma4_export.runtime.engine import build as build_module
from gemma4_export.runtime.engine.outcome import BuildLog, ImportFailure, build_error, import_error
from gemma4_export.runtime.engine.plugins import library_contracts
from gemma4_export.runtime.engine.rtx import RtxBuilder

needs_wheel = pytest.mark.skipif(not HAS_WHEEL, reason="TensorRT-RTX's wheel exists for Linux on x86-64 only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refused")


@pytest.fixture(scope="module")
def good(folder: Path) -> EngineRequest:
    return request_for(engine_graphs.linear(folder, weights="int4"), capabilities=(89,), profiles="decode")


def refusal(request: EngineRequest, engines: Path, kind: type[Gemma4Error]) -> tuple[str, str]:
    """Cause and hint of a build that must fail, and must leave nothing but its log."""
    with pytest.raises(kind) as caught:
        build_engine(request, engines)
    assert type(caught.value) is kind
    assert all(path.suffix == ".log" for path in engines.glob("*"))
    assert caught.value.hint is not None
    assert "\n" not in caught.value.cause
    return caught.value.cause, caught.value.hint


@needs_wheel
@pytest.mark.parametrize(
    ("make", "cause", "hint"),
    [
        (
            engine_graphs.circular_scatter,
            "circular.onnx: tensorrt-rtx does not import it: node 0 layers.0.write (TensorScatter): "
            'Assertion failed: mode == "linear": Only linear mode is supported for now, got circular',
            "tensorrt-rtx cannot run this op: pack other backends with --backends",
        ),
        (
            engine_graphs.mixed_types,
            "mixed.onnx: tensorrt-rtx does not import it: node 0 layers.0.linear (MatMul): Invalid Node",
            "tensorrt-rtx cannot run this op: pack other backends with --backends",
        ),
        (
            engine_graphs.moe_without_weights,
            "moe.onnx: tensorrt-rtx does not import it: node 0 layers.0.experts (Gemma4MoE): creator && "
            '"Plugin not found, are the plugin name, version, and namespace correct?"; no plugin library was given',
            "make plugins compiles ours",
        ),
        (
            engine_graphs.no_graph,
            "damaged.onnx: tensorrt-rtx does not import it: node -1 (no name) (no op type): Assertion failed",
            "the file is damaged: copy or build the artifact again",
        ),
    ],
    ids=["op", "types", "plugin missing", "damaged"],
)
def test_a_graph_that_does_not_import_names_node_and_reason(make, cause: str, hint: str, tmp_path: Path) -> None:
    request = EngineRequest(graph=make(tmp_path), profiles={}, compute_capabilities=(89,))
    found, found_hint = refusal(request, tmp_path / "engines", ArtifactError)
    assert found.startswith(cause)
    assert found_hint == hint
    (log,) = (tmp_path / "engines").iterdir()
    assert "[ERROR] " in log.read_text(encoding="utf-8")


@needs_wheel
def test_a_gpu_that_the_builder_does_not_know(good: EngineRequest, tmp_path: Path) -> None:
    assert refusal(replace(good, compute_capabilities=(89, 90)), tmp_path, ConfigError) == (
        "tensorrt-rtx refuses a compute capability among [89, 90]",
        "tensorrt-rtx compiles for 75, 80, 86, 89, 120 and 121; other GPUs need the tensorrt backend",
    )


@needs_wheel
@pytest.mark.parametrize(("weights", "capability", "named"), [("fp8", 86, "fp8_e4m3"), ("int4", 75, "int4")])
def test_weights_that_a_gpu_cannot_compute_with(
    folder: Path, tmp_path: Path, weights: str, capability: int, named: str
) -> None:
    request = request_for(engine_graphs.linear(folder, weights=weights), capabilities=(capability,))
    assert refusal(request, tmp_path, ConfigError) == (
        f"{weights}-float16.onnx: sm{capability} cannot compute with {named} weights",
        "fp8 needs compute capability 8.9 or newer, int4 8.0: choose another --recipe or leave that GPU out",
    )


@needs_wheel
@pytest.mark.parametrize(
    ("profiles", "cause", "hint"),
    [
        ({}, "int4-float16.onnx, input x [-1, 1024]: no profile bounds it", "every profile gives min, opt and max"),
        (
            {"a": {"x": ((1, K),) * 3}, "b": {}},
            "int4-float16.onnx, input x [-1, 1024]: profile b leaves it out",
            "every profile gives min, opt and max",
        ),
        ({"a": {"z": ((1, K),) * 3}}, "int4-float16.onnx, profile a: no input z", "known: x"),
        (
            {"a": {"x": ((1, K + 1),) * 3}},
            "int4-float16.onnx, profile a, x: the graph has [-1, 1024] (-1: any), the profile [1, 1025]",
            "build the artifact again: its profiles are not those of its graphs",
        ),
    ],
    ids=["none", "left out", "unknown input", "other size"],
)
def test_profiles_that_do_not_fit_the_graph(
    good: EngineRequest, tmp_path: Path, profiles: dict, cause: str, hint: str
) -> None:
    found, found_hint = refusal(replace(good, profiles=profiles), tmp_path, ContractError)
    assert found == cause
    assert found_hint.startswith(hint)


@pytest.mark.parametrize(
    ("change", "cause", "kind"),
    [
        ({"compute_capabilities": ()}, "compute capabilities []: expected one or more", ConfigError),
        ({"compute_capabilities": (89, 89)}, "compute capabilities [89, 89]: expected one or more", ConfigError),
        (
            {"profiles": {"a": {"x": ((2, K), (1, K), (4, K))}}},
            "profile a, x: min (2, 1024), opt (1, 1024), max (4, 1024) are not in order",
            ConfigError,
        ),
        ({"graph": Path("nowhere.onnx")}, "nowhere.onnx: no such file", ArtifactError),
        ({"plugins": (Path("libnone.so"),)}, "libnone.so: no such file", ArtifactError),
    ],
    ids=["no gpu", "gpu twice", "range", "no graph", "no plugin"],
)
def test_a_request_that_no_builder_could_meet(
    good: EngineRequest, tmp_path: Path, change: dict, cause: str, kind: type[Gemma4Error]
) -> None:
    found, _ = refusal(replace(good, **change), tmp_path, kind)
    assert found.startswith(cause)


@needs_wheel
def test_a_library_that_is_no_plugin_of_ours(good: EngineRequest, tmp_path: Path) -> None:
    stranger = library.find_rtx_library().parser.resolve()
    cause, hint = refusal(replace(good, plugins=(stranger,)), tmp_path, ArtifactError)
    assert cause.startswith(f"{stranger}: not a plugin library of ours")
    assert hint == "make plugins"


@needs_wheel
def test_a_library_that_ends_its_process(good: EngineRequest, tmp_path: Path) -> None:
    def abort(graph: str, phase: str, done: int, steps: int) -> None:
        for path in Path("/proc/self/task").glob("*/children"):
            for pid in map(int, path.read_text(encoding="ascii").split()):
                if b"runtime.engine.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGABRT)

    with pytest.raises(ArtifactError) as caught:
        build_engine(good, tmp_path, abort)
    (log,) = tmp_path.iterdir()
    assert caught.value.cause.startswith(
        "int4-float16.onnx: tensorrt-rtx ended its process (signal 6); its last words: [INFO] "
    )
    assert caught.value.hint == f"the whole log: {log}"


@needs_wheel
def test_memory_that_runs_out(folder: Path, tmp_path: Path) -> None:
    """Under a limit of the system's: the library holds 234 MB, the graph 17 MB, Python some 100."""
    request = request_for(engine_graphs.linear(folder, weights="float"))
    with pytest.raises(ArtifactError) as caught:
        _limited(request, tmp_path, address_space=500 << 20)
    assert caught.value.cause == "float-float16.onnx: out of memory while building 0.02 GB of weights"
    assert caught.value.hint == (
        "give a smaller --build-memory, so that fewer groups are built at once, or close other programs"
    )


def _limited(request: EngineRequest, engines: Path, *, address_space: int) -> None:
    """Build with a limit on the child's address space; this process has used more than that already."""
    original = subprocess.Popen

    def popen(*arguments, **options):
        limits = (address_space, address_space)
        return original(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module.subprocess, "Popen", popen)
        build_engine(request, engines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@needs_wheel
def test_a_full_disk(good: EngineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build_module._run_child

    def onto_a_full_disk(request, found, folder, *rest):
        (folder / "model.engine").symlink_to("/dev/full")
        return original(request, found, folder, *rest)

    monkeypatch.setattr(build_module, "_run_child", onto_a_full_disk)
    cause, hint = refusal(good, tmp_path, ArtifactError)
    assert cause.endswith(": No space left on device")
    assert hint == "free some space and run it again"


def test_no_library(good: EngineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(good, tmp_path, ArtifactError) == (
        "TensorRT-RTX is not installed: no engine can be built",
        'pip install "gemma4-export[rtx]"',
    )
    assert refusal(replace(good, builder="tensorrt"), tmp_path, ArtifactError) == (
        "TensorRT is not installed: engines for this GPU need it",
        'pip install "gemma4-export[tensorrt]" on the device, then gemma4-run build ARTIFACT there',
    )


def test_a_library_of_another_version_or_a_broken_installation(tmp_path: Path) -> None:
    (tmp_path / "libtensorrt_rtx.so.1.8.0").touch()
    with pytest.raises(ArtifactError, match=r"expected one libtensorrt_onnxparser_rtx\.so\.VERSION, found 0"):
        library.rtx_library_in(tmp_path)
    (tmp_path / "libtensorrt_onnxparser_rtx.so.1.8.0").touch()
    with pytest.raises(ArtifactError) as caught:
        library.rtx_library_in(tmp_path)
    assert caught.value.cause == (
        "libtensorrt_rtx.so.1.8.0: TensorRT-RTX 1.8.0, this version of gemma4-export binds 1.7.x"
    )
    assert caught.value.hint == 'pip install "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0"'


def test_links_have_every_name_that_is_looked_for(tmp_path: Path) -> None:
    for name in ("libtensorrt_rtx.so.1.7.1", "libtensorrt_onnxparser_rtx.so.1.7.1"):
        (tmp_path / name).touch()
    links = library.rtx_library_in(tmp_path).link_into(tmp_path / "links")
    library.rtx_library_in(tmp_path).link_into(tmp_path / "links")  # a second time changes nothing
    stems = ("libtensorrt_onnxparser_rtx", "libtensorrt_rtx")
    assert sorted(path.name for path in links.iterdir()) == sorted(
        f"{stem}.so{version}" for stem in stems for version in ("", ".1", ".1.7.1")
    )
    assert all(path.resolve().parent == tmp_path for path in links.iterdir())


def test_a_module_that_does_not_import(good: EngineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "modules" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    cause, hint = refusal(replace(good, builder="tensorrt"), tmp_path / "engines", ArtifactError)
    assert cause == (
        "tensorrt is installed and does not import: ImportError: libnvinfer.so.10: cannot open shared object file"
    )
    assert hint == "its libraries must be on the loader's path (LD_LIBRARY_PATH)"


def test_tensorrt_that_is_too_old() -> None:
    with pytest.raises(ArtifactError, match=r"TensorRT 10\.3\.0: its parser lacks TensorScatter and Attention"):
        module.check_tensorrt_version("10.3.0")
    for version in ("10.15.1.29", "10.16.0", "11.0.0"):
        module.check_tensorrt_version(version)


@pytest.mark.parametrize(("here", "found"), [(None, "this machine has none"), (89, "this machine's has 8.9")])
def test_tensorrt_builds_for_the_gpu_at_hand_only(here: int | None, found: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        module.check_device((90,), here)
    assert caught.value.cause == (
        f"tensorrt builds on a GPU of the kind it builds for; compute capability 9.0 was asked for, {found}"
    )
    assert caught.value.hint == "copy the artifact to the device and run gemma4-run build ARTIFACT there"
    module.check_device((90,), 90)


def test_a_missing_builder_resource(good: EngineRequest) -> None:
    log = BuildLog(io.StringIO(), "build.log")
    log(1, "Unable to load library: libnvinfer_builder_resource_sm90.so.10.15.1: cannot open shared object file")
    error = build_error(replace(good, builder="tensorrt"), log)
    assert error.cause == (
        "int4-float16.onnx: tensorrt lacks libnvinfer_builder_resource_sm90.so.10.15.1, "
        "the kernels of this GPU's architecture"
    )
    assert error.hint == "install the builder resource of that architecture beside libnvinfer"


def test_an_engine_for_another_gpu_or_library() -> None:
    record = EngineRecord(
        key="k",
        builder="tensorrt-rtx",
        library_version="1.7.1",
        graph="decoder.onnx",
        compute_capabilities=(86, 120),
        profiles={},
        inputs=(),
        outputs=(),
        weights_bytes=0,
        scratch_bytes=0,
        plugins={},
        engine_bytes=0,
        engine_sha256="",
    )
    record.check_device(120)
    with pytest.raises(ArtifactError) as caught:
        record.check_device(89)
    assert caught.value.cause == ("engine of decoder.onnx: built for compute capability 8.6, 12.0, this GPU has 8.9")
    record.check_library("tensorrt-rtx", "1.7.1")
    with pytest.raises(ArtifactError, match=r"built by tensorrt-rtx 1\.7\.1, here is tensorrt-rtx 1\.7\.2"):
        record.check_library("tensorrt-rtx", "1.7.2")


# ---------------------------------------------------------------------------------------------------------------------
# What children say, made here: the messages of other processes are not seen by --every-message


@needs_wheel
@pytest.mark.parametrize(
    ("change", "kind", "cause"),
    [
        ({"compute_capabilities": (90,)}, ConfigError, "refuses a compute capability among [90]"),
        ({"profiles": {}}, ContractError, "no profile bounds it"),
        ({"profiles": {"a": {"z": ((1, K),) * 3}}}, ContractError, "no input z"),
        ({"profiles": {"a": {"x": ((1, 7),) * 3}}}, ContractError, "the profile [1, 7]"),
        ({"plugins": (Path("libnone.so"),)}, ArtifactError, "libnone.so: not a plugin library: IPluginRegistry::"),
        ({"graph": Path("nowhere.onnx")}, ArtifactError, "nowhere.onnx: tensorrt-rtx does not import it: node -1"),
    ],
    ids=["gpu", "no profile", "input", "size", "plugin", "graph"],
)
def test_the_binding_itself_refuses(good: EngineRequest, change: dict, kind: type[Gemma4Error], cause: str) -> None:
    builder = RtxBuilder(library.find_rtx_library(), BuildLog(io.StringIO(), "build.log"))
    with pytest.raises(kind) as caught:
        builder.build(replace(good, **change), io.BytesIO(), lambda *step: None)
    assert cause in caught.value.cause


def test_the_causes_that_a_build_log_names(good: EngineRequest) -> None:
    said = {
        "Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3.": (
            "sm86 cannot compute with fp8_e4m3 weights"
        ),
        "Unexpected exception std::bad_alloc": "out of memory while building 0.00 GB of weights",
        "Something else": "tensorrt-rtx builds no engine: Something else",
    }
    for message, cause in said.items():
        log = BuildLog(io.StringIO(), "build.log")
        log(1, message)
        assert build_error(good, log).cause == f"int4-float16.onnx: {cause}"


def test_the_causes_that_a_parser_names(good: EngineRequest) -> None:
    failure = ImportFailure(reason="Plugin not found\ncatchCudaError: 35", node=3, name="", operator="Gemma4MoE")
    prefix = "int4-float16.onnx: tensorrt-rtx does not import it: node "
    assert import_error(good, [failure]).cause == (
        f"{prefix}3 (no name) (Gemma4MoE): Plugin not found; no plugin library was given"
    )
    given = replace(good, plugins=(Path("libours.so"),))
    assert import_error(given, [failure]).cause == f"{prefix}3 (no name) (Gemma4MoE): Plugin not found"
    assert import_error(good, [replace(failure, node=-1)]).hint is not None


def test_plugin_libraries_are_held_to_the_contracts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'const char* gemma4_plugin_contracts() { return "Gemma4MoE=%d"; }'
    for version in (1, 2):
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / f"lib{version}.so")]
        subprocess.run(command, input=source % version, text=True, check=True)
    assert library_contracts(tmp_path / "lib1.so") == {"Gemma4MoE": 1}
    with pytest.raises(ArtifactError) as caught:
        library_contracts(tmp_path / "lib2.so")
    assert caught.value.cause == f"{tmp_path}/lib2.so: Gemma4MoE version 2, this gemma4-export has version 1"
    assert caught.value.hint == "make plugins compiles the library of this version"
    monkeypatch.setattr("gemma4_export.runtime.engine.plugins.CONTRACTS", {})
    with pytest.raises(ArtifactError, match="Gemma4MoE version 1, this gemma4-export has no such op"):
        library_contracts(tmp_path / "lib1.so")
    with pytest.raises(ArtifactError, match="not a plugin library of ours"):
        library_contracts(tmp_path / "none.so")


def test_a_library_whose_number_is_not_its_name_s() -> None:
    with pytest.raises(ArtifactError, match=r"libtensorrt_rtx\.so: TensorRT-RTX 1\.8\.0"):
        library.check_version("1.8.0", "libtensorrt_rtx.so")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}'])
def test_a_record_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "engine.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"engine\.json: (not JSON|format (None|2), this version reads format 1)"):
        read_record(tmp_path)


def test_a_record_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "engine.json").mkdir()
    with pytest.raises(ArtifactError, match=r"engine\.json: Is a directory\nhint: gemma4-run build ARTIFACT"):
        read_record(tmp_path)


@needs_wheel
def test_an_outcome_that_a_full_disk_cut_short(good: EngineRequest, tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text("", encoding="utf-8")
    log = tmp_path / "build.log"
    log.write_text("[INFO] serialized\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"ended its process \(exit code 1\); its last words: \[INFO\] serialized"):
        build_module._outcome(good, tmp_path, 1, log)
