"""What a backend must offer to run one graph, and which backends exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.manifest import Manifest
from gemma4_export.configs.target import RUN_BACKEND
from gemma4_export.runtime.kv_cache import KVCache

if TYPE_CHECKING:
    from gemma4_export.runtime.session_ort import Activations

Array = np.ndarray[Any, np.dtype[Any]]
Float32 = np.ndarray[Any, np.dtype[np.float32]]


class Session(Protocol):
    """A loaded decoder."""

    @property
    def seconds_in_graph(self) -> float:
        """Time spent in the backend's run so far."""
        ...

    def run(self, feeds: Mapping[str, Array], cache: KVCache, out: Float32 | None = None) -> Float32:
        """Run one call; ``cache``'s buffers are read and written in place. Returns logits [R, V], ``out`` if given."""
        ...


def open_session(
    artifact: Artifact, *, num_threads: int | None = None, activations: Activations | None = None
) -> Session:
    """Load the decoder of ``artifact`` with the backend it was packed for.

    Args:
        num_threads: None: a thread a core.
        activations: what quantised matrices multiply with; None: as the artifact was built.
    Raises:
        ArtifactError: this version has no such backend, the backend's library is missing, or the manifest describes
            another graph.
    """
    graph = artifact.manifest.graphs.get("decoder")
    if graph is None:
        assert artifact.manifest.engines is not None  # the manifest was checked: it has one or the other
        state = "not compiled yet" if artifact.manifest.engines.compiled is None else "built"
        raise ArtifactError(
            f"{artifact.folder}: {artifact.manifest.engines.backend} engines are {state}; this version cannot run them "
            f"yet, only {RUN_BACKEND}",
            hint="build the model for --target cpu",
        )
    if graph.backend != RUN_BACKEND:
        raise ArtifactError(
            f"graphs.decoder: this version cannot run backend {graph.backend!r}, only {RUN_BACKEND}",
            hint="build the model for --target cpu",
        )
    from gemma4_export.runtime.session_ort import OrtSession

    session = OrtSession(artifact.path(graph.file), num_threads=num_threads, activations=activations)
    _check_inputs(session.input_shapes, artifact.manifest)
    return session


def _check_inputs(found: Mapping[str, Sequence[int | str]], manifest: Manifest) -> None:
    """Raise ArtifactError unless the graph takes what the manifest makes the runtime feed it."""
    model, graph = manifest.model, manifest.graphs["decoder"]
    expected: dict[str, tuple[int | str, ...]] = {
        "inputs_embeds": (1, "T", model.hidden_size),
        "rope_global": (1, "T", 2, manifest.rope_global.num_frequencies),
        "global_write_index": (1,),
        "global_end": (1, "T"),
        "output_rows": ("R",),
    }
    if manifest.rope_sliding is not None:
        expected["rope_sliding"] = (1, "T", 2, manifest.rope_sliding.num_frequencies)
    if manifest.kv.sliding_window is not None:
        expected |= {"sliding_write_index": (1,), "sliding_start": (1, "T"), "sliding_end": (1, "T")}
    if model.hidden_size_per_layer_input:
        expected["per_layer_inputs"] = (1, "T", model.num_layers, model.hidden_size_per_layer_input)
    for cache in manifest.kv.caches:
        for part in ("key", "value"):
            expected[f"past_key_values.{cache.layer}.{part}"] = (1, cache.num_kv_heads, "C", cache.head_dim)
    for name in sorted({*expected, *found, *graph.inputs}):
        wanted, shape = list(expected.get(name, ())), list(found.get(name, ()))
        fits = len(wanted) == len(shape) and all(
            isinstance(w, str) or w == s for w, s in zip(wanted, shape, strict=True)
        )
        if not fits or name not in graph.inputs:
            raise ArtifactError(
                f"{graph.file}: input {name}: expected {wanted or 'none'} (manifest.json), found {shape or 'none'}",
                hint="copy the folder again, or build it again with gemma4-export build",
            )
