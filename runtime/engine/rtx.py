"""Builds with TensorRT-RTX through its C++ interface. Runs in a child process only."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from gemma4_export.runtime.engine.cpp_interface import (
    CppObject,
    Dims,
    Implemented,
    logger,
    progress_monitor,
    stream_writer,
)
from gemma4_export.runtime.engine.library import RtxLibrary, check_version
from gemma4_export.runtime.engine.outcome import (
    DATA_TYPES,
    BuildLog,
    ImportFailure,
    Network,
    Progress,
    build_error,
    import_error,
    plugin_error,
)
from gemma4_export.runtime.engine.record import TensorRecord
from gemma4_export.runtime.engine.request import EngineRequest, Range, check_profiles

_WARNING = 2  # parser verbosity
_STRONGLY_TYPED = 0  # the only kind of network that TensorRT-RTX has; no flag asks for it


class RtxBuilder:
    """One build: library, network, configuration."""

    def __init__(self, library: RtxLibrary, log: BuildLog) -> None:
        # RTLD_GLOBAL and this order: the parser finds the core's symbols, plugin libraries both.
        self._core = ctypes.CDLL(str(library.core), mode=ctypes.RTLD_GLOBAL)
        self._parser = ctypes.CDLL(str(library.parser), mode=ctypes.RTLD_GLOBAL)
        number = self._core.getInferLibVersion()
        check_version(f"{number // 10000}.{number // 100 % 100}.{number % 100}", library.core.name)
        self._log = log
        self._kept: list[Implemented] = [logger(log)]
        self._builder = self._create("IBuilder", self._core.createInferBuilder_INTERNAL, number)
        self._network = self._builder.make("INetworkDefinition", "createNetworkV2", _STRONGLY_TYPED)
        self._config = self._builder.make("IBuilderConfig", "createBuilderConfig")

    def build(self, request: EngineRequest, file: BinaryIO, progress: Progress) -> Network:
        """Compile ``request`` and write the engine into ``file``.

        Raises:
            ArtifactError: the graph does not import (which node, why), or no engine came out.
            ConfigError: a compute capability is refused.
        """
        for plugin in request.plugins:
            self._load_plugins(plugin)
        self._parse(request)
        network = self._tensors()
        check_profiles(request, {tensor.name: tensor.shape for tensor in network.inputs})
        for ranges in request.profiles.values():
            self._add_profile(request, ranges)
        self._target(request)
        self._watch(progress)
        self._write(request, file)
        return network

    def _create(self, class_name: str, function: ctypes._NamedFuncPointer, *arguments: int) -> CppObject:
        function.restype = ctypes.c_void_p
        *pointers, version = arguments
        addresses = [ctypes.c_void_p(value) for value in (*pointers, self._kept[0].address)]
        return CppObject(class_name, function(*addresses, ctypes.c_int32(version)))

    def _load_plugins(self, library: Path) -> None:
        registry = self._builder.make("IPluginRegistry", "getPluginRegistry")
        if not registry.call("loadLibrary", str(library).encode()):
            raise plugin_error(library, self._log.errors)

    def _parse(self, request: EngineRequest) -> None:
        create, version = self._parser.createNvOnnxParser_INTERNAL, self._parser.getNvOnnxParserVersion()
        parser = self._create("IParser", create, self._network.address, version)
        if not parser.call("parseFromFile", str(request.graph).encode(), _WARNING):
            errors = [parser.make("IParserError", "getError", i) for i in range(parser.call("getNbErrors"))]
            raise import_error(request, [_failure(error) for error in errors])

    def _tensors(self) -> Network:
        def tensors(count: str, get: str) -> tuple[TensorRecord, ...]:
            number = self._network.call(count)
            return tuple(_tensor(self._network.make("ITensor", get, i)) for i in range(number))

        return Network(inputs=tensors("getNbInputs", "getInput"), outputs=tensors("getNbOutputs", "getOutput"))

    def _add_profile(self, request: EngineRequest, ranges: Mapping[str, Range]) -> None:
        profile = self._builder.make("IOptimizationProfile", "createOptimizationProfile")
        for name, shapes in ranges.items():
            for selector, shape in enumerate(shapes):
                dims = ctypes.pointer(Dims.of(shape))
                self._must(request, profile.call("setDimensions", name.encode(), selector, dims))
        self._must(request, self._config.call("addOptimizationProfile", profile.address) >= 0)

    def _target(self, request: EngineRequest) -> None:
        self._config.call("setNbComputeCapabilities", len(request.compute_capabilities))
        for index, capability in enumerate(request.compute_capabilities):
            self._must(request, self._config.call("setComputeCapability", capability, index))

    def _watch(self, progress: Progress) -> None:
        steps: dict[str, int] = {}

        def start(phase: str, parent: str | None, count: int) -> None:
            steps[phase] = count

        monitor = progress_monitor(start, lambda phase, number: progress(phase, number + 1, steps.get(phase, 0)))
        self._kept.append(monitor)
        self._config.call("setProgressMonitor", monitor.address)

    def _write(self, request: EngineRequest, file: BinaryIO) -> None:
        failures: list[OSError] = []

        def write(address: int, num_bytes: int) -> int:
            try:
                return file.write((ctypes.c_char * num_bytes).from_address(address))
            except OSError as error:  # kept for below: an exception cannot pass through the library
                failures.append(error)
                return 0

        writer = stream_writer(write)
        arguments = (self._network.address, self._config.address, writer.address)
        is_built = self._builder.call("buildSerializedNetworkToStream", *arguments)
        if failures:
            raise failures[0]
        self._must(request, is_built)

    def _must(self, request: EngineRequest, is_done: bool) -> None:
        if not is_done:
            raise build_error(request, self._log)


def _tensor(tensor: CppObject) -> TensorRecord:
    return TensorRecord(
        name=tensor.call("getName").decode(),
        dtype=DATA_TYPES[tensor.call("getType")],
        shape=tensor.call("getDimensions").shape(),
    )


def _failure(error: CppObject) -> ImportFailure:
    def text(method: str) -> str:
        return (error.call(method) or b"").decode(errors="replace")

    node = error.call("node")
    return ImportFailure(reason=text("desc"), node=node, name=text("nodeName"), operator=text("nodeOperator"))
