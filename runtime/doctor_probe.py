"""Looks at this machine: the only part of ``gemma4-run doctor`` that does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from gemma4_export.configs.command_line import installed_versions
from gemma4_export.configs.errors import ArtifactError
from gemma4_export.plugins import compile as plugin_compiler
from gemma4_export.runtime import doctor_child, memory
from gemma4_export.runtime.doctor_facts import (
    Disk,
    Driver,
    Facts,
    Failure,
    Gpu,
    Library,
    Memory,
    Onnxruntime,
    Plugins,
    Processor,
)
from gemma4_export.runtime.engine.library import find_rtx_library

FEATURES = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sme"),
)
"""What onnxruntime's matrix products look for: Intel and AMD, then Arm."""
_ANSWER_WITHIN_S = 60
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "usr/local/lib")
_T = TypeVar("_T")


def probe(root: Path = Path("/")) -> Facts:
    """Everything about this machine. Never raises: what cannot be read is among ``unread``.

    Args:
        root: where proc, sys and the system's libraries lie; another one in tests.
    """
    unread: list[Failure] = []

    def read(what: str, ask: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return ask()
        except Exception as error:  # noqa: BLE001  (a machine's oddities are what is looked for: each is told)
            unread.append(Failure(cause=f"{what}: {type(error).__name__}: {error}"))
            return otherwise

    nothing = Library(version=None, where=None, failure=None)
    no_driver = Driver(num_devices=0, has_kernel_module=False, version=None, cuda_version=None, failure=None, gpus=[])
    no_plugins = Plugins(path=str(plugin_compiler.LIBRARY), contracts={}, failure=None)
    processor = Processor(architecture=platform.machine(), model="", cores=os.cpu_count() or 1, quota=None, features=[])
    no_memory = Memory(total_bytes=None, available_bytes=None, container_limit_bytes=None)
    no_disk: Disk | None = None
    no_onnxruntime = Onnxruntime(distributions={}, version=None, providers=[], failure=None)
    no_folders: list[Path] = []
    folders = read("library folders", lambda: library_folders(root), no_folders)
    return Facts(
        python=platform.python_version(),
        system=platform.platform(),
        packages=read("installed packages", installed_versions, {}),
        processor=read("processor", lambda: read_processor(root), processor),
        memory=read("memory", lambda: read_memory(root), no_memory),
        disk=read("disk", lambda: read_disk(Path.cwd()), no_disk),
        driver=read("driver", lambda: read_driver(root), no_driver),
        onnxruntime=read("onnxruntime", read_onnxruntime, no_onnxruntime),
        tensorrt_rtx=read("TensorRT-RTX", read_tensorrt_rtx, nothing),
        tensorrt=read("TensorRT", lambda: read_module("tensorrt"), nothing),
        libnvinfer=read("libnvinfer", lambda: read_libnvinfer(folders), nothing),
        builder_resources=read("builder resources", lambda: read_builder_resources(folders), []),
        plugins=read("plugin library", lambda: read_plugins(plugin_compiler.LIBRARY), no_plugins),
        nvcc=read("nvcc", read_nvcc, nothing),
        unread=unread,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def read_processor(root: Path) -> Processor:
    text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    lines = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in text.splitlines())]
    flags = next((value.split() for name, value in lines if name in ("flags", "Features")), [])
    return Processor(
        architecture=platform.machine(),
        model=next((value for name, value in lines if name in ("model name", "Model")), ""),
        cores=len(os.sched_getaffinity(0)),
        quota=_quota(root),
        features=[name for name in FEATURES if name in flags],
    )


def _quota(root: Path) -> float | None:
    """Processors that a container gets time for, by version 2 of control groups."""
    path = root / "sys/fs/cgroup/cpu.max"
    limit, _, period = path.read_text(encoding="ascii").partition(" ") if path.is_file() else ("max", "", "")
    return None if limit.strip() == "max" else int(limit) / int(period)


def read_memory(root: Path) -> Memory:
    container = memory.container_memory(root)
    return Memory(
        total_bytes=memory.total_bytes(root),
        available_bytes=memory.available_bytes(root),
        container_limit_bytes=None if container is None else container.limit,
    )


def read_disk(folder: Path) -> Disk:
    return Disk(path=str(folder), free_bytes=shutil.disk_usage(folder).free)


def read_driver(root: Path) -> Driver:
    """What the kernel, the PCI bus and libcuda say; without a GPU all of them are silent, and that is no failure."""
    told = root / "proc/driver/nvidia/version"
    kernel = re.search(r"\d+(\.\d+){1,2}", told.read_text(encoding="utf-8")) if told.is_file() else None
    answer = ask("cuda")
    failure = answer if isinstance(answer, Failure) else None
    values: dict[str, Any] = {"gpus": []} if isinstance(answer, Failure) else answer
    if values.get("failure"):
        failure = Failure(cause=values["failure"])
    return Driver(
        num_devices=_num_devices(root),
        has_kernel_module=told.is_file() or (root / "dev/nvidiactl").exists(),
        version=values.get("version") or (kernel[0] if kernel else None),
        cuda_version=values.get("cuda_version"),
        failure=failure,
        gpus=[Gpu(**gpu) for gpu in values["gpus"]],
    )


