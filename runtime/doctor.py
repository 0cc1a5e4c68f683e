"""``gemma4-run doctor``: what of ours can run on a machine, what cannot, and the command that mends it.

`doctor_probe.probe` looks at the machine, `machine_findings` and `doctor_artifact.artifact_findings` judge what it saw.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.target import RUN_BACKEND, load_target, target_names
from gemma4_export.runtime.doctor_facts import Driver, Facts, Gpu, Onnxruntime
from gemma4_export.runtime.engine.module import check_tensorrt_version
from gemma4_export.runtime.engine.plugins import CONTRACTS
from gemma4_export.runtime.memory import size

Level = Literal["ok", "warning", "problem"]
OLDEST_ONNXRUNTIME = "1.31.1"
"""As pyproject.toml asks for it."""
CUDA_MAJOR = 13
"""What the extras rtx, tensorrt and kernels are made for."""
_NEEDED = ("numpy", "tokenizers", "jinja2", "safetensors")
_SHOWN = {
    **{"avx2": "AVX2", "avx512f": "AVX-512", "avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX-512 VNNI"},
    **{"avx512_bf16": "AVX-512 bf16", "amx_int8": "AMX int8", "amx_bf16": "AMX bf16"},
    **{"asimd": "NEON", "asimddp": "NEON dot product", "i8mm": "int8 matrix products", "bf16": "bf16"},
    **{"sve": "SVE", "sme": "SME"},
}
_INT8_PRODUCTS = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
INSTALL_ONNXRUNTIME = 'pip install "gemma4-export[cpu]"'
INSTALL_DRIVER = "sudo apt-get install nvidia-driver-580"
"""The first that runs CUDA 13."""
COMPILE_PLUGINS = "python -m gemma4_export.plugins.compile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: ``what``, what was found with its numbers, and what mends it."""

    level: Level
    what: str
    found: str
    mend: str | None = None


def machine_findings(facts: Facts) -> list[Finding]:
    """What these facts mean.

    ``problem``: what is installed for us is broken. Where something is absent, or a GPU out of reach, the processor is
    left to run on.
    """
    return [
        packages_finding(facts),
        *_processor(facts),
        *_memory(facts),
        *_disk(facts),
        *_driver(facts.driver),
        onnxruntime_finding(facts.onnxruntime),
        *_rtx(facts),
        *_tensorrt(facts),
        plugin_finding(facts),
        _nvcc(facts),
        *(Finding(level="warning", what="doctor", found=f"could not read {each.cause}") for each in facts.unread),
    ]


def packages_finding(facts: Facts) -> Finding:
    """Whether everything is installed that the runtime imports."""
    missing = [name for name in _NEEDED if name not in facts.packages]
    if missing:
        found = f"Python {facts.python}, without {', '.join(missing)}"
        return Finding(level="problem", what="packages", found=found, mend="pip install --upgrade gemma4-export")
    versions = ", ".join(f"{name} {version}" for name, version in facts.packages.items())
    return Finding(level="ok", what="packages", found=f"Python {facts.python}, {versions}")


# ---------------------------------------------------------------------------------------------------------------------
# Processor, memory, disk


def _processor(facts: Facts) -> Iterator[Finding]:
    processor = facts.processor
    features = ", ".join(_SHOWN[name] for name in processor.features) or "none of the instructions looked for"
    model = processor.model or "processor"
    found = f"{model}, {processor.architecture}, {processor.cores} cores: {features}"
    is_fast = bool(_INT8_PRODUCTS & set(processor.features))
    if not {"avx2", "asimd"} & set(processor.features):
        yield Finding(
            level="warning", what="processor", found=f"{found}; products will be slow: AVX2 or NEON is missing"
        )
    else:
        note = "" if is_fast else "; no int8 dot product: int8 and int4 recipes gain less"
        yield Finding(level="ok", what="processor", found=found + note)
    if processor.quota is not None and processor.quota < processor.cores:
        threads = max(1, int(processor.quota))
        yield Finding(
            level="warning",
            what="processor",
            found=f"this container gets the time of {processor.quota:g} cores and sees {processor.cores}",
            mend=f"gemma4-run generate ARTIFACT --threads {threads}",
        )


def _memory(facts: Facts) -> Iterator[Finding]:
    memory = facts.memory
    if memory.available_bytes is None:
        found = "nothing says how much there is: a load that cannot fit will not be refused"
        yield Finding(level="warning", what="memory", found=found)
        return
    total = "" if memory.total_bytes is None else f" of {size(memory.total_bytes)}"
    limit = memory.container_limit_bytes
    capped = "" if limit is None else f"; this container may take {size(limit)}"
    found = f"{size(memory.available_bytes)}{total} can be had{capped}"
    yield Finding(level="ok", what="memory", found=found)


