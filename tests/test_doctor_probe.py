"""What ``gemma4-run doctor`` reads off a machine: made-up ones, with a stub of a driver and libraries that crash."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import artifacts
import pytest

from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.manifest import FORMAT
from gemma4_export.runtime import commands, doctor_probe, memory
from gemma4_export.runtime.doctor import machine_findings
from gemma4_export.runtime.doctor_artifact import probe_artifact
from gemma4_export.runtime.doctor_facts import Failure
from gemma4_export.runtime.engine.library import RtxLibrary


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_this_machine_is_read_whole() -> None:
    facts = doctor_probe.probe()
    assert facts.unread == []
    assert facts.processor.features
    assert facts.memory.available_bytes is not None
    assert 0 < facts.memory.available_bytes <= (facts.memory.total_bytes or 0)
    assert facts.onnxruntime.version == facts.packages["onnxruntime"]
    assert "CPUExecutionProvider" in facts.onnxruntime.providers


def test_a_machine_with_nothing_is_read_without_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    facts = doctor_probe.probe(tmp_path)
    assert [failure.cause.partition(":")[0] for failure in facts.unread] == ["processor"]  # no proc/cpuinfo
    assert facts.memory.available_bytes is facts.memory.total_bytes is facts.memory.container_limit_bytes is None
    assert facts.driver.num_devices == 0
    assert facts.libnvinfer.version is None
    assert machine_findings(facts)


READERS = [name for name in dir(doctor_probe) if name.startswith("read_")]


def test_no_probe_ends_the_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("odd")

    for name in [*READERS, "library_folders", "installed_versions"]:
        monkeypatch.setattr(doctor_probe, name, fail)
    facts = doctor_probe.probe()
    told = {finding.found for finding in machine_findings(facts) if finding.what == "doctor"}
    assert "could not read processor: KeyError: 'odd'" in told
    assert "could not read disk: KeyError: 'odd'" in told
    assert not [finding for finding in machine_findings(facts) if finding.what == "disk"]
    # One reader serves two modules, one of them through another reader.
    assert len(told) == len(READERS) + 2


ARM = "processor\t: 0\nBogoMIPS\t: 48.00\nFeatures\t: fp asimd aes asimddp sve i8mm bf16\n"
INTEL = "processor : 0\nmodel name : Xeon\nflags : fpu avx2 avx512f avx512_vnni amx_tile amx_int8\n\nflags : other\n"


@pytest.mark.parametrize(
    ("text", "model", "features"),
    [
        (ARM, "", ["asimd", "asimddp", "i8mm", "bf16", "sve"]),
        (INTEL, "Xeon", ["avx2", "avx512f", "avx512_vnni", "amx_int8"]),
        ("", "", []),
    ],
)
def test_processors_by_proc_cpuinfo(tmp_path: Path, text: str, model: str, features: list[str]) -> None:
    write(tmp_path / "proc/cpuinfo", text)
    processor = doctor_probe.read_processor(tmp_path)
    assert (processor.model, processor.features, processor.quota) == (model, features, None)


@pytest.mark.parametrize(("text", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5)])
def test_the_time_that_a_container_gets(tmp_path: Path, text: str, quota: float | None) -> None:
    write(tmp_path / "proc/cpuinfo", INTEL)
    write(tmp_path / "sys/fs/cgroup/cpu.max", text)
    assert doctor_probe.read_processor(tmp_path).quota == quota


# ---------------------------------------------------------------------------------------------------------------------
# Memory of containers


def group(folder: Path, limit: str, current: int, cached: int) -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{current}\n")
    write(folder / "memory.stat", f"anon 1\nfile {cached}\n")


def test_a_limit_on_a_group_around_ours_holds(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/user.slice/session:7.scope\n")
    around = tmp_path / "sys/fs/cgroup/user.slice"
    group(around / "session:7.scope", "max", 900_000, 0)
    assert memory.container_memory(tmp_path) is None
    group(around, "2000000", 1_500_000, 400_000)
    assert memory.container_memory(tmp_path) == (2_000_000, 900_000)
    group(around / "session:7.scope", "1000000", 900_000, 0)
    assert memory.container_memory(tmp_path) == (1_000_000, 100_000)
    read = doctor_probe.read_memory(tmp_path)
    assert (read.total_bytes, read.available_bytes, read.container_limit_bytes) == (9000 * 1024, 100_000, 1_000_000)


@pytest.mark.parametrize(("limit", "expected"), [("1000000", (1_000_000, 350_000)), (str((1 << 63) - 4096), None)])
def test_control_groups_of_version_1(tmp_path: Path, limit: str, expected: tuple[int, int] | None) -> None:
    write(tmp_path / "proc/self/cgroup", "11:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n")
    folder = tmp_path / "sys/fs/cgroup/memory/docker/abc"
    write(folder / "memory.limit_in_bytes", f"{limit}\n")
    write(folder / "memory.usage_in_bytes", "700000\n")
    write(folder / "memory.stat", "cache 9\ntotal_cache 50000\n")
    assert memory.container_memory(tmp_path) == expected


# ---------------------------------------------------------------------------------------------------------------------
# GPUs

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the stub of a driver is not compiled")

LIBCUDA = """
#include <stddef.h>
#include <stdio.h>
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuGetErrorName(int status, const char** name) { *name = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"; return 0; }
int cuDriverGetVersion(int* version) { *version = 12080; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int index) { *device = 40 + index; return DEVICE; }
int cuDeviceGetName(char* name, int len, int device) { snprintf(name, len, "Stub %d", device); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = (size_t)device << 30; return 0; }
int cuDeviceGetPCIBusId(char* bus, int len, int device) { snprintf(bus, len, "0000:%d:00.0", device); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? device - 32 : attribute == 76 ? 9 - (device - 40) : -1;
    return 0;
}
"""
LIBNVML = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int nvmlInit_v2(void) { return START; }
int nvmlSystemGetDriverVersion(char* text, unsigned len) { snprintf(text, len, "570.1"); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, void** handle) {
    *handle = (void*)(long)atoi(bus + 5);
    return atoi(bus + 5) == 41 ? 6 : 0;  /* the second is not found */
}
int nvmlDeviceGetMemoryInfo(void* handle, unsigned long long* info) {
    info[0] = 3000; info[1] = 1000 + (long)handle; info[2] = 2000;
    return 0;
}
"""
Stub = Callable[[dict[str, str], str], None]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Put libraries with these names and sources on the path of child processes."""
    folder = tmp_path / "stubs"

    def compile_stubs(sources: dict[str, str], *options: str) -> None:
        for name, source in sources.items():
            path = write(folder / f"{name}.c", source)
            subprocess.run(["cc", "-shared", "-fPIC", *options, "-o", str(folder / name), str(path)], check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))

    return compile_stubs


WORKS = ("-DINIT=0", "-DDEVICE=0", "-DSTART=0")


@needs_cc
def test_gpus_by_the_driver(stub: Callable[..., None], tmp_path: Path) -> None:
    stub({"libcuda.so.1": LIBCUDA, "libnvidia-ml.so.1": LIBNVML}, *WORKS)
    driver = doctor_probe.read_driver(tmp_path)
    assert (driver.version, driver.cuda_version, driver.failure) == ("570.1", "12.8", None)
    first, second = driver.gpus
    assert (first.name, first.compute_capability, first.memory_bytes, first.free_bytes) == (
        "Stub 40",
        "8.9",
        40 << 30,
        1040,
    )
    assert (second.name, second.compute_capability, second.free_bytes) == ("Stub 41", "9.8", None)


@needs_cc
def test_a_driver_without_its_management_library(stub: Callable[..., None], tmp_path: Path) -> None:
    write(
        tmp_path / "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Module  570.86.10  Fri\nGCC version: 13.2.0\n",
    )
    stub({"libcuda.so.1": LIBCUDA, "libnvidia-ml.so.1": LIBNVML}, "-DINIT=0", "-DDEVICE=0", "-DSTART=9")
    driver = doctor_probe.read_driver(tmp_path)
    assert (driver.version, driver.has_kernel_module) == ("570.86.10", True)
    assert [gpu.free_bytes for gpu in driver.gpus] == [None, None]


@needs_cc
@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("-DINIT=803", "-DDEVICE=0"), "cuInit: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)"),
        (("-DINIT=0", "-DDEVICE=3"), "OSError: GPU 0: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (3)"),
    ],
)
def test_a_driver_that_refuses(stub: Callable[..., None], tmp_path: Path, options: tuple[str, str], cause: str) -> None:
    stub({"libcuda.so.1": LIBCUDA}, *options)
    driver = doctor_probe.read_driver(tmp_path)
    assert driver.failure == Failure(cause=cause)
    assert driver.gpus == []


@needs_cc
def test_a_driver_that_crashes_or_hangs_is_told(
    stub: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub({"libcuda.so.1": "#include <stdlib.h>\nint cuDriverGetVersion(int* v) { abort(); }"})
    assert doctor_probe.ask("cuda") == Failure(cause="the process was ended by SIGABRT")
    stub({"libcuda.so.1": "#include <unistd.h>\nint cuDriverGetVersion(int* v) { return sleep(60); }"})
    monkeypatch.setattr(doctor_probe, "_ANSWER_WITHIN_S", 1)
    assert doctor_probe.ask("cuda") == Failure(cause="no answer within 1 s")


def test_devices_without_a_driver_are_counted(tmp_path: Path) -> None:
    devices = tmp_path / "sys/bus/pci/devices"
    for name, vendor, kind in (
        ("0000:01:00.0", "0x10de", "0x030000"),
        ("0000:01:00.1", "0x10de", "0x040300"),  # the sound half of a card
        ("0000:02:00.0", "0x1002", "0x030000"),
        ("0000:03:00.0", "0x10de", "0x030200"),
    ):
        write(devices / name / "vendor", f"{vendor}\n")
        write(devices / name / "class", f"{kind}\n")
    driver = doctor_probe.read_driver(tmp_path)
    assert (driver.num_devices, driver.has_kernel_module) == (2, False)


# ---------------------------------------------------------------------------------------------------------------------
# Libraries


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of all others that modules are imported from, here and in child processes."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return folder


def distribution(packages: Path, name: str, version: str, *files: str) -> None:
    folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    write(folder / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    write(folder / "RECORD", "".join(f"{file},,\n" for file in files))


def test_packages_that_bring_the_same_module_are_all_found(packages: Path) -> None:
    distribution(packages, "onnxruntime-gpu", "1.31.1", "onnxruntime/__init__.py", "onnxruntime/capi/x.so")
    distribution(packages, "onnxruntime-extensions", "0.14", "onnxruntime_extensions/__init__.py")
    found = doctor_probe.read_onnxruntime()
    assert found.distributions.keys() == {"onnxruntime", "onnxruntime-gpu"}
    assert found.distributions["onnxruntime-gpu"] == "1.31.1"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (
            "raise ImportError('libcudnn.so.9: cannot open shared object file')",
            "ImportError: libcudnn.so.9: cannot open shared object file",
        ),
        ("import os; os.abort()", "the process was ended by SIGABRT"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_a_module_that_does_not_import_is_told(packages: Path, source: str, cause: str) -> None:
    write(packages / "onnxruntime/__init__.py", source)
    found = doctor_probe.read_onnxruntime()
    assert (found.version, found.failure) == (None, Failure(cause=cause))
    write(packages / "tensorrt/__init__.py", source)
    assert doctor_probe.read_module("tensorrt").failure == Failure(cause=cause)


def test_a_module_that_prints_is_understood(packages: Path) -> None:
    write(packages / "tensorrt/__init__.py", "print('[TRT] loaded', end='')\n__version__ = '10.15.1.29'")
    assert doctor_probe.read_module("tensorrt").version == "10.15.1.29"
    assert doctor_probe.read_module("no_such_module").version is None


def test_the_official_module_of_rtx_goes_before_the_wheel(packages: Path) -> None:
    write(packages / "tensorrt_rtx/__init__.py", "__version__ = '1.7.0'")
    found = doctor_probe.read_tensorrt_rtx()
    assert (found.version, found.where) == ("1.7.0", "tensorrt_rtx")


def test_a_wheel_of_another_version_is_told_with_its_mend(packages: Path) -> None:
    write(packages / "onnxruntime_ep_nv_tensorrt_rtx/__init__.py", "")
    for stem in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):
        write(packages / f"onnxruntime_ep_nv_tensorrt_rtx/{stem}.so.1.8.0", "")
    found = doctor_probe.read_tensorrt_rtx()
    assert found.failure == Failure(
        cause="libtensorrt_rtx.so.1.8.0: TensorRT-RTX 1.8.0, this version of gemma4-export binds 1.7.x",
        hint='pip install "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0"',
    )
    (packages / "onnxruntime_ep_nv_tensorrt_rtx/libtensorrt_rtx.so.1.8.0").unlink()
    failure = doctor_probe.read_tensorrt_rtx().failure
    assert failure is not None
    assert failure.cause.endswith(": expected one libtensorrt_rtx.so.VERSION, found 0")


def test_no_wheel_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> RtxLibrary:
        raise ArtifactError("TensorRT-RTX is not installed", hint="pip")

    monkeypatch.setattr(doctor_probe, "find_rtx_library", missing)
    monkeypatch.setattr(doctor_probe.importlib.util, "find_spec", lambda name: None)
    found = doctor_probe.read_tensorrt_rtx()
    assert found.version is found.failure is None


def test_tensorrt_s_libraries_are_found_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "usr/lib/x86_64-linux-gnu"
    for name in (
        *("libnvinfer.so", "libnvinfer.so.10", "libnvinfer.so.10.15.1", "libnvinfer_plugin.so.10.15.1"),
        *("libnvinfer_builder_resource_sm90.so.10.15.1", "libnvinfer_builder_resource_ptx.so.10.15.1"),
    ):
        write(here / name, "")
    loader = write(tmp_path / "loader/libnvinfer_builder_resource_sm120.so.10.15.1", "").parent
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{loader}:/nowhere:")
    folders = doctor_probe.library_folders(tmp_path)
    assert folders == [loader, here, tmp_path / "usr/lib"]
    found = doctor_probe.read_libnvinfer(folders)
    assert (found.version, found.where) == ("10.15.1", str(here / "libnvinfer.so.10.15.1"))
    assert doctor_probe.read_builder_resources(folders) == ["ptx", "sm120", "sm90"]


@needs_cc
def test_the_plugin_library_states_its_contracts(stub: Callable[..., None], tmp_path: Path) -> None:
    stub({"libgemma4.so": 'const char* gemma4_plugin_contracts(void) { return "Gemma4MoE=1 Other=2"; }'})
    found = doctor_probe.read_plugins(tmp_path / "stubs/libgemma4.so")
    assert (found.contracts, found.failure) == ({"Gemma4MoE": 1, "Other": 2}, None)
    foreign = write(tmp_path / "foreign.so", "no library")
    failure = doctor_probe.read_plugins(foreign).failure
    assert failure is not None
    assert "invalid ELF header" in failure.cause or "file too short" in failure.cause
    assert doctor_probe.read_plugins(tmp_path / "none.so").failure is None


def test_nvcc_by_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = write(tmp_path / "nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(doctor_probe.plugin_compiler, "find_nvcc", lambda: (nvcc, nvcc.parent))
    assert doctor_probe.read_nvcc().version == "13.0.88"
    nvcc.write_text("#!/bin/sh\necho 'no licence' >&2; exit 4\n", encoding="utf-8")
    assert doctor_probe.read_nvcc().failure == Failure(cause=f"{nvcc} --version: no licence")

    def missing() -> tuple[Path, Path]:
        raise ArtifactError("no nvcc", hint="pip")

    monkeypatch.setattr(doctor_probe.plugin_compiler, "find_nvcc", missing)
    found = doctor_probe.read_nvcc()
    assert found.version is found.failure is None


# ---------------------------------------------------------------------------------------------------------------------
# Artifacts and the command


@pytest.fixture(scope="module")
def folder() -> Path:
    return artifacts.artifact("31b", context=64, fresh_trace=False)


def spoiled(folder: Path, out: Path, **values: object) -> Path:
    shutil.copytree(folder, out)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    (out / "manifest.json").write_text(json.dumps(manifest | values), encoding="utf-8")
    return out


def test_a_newer_artifact_is_told_from_a_damaged_one(folder: Path, tmp_path: Path) -> None:
    newer = probe_artifact(spoiled(folder, tmp_path / "a", format=FORMAT + 1, versions={"gemma4-export": "0.10.0"}))
    assert newer.failure == Failure(
        cause=f"manifest.json: format {FORMAT + 1}, this version reads format {FORMAT}; made by gemma4-export 0.10.0, "
        "this is 0.1.0",
        hint="pip install --upgrade gemma4-export",
    )
    keys = probe_artifact(spoiled(folder, tmp_path / "b", sharding={}, versions={"gemma4-export": "0.10.0"}))
    assert keys.failure == Failure(
        cause="manifest.json: key 'sharding' is unknown; made by gemma4-export 0.10.0, this is 0.1.0",
        hint="pip install --upgrade gemma4-export",
    )
    damaged = probe_artifact(spoiled(folder, tmp_path / "c", sharding={}))
    assert damaged.failure is not None
    assert damaged.failure.cause == "manifest.json: key 'sharding' is unknown"
    assert damaged.failure.hint != newer.failure.hint


def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("gemma4_export.runtime.doctor_artifact.Artifact.open", refuse)
    failure = Failure(cause=f"{tmp_path}: Permission denied", hint=f"chmod -R u+rX '{tmp_path}'")
    assert probe_artifact(tmp_path).failure == failure


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["gemma4-run", "doctor", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    captured = capsys.readouterr()
    assert captured.err == ""
    return int(ended.value.code or 0), captured.out


def test_the_command_says_what_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(monkeypatch, capsys, folder)
    assert code == 0
    machine, _, artifact = out.partition("\n\n")
    assert machine.splitlines()[0].startswith("ok       packages      Python ")
    assert artifact.splitlines()[0].startswith("ok       artifact      31b for cpu, fp32, ")
    code, out = run(monkeypatch, capsys, folder, "--json")
    values = json.loads(out)
    assert (code, values["passed"]) == (0, True)
    assert values.keys() == {"passed", "machine", "artifact", "facts"}
    code, out = run(monkeypatch, capsys, "--json")
    assert (code, json.loads(out)["artifact"]) == (0, None)


def test_the_command_says_what_does_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = spoiled(folder, tmp_path / "newer", format=FORMAT + 1)
    code, out = run(monkeypatch, capsys, newer)
    assert code == 1
    assert out.endswith(
        f"problem  artifact      manifest.json: format {FORMAT + 1}, this version reads format {FORMAT}\n"
        "                       mend: pip install --upgrade gemma4-export\n"
    )
    code, out = run(monkeypatch, capsys, tmp_path / "nowhere", "--json")
    assert (code, json.loads(out)["passed"]) == (1, False)
    # A broken machine is a problem by itself.
    failure = Failure(cause="ImportError: gone")
    monkeypatch.setattr(doctor_probe, "ask", lambda *question: failure)
    code, out = run(monkeypatch, capsys)
    assert code == 1
    assert "problem  onnxruntime   onnxruntime " in out
