"""``gemma4-export build``: checkpoint to artifact."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from gemma4_export.configs.command_line import CHECK_FAILED
from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.manifest import Manifest
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.models import ReleasedModel, load_model, name_of, plain_id_of, released_ids
from gemma4_export.configs.names import NOT_PACKED_PREFIXES, decoder_tensors
from gemma4_export.configs.recipe import Recipe, load_recipe, recipe_names
from gemma4_export.configs.target import Target, check_buildable, load_target

if TYPE_CHECKING:
    from gemma4_export.exporter.write import WeightSource

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
    if (checkpoint is None) == (model is None):
        raise ConfigError("give one of --checkpoint and --model", hint="--checkpoint DIR, or --model e2b to download")
    if weights == "dummy" and model is None:
        raise ConfigError("--weights dummy needs --model, the size to draw", hint="--model e2b --weights dummy")
    released = None if model is None or _is_foreign(model) else load_model(model)
    from gemma4_export.exporter.build import build_artifact, resolve_options
    from gemma4_export.exporter.commands.progress import BuildProgress
    from gemma4_export.exporter.oracle import oracle_bytes
    from gemma4_export.exporter.package import partial_of
    from gemma4_export.exporter.weights import place_weights
    from gemma4_export.exporter.write import check_room

    choose = functools.partial(
        resolve_options,
        target=chosen_target,
        recipe=chosen_recipe,
        activations=activations,
        has_dummy_weights=weights == "dummy",
        context=context,
        chunk=chunk,
        experts=experts,
    )

    def artifact_of(name: str) -> Path:
        return out or Path(f"gemma4-{name}-{target}")

    started = time.monotonic()
    with BuildProgress() as progress, contextlib.ExitStack() as stack:
        source: WeightSource
        if weights == "dummy":
            from gemma4_export.exporter.dummy import DummySource

            if released is None:
                raise ConfigError(f"--weights dummy knows released sizes only, not {model}", hint="--model e2b")
            source, name = DummySource(released.config), f"{released.name}-dummy"
        else:
            from gemma4_export.exporter.source import open_source

            if checkpoint is None:
                from gemma4_export.exporter.hub import download

                origin = hub_checkpoint(released or str(model), chosen_recipe)
                progress.say(origin.note)
                name = released.name if released else name_of(origin.hub_id)

                def check_before_weights(config: ModelConfig, cache: Path, download_bytes: int) -> None:
                    packing = choose(config, model_name=name).packing
                    check_room(
                        place_weights(decoder_tensors(config).values(), chosen_recipe, packing=packing),
                        partial_of(artifact_of(name)),
                        oracle_bytes=oracle_bytes(config),
                        cache=cache,
                        download_bytes=download_bytes,
                    )

                downloaded = download(
                    origin.hub_id,
                    plain_id=origin.plain_id,
                    on_config=check_before_weights,
                    on_progress=functools.partial(progress, "download"),
                )
                source = stack.enter_context(open_source(downloaded.folder, downloaded.companions))
            else:
                name = name_of(checkpoint.resolve().name)
                source = stack.enter_context(open_source(checkpoint))
        artifact = artifact_of(name)
        manifest = build_artifact(source, choose(source.config, model_name=name), artifact, progress)
    _report(manifest, artifact, time.monotonic() - started)
    if verify != "off" and manifest.engines is None and not _verify(artifact, verify):
        raise typer.Exit(CHECK_FAILED)


class HubCheckpoint(NamedTuple):
    """What is downloaded: its id, the plain checkpoint's (for a GGUF without config and tokenizer), what to tell."""

    hub_id: str
    plain_id: str | None
    note: str


def hub_checkpoint(model: ReleasedModel | str, recipe: Recipe) -> HubCheckpoint:
    """The checkpoint that ``recipe`` wants of a released model, or of a hub id beside those."""
    if isinstance(model, str):
        note = f"{recipe.name}: no quantisation-aware checkpoint of {model} is known; what is not 4-bit yet is rounded"
        return HubCheckpoint(model, plain_id_of(model), note if recipe.prefers_qat else "")
    if not recipe.prefers_qat:
        return HubCheckpoint(model.hub_id, None, "")
    if model.qat is None:
        note = f"{recipe.name}: no quantisation-aware checkpoint of {model.hub_id} is known; its weights are rounded"
        return HubCheckpoint(model.hub_id, None, note)
    note = (
        f"{recipe.name}: taking the quantisation-aware checkpoint {model.qat.hub_id} "
        f"(--recipe int4-rtn rounds {model.hub_id} instead)"
    )
    return HubCheckpoint(model.qat.hub_id, model.hub_id, note)


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


def _is_foreign(model: str) -> bool:
    """A hub id beside the released ones: a fine-tune or a quantised one, named as the hub names it."""
    return "/" in model and model.lower() not in released_ids()


def _verify(folder: Path, level: Verify) -> bool:
    """Run ``gemma4-run verify`` in a process of its own, print its verdict, and say whether it passed."""
    command = [sys.executable, "-m", "gemma4_export.runtime", "verify", str(folder), "--level", level, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if not ended.stdout:  # it could not begin: its own words, without its progress
        at = ended.stderr.rfind("error: ")
        sys.stderr.write(ended.stderr[max(at, 0) :])
        print(f"built, not verified: gemma4-run verify {shlex.quote(str(folder))}")
        return False
    print(f"verify {level}: {json.loads(ended.stdout)['verdict']}")
    return ended.returncode == 0


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
        return
    command = "" if manifest.model.is_chat else "--raw "
    print(f'next: gemma4-run generate {shlex.quote(str(folder))} {command}--prompt "Hello"')