def _disk(facts: Facts) -> Iterator[Finding]:
    """What is free; a disk that could not be read is told among what was unread."""
    if facts.disk is not None:
        yield Finding(level="ok", what="disk", found=f"{size(facts.disk.free_bytes)} free in {facts.disk.path}")


# ---------------------------------------------------------------------------------------------------------------------
# GPUs


def _driver(driver: Driver) -> Iterator[Finding]:
    if driver.gpus:
        yield _driver_version(driver)
        yield from (Finding(level="ok", what="GPU", found=_gpu(gpu)) for gpu in driver.gpus)
        yield Finding(
            level="ok", what="GPU", found=f"this version compiles engines for GPUs and runs {RUN_BACKEND} only"
        )
    elif driver.has_kernel_module:
        reason = "" if driver.failure is None else f" ({driver.failure.cause})"
        version = "" if driver.version is None else f" {driver.version}"
        yield Finding(
            level="warning",
            what="GPU",
            found=f"NVIDIA's driver{version} is loaded, and this process gets no GPU{reason}",
            mend="nvidia-smi says more; in a container: docker run --gpus all …; CUDA_VISIBLE_DEVICES may hide them",
        )
    elif driver.num_devices:
        count = f"{driver.num_devices} NVIDIA GPU" + ("s" if driver.num_devices > 1 else "")
        yield Finding(
            level="warning",
            what="GPU",
            found=f"{count} on the PCI bus, no driver",
            mend=INSTALL_DRIVER,
        )
    else:
        yield Finding(level="ok", what="GPU", found="no NVIDIA GPU; artifacts for --target cpu need none")


def _driver_version(driver: Driver) -> Finding:
    found = f"{driver.version or 'of unknown version'}, runs CUDA up to {driver.cuda_version or 'an unknown version'}"
    if is_old(driver):
        return Finding(
            level="warning",
            what="driver",
            found=f"{found}; TensorRT and our plugins are made for CUDA {CUDA_MAJOR}",
            mend=INSTALL_DRIVER,
        )
    return Finding(level="ok", what="driver", found=found)


def is_old(driver: Driver) -> bool:
    """Whether the driver is known to be older than the CUDA that our libraries are made for."""
    return driver.cuda_version is not None and numbers(driver.cuda_version) < (CUDA_MAJOR,)


def _gpu(gpu: Gpu) -> str:
    free = "" if gpu.free_bytes is None else f", {size(gpu.free_bytes)} free"
    backends = {name: load_target(name).backends[0] for name in targets_of(gpu.compute_capability)}
    named = ", ".join(f"{name} ({backend})" for name, backend in backends.items())
    return (
        f"{gpu.name}, compute capability {gpu.compute_capability}, {size(gpu.memory_bytes)}{free}; "
        f"targets: {named or 'none of this compute capability'}"
    )


