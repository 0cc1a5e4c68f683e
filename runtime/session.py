"""What a backend must offer to run one graph, and which backends exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError
from gemma4_export.runtime.kv_cache import KVCache

Array = np.ndarray[Any, np.dtype[Any]]


class Session(Protocol):
    """A loaded decoder."""

    def run(self, feeds: Mapping[str, Array], cache: KVCache) -> Array:
        """Run one call; ``cache``'s buffers are read and written in place. Returns logits [R, V] float32."""
        ...


def open_session(artifact: Artifact) -> Session:
    """Load the decoder of ``artifact`` with the backend it was packed for.

    Raises:
        ArtifactError: this version has no such backend, or the backend's library is missing.
    """
    graph = artifact.manifest.graphs["decoder"]
    if graph.backend != "ort-cpu":
        raise ArtifactError(f"graphs.decoder: this version cannot run backend {graph.backend!r}, only ort-cpu")
    from gemma4_export.runtime.session_ort import OrtSession

    return OrtSession(artifact.path(graph.file))
