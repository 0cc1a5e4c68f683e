"""Questions to libraries that may end the process: ``python -P doctor_child.py cuda|module|plugins [NAME]``.

Standard library only, so that a broken package shows where it is asked for. The answer is the last line of stdout, as
JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class _MemoryInfo(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_uint64), ("free", ctypes.c_uint64), ("used", ctypes.c_uint64))


def cuda() -> dict[str, Any]:
    """The driver's versions and GPUs; ``failure`` says why there are none. No context is made: it would take memory."""
    answer: dict[str, Any] = {"version": None, "cuda_version": None, "failure": None, "gpus": []}
    management = _management()
    if management is not None:
        text = ctypes.create_string_buffer(96)
        if management.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            answer["version"] = text.value.decode()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return answer | {"failure": str(error)}
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) == 0:
        answer["cuda_version"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return answer | {"failure": f"cuInit: {_error_name(driver, status)}"}
    answer["gpus"] = [_gpu(driver, management, index) for index in range(count.value)]
    return answer


def _management() -> ctypes.CDLL | None:
    """NVML, where it is and starts."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None  # some containers leave it out: versions and free memory are not known then
    return library if library.nvmlInit_v2() == 0 else None


def _error_name(driver: ctypes.CDLL, status: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(name))
    return f"{(name.value or b'unknown').decode()} ({status})"


def _gpu(driver: ctypes.CDLL, management: ctypes.CDLL | None, index: int) -> dict[str, Any]:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    size, name, bus = ctypes.c_size_t(), ctypes.create_string_buffer(256), ctypes.create_string_buffer(64)
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        or driver.cuDeviceGetPCIBusId(bus, len(bus), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    if failed:
        raise OSError(f"GPU {index}: {_error_name(driver, failed)}")
    return {
        "name": name.value.decode(),
        "compute_capability": f"{major.value}.{minor.value}",
        "memory_bytes": size.value,
        "free_bytes": _free_bytes(management, bus.value),
    }


def _free_bytes(management: ctypes.CDLL | None, bus: bytes) -> int | None:
    """Found by PCI address: CUDA_VISIBLE_DEVICES renumbers for CUDA alone."""
    if management is None:
        return None
    handle, memory = ctypes.c_void_p(), _MemoryInfo()
    failed = management.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle))
    failed = failed or management.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return None if failed else memory.free


def module(name: str) -> dict[str, Any]:
    """Version of a module that is imported for it, and onnxruntime's providers."""
    imported = importlib.import_module(name)
    providers: list[str] = imported.get_available_providers() if name == "onnxruntime" else []
    return {"version": str(imported.__version__), "providers": providers}


def plugins(library: str) -> dict[str, Any]:
    """Contracts that a library of ours says it implements."""
    describe = ctypes.CDLL(library).gemma4_plugin_contracts
    describe.restype = ctypes.c_char_p
    return {name: int(version) for name, _, version in (pair.partition("=") for pair in describe().decode().split())}


if __name__ == "__main__":
    question, *arguments = sys.argv[1:]
    questions: dict[str, Callable[..., dict[str, Any]]] = {"cuda": cuda, "module": module, "plugins": plugins}
    answered = questions[question](*arguments)
    sys.stdout.write(f"\n{json.dumps(answered)}\n")
