"""``gemma4-run doctor``: recorded machines judged as they were, broken ones told what mends them."""

from __future__ import annotations

import json
import tomllib
import types
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import artifacts
import pytest
from conftest import REPOSITORY

from gemma4_export.configs.manifest import FORMAT, CompiledEntry, EnginesEntry, GroupEntry, Manifest
from gemma4_export.configs.step_bytes import PROCESS_BYTES
from gemma4_export.runtime import doctor
from gemma4_export.runtime import memory as memory_module
from gemma4_export.runtime.doctor import Finding, machine_findings
from gemma4_export.runtime.doctor_artifact import ArtifactFacts, artifact_findings, probe_artifact
from gemma4_export.runtime.doctor_facts import Disk, Facts, Failure, Gpu, Library, Onnxruntime
from gemma4_export.runtime.engine.build import build_memory

RECORDED = sorted((Path(__file__).parent / "doctor").glob("*.json"))
"""What ``gemma4-run doctor --json`` said on machines of ours: two cores without a GPU; an H200; the same with its GPU
hidden from the process."""


def parsed(kind: Any, value: Any) -> Any:
    """``value``, read from JSON, as ``kind``."""
    arguments = get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if value is None else parsed(arguments[0], value)
    if get_origin(kind) is list:
        return [parsed(arguments[0], item) for item in value]
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        assert set(value) == set(hints)
        return kind(**{name: parsed(hint, value[name]) for name, hint in hints.items()})
    return value


def recorded(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "doctor" / f"{name}.json").read_text(encoding="utf-8"))


CPU: Facts = parsed(Facts, recorded("cpu")["facts"])
H100 = Gpu(name="NVIDIA H100", compute_capability="9.0", memory_bytes=85_000_000_000, free_bytes=84_000_000_000)
RTX4090 = Gpu(name="RTX 4090", compute_capability="8.9", memory_bytes=25_000_000_000, free_bytes=None)


def with_gpu(facts: Facts, *gpus: Gpu, cuda: str = "13.0", driver: str = "580.159.04") -> Facts:
    return replace(
        facts,
        driver=replace(
            facts.driver,
            num_devices=len(gpus),
            has_kernel_module=True,
            version=driver,
            cuda_version=cuda,
            failure=None,
            gpus=list(gpus),
        ),
    )


def of(findings: list[Finding], what: str) -> list[Finding]:
    return [finding for finding in findings if finding.what == what]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_machines_are_judged_as_they_were(path: Path) -> None:
    values = recorded(path.stem)
    findings = machine_findings(parsed(Facts, values["facts"]))
    assert [asdict(finding) for finding in findings] == values["machine"]


def test_an_h200_is_one_that_tensorrt_engines_are_for(manifest: Manifest) -> None:
    h200 = parsed(Facts, recorded("h200")["facts"])
    (gpu,) = h200.driver.gpus
    assert (gpu.name, gpu.compute_capability, h200.driver.version) == ("NVIDIA H200", "9.0", "580.159.04")
    trt = about(engines(manifest, "tensorrt", "9.0", num_experts=8))
    assert problems(trt, h200) == {
        **RUNS_NOT,
        "builder": INSTALL_TENSORRT,
        "plugins": "python -m gemma4_export.plugins.compile",
    }
    assert of(artifact_findings(trt, h200), "device")[0].level == "ok"
    (backend,) = wrong(about(manifest), h200)
    assert (backend.level, backend.mend) == ("warning", 'pip install --upgrade "onnxruntime>=1.31.1"')


# ---------------------------------------------------------------------------------------------------------------------
# Broken machines

