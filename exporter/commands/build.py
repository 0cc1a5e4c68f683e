"""``gemma4-export build``: checkpoint to artifact."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.manifest import Manifest
from gemma4_export.configs.models import load_model, recognise
from gemma4_export.configs.names import NOT_PACKED_PREFIXES
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.configs.target import load_target

if TYPE_CHECKING:
    from gemma4_export.exporter.checkpoint import Checkpoint


def build(
    target: Annotated[str, typer.Option(help="Where it will run, e.g. cpu.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint folder: config.json and *.safetensors.")] = None,
    model: Annotated[str | None, typer.Option(help="Released model, e.g. e2b or 26b-a4b-base, or a hub id.")] = None,
    recipe: Annotated[str, typer.Option(help="How weights are stored: bf16 as released, or fp32.")] = "bf16",
    out: Annotated[Path | None, typer.Option(help="Artifact folder.  [default: gemma4-MODEL-TARGET]")] = None,
    context: Annotated[int | None, typer.Option(help="Longest sequence in tokens.  [default: the model's]")] = None,
    chunk: Annotated[int | None, typer.Option(help="Longest prefill step in tokens.  [default: the target's]")] = None,
) -> None:
    """Turn a checkpoint into an artifact folder that gemma4-run runs without torch."""
    # Names are checked before torch is imported: a typo should cost milliseconds.
    chosen_target, chosen_recipe = load_target(target), load_recipe(recipe)
    if (checkpoint is None) == (model is None):
        raise ConfigError("give one of --checkpoint and --model", hint="--checkpoint DIR, or --model e2b to download")
    hub_id = None if model is None else model if _is_foreign(model) else load_model(model).hub_id
    from gemma4_export.exporter.build import build_artifact, check_target, resolve_options
    from gemma4_export.exporter.checkpoint import Checkpoint
    from gemma4_export.exporter.commands.progress import BuildProgress

    check_target(chosen_target)
    started = time.monotonic()
    with BuildProgress() as progress:
        if hub_id is not None:
            from gemma4_export.exporter.hub import download

            checkpoint = download(hub_id, on_progress=functools.partial(progress, "download"))
        assert checkpoint is not None
        with Checkpoint(checkpoint) as opened:
            options = resolve_options(
                opened.config,
                model_name=_name(opened, (hub_id or str(checkpoint.resolve())).rsplit("/", 1)[-1]),
                target=chosen_target,
                recipe=chosen_recipe,
                context=context,
                chunk=chunk,
            )
            folder = out or Path(f"gemma4-{options.model_name}-{options.target.name}")
            manifest = build_artifact(opened, options, folder, progress)
    _report(manifest, folder, time.monotonic() - started)


def _is_foreign(model: str) -> bool:
    """A hub id of somebody else's: a fine-tune, named as the hub names it."""
    return "/" in model and not model.lower().startswith("google/")


def _name(checkpoint: Checkpoint, own_name: str) -> str:
    """A released size by its structure, else what the checkpoint is called."""
    from gemma4_export.exporter.package import read_chat_template

    size = recognise(checkpoint.config)
    if size is None:
        return own_name
    return size if read_chat_template(checkpoint.folder) else f"{size}-base"


def _report(manifest: Manifest, folder: Path, seconds: float) -> None:
    size = sum(entry.bytes for entry in manifest.files.values())
    what = f"{manifest.model.name} for {manifest.target}, {manifest.recipe}"
    print(f"{folder}: {what}, {size / 1e6:.1f} MB, {seconds:.0f} s")
    for prefix in NOT_PACKED_PREFIXES:
        count = sum(name.startswith(prefix) for name in manifest.not_packed)
        if count:
            print(f"not packed by this version: {count} tensors of {prefix.removeprefix('model.').rstrip('.')}")
    command = "" if manifest.model.is_chat else "--raw "
    print(f'next: gemma4-run generate {folder} {command}--prompt "Hello"')
