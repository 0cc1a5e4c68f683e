"""``gemma4-export inspect``: what an artifact folder holds, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.manifest import Manifest


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Folder that gemma4-export build wrote.")],
    check: Annotated[bool, typer.Option("--check", help="Hash every file, weights included (about 2 GB/s).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Describe an artifact; with --check, prove that it is undamaged."""
    manifest = Artifact.open(artifact, check="full" if check else "small").manifest
    if as_json:
        print(manifest.to_json(), end="")
        return
    for line in _describe(manifest):
        print(line)
    if check:
        print(f"checked: {len(manifest.files)} files, every size and sha256 as recorded")


def _describe(manifest: Manifest) -> list[str]:
    model, kv = manifest.model, manifest.kv
    shares = model.num_layers - len(kv.caches)
    sliding = sum(cache.kind == "sliding" for cache in kv.caches)
    lines = [
        f"model    {model.name} ({model.model_type}), {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"vocabulary {model.vocab_size}, {'chat' if model.is_chat else 'base'}",
        f"target   {manifest.target}, recipe {manifest.recipe}, "
        f"context {manifest.context} tokens, chunk {manifest.chunk}",
        f"kv       {sliding} sliding caches of {kv.sliding_slots} slots (window {kv.sliding_window}), "
        f"{len(kv.caches) - sliding} global ones from {kv.global_bucket} slots up, {shares} layers share",
        f"kv bytes {kv.num_bytes(kv.global_bucket) / 1e6:.1f} MB at first, "
        f"{kv.num_bytes(manifest.context) / 1e6:.1f} MB when the context is full",
    ]
    for name, graph in sorted(manifest.graphs.items()):
        lines.append(f"graph    {name}: {graph.file} for {graph.backend}")
    for file, entry in sorted(manifest.files.items()):
        lines.append(f"file     {entry.bytes:>14,}  {file}")
    lines.append(f"total    {sum(entry.bytes for entry in manifest.files.values()):>14,}  bytes")
    if manifest.not_packed:
        lines.append(f"left out {len(manifest.not_packed)} vision and audio tensors (names: --json, not_packed)")
    made_with = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    return [*lines, f"made by  {made_with}"]
