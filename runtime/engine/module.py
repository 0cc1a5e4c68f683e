"""Builds with NVIDIA's Python modules ``tensorrt_rtx`` and ``tensorrt``, which share one interface. In a child only.

Every call made here is held by name and argument to the modules' published bindings (tests/test_engine_module.py).
"""

from __future__ import annotations

import ctypes
from typing import Any, BinaryIO

from gemma4_export.configs.errors import ArtifactError
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
from gemma4_export.runtime.engine.record import TensorRecord, dotted
from gemma4_export.runtime.engine.request import EngineRequest, check_profiles

OLDEST_TENSORRT = (10, 15)
"""``TensorScatter`` and ``Attention`` exist from there on."""
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


def check_tensorrt_version(version: str) -> None:
    """Refuse a TensorRT whose parser lacks the ops of our graphs.

    Raises:
        ArtifactError: older than `OLDEST_TENSORRT`.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        raise ArtifactError(
            f"TensorRT {version}: its parser lacks TensorScatter and Attention, which came with {oldest}",
            hint='pip install --upgrade "gemma4-export[tensorrt]"; Jetson: JetPack 7.2 or newer',
        )


class ModuleBuilder:
    """One build with ``module``, which is ``tensorrt_rtx`` or ``tensorrt``."""

    def __init__(self, module: Any, log: BuildLog) -> None:
        self._trt, self._log = module, log
        self._logger = _logger(module, log)
        self._builder = module.Builder(self._logger)
        self._config = self._builder.create_builder_config()
        # Strongly typed: the graph's types are the engine's. TensorRT-RTX and TensorRT 11 know no other kind.
        flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self._network = self._builder.create_network(0 if flag is None else 1 << int(flag))

    def build(self, request: EngineRequest, file: BinaryIO, progress: Progress) -> Network:
        """As `RtxBuilder.build`."""
        for plugin in request.plugins:
            if self._builder.get_plugin_registry().load_library(str(plugin)) is None:
                raise plugin_error(plugin, self._log.errors)
        self._parse(request)
        network = self._tensors()
        check_profiles(request, {tensor.name: tensor.shape for tensor in network.inputs})
        for ranges in request.profiles.values():
            profile = self._builder.create_optimization_profile()
            for name, (low, likely, high) in ranges.items():
                profile.set_shape(name, low, likely, high)
            self._must(request, self._config.add_optimization_profile(profile) >= 0)
        self._target(request)
        self._config.progress_monitor = _monitor(self._trt, progress)
        writer = _writer(self._trt, file)
        is_built = self._builder.build_serialized_network_to_stream(self._network, self._config, writer)
        if writer.failure is not None:
            raise writer.failure
        self._must(request, is_built)
        return network

    def _parse(self, request: EngineRequest) -> None:
        parser = self._trt.OnnxParser(self._network, self._logger)
        if not parser.parse_from_file(str(request.graph)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            raise import_error(request, [_failure(error) for error in errors])

    def _tensors(self) -> Network:
        network = self._network
        return Network(
            inputs=tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs)),
            outputs=tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs)),
        )

    def _target(self, request: EngineRequest) -> None:
        if request.builder == "tensorrt":
            check_device(request.compute_capabilities, device_capability())
            return
        self._config.num_compute_capabilities = len(request.compute_capabilities)
        for index, capability in enumerate(request.compute_capabilities):
            is_set = self._config.set_compute_capability(self._trt.ComputeCapability(capability), index)
            self._must(request, is_set)

    def _must(self, request: EngineRequest, is_done: bool) -> None:
        if not is_done:
            raise build_error(request, self._log)


def check_device(compute_capabilities: tuple[int, ...], capability: int | None) -> None:
    """TensorRT compiles for the GPU at hand only, by trying its kernels there.

    Raises:
        ArtifactError: there is none, or it is of another kind than the one asked for.
    """
    if compute_capabilities != (capability,):
        found = "this machine has none" if capability is None else f"this machine's has {dotted(capability)}"
        raise ArtifactError(
            f"tensorrt builds on a GPU of the kind it builds for; compute capability "
            f"{', '.join(map(dotted, compute_capabilities))} was asked for, {found}",
            hint="copy the artifact to the device and run gemma4-run build ARTIFACT there",
        )


def device_capability() -> int | None:
    """Compute capability of the first GPU, 90 for 9.0; None without a GPU or driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    for value, attribute in ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MINOR)):
        failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return None if failed else major.value * 10 + minor.value


def _logger(module: Any, log: BuildLog) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log(int(severity), message)

    return Logger()


def _monitor(module: Any, progress: Progress) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self._steps.get(phase_name, 0))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _writer(module: Any, file: BinaryIO) -> Any:
    class Writer(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # kept for the caller: an exception cannot pass through the library
                self.failure = error
                return 0

    return Writer()


def _tensor(tensor: Any) -> TensorRecord:
    return TensorRecord(name=tensor.name, dtype=DATA_TYPES[int(tensor.dtype)], shape=tuple(tensor.shape))


def _failure(error: Any) -> ImportFailure:
    return ImportFailure(reason=error.desc(), node=error.node(), name=error.node_name(), operator=error.node_operator())
