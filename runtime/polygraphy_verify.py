"""Holds an artifact's graphs on this runtime to the same graphs on another runner, through polygraphy's comparator.

Every graph gets the oracle's own inputs, as in ``verify``, so a difference belongs to the layer and role that show it.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma4_export import __version__
from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.manifest import MANIFEST_NAME
from gemma4_export.runtime.polygraphy_cases import Case, cases
from gemma4_export.runtime.polygraphy_report import AgainstReport, OutputApart
from gemma4_export.runtime.polygraphy_runners import (
    against_runner,
    check_against,
    quiet,
    run_graph,
    shipped_runner,
)
from gemma4_export.runtime.verify_oracle import open_oracle
from gemma4_export.runtime.verify_report import Against, device_name

Array = np.ndarray[Any, np.dtype[Any]]


def verify_against(folder: Path, against: Against, *, say: Callable[[str], None] = lambda _: None) -> AgainstReport:
    """Run the per-layer graphs of the artifact in ``folder`` on two runners; nothing is written.

    Args:
        against: "onnxruntime" runs the same graphs node by node, with weights widened to float32; "tensorrt" compiles
            them on this machine's GPU.
        say: called with one line per graph.
    Raises:
        ArtifactError: the artifact is damaged, has no graphs to verify with, or a runner refuses one.
        ConfigError: polygraphy or what ``against`` needs is not installed, or polygraphy has an unsupported version.
    """
    version = check_against(against)
    artifact = Artifact.open(folder)
    manifest = artifact.manifest
    outputs: list[OutputApart] = []
    with open_oracle(artifact) as oracle, quiet():
        for case in cases(artifact, oracle):
            say(f"{case.graph.file} against {against}")
            path = artifact.path(case.graph.file)
            runners = [shipped_runner(path), against_runner(against, path, case.feeds[0])]
            outputs += compare(case, run_graph(artifact, runners, case.feeds, case.graph.file))
    return AgainstReport(
        model=manifest.model.name,
        recipe=manifest.recipe,
        manifest_sha256=hashlib.sha256(artifact.path(MANIFEST_NAME).read_bytes()).hexdigest(),
        backend=manifest.verify.graphs["head.0"].backend,
        against=against,
        device=device_name(),
        versions={
            "gemma4-export": __version__,
            "numpy": np.__version__,
            "polygraphy": version,
            against: str(importlib.import_module(against).__version__),
        },
        outputs=outputs,
    )


def compare(case: Case, found: Any) -> list[OutputApart]:
    """Every output of one graph.

    Args:
        found: polygraphy's ``RunResults`` of two runners on the case's feeds, the shipped one first.
    """
    from polygraphy.comparator import RunResults

    results = RunResults()
    for name, runs in found.items():
        results.add([_scaled(case, run, values) for run, values in enumerate(runs)], runner_name=name)
    expected = [{name: one.expected[run] for name, one in case.outputs.items()} for run in range(len(case.feeds))]
    results.add([_scaled(case, run, values) for run, values in enumerate(expected)], runner_name="oracle")
    apart, shipped, against = (_differences(case, results, pair) for pair in ((0, 1), (0, 2), (1, 2)))
    return [
        OutputApart(
            name=output.name,
            layer=case.layer,
            role=output.role,
            apart=apart[name].drift,
            shipped=shipped[name].drift,
            against=against[name].drift,
            bound=output.bound,
            agrees=output.rows > 0 and all(pair[name].agrees for pair in (apart, shipped, against)),
            rows=output.rows,
        )
        for name, output in case.outputs.items()
    ]


def _scaled(case: Case, run: int, values: Any) -> dict[str, Array]:
    return {name: output.scaled(run, np.asarray(values[name])) for name, output in case.outputs.items()}


class _Difference(NamedTuple):
    drift: float
    agrees: bool


_ORACLE = 2


def _differences(case: Case, results: Any, pair: tuple[int, int]) -> dict[str, _Difference]:
    """Output -> the largest difference of this pair of runners over all runs of the graph, as polygraphy judges it."""
    from polygraphy.comparator import Comparator, SimpleCompareFunc

    bounds_away = 1 if _ORACLE in pair else 2
    limits = {name: bounds_away * output.bound for name, output in case.outputs.items()}
    judge = SimpleCompareFunc(atol=limits, rtol=0.0, check_error_stat="max")
    (accuracy,) = Comparator.compare_accuracy(results, comparisons=[pair], compare_func=judge)
    (runs,) = accuracy.values()
    return {name: _worst([run[name] for run in runs]) for name in case.outputs}


def _worst(runs: Sequence[Any]) -> _Difference:
    largest = [float(run.max_absdiff) for run in runs]
    return _Difference(max(math.inf if math.isnan(one) else one for one in largest), all(bool(run) for run in runs))
