"""TensorRT-RTX's C++ interface by virtual table: what the official Python module would offer, where it cannot be had.

Every interface object is {virtual table, implementation}, and each public method forwards to a slot of the
implementation's own virtual table (Itanium C++ ABI, x86-64 and aarch64). Slots 0 and 1 are destructors. The numbers
belong to TensorRT-RTX 1.7; ``library.check_version`` refuses any other. Objects live as long as their process, a child
that ends with its build, so nothing is ever destroyed here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_int32, c_int64, c_uint32, c_void_p, cast
from typing import Any

MAX_DIMS = 8


class Dims(ctypes.Structure):
    """nvinfer1::Dims64."""

    _fields_ = (("num_dims", c_int32), ("d", c_int64 * MAX_DIMS))

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Dims:
        return cls(len(shape), (c_int64 * MAX_DIMS)(*shape))

    def shape(self) -> tuple[int, ...]:
        return tuple(self.d[: self.num_dims])


# class -> method -> (slot, result, arguments)
METHODS: dict[str, dict[str, tuple[int, Any, tuple[Any, ...]]]] = {
    "IBuilder": {
        "createBuilderConfig": (5, c_void_p, ()),
        "createNetworkV2": (6, c_void_p, (c_uint32,)),
        "createOptimizationProfile": (7, c_void_p, ()),
        "getPluginRegistry": (16, c_void_p, ()),
        "buildSerializedNetworkToStream": (17, c_bool, (c_void_p, c_void_p, c_void_p)),
    },
    "IBuilderConfig": {
        "addOptimizationProfile": (23, c_int32, (c_void_p,)),
        "setProgressMonitor": (45, None, (c_void_p,)),
        "setNbComputeCapabilities": (55, c_bool, (c_int32,)),
        "setComputeCapability": (57, c_bool, (c_int32, c_int32)),
    },
    "INetworkDefinition": {
        "getNbInputs": (14, c_int32, ()),
        "getInput": (15, c_void_p, (c_int32,)),
        "getNbOutputs": (16, c_int32, ()),
        "getOutput": (17, c_void_p, (c_int32,)),
    },
    "ITensor": {
        "getName": (3, c_char_p, ()),
        "getDimensions": (5, Dims, ()),
        "getType": (6, c_int32, ()),
    },
    "IOptimizationProfile": {
        "setDimensions": (2, c_bool, (c_char_p, c_int32, POINTER(Dims))),
    },
    "IPluginRegistry": {
        "loadLibrary": (6, c_void_p, (c_char_p,)),
    },
    "IParser": {
        "parseFromFile": (1, c_bool, (c_char_p, c_int32)),
        "getNbErrors": (3, c_int32, ()),
        "getError": (4, c_void_p, (c_int32,)),
    },
    "IParserError": {
        "desc": (1, c_char_p, ()),
        "node": (5, c_int32, ()),
        "nodeName": (6, c_char_p, ()),
        "nodeOperator": (7, c_char_p, ()),
    },
}
# These are plain abstract classes: no implementation behind them.
_DIRECT = {"IParser", "IParserError", "IPluginRegistry"}


class CppObject:
    """One object of the library."""

    __slots__ = ("_class", "_this", "address")

    def __init__(self, class_name: str, address: int | None) -> None:
        if not address:
            raise RuntimeError(f"the library made no {class_name}")
        self._class, self.address = class_name, address
        self._this = address if class_name in _DIRECT else _pointer_at(address + ctypes.sizeof(c_void_p))

    def call(self, method: str, *arguments: Any) -> Any:
        slot, result, types = METHODS[self._class][method]
        address = _pointer_at(_pointer_at(self._this) + slot * ctypes.sizeof(c_void_p))
        function = CFUNCTYPE(result, c_void_p, *types)(address)
        return function(self._this, *arguments)

    def make(self, class_name: str, method: str, *arguments: Any) -> CppObject:
        """Call a method that returns an object."""
        return CppObject(class_name, self.call(method, *arguments))


def _pointer_at(address: int) -> int:
    value = cast(address, POINTER(c_void_p))[0]
    assert value is not None, "a null pointer where the library keeps an object"
    return int(value)


class Implemented:
    """An object of ours that the library calls: a virtual table of Python functions.

    The first four slots are IVersionedInterface's: getAPILanguage, getInterfaceInfo and two destructors. The library of
    the bound version calls none of them, so they say 0 (getInterfaceInfo returns a struct, as no ctypes callback can).
    """

    def __init__(self, *methods: Any) -> None:
        unused = CFUNCTYPE(c_int64, c_void_p)(lambda this: 0)
        self._methods = (unused, unused, unused, unused, *methods)
        self._table = (c_void_p * len(self._methods))(*(cast(method, c_void_p) for method in self._methods))
        self._object = (c_void_p * 1)(ctypes.addressof(self._table))

    @property
    def address(self) -> int:
        return ctypes.addressof(self._object)


def logger(log: Callable[[int, str], None]) -> Implemented:
    """ILogger: ``log(severity, message)``, 0 internal error, 1 error, 2 warning, 3 information, 4 verbose."""

    def _log(this: int, severity: int, message: bytes) -> None:
        log(severity, message.decode(errors="replace"))

    return Implemented(CFUNCTYPE(None, c_void_p, c_int32, c_char_p)(_log))


def progress_monitor(start: Callable[[str, str | None, int], None], step: Callable[[str, int], None]) -> Implemented:
    """IProgressMonitor: ``start(phase, parent phase, steps)`` and ``step(phase, number of the finished step)``."""

    def _start(this: int, phase: bytes, parent: bytes | None, steps: int) -> None:
        start(phase.decode(), parent.decode() if parent else None, steps)

    def _step(this: int, phase: bytes, number: int) -> bool:
        step(phase.decode(), number)
        return True  # go on

    return Implemented(
        CFUNCTYPE(None, c_void_p, c_char_p, c_char_p, c_int32)(_start),
        CFUNCTYPE(c_bool, c_void_p, c_char_p, c_int32)(_step),
        CFUNCTYPE(None, c_void_p, c_char_p)(lambda this, phase: None),
    )


def stream_writer(write: Callable[[int, int], int]) -> Implemented:
    """IStreamWriter: ``write(address, bytes)`` returns how many were written; fewer end the build."""

    def _write(this: int, address: int, num_bytes: int) -> int:
        return write(address, num_bytes)

    return Implemented(CFUNCTYPE(c_int64, c_void_p, c_void_p, c_int64)(_write))
