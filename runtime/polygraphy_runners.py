"""The runners that polygraphy compares: the artifact's own session, and what it is held against.

Polygraphy is an extra: it is imported when a comparison is asked for, and brings no torch along.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError, ConfigError, Gemma4Error
from gemma4_export.configs.evidence import GRAPHS_FOLDER
from gemma4_export.runtime.session_ort import open_graph
from gemma4_export.runtime.verify_report import Against

Array = np.ndarray[Any, np.dtype[Any]]

SHIPPED = "gemma4-run"
"""Name of the runner that loads a graph as this runtime does."""
SUPPORTED = "0.53"
"""Major and minor version of polygraphy; ``pyproject.toml`` asks for the same."""
_INSTALL = 'pip install "gemma4-export[polygraphy]"'


def check_against(against: Against) -> str:
    """Refuse a comparison that cannot begin, before the work.

    Returns:
        polygraphy's version.
    Raises:
        ConfigError: polygraphy or TensorRT is not installed, or polygraphy has another version.
    """
    if importlib.util.find_spec("polygraphy") is None:
        raise ConfigError(f"--against {against}: polygraphy is not installed", hint=_INSTALL)
    import polygraphy

    version = str(polygraphy.__version__)
    if version.split(".")[:2] != SUPPORTED.split("."):
        raise ConfigError(
            f"--against {against}: polygraphy {version} is installed, this version of ours works with {SUPPORTED}.*",
            hint=f'pip install "polygraphy=={SUPPORTED}.*"',
        )
    if against == "tensorrt":
        for module, extra in (("tensorrt", "tensorrt"), ("onnx", "polygraphy")):
            if importlib.util.find_spec(module) is None:
                raise ConfigError(
                    f"--against tensorrt: {module} is not installed", hint=f'pip install "gemma4-export[{extra}]"'
                )
    return version


def shipped_runner(path: Path) -> Any:
    """A polygraphy runner of a graph as this runtime loads it, activations in float32."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    return OnnxrtRunner(lambda: open_graph(path, activations="fp32"), name=SHIPPED)


def against_runner(against: Against, path: Path, feeds: Mapping[str, Array]) -> Any:
    """A polygraphy runner of the same graph on ``against``.

    Args:
        path: the graph, in ``graphs/`` or a folder below.
        feeds: its inputs; TensorRT builds an engine of just these shapes.
    """
    if against == "tensorrt":
        return _tensorrt_runner(path, feeds)
    from polygraphy.backend.onnxrt import OnnxrtRunner

    return OnnxrtRunner(lambda: open_graph(path, activations="fp32", is_plain=True), name=against)


def _tensorrt_runner(path: Path, feeds: Mapping[str, Array]) -> Any:
    from polygraphy.backend.onnx import BytesFromOnnx, OnnxFromPath
    from polygraphy.backend.trt import CreateConfig, EngineFromNetwork, NetworkFromOnnxBytes, Profile, TrtRunner

    profile = Profile()
    for name, values in feeds.items():
        profile.add(name, min=values.shape, opt=values.shape, max=values.shape)
    folder = next(parent for parent in path.parents if parent.name == GRAPHS_FOLDER)
    graph = BytesFromOnnx(OnnxFromPath(str(path), external_data_dir=str(folder)))
    # Strongly typed: float32 stays float32, as the bounds assume.
    network = NetworkFromOnnxBytes(graph, strongly_typed=True)
    return TrtRunner(EngineFromNetwork(network, config=CreateConfig(profiles=[profile])), name="tensorrt")


def run_graph(artifact: Artifact, runners: Sequence[Any], feeds: Sequence[Mapping[str, Array]], file: str) -> Any:
    """Polygraphy's ``RunResults`` of one graph: every runner on the same feeds, one runner loaded at a time.

    Raises:
        ArtifactError: a runner does not load the graph, or fails on it.
    """
    from polygraphy.comparator import Comparator

    try:
        return Comparator.run(runners, data_loader=[dict(one) for one in feeds])
    except Gemma4Error:
        raise
    except Exception as error:  # onnxruntime's, TensorRT's and polygraphy's have no common base below Exception
        names = " and ".join(runner.name for runner in runners)
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtifactError(
            f"{file}: {names} do not both run it: {first}",
            hint=f"polygraphy inspect model {artifact.path(file)} --ignore-external-data lists its operators",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Polygraphy without its log, which would stand on stdout between our reports, and without torch.

    Where torch is installed polygraphy imports it, seconds and 200 MB, to ask whether an array is a tensor; None among
    the modules makes that import fail, and the answer no.
    """
    from polygraphy.logger import G_LOGGER

    has_torch = "torch" in sys.modules
    if not has_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            yield
    finally:
        if not has_torch:
            del sys.modules["torch"]