NO_ONNXRUNTIME = Onnxruntime(distributions={}, version=None, providers=[], failure=None)
BOTH = Onnxruntime(
    distributions={"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"},
    version="1.31.1",
    providers=["CUDAExecutionProvider", "CPUExecutionProvider"],
    failure=None,
)
INSTALL_RTX, INSTALL_TENSORRT = 'pip install "gemma4-export[rtx]"', 'pip install "gemma4-export[tensorrt]"'
Breaks = Callable[[Facts], Facts]
BROKEN: dict[str, tuple[Breaks, str, str, str, str | None]] = {
    "both onnxruntimes": (
        lambda facts: replace(facts, onnxruntime=BOTH),
        "onnxruntime",
        "problem",
        "onnxruntime 1.32.0, onnxruntime-gpu 1.31.1 are installed over each other; importing gives 1.31.1",
        'pip uninstall --yes onnxruntime onnxruntime-gpu && pip install "gemma4-export[gpu]"',
    ),
    "no onnxruntime": (
        lambda facts: replace(facts, onnxruntime=NO_ONNXRUNTIME),
        "onnxruntime",
        "warning",
        "not installed: no artifact for --target cpu runs",
        'pip install "gemma4-export[cpu]"',
    ),
    "old onnxruntime": (
        lambda facts: replace(
            facts, onnxruntime=replace(facts.onnxruntime, distributions={"onnxruntime-gpu": "1.9.0"}, version="1.9.0")
        ),
        "onnxruntime",
        "warning",
        "onnxruntime-gpu 1.9.0: older than 1.31.1, the oldest that is tested",
        'pip install --upgrade "onnxruntime-gpu>=1.31.1"',
    ),
    "onnxruntime does not import": (
        lambda facts: replace(
            facts, onnxruntime=replace(facts.onnxruntime, version=None, failure=Failure(cause="ImportError: no glibc"))
        ),
        "onnxruntime",
        "problem",
        "onnxruntime 1.32.0 does not import: ImportError: no glibc",
        "pip install --force-reinstall onnxruntime",
    ),
    "missing package": (
        lambda facts: replace(facts, packages={"numpy": "2.4.6", "jinja2": "3.1.6", "safetensors": "0.8.0"}),
        "packages",
        "problem",
        f"Python {CPU.python}, without tokenizers",
        "pip install --upgrade gemma4-export",
    ),
    "wrong version of TensorRT-RTX": (
        lambda facts: replace(
            facts,
            tensorrt_rtx=Library(version=None, where=None, failure=Failure(cause="1.8.0, binds 1.7.x", hint="pip x")),
        ),
        "TensorRT-RTX",
        "problem",
        "1.8.0, binds 1.7.x",
        "pip x",
    ),
    "TensorRT-RTX's module does not import": (
        lambda facts: replace(
            facts,
            tensorrt_rtx=Library(version=None, where="tensorrt_rtx", failure=Failure(cause="ImportError: libcudart")),
        ),
        "TensorRT-RTX",
        "problem",
        "ImportError: libcudart",
        'pip install --force-reinstall "gemma4-export[rtx]"',
    ),
    "old TensorRT": (
        lambda facts: replace(facts, tensorrt=Library(version="10.9.0", where="tensorrt", failure=None)),
        "TensorRT",
        "problem",
        "TensorRT 10.9.0: its parser lacks TensorScatter and Attention, which came with 10.15",
        'pip install --upgrade "gemma4-export[tensorrt]"; Jetson: JetPack 7.2 or newer',
    ),
    "TensorRT without its libraries": (
        lambda facts: replace(
            facts,
            tensorrt=Library(version=None, where="tensorrt", failure=Failure(cause="libnvinfer_plugin.so.10: no")),
        ),
        "TensorRT",
        "problem",
        "tensorrt does not import: libnvinfer_plugin.so.10: no",
        'pip install --force-reinstall "gemma4-export[tensorrt]"',
    ),
    "TensorRT without its module": (
        lambda facts: replace(
            facts, libnvinfer=Library(version="10.15.1", where="/usr/lib/libnvinfer.so.10.15.1", failure=None)
        ),
        "TensorRT",
        "warning",
        "libnvinfer 10.15.1 (/usr/lib/libnvinfer.so.10.15.1) without its Python module",
        f"{INSTALL_TENSORRT}; on a Jetson: sudo apt-get install python3-libnvinfer",
    ),
    "TensorRT without the builder's part for the GPU": (
        lambda facts: replace(
            with_gpu(facts, H100),
            tensorrt=Library(version="10.15.1", where="tensorrt", failure=None),
            builder_resources=["ptx", "sm80"],
        ),
        "TensorRT",
        "problem",
        "libnvinfer_builder_resource_sm90.so.10.15.1 is missing: nothing can be built for this GPU",
        "pip install --force-reinstall tensorrt-cu13-libs",
    ),
    "plugins of another version": (
        lambda facts: replace(facts, plugins=replace(facts.plugins, path="lib.so", contracts={"Gemma4MoE": 9})),
        "plugins",
        "problem",
        "lib.so: Gemma4MoE version 9, this gemma4-export has version 1",
        "python -m gemma4_export.plugins.compile",
    ),
    "plugins of another project": (
        lambda facts: replace(facts, plugins=replace(facts.plugins, path="lib.so", contracts={"Other": 1})),
        "plugins",
        "problem",
        "lib.so: Other version 1, this gemma4-export has no such op",
        "python -m gemma4_export.plugins.compile",
    ),
    "plugins do not load": (
        lambda facts: replace(
            facts, plugins=replace(facts.plugins, path="lib.so", failure=Failure(cause="invalid ELF header"))
        ),
        "plugins",
        "problem",
        "lib.so does not load: invalid ELF header",
        "python -m gemma4_export.plugins.compile",
    ),
    "nvcc of another CUDA": (
        lambda facts: replace(facts, nvcc=Library(version="12.9.86", where="/usr/bin/nvcc", failure=None)),
        "nvcc",
        "warning",
        "12.9.86 (/usr/bin/nvcc): our plugins are compiled with CUDA 13",
        'pip install "gemma4-export[kernels]"',
    ),
    "nvcc says nothing": (
        lambda facts: replace(
            facts, nvcc=Library(version=None, where="nvcc", failure=Failure(cause="nvcc --version: exit code 1"))
        ),
        "nvcc",
        "warning",
        "nvcc --version: exit code 1",
        'pip install "gemma4-export[kernels]"',
    ),
    "old driver": (
        lambda facts: with_gpu(facts, H100, cuda="12.2", driver="535.54.03"),
        "driver",
        "warning",
        "535.54.03, runs CUDA up to 12.2; TensorRT and our plugins are made for CUDA 13",
        "sudo apt-get install nvidia-driver-580",
    ),
    "GPUs without a driver": (
        lambda facts: replace(facts, driver=replace(facts.driver, num_devices=2)),
        "GPU",
        "warning",
        "2 NVIDIA GPUs on the PCI bus, no driver",
        "sudo apt-get install nvidia-driver-580",
    ),
    "a container without its GPU": (
        lambda facts: replace(with_gpu(facts), driver=replace(with_gpu(facts).driver, failure=Failure(cause="no lib"))),
        "GPU",
        "warning",
        "NVIDIA's driver 580.159.04 is loaded, and this process gets no GPU (no lib)",
        "nvidia-smi says more; in a container: docker run --gpus all …; CUDA_VISIBLE_DEVICES may hide them",
    ),
    "no AVX2": (
        lambda facts: replace(facts, processor=replace(facts.processor, model="Atom", cores=4, features=[])),
        "processor",
        "warning",
        "Atom, x86_64, 4 cores: none of the instructions looked for; products will be slow: AVX2 or NEON is missing",
        None,
    ),
    "a container of half a core": (
        lambda facts: replace(facts, processor=replace(facts.processor, cores=16, quota=2.5)),
        "processor",
        "warning",
        "this container gets the time of 2.5 cores and sees 16",
        "gemma4-run generate ARTIFACT --threads 2",
    ),
    "memory that nothing tells": (
        lambda facts: replace(facts, memory=replace(facts.memory, available_bytes=None)),
        "memory",
        "warning",
        "nothing says how much there is: a load that cannot fit will not be refused",
        None,
    ),
    "a probe that failed": (
        lambda facts: replace(facts, unread=[Failure(cause="processor: KeyError: 'x'")]),
        "doctor",
        "warning",
        "could not read processor: KeyError: 'x'",
        None,
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_machine_is_told_what_mends_it(kind: str) -> None:
    breaks, what, level, found, mend = BROKEN[kind]
    assert all(finding.level == "ok" for finding in machine_findings(CPU))
    findings = machine_findings(breaks(CPU))
    wrong = [finding for finding in findings if finding.level != "ok"]
    assert wrong == [Finding(level=level, what=what, found=found, mend=mend)]  # type: ignore[arg-type]


def test_a_sound_gpu_names_its_targets() -> None:
    findings = machine_findings(with_gpu(CPU, H100, RTX4090))
    assert all(finding.level == "ok" for finding in findings)
    assert [finding.found for finding in of(findings, "GPU")][:2] == [
        "NVIDIA H100, compute capability 9.0, 85.00 GB, 84.00 GB free; targets: h100 (tensorrt), h200 (tensorrt)",
        "RTX 4090, compute capability 8.9, 25.00 GB; targets: l4 (tensorrt-rtx), rtx4090 (tensorrt-rtx)",
    ]
    (finding,) = of(findings, "driver")
    assert finding.found == "580.159.04, runs CUDA up to 13.0"


def test_a_container_says_what_it_may_take() -> None:
    memory = replace(CPU.memory, total_bytes=64 << 30, available_bytes=3_000_000_000, container_limit_bytes=1 << 32)
    (finding,) = of(machine_findings(replace(CPU, memory=memory)), "memory")
    assert finding.found == "3.00 GB of 68.72 GB can be had; this container may take 4.29 GB"


def test_the_oldest_onnxruntime_is_what_the_package_asks_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert extras["cpu"] == [f"onnxruntime>={doctor.OLDEST_ONNXRUNTIME}"]
    assert extras["gpu"] == [f"onnxruntime-gpu>={doctor.OLDEST_ONNXRUNTIME}"]


@pytest.mark.parametrize(
    ("version", "expected"), [("1.32.0rc1", (1, 32, 0)), ("1.9", (1, 9)), ("unknown", ()), ("", ())]
)
def test_versions_compare_as_numbers(version: str, expected: tuple[int, ...]) -> None:
    assert doctor.numbers(version) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Artifacts


@pytest.fixture(scope="module")
def folder() -> Path:
    return artifacts.artifact("31b", context=64, fresh_trace=False)


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    opened = probe_artifact(folder)
    assert opened.failure is None
    assert opened.manifest is not None
    return opened.manifest


def about(manifest: Manifest, *, free_bytes: int = 10**12) -> ArtifactFacts:
    disk = Disk(path="folder", free_bytes=free_bytes)
    return ArtifactFacts(folder="folder", manifest=manifest, failure=None, disk=disk)


def wrong(artifact: ArtifactFacts, facts: Facts) -> list[Finding]:
    return [finding for finding in artifact_findings(artifact, facts) if finding.level != "ok"]


def test_an_artifact_for_the_processor_runs_on_every_recorded_machine_of_today(manifest: Manifest) -> None:
    findings = artifact_findings(about(manifest), CPU)
    assert all(finding.level == "ok" for finding in findings)
    assert [finding.what for finding in findings] == ["artifact", "backend", "memory"]
    assert findings[0].found.startswith(f"31b for cpu, fp32, format {FORMAT}, made by gemma4-export 0.1.0; ")


def memory_of(facts: Facts, available: int) -> Facts:
    return replace(facts, memory=replace(facts.memory, available_bytes=available))


def test_memory_is_judged_as_a_load_judges_it(manifest: Manifest) -> None:
    manifest = replace(manifest, verify=replace(manifest.verify, load_peak_bytes=0))
    weights = memory_module.weights_bytes(manifest)
    (short,) = wrong(about(manifest), memory_of(CPU, weights - 1))
    assert (short.level, short.what, short.mend) == ("problem", "memory", "gemma4-export build --recipe int4 …")
    assert short.found.endswith(f"; {memory_module.size(weights - 1)} can be had, less than the weights")
    (short,) = wrong(about(replace(manifest, recipe="int4")), memory_of(CPU, weights - 1))
    assert short.mend == "close what else runs"
    # Weights, process and the caches of 20 tokens: the load passes, its last tokens would not.
    kv = manifest.kv
    tight = weights + PROCESS_BYTES + kv.num_bytes(20)
    assert kv.num_bytes(20) < kv.num_bytes(64)
    (finding,) = wrong(about(manifest), memory_of(CPU, tight))
    assert (finding.level, finding.what) == ("warning", "memory")
    assert finding.found.endswith(" can be had: about 20 tokens fit")
    assert not wrong(about(manifest), memory_of(CPU, weights + PROCESS_BYTES + kv.num_bytes(64)))
    (unknown,) = wrong(about(manifest), replace(CPU, memory=replace(CPU.memory, available_bytes=None)))
    assert unknown.found.endswith("; how much there is, nothing says")


def test_a_load_that_peaks_above_what_is_left_is_warned_of(manifest: Manifest) -> None:
    manifest = replace(manifest, verify=replace(manifest.verify, load_peak_bytes=3_000_000_000))
    (finding,) = wrong(about(manifest), memory_of(CPU, 2_000_000_000))
    assert (finding.level, finding.found) == ("warning", "loading takes 3.00 GB for a moment; 2.00 GB can be had")


def test_sliding_layers_alone_fit_whole_or_not_at_all(manifest: Manifest) -> None:
    caches = [replace(cache, kind="sliding") for cache in manifest.kv.caches]
    sliding = replace(manifest, kv=replace(manifest.kv, caches=caches))
    weights = memory_module.weights_bytes(sliding)
    (finding,) = wrong(about(sliding), memory_of(CPU, weights + PROCESS_BYTES))
    assert finding.found.endswith("about 0 tokens fit")


@pytest.mark.parametrize(
    ("onnxruntime", "level", "mend"),
    [
        (NO_ONNXRUNTIME, "problem", 'pip install "gemma4-export[cpu]"'),
        (BOTH, "warning", 'pip uninstall --yes onnxruntime onnxruntime-gpu && pip install "gemma4-export[gpu]"'),
        (replace(BOTH, providers=[]), "problem", None),
        (replace(CPU.onnxruntime, version=None, failure=Failure(cause="no")), "problem", None),
    ],
)
def test_an_artifact_needs_its_backend(
    manifest: Manifest, onnxruntime: Onnxruntime, level: str, mend: str | None
) -> None:
    (finding,) = wrong(about(manifest), replace(CPU, onnxruntime=onnxruntime))
    assert (finding.level, finding.what) == (level, "backend")
    assert finding.mend == (mend or finding.mend)
    assert finding.mend


def test_what_else_keeps_an_artifact_from_running(manifest: Manifest) -> None:
    (finding,) = wrong(about(manifest), replace(CPU, packages={}))
    assert (finding.level, finding.what) == ("problem", "packages")
    (finding,) = wrong(about(manifest, free_bytes=5), CPU)
    assert finding.found == "5 bytes free in folder: verify cannot write its report"
    (finding,) = wrong(about(replace(manifest, has_dummy_weights=True)), CPU)
    assert (finding.level, finding.what) == ("warning", "weights")
    census = {"decoder.mlp": replace(next(iter(manifest.census.values())), format="int4/32")}
    slow = replace(CPU, processor=replace(CPU.processor, features=["bf16"]))
    (finding,) = wrong(about(replace(manifest, census=census, activations="int8")), slow)
    assert finding.found == "int8 products without AVX2 or NEON: it runs, many times slower"
    graphs = {"decoder": replace(manifest.graphs["decoder"], backend="ort-cuda")}
    (finding,) = wrong(about(replace(manifest, graphs=graphs)), CPU)
    assert (finding.level, finding.what) == ("problem", "backend")
    assert finding.mend == "gemma4-export build --target cpu …"


# ---------------------------------------------------------------------------------------------------------------------
# Artifacts of engines

WEIGHTS = 1_400_000_000


def filled(kind: Any, **values: object) -> Any:
    """A dataclass in which nothing else is said."""
    return kind(**{field.name: None for field in fields(kind)} | values)


def engines(
    manifest: Manifest,
    backend: Literal["tensorrt", "tensorrt-rtx"],
    compute_capability: str,
    *,
    num_experts: int = 0,
    compiled: CompiledEntry | None = None,
) -> Manifest:
    groups = [
        filled(GroupEntry, file="g.onnx", first=i, last=i, weight_bytes=WEIGHTS, inputs=[], outputs=[], profiles={})
        for i in range(3)
    ]
    entry = filled(
        EnginesEntry,
        backend=backend,
        compute_capability=compute_capability,
        float_type="bfloat16",
        experts="plugin",
        phases={"all": groups},
        compiled=compiled,
    )
    return replace(manifest, graphs={}, engines=entry, model=replace(manifest.model, num_experts=num_experts))


def problems(artifact: ArtifactFacts, facts: Facts) -> dict[str, str | None]:
    found = artifact_findings(artifact, facts)
    return {finding.what: finding.mend for finding in found if finding.level == "problem"}


RUNS_NOT = {"backend": "gemma4-export build --target cpu …"}


def test_rtx_engines_compile_without_a_gpu_and_do_not_run(manifest: Manifest) -> None:
    rtx = about(engines(manifest, "tensorrt-rtx", "8.9"))
    assert problems(rtx, CPU) == RUNS_NOT
    (device,) = of(artifact_findings(rtx, CPU), "device")
    assert (device.level, device.found) == ("warning", "for a GPU of compute capability 8.9, here is none")
    (device,) = of(artifact_findings(rtx, with_gpu(CPU, H100)), "device")
    assert device.found == "for a GPU of compute capability 8.9, here: 9.0"
    (device,) = of(artifact_findings(rtx, with_gpu(CPU, RTX4090)), "device")
    assert (device.level, device.found) == ("ok", "a GPU of compute capability 8.9 is here")


def test_engines_need_library_plugins_memory_and_disk(manifest: Manifest) -> None:
    rtx = about(engines(manifest, "tensorrt-rtx", "8.9", num_experts=8))
    bare = replace(CPU, tensorrt_rtx=Library(version=None, where=None, failure=None))
    assert problems(rtx, bare) == {
        **RUNS_NOT,
        "builder": INSTALL_RTX,
        "plugins": "python -m gemma4_export.plugins.compile",
    }
    ready = replace(CPU, plugins=replace(CPU.plugins, contracts={"Gemma4MoE": 1}))
    assert problems(rtx, ready) == RUNS_NOT
    broken = replace(ready, tensorrt_rtx=Library(version=None, where=None, failure=Failure(cause="1.8", hint="pip x")))
    assert problems(rtx, broken) == {**RUNS_NOT, "builder": "pip x"}
    assert "memory" in problems(rtx, memory_of(ready, build_memory(WEIGHTS) - 1))
    assert "memory" not in problems(rtx, memory_of(ready, build_memory(WEIGHTS)))
    assert "disk" in problems(about(rtx.manifest, free_bytes=3 * WEIGHTS - 1), ready)  # type: ignore[arg-type]
    assert "disk" not in problems(about(rtx.manifest, free_bytes=3 * WEIGHTS), ready)  # type: ignore[arg-type]


def test_tensorrt_engines_need_the_gpu_that_they_are_for(manifest: Manifest) -> None:
    trt = about(engines(manifest, "tensorrt", "9.0"))
    move = "copy the folder to a machine with such a GPU and run gemma4-run doctor ARTIFACT there"
    assert problems(trt, CPU) == {**RUNS_NOT, "device": move, "builder": INSTALL_TENSORRT}
    here = replace(
        with_gpu(CPU, H100),
        tensorrt=Library(version="10.15.1", where="tensorrt", failure=None),
        builder_resources=["sm90"],
    )
    assert problems(trt, here) == RUNS_NOT
    assert problems(trt, replace(here, builder_resources=["sm80"])) == {
        **RUNS_NOT,
        "builder": "pip install --force-reinstall tensorrt-cu13-libs",
    }
    old = replace(here, driver=replace(here.driver, cuda_version="12.2", version="535.54.03"))
    (device,) = of(artifact_findings(trt, old), "device")
    assert device.found == "driver 535.54.03 runs CUDA up to 12.2, engines need 13"
    assert problems(trt, old) == {**RUNS_NOT, "device": "sudo apt-get install nvidia-driver-580"}


def test_compiled_engines_need_their_gpu_and_their_library(manifest: Manifest) -> None:
    entry = CompiledEntry(library_version="1.7.1", compute_capabilities=["8.6", "8.9"])
    rtx = about(engines(manifest, "tensorrt-rtx", "8.9", compiled=entry))
    here = with_gpu(CPU, RTX4090)
    assert problems(rtx, here) == RUNS_NOT
    (backend,) = of(artifact_findings(rtx, here), "backend")
    assert backend.found.startswith("3 tensorrt-rtx engines, compiled by 1.7.1; this version ")
    assert not of(artifact_findings(rtx, memory_of(here, 1)), "memory")  # nothing is left to compile
    newer = replace(here, tensorrt_rtx=replace(CPU.tensorrt_rtx, version="1.7.2"))
    assert problems(rtx, newer) == {**RUNS_NOT, "builder": "gemma4-run build ARTIFACT"}
    (builder,) = of(artifact_findings(rtx, newer), "builder")
    assert builder.found == "engines load into tensorrt-rtx 1.7.1 only, here is 1.7.2"
    blackwell = replace(RTX4090, name="RTX 5090", compute_capability="12.0")
    (device,) = of(artifact_findings(rtx, with_gpu(CPU, blackwell)), "device")
    assert (device.level, device.found, device.mend) == (
        "problem",
        "for a GPU of compute capability 8.6, 8.9, here: 12.0",
        "gemma4-run build ARTIFACT --target rtx5090",
    )
    assert problems(rtx, with_gpu(CPU, H100))["device"] == problems(rtx, CPU)["device"]