def _num_devices(root: Path) -> int:
    def read(path: Path) -> str:
        return path.read_text(encoding="ascii") if path.is_file() else ""

    devices = (root / "sys/bus/pci/devices").glob("*")
    return sum(
        read(device / "vendor").startswith(_NVIDIA) and read(device / "class").startswith(_DISPLAY)
        for device in devices
    )


# ---------------------------------------------------------------------------------------------------------------------
# Libraries


def read_onnxruntime() -> Onnxruntime:
    found = {
        distribution.name.lower(): distribution.version
        for distribution in importlib.metadata.distributions()
        if (distribution.name or "").lower().startswith("onnxruntime") and _brings_onnxruntime(distribution)
    }
    if importlib.util.find_spec("onnxruntime") is None:
        return Onnxruntime(distributions=found, version=None, providers=[], failure=None)
    answer = ask("module", "onnxruntime")
    if isinstance(answer, Failure):
        return Onnxruntime(distributions=found, version=None, providers=[], failure=answer)
    return Onnxruntime(distributions=found, version=answer["version"], providers=answer["providers"], failure=None)


def _brings_onnxruntime(distribution: importlib.metadata.Distribution) -> bool:
    """Providers and tools are called onnxruntime-something as well, and have modules of their own."""
    return any(path.as_posix() == "onnxruntime/__init__.py" for path in distribution.files or ())


def read_tensorrt_rtx() -> Library:
    """NVIDIA's module where it is installed, else the libraries of the onnxruntime wheel: as engines are built."""
    official = read_module("tensorrt_rtx")
    if official.where is not None:
        return official
    try:
        library = find_rtx_library()
    except ArtifactError as error:
        is_missing = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is None
        failure = None if is_missing else Failure(cause=error.cause, hint=error.hint)
        return Library(version=None, where=None, failure=failure)
    return Library(version=library.version, where=str(library.core), failure=None)


def read_module(name: str) -> Library:
    if importlib.util.find_spec(name) is None:
        return Library(version=None, where=None, failure=None)
    answer = ask("module", name)
    if isinstance(answer, Failure):
        return Library(version=None, where=name, failure=answer)
    return Library(version=answer["version"], where=name, failure=None)


def library_folders(root: Path) -> list[Path]:
    """Where TensorRT's libraries lie: pip's package, the loader's path, the system's folders."""
    spec = importlib.util.find_spec("tensorrt_libs")
    packaged = [] if spec is None else list(spec.submodule_search_locations or [])
    loader = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    folders = [*map(Path, [*packaged, *loader]), *(root / folder for folder in _LIBRARY_FOLDERS)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def read_libnvinfer(folders: list[Path]) -> Library:
    """TensorRT's library itself, which a Python module without it cannot replace."""
    found = [(match[1], path) for match, path in _libraries(folders, r"libnvinfer\.so\.(\d+(\.\d+)*)")]
    if not found:
        return Library(version=None, where=None, failure=None)
    version, path = max(found, key=lambda each: len(each[0]))  # libnvinfer.so.10 is a link to the full version
    return Library(version=version, where=str(path), failure=None)


def read_builder_resources(folders: list[Path]) -> list[str]:
    found = _libraries(folders, r"libnvinfer_builder_resource(?:_win)?_([a-z]+\d*)\.so\.[\d.]+")
    return sorted({match[1] for match, _ in found})


def _libraries(folders: list[Path], pattern: str) -> Iterator[tuple[re.Match[str], Path]]:
    for folder in folders:
        for path in sorted(folder.glob("libnvinfer*")):
            if match := re.fullmatch(pattern, path.name):
                yield match, path


def read_plugins(library: Path) -> Plugins:
    if not library.is_file():
        return Plugins(path=str(library), contracts={}, failure=None)
    answer = ask("plugins", str(library))
    if isinstance(answer, Failure):
        return Plugins(path=str(library), contracts={}, failure=answer)
    return Plugins(path=str(library), contracts=answer, failure=None)


def read_nvcc() -> Library:
    try:
        nvcc, _ = plugin_compiler.find_nvcc()
    except ArtifactError:
        return Library(version=None, where=None, failure=None)
    asked = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False, timeout=_ANSWER_WITHIN_S)
    version = re.search(r"\bV(\d+(\.\d+)+)", asked.stdout)
    failure = None if version else Failure(cause=f"{nvcc} --version: {_last_line(asked)}")
    return Library(version=version[1] if version else None, where=str(nvcc), failure=failure)


# ---------------------------------------------------------------------------------------------------------------------
# Child processes


def ask(*question: str) -> dict[str, Any] | Failure:
    """What `doctor_child` answers in a process of its own, or how that process ended."""
    command = [sys.executable, "-P", str(Path(doctor_child.__file__)), *question]
    try:
        asked = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_ANSWER_WITHIN_S
        )
    except subprocess.TimeoutExpired:
        return Failure(cause=f"no answer within {_ANSWER_WITHIN_S} s")
    if asked.returncode != 0:
        return Failure(cause=_last_line(asked))
    answer: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    return answer


def _last_line(ended: subprocess.CompletedProcess[str]) -> str:
    if ended.returncode < 0:
        return f"the process was ended by {signal.Signals(-ended.returncode).name}"
    lines = (ended.stderr or ended.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {ended.returncode}"
