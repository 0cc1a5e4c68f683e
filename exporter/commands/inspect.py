"""``gemma4-export inspect``: what an artifact folder holds, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from gemma4_export.configs.artifact import Artifact, artifact_path
from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.evidence import REPORTS_FOLDER
from gemma4_export.configs.manifest import MANIFEST_NAME, Manifest


def inspect(
    artifact: Annotated[
        Path, typer.Argument(help="Folder that gemma4-export build wrote.", parser=artifact_path, metavar="ARTIFACT")
    ],
    check: Annotated[bool, typer.Option("--check", help="Hash every file, weights included (about 2 GB/s).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
    polygraphy: Annotated[
        bool, typer.Option("--polygraphy", help="Print a line for a shell per graph: polygraphy loads and runs it.")
    ] = False,
) -> None:
    """Describe an artifact; with --check, prove that it is undamaged."""
    if polygraphy and as_json:
        raise ConfigError("--polygraphy prints lines for a shell, not JSON", hint="leave one of the two out")
    manifest = Artifact.open(artifact, check="full" if check else "small").manifest
    if as_json:
        print(manifest.to_json(), end="")
        return
    if polygraphy:
        from gemma4_export.exporter.polygraphy_lines import polygraphy_lines

        print("\n".join(polygraphy_lines(artifact, manifest)))
        return
    for line in [*_describe(manifest), *_reports(artifact)]:
        print(line)
    if check:
        print(f"checked: {len(manifest.files)} files, every size and sha256 as recorded")


def _reports(folder: Path) -> list[str]:
    """One line per device that the artifact was verified on."""
    digest = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    lines = []
    for path in sorted((folder / REPORTS_FOLDER).glob("*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            state, is_this = str(report["verdict"]), report["manifest_sha256"] == digest
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            state, is_this = f"not a report ({error!r})", True
        lines.append(
            f"verified {path.name}: " + (state if is_this else f"of other files than these, so not verified: {state}")
        )
    return lines or [f"verified never: gemma4-run verify {shlex.quote(str(folder))}"]


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
    if manifest.engines is not None:
        for phase, groups in manifest.engines.phases.items():
            for group in groups:
                lines.append(
                    f"engine   {phase}, {group.layers(manifest.model.num_layers)}, {group.weight_bytes / 1e6:.1f} MB: "
                    f"{group.file} for {manifest.engines.backend} in {manifest.engines.float_type}, "
                    f"{'not compiled' if group.engine is None else f'compiled into {group.engine}'}"
                )
    lines.append(f"oracle   {manifest.verify.oracle}, {len(manifest.verify.graphs)} graphs to verify with")
    for file, entry in sorted(manifest.files.items()):
        lines.append(f"file     {entry.bytes:>14,}  {file}")
    lines.append(f"total    {sum(entry.bytes for entry in manifest.files.values()):>14,}  bytes")
    if manifest.not_packed:
        lines.append(f"left out {len(manifest.not_packed)} vision and audio tensors (names: --json, not_packed)")
    made_with = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    return [*lines, f"made by  {made_with}"]
