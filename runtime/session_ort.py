"""onnxruntime sessions: caches bound in place, so that a step writes its tokens' slots and copies nothing else."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.evidence import GRAPHS_FOLDER
from gemma4_export.runtime.kv_cache import KVCache

Array = np.ndarray[Any, np.dtype[Any]]
Float32 = np.ndarray[Any, np.dtype[np.float32]]

_ERRORS_ONLY = 3

Activations = Literal["int8", "fp32"]
# MatMulNBits' attribute accuracy_level as protobuf writes it: field 1 with the name, field 3 with one byte of value.
_ACCURACY_LEVEL = b"\x0a\x0eaccuracy_level\x18"
_LEVELS: dict[Activations, bytes] = {"int8": b"\x04", "fp32": b"\x01"}


def open_graph(
    path: Path,
    *,
    num_threads: int | None = None,
    activations: Activations | None = None,
    is_plain: bool = False,
    log_severity: int = _ERRORS_ONLY,
) -> Any:
    """An ``onnxruntime.InferenceSession`` of a graph whose weights lie in files below ``graphs/``.

    Args:
        path: the graph, in ``graphs/`` or a folder below; its external data is mapped and packed by onnxruntime.
        num_threads: None: a thread a core that this process may use.
        activations: what quantised matrices multiply with; None: as the graph was built.
        is_plain: node by node as the graph stands, quantised matrices widened to float32 and multiplied as such: no
            optimisation, no packed weights. The slow twin that the session of a run is held to.
    Raises:
        ArtifactError: onnxruntime is not installed, or does not accept the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ArtifactError(
            "onnxruntime is not installed", hint='pip install "gemma4-export[cpu]"  (or [gpu], never both)'
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = log_severity
    options.intra_op_num_threads = usable_threads() if num_threads is None else num_threads
    # A path would let it look for weights beside the graph only.
    folder = next((parent for parent in path.parents if parent.name == GRAPHS_FOLDER), path.parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if is_plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    graph = path.read_bytes()
    if activations is not None:
        for level in _LEVELS.values():
            graph = graph.replace(_ACCURACY_LEVEL + level, _ACCURACY_LEVEL + _LEVELS[activations])
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common base below Exception
        raise ArtifactError(
            f"{path.name}: onnxruntime {onnxruntime.__version__} does not load it: {str(error).splitlines()[0]}",
            hint='pip install --upgrade "onnxruntime>=1.31.1"',
        ) from error


def usable_threads() -> int:
    """Threads where fewer processors are left to this process than there are; 0: onnxruntime's own choice, one a core.

    onnxruntime counts all cores: its threads would spin against each other under ``taskset`` or in a cpuset.
    """
    usable = len(os.sched_getaffinity(0))
    return usable if usable < (os.cpu_count() or 1) else 0


class OrtSession:
    """One graph on onnxruntime's CPU provider."""

    def __init__(
        self,
        path: Path,
        *,
        num_threads: int | None = None,
        activations: Activations | None = None,
        log_severity: int = _ERRORS_ONLY,
    ) -> None:
        """Load ``path`` as ``open_graph`` does."""
        self._session = open_graph(path, num_threads=num_threads, activations=activations, log_severity=log_severity)
        self.input_shapes: dict[str, list[int | str]] = {node.name: node.shape for node in self._session.get_inputs()}
        """As the graph declares them; a size that changes from call to call is a name."""
        (shape,) = (node.shape for node in self._session.get_outputs() if node.name == "logits")
        self.vocab_size: int = shape[-1]
        """V, as the graph declares it."""
        self.seconds_in_graph = 0.0
        """Time spent in onnxruntime's run so far; the rest of a call is ours."""
        self._binding: Any = None
        self._bound: dict[str, Array] = {}
        # Weak: a finished sequence must not keep its cache until the next one begins.
        self._cache: weakref.ref[KVCache] | None = None
        self._bound_reallocations = -1

    def run(self, feeds: Mapping[str, Array], cache: KVCache, out: Float32 | None = None) -> Float32:
        """Run one call. Returns logits [R, V] float32; ``cache`` holds this call's keys and values afterwards.

        Binding takes longer than any other part of a call: an array that the call before had as well, with other
        values, stays bound.

        Args:
            feeds: the inputs beside the caches.
            cache: its buffers are read and written in place.
            out: [R, V] where the logits go; None: a new array.
        """
        logits: Float32 = np.empty((len(feeds["output_rows"]), self.vocab_size), np.float32) if out is None else out
        is_bound = self._cache is not None and self._cache() is cache
        if not is_bound or self._bound_reallocations != cache.num_reallocations:
            self._bind_cache(cache)
        for name, array in feeds.items():
            if self._bound.get(name) is not array:
                self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
                self._bound[name] = array
        if self._bound.get("logits") is not logits:
            self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            self._bound["logits"] = logits
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self.seconds_in_graph += time.perf_counter() - started
        return logits

    def _bind_cache(self, cache: KVCache) -> None:
        """Bind each buffer as input and output at once: TensorScatter then writes in place."""
        self._binding, self._bound = self._session.io_binding(), {}
        for layer, buffers in cache.buffers.items():
            for part, buffer in zip(("key", "value"), buffers, strict=True):
                at = ("cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
                self._binding.bind_input(f"past_key_values.{layer}.{part}", *at)
                self._binding.bind_output(f"present.{layer}.{part}", *at)
        self._cache = weakref.ref(cache)
        self._bound_reallocations = cache.num_reallocations
