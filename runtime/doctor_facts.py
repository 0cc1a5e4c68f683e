"""What ``gemma4-run doctor`` looks at, as plain values: `doctor_probe` fills them, `doctor` judges them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why something could not be had, and what mends it, where that is known."""

    cause: str
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """``features``: what speeds up matrix products, as /proc/cpuinfo spells it.

    ``cores`` are those that this process may use; ``quota`` is how many of them its container gets time for.
    """

    architecture: str
    model: str
    cores: int
    quota: float | None
    features: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """None: nothing says. ``available_bytes`` minds ``container_limit_bytes``."""

    total_bytes: int | None
    available_bytes: int | None
    container_limit_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    path: str
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """``free_bytes`` is None where NVML does not answer."""

    name: str
    compute_capability: str
    memory_bytes: int
    free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """NVIDIA's driver.

    Attributes:
        num_devices: NVIDIA display devices on the PCI bus, with a driver or without.
        has_kernel_module: the kernel's half is loaded.
        version: "580.159.04"; cuda_version: newest CUDA that it runs, "13.0".
        failure: why libcuda gives no GPU; None where it does.
        gpus: those that this process may use.
    """

    num_devices: int
    has_kernel_module: bool
    version: str | None
    cuda_version: str | None
    failure: Failure | None
    gpus: list[Gpu]


@dataclass(frozen=True, slots=True, kw_only=True)
class Onnxruntime:
    """``distributions`` are the installed packages that bring the one module ``onnxruntime``, with their versions.

    ``version`` and ``providers`` are what importing it says; ``failure`` why that failed.
    """

    distributions: dict[str, str]
    version: str | None
    providers: list[str]
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A library with what is known of it; version and failure both None: not installed.

    ``where`` is a Python module's name or a file.
    """

    version: str | None
    where: str | None
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugins:
    """The native library of our plugins. ``contracts``: op -> version; empty and no failure: not compiled."""

    path: str
    contracts: dict[str, int]
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A machine.

    Attributes:
        packages: installed distribution -> version, of those that matter here.
        tensorrt: NVIDIA's module; libnvinfer: the library that it needs, on the paths where it is looked for.
        builder_resources: libnvinfer_builder_resource_NAME: "sm90", "ptx" ….
        unread: probes that ended in an error of their own.
    """

    python: str
    system: str
    packages: dict[str, str]
    processor: Processor
    memory: Memory
    disk: Disk | None
    driver: Driver
    onnxruntime: Onnxruntime
    tensorrt_rtx: Library
    tensorrt: Library
    libnvinfer: Library
    builder_resources: list[str]
    plugins: Plugins
    nvcc: Library
    unread: list[Failure]
