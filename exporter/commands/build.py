"""``gemma4-export build``: checkpoint to artifact."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gemma4_export.configs.command_line import CHECK_FAILED, parse_bytes
from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.manifest import EnginesEntry, Manifest
from gemma4_export.configs.matrix import Engines
from gemma4_export.configs.models import ReleasedModel, is_other, load_model
from gemma4_export.configs.names import NOT_PACKED_PREFIXES
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.configs.target import check_buildable, check_recipe, load_target
from gemma4_export.exporter.commands import options

if TYPE_CHECKING:
    from gemma4_export.exporter.child import Verdict

Activations = Literal["int8", "fp32"]
Experts = Literal["plugin", "builtin"]


def build(
    target: options.Target,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder: config.json with *.safetensors, or with one *.gguf.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Released model, e.g. e2b or 26b-a4b-base, or a hub id.", autocompletion=options.complete_model
        ),
    ] = None,
    weights: Annotated[
        options.Weights, typer.Option(help="dummy: random weights of --model, for sizes and speed.")
    ] = "model",
    recipe: options.Recipe = None,
    activations: Annotated[Activations, typer.Option(help="What int4 and int8 matrices are multiplied with.")] = "int8",
    out: Annotated[Path | None, typer.Option(help="Artifact folder.", show_default="gemma4-MODEL-TARGET")] = None,
    context: options.Context = None,
    chunk: options.Chunk = None,
    verify: Annotated[
        options.Verify,
        typer.Option(help="Hold the artifact to its oracle at once: layer by layer; full: the whole model too."),
    ] = "layers",
    engines: Annotated[
        Engines | None, typer.Option(help="later: write what TensorRT engines are compiled from, and compile none.")
    ] = None,
    build_memory: Annotated[
        str | None, typer.Option(help="What compiling engines may take, e.g. 12GB.", show_default="what is free")
    ] = None,
    experts: Annotated[
        Experts, typer.Option(help="Who computes routed experts in an engine: our plugin, or TensorRT's own ops.")
    ] = "plugin",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object once it is built.")] = False,
) -> None:
    """Turn a checkpoint into an artifact folder that gemma4-run runs without torch."""
    # Names are checked before torch is imported: a typo should cost milliseconds.
    chosen_target = load_target(target)
    chosen_recipe = load_recipe(recipe or chosen_target.recipe)
    check_buildable(chosen_target)
    check_recipe(chosen_target, chosen_recipe)
    has_engines = chosen_target.built_backend != "ort-cpu"
    if engines is not None and not has_engines:
        raise ConfigError(f"--engines {engines}: target {target} has none", hint="leave --engines out")
    memory_bytes = None if build_memory is None else parse_bytes("--build-memory", build_memory)
    origin = _origin(checkpoint, model, weights)
    from gemma4_export.exporter.commands.progress import BuildProgress
    from gemma4_export.exporter.requested import BuildRequest, build_requested

    request = BuildRequest(
        origin=origin,
        target=chosen_target,
        recipe=chosen_recipe,
        activations=activations,
        has_dummy_weights=weights == "dummy",
        out=out,
        context=context,
        chunk=chunk,
        experts=experts,
        compiles_engines=engines is None,
        build_memory_bytes=memory_bytes,
    )
    started = time.monotonic()
    with BuildProgress() as progress:
        manifest = build_requested(request, progress, progress.say)
    seconds = time.monotonic() - started
    if not as_json:
        _report(manifest, request.folder, seconds)
    verdict = None
    if verify != "off":
        from gemma4_export.exporter.child import verify_in_child

        verdict = verify_in_child(request.folder, verify)
        sys.stderr.write(verdict.error)
    if as_json:
        print(json.dumps(summary(manifest, request.folder, seconds, verdict), ensure_ascii=False))
    elif verdict is not None:
        unverified = f"built, not verified: gemma4-run verify {shlex.quote(str(request.folder))}"
        print(unverified if verdict.text is None else f"verify {verify}: {verdict.text}")
    if verdict is not None and not verdict.passed:
        raise typer.Exit(CHECK_FAILED)
    if not as_json:
        print(_next_step(manifest, request.folder))


def _origin(checkpoint: Path | None, model: str | None, weights: options.Weights) -> Path | ReleasedModel | str:
    """Where the weights come from; a hub id stays one when it is none of the released."""
    if (checkpoint is None) == (model is None):
        raise ConfigError("give one of --checkpoint and --model", hint="--checkpoint DIR, or --model e2b to download")
    if checkpoint is not None:
        if weights == "dummy":
            raise ConfigError("--weights dummy needs --model, the size to draw", hint="--model e2b --weights dummy")
        return checkpoint
    assert model is not None
    return model if is_other(model) else load_model(model)


def summary(manifest: Manifest, folder: Path, seconds: float, verdict: Verdict | None) -> dict[str, Any]:
    """What ``--json`` prints: the build by numbers, ``verified`` None where nothing was held to the oracle."""
    return {
        "artifact": str(folder),
        "model": manifest.model.name,
        "target": manifest.target,
        "recipe": manifest.recipe,
        "context": manifest.context,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "kv_bytes": manifest.kv.num_bytes(manifest.context),
        "seconds": round(seconds, 3),
        "census": {role: dataclasses.asdict(entry) for role, entry in sorted(manifest.census.items())},
        "not_packed": len(manifest.not_packed),
        "engines": []
        if manifest.engines is None
        else [{"graph": group.file, "engine": group.engine} for group in manifest.engines.groups],
        "verified": None if verdict is None else verdict.passed,
        "verdict": None if verdict is None else verdict.text,
    }


def _report(manifest: Manifest, folder: Path, seconds: float) -> None:
    size = sum(entry.bytes for entry in manifest.files.values())
    what = f"{manifest.model.name} for {manifest.target}, {manifest.recipe}"
    print(f"{folder}: {what}, {size / 1e6:.1f} MB, {seconds:.0f} s")
    for role, entry in sorted(manifest.census.items()):
        # Plain values that were stored as they came need no line.
        if entry.codes or entry.relative_error:
            kept = f", {entry.codes - entry.codes_kept} of {entry.codes} codes changed" if entry.codes_kept else ""
            print(
                f"  {role}: {entry.tensors} tensors, {entry.parameters / 1e6:.1f} M parameters as {entry.format}, "
                f"{entry.bytes / 1e6:.1f} MB, relative error {entry.relative_error:.4f}{kept}"
            )
    first, full = manifest.kv.num_bytes(manifest.kv.global_bucket), manifest.kv.num_bytes(manifest.context)
    print(
        f"context {manifest.context} tokens: {first / 1e6:.1f} MB of KV at first, {full / 1e6:.1f} MB when it is full"
    )
    for prefix in NOT_PACKED_PREFIXES:
        count = sum(name.startswith(prefix) for name in manifest.not_packed)
        if count:
            print(f"not packed by this version: {count} tensors of {prefix.removeprefix('model.').rstrip('.')}")
    if manifest.engines is not None:
        _report_engines(manifest.engines)


def _report_engines(engines: EnginesEntry) -> None:
    largest = max(group.weight_bytes for group in engines.groups)
    state = (
        f"to compile for {engines.backend}, compute capability {engines.compute_capability}"
        if engines.compiled is None
        else f"for compute capability {', '.join(engines.compiled.compute_capabilities)} "
        f"by {engines.backend} {engines.compiled.library_version}"
    )
    print(f"{len(engines.groups)} engines {state}, up to {largest / 1e9:.2f} GB of weights each")


def _next_step(manifest: Manifest, folder: Path) -> str:
    name = shlex.quote(str(folder))
    if manifest.engines is None:
        raw = "" if manifest.model.is_chat else "--raw "
        return f'next: gemma4-run generate {name} {raw}--prompt "Hello"'
    if manifest.engines.compiled is None:
        return f"next: gemma4-run build {name}"
    return "engines are built; this version cannot run them yet"