def targets_of(compute_capability: str, backend: str | None = None) -> list[str]:
    """Targets with such a GPU, where ``backend`` is given those that it compiles for."""
    targets = [load_target(name) for name in target_names()]
    return [
        target.name
        for target in targets
        if target.compute_capability == compute_capability and backend in (None, target.built_backend)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Libraries


def onnxruntime_finding(found: Onnxruntime) -> Finding:
    """Whether onnxruntime can run our CPU graphs; its packages overwrite each other."""

    def finding(level: Level, text: str, mend: str | None = None) -> Finding:
        return Finding(level=level, what="onnxruntime", found=text, mend=mend)

    packages = ", ".join(f"{name} {version}" for name, version in sorted(found.distributions.items()))
    if len(found.distributions) > 1:
        names = " ".join(sorted(found.distributions))
        extra = "gpu" if "onnxruntime-gpu" in found.distributions else "cpu"
        return finding(
            "problem",
            f"{packages} are installed over each other; importing gives {found.version or 'an error'}",
            f'pip uninstall --yes {names} && pip install "gemma4-export[{extra}]"',
        )
    if found.failure is not None:
        return finding(
            "problem",
            f"{packages or 'installed'} does not import: {found.failure.cause}",
            f"pip install --force-reinstall {next(iter(found.distributions), 'onnxruntime')}",
        )
    if found.version is None:
        return finding("warning", "not installed: no artifact for --target cpu runs", INSTALL_ONNXRUNTIME)
    if numbers(found.version) < numbers(OLDEST_ONNXRUNTIME):
        name = next(iter(found.distributions), "onnxruntime")
        text = f"{packages or found.version}: older than {OLDEST_ONNXRUNTIME}, the oldest that is tested"
        return finding("warning", text, f'pip install --upgrade "{name}>={OLDEST_ONNXRUNTIME}"')
    return finding("ok", f"{packages or found.version}: {', '.join(found.providers)}")


def _rtx(facts: Facts) -> Iterator[Finding]:
    library = facts.tensorrt_rtx
    if library.failure is not None:
        mend = library.failure.hint or 'pip install --force-reinstall "gemma4-export[rtx]"'
        yield Finding(level="problem", what="TensorRT-RTX", found=library.failure.cause, mend=mend)
    elif library.version is None:
        found = "not installed: compiles engines for RTX cards, also on machines without one"
        yield Finding(level="ok", what="TensorRT-RTX", found=found, mend='pip install "gemma4-export[rtx]"')
    else:
        found = f"{library.version} ({library.where}): compiles engines for RTX cards, without one too"
        yield Finding(level="ok", what="TensorRT-RTX", found=found)


def _tensorrt(facts: Facts) -> Iterator[Finding]:
    module, core = facts.tensorrt, facts.libnvinfer

    def finding(level: Level, text: str, mend: str | None = None) -> Finding:
        return Finding(level=level, what="TensorRT", found=text, mend=mend)

    install = 'pip install "gemma4-export[tensorrt]"'
    if module.failure is not None:
        yield finding(
            "problem",
            f"{module.where} does not import: {module.failure.cause}",
            'pip install --force-reinstall "gemma4-export[tensorrt]"',
        )
    elif module.version is None and core.version is not None:
        text = f"libnvinfer {core.version} ({core.where}) without its Python module"
        yield finding("warning", text, f"{install}; on a Jetson: sudo apt-get install python3-libnvinfer")
    elif module.version is None:
        yield finding("ok", "not installed: compiles engines for datacentre GPUs and Jetson, on the device", install)
    else:
        try:
            check_tensorrt_version(module.version)
        except ArtifactError as error:
            yield finding("problem", error.cause, error.hint)
            return
        resources = ", ".join(facts.builder_resources) or "none found"
        yield finding("ok", f"{module.version}; builder resources: {resources}")
        for architecture in missing_resources(facts):
            yield finding(
                "problem",
                f"libnvinfer_builder_resource_{architecture}.so.{core.version or module.version} is missing: "
                "nothing can be built for this GPU",
                "pip install --force-reinstall tensorrt-cu13-libs",
            )


def missing_resources(facts: Facts) -> list[str]:
    """Builder resources of this machine's GPUs that TensorRT will look for and not find; none where it is not used."""
    wanted = {f"sm{gpu.compute_capability.replace('.', '')}" for gpu in facts.driver.gpus}
    return sorted(wanted - set(facts.builder_resources)) if facts.tensorrt.version is not None else []


def plugin_finding(facts: Facts) -> Finding:
    """Whether the native library of our plugins is there and means what the graphs of this version mean."""
    plugins = facts.plugins

    def finding(level: Level, text: str, mend: str | None = None) -> Finding:
        return Finding(level=level, what="plugins", found=text, mend=mend)

    if plugins.failure is not None:
        return finding("problem", f"{plugins.path} does not load: {plugins.failure.cause}", COMPILE_PLUGINS)
    if not plugins.contracts:
        return finding("ok", "not compiled: engines of models with experts need them", COMPILE_PLUGINS)
    for name, version in plugins.contracts.items():
        if CONTRACTS.get(name) != version:
            ours = f"version {CONTRACTS[name]}" if name in CONTRACTS else "no such op"
            text = f"{plugins.path}: {name} version {version}, this gemma4-export has {ours}"
            return finding("problem", text, COMPILE_PLUGINS)
    names = ", ".join(f"{name} version {version}" for name, version in plugins.contracts.items())
    return finding("ok", f"{plugins.path}: {names}")


def _nvcc(facts: Facts) -> Finding:
    install = 'pip install "gemma4-export[kernels]"'
    if facts.nvcc.failure is not None:
        return Finding(level="warning", what="nvcc", found=facts.nvcc.failure.cause, mend=install)
    if facts.nvcc.version is None:
        return Finding(level="ok", what="nvcc", found="not installed: compiles our plugins", mend=install)
    found = f"{facts.nvcc.version} ({facts.nvcc.where})"
    if numbers(facts.nvcc.version) < (CUDA_MAJOR,):
        text = f"{found}: our plugins are compiled with CUDA {CUDA_MAJOR}"
        return Finding(level="warning", what="nvcc", found=text, mend=install)
    return Finding(level="ok", what="nvcc", found=found)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare: (1, 32, 0) of "1.32.0rc1"."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading[0].split("."))) if leading else ()
