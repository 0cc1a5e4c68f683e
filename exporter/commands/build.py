"""``gemma4-export build``: checkpoint to artifact."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from gemma4_export.configs.command_line import CHECK_FAILED
from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.manifest import Manifest
from gemma4_export.configs.models import ReleasedModel, load_model, released_ids
from gemma4_export.configs.names import NOT_PACKED_PREFIXES
from gemma4_export.configs.recipe import load_recipe, recipe_names
from gemma4_export.configs.target import Target, check_buildable, load_target

Weights = Literal["model", "dummy"]
Activations = Literal["int8", "fp32"]
Verify = Literal["off", "layers", "full"]
Engines = Literal["later"]
Experts = Literal["plugin", "builtin"]


def build(
    target: Annotated[str, typer.Option(help="Where it will run, e.g. cpu.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder: config.json with *.safetensors, or with one *.gguf.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Released model, e.g. e2b or 26b-a4b-base, or a hub id.")] = None,
    weights: Annotated[Weights, typer.Option(help="dummy: random weights of --model, for sizes and speed.")] = "model",
    recipe: Annotated[
        str, typer.Option(help=f"How weights are stored: {', '.join(recipe_names())}, or FILE.toml.")
    ] = "bf16",
    activations: Annotated[Activations, typer.Option(help="What int4 and int8 matrices are multiplied with.")] = "int8",
    out: Annotated[Path | None, typer.Option(help="Artifact folder.  [default: gemma4-MODEL-TARGET]")] = None,
    context: Annotated[int | None, typer.Option(help="Longest sequence in tokens.  [default: the model's]")] = None,
    chunk: Annotated[int | None, typer.Option(help="Longest prefill step in tokens.  [default: the target's]")] = None,
    verify: Annotated[
        Verify, typer.Option(help="Hold the artifact to its oracle at once: layer by layer; full: the whole model too.")
    ] = "layers",
    engines: Annotated[
        Engines | None, typer.Option(help="later: write what TensorRT engines are compiled from, and compile none.")
    ] = None,
    experts: Annotated[
        Experts, typer.Option(help="Who computes routed experts in an engine: our plugin, or TensorRT's own ops.")
    ] = "plugin",
) -> None:
    """Turn a checkpoint into an artifact folder that gemma4-run runs without torch."""
    # Names are checked before torch is imported: a typo should cost milliseconds.
    chosen_target, chosen_recipe = load_target(target), load_recipe(recipe)
    check_buildable(chosen_target)
    _check_engines(chosen_target, engines)
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
    )
    started = time.monotonic()
    with BuildProgress() as progress:
        manifest = build_requested(request, progress, progress.say)
    _report(manifest, request.folder, time.monotonic() - started)
    if verify != "off" and manifest.engines is None and not _verify(request.folder, verify):
        raise typer.Exit(CHECK_FAILED)
    if manifest.engines is None:
        raw = "" if manifest.model.is_chat else "--raw "
        print(f'next: gemma4-run generate {shlex.quote(str(request.folder))} {raw}--prompt "Hello"')


def _origin(checkpoint: Path | None, model: str | None, weights: Weights) -> Path | ReleasedModel | str:
    """Where the weights come from; a hub id stays one when it is none of the released."""
    if (checkpoint is None) == (model is None):
        raise ConfigError("give one of --checkpoint and --model", hint="--checkpoint DIR, or --model e2b to download")
    if checkpoint is not None:
        if weights == "dummy":
            raise ConfigError("--weights dummy needs --model, the size to draw", hint="--model e2b --weights dummy")
        return checkpoint
    assert model is not None
    is_other = "/" in model and model.lower() not in released_ids()
    return model if is_other else load_model(model)


def _check_engines(target: Target, engines: Engines | None) -> None:
    """Nobody is to take a folder without engines for one with them, or the other way round."""
    if target.built_backend == "ort-cpu":
        if engines is not None:
            raise ConfigError(f"--engines {engines}: target {target.name} has none", hint="leave --engines out")
    elif engines is None:
        raise ConfigError(
            f"target {target.name} runs {target.built_backend} engines; this version compiles none during a build",
            hint=f"--target {target.name} --engines later writes the graphs, profiles and weights that they need",
        )


def _verify(folder: Path, level: Literal["layers", "full"]) -> bool:
    """Print the verdict of ``gemma4-run verify``, and say whether it passed."""
    from gemma4_export.exporter.child import verify_in_child

    verdict = verify_in_child(folder, level)
    sys.stderr.write(verdict.error)
    if verdict.text is None:
        print(f"built, not verified: gemma4-run verify {shlex.quote(str(folder))}")
    else:
        print(f"verify {level}: {verdict.text}")
    return verdict.passed


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
        groups = [group for phase in manifest.engines.phases.values() for group in phase]
        largest = max(group.weight_bytes for group in groups)
        print(
            f"{len(groups)} engines to compile for {manifest.engines.backend}, compute capability "
            f"{manifest.engines.compute_capability}, up to {largest / 1e9:.2f} GB of weights each; "
            "nothing is verified"
        )
