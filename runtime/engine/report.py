"""How a build of engines is told: a line per engine, and one at the end."""

from __future__ import annotations

from gemma4_export.configs.manifest import GroupEntry, Manifest
from gemma4_export.runtime.engine.artifact import Compiled
from gemma4_export.runtime.engine.build import BuiltEngine


def engine_line(manifest: Manifest, engine: BuiltEngine) -> str:
    """Which layers, how large, and what it took."""
    group = _group_of(manifest, engine)
    layers = group.layers(manifest.model.num_layers)
    took = f"{engine.seconds:.1f} s, {engine.peak_memory_bytes / 1e9:.2f} GB of memory"
    size = f"{engine.record.engine_bytes / 1e6:.1f} MB"
    return f"{engine.record.graph}: {layers}, {size}: {'as it was' if engine.was_cached else took}"


def last_line(compiled: Compiled) -> str:
    """All engines in one line."""
    engines = compiled.manifest.engines
    assert engines is not None
    assert engines.compiled is not None
    size = sum(engine.record.engine_bytes for engine in compiled.engines)
    cached = sum(engine.was_cached for engine in compiled.engines)
    return (
        f"{len(compiled.engines)} engines for compute capability {', '.join(engines.compiled.compute_capabilities)} "
        f"by {engines.backend} {engines.compiled.library_version}, {size / 1e6:.1f} MB, {cached} of them as they were"
    )


def _group_of(manifest: Manifest, engine: BuiltEngine) -> GroupEntry:
    assert manifest.engines is not None
    return next(g for g in manifest.engines.groups if g.file.rpartition("/")[2] == engine.record.graph)
