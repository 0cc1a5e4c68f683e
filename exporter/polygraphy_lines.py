"""Command lines with which polygraphy loads and runs the graphs of an artifact, unchanged, one step of one token each.

Polygraphy draws inputs at random. That is right for activations and caches, and wrong for what says where a token goes:
those get a range of one value, the first token of an empty cache.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gemma4_export.configs.evidence import GRAPHS_FOLDER
from gemma4_export.configs.manifest import EnginesEntry, GroupEntry, Manifest
from gemma4_export.plugins.compile import LIBRARY

# By how an input's name ends; ``configs/names.py`` and ``configs/evidence.py`` say what each means.
_VALUES = {"write_index": 0, "start": 0, "end": 1, "output_rows": 0}
_SHAPES = ("min", "opt", "max")


def polygraphy_lines(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A line for a shell per graph: what runs, what verifies, what engines are compiled from."""
    for _, graph in sorted(manifest.graphs.items()):
        yield _line(folder, graph.file, ["--onnxrt"], graph.inputs)
    for _, graph in sorted(manifest.verify.graphs.items(), key=lambda item: item[1].file):
        # Their weights lie where those of the decoder do, not beside them.
        data = ["--external-data-dir", str(folder / GRAPHS_FOLDER), "--onnxrt"]
        yield _line(folder, graph.file, data, graph.inputs)
    if manifest.engines is not None:
        has_plugin = manifest.engines.experts == "plugin" and manifest.model.top_k_experts > 0
        for groups in manifest.engines.phases.values():
            for group in groups:
                yield _engine_line(folder, group, manifest.engines, has_plugin=has_plugin)


def _engine_line(folder: Path, group: GroupEntry, engines: EnginesEntry, *, has_plugin: bool) -> str:
    options = ["--trt", "--strongly-typed"]
    if has_plugin:
        options += ["--plugins", str(LIBRARY)]
    for profile in group.profiles.values():
        for index, kind in enumerate(_SHAPES):
            options += [f"--trt-{kind}-shapes", *_shapes(profile, index)]
    first = next(iter(group.profiles.values()), {})
    if first:
        options += ["--input-shapes", *_shapes(first, 0)]
    line = _line(folder, group.file, options, group.inputs)
    return f"POLYGRAPHY_USE_TENSORRT_RTX=1 {line}" if engines.backend == "tensorrt-rtx" else line


def _shapes(profile: Mapping[str, Sequence[Sequence[int]]], index: int) -> list[str]:
    return [f"{name}:[{','.join(map(str, shapes[index]))}]" for name, shapes in sorted(profile.items())]


def _line(folder: Path, file: str, options: Iterable[str], inputs: Iterable[str]) -> str:
    ranges = [
        f"{name}:[{value},{value}]" for name in inputs for ending, value in _VALUES.items() if name.endswith(ending)
    ]
    words = ["polygraphy", "run", str(folder / file), *options, *(["--val-range", *ranges] if ranges else [])]
    return shlex.join(words)
