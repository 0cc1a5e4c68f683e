"""Checkpoint folder to artifact folder: trace, lower, stream the weights, package."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from gemma4_export.configs import names
from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.manifest import (
    FORMAT,
    MANIFEST_NAME,
    CacheEntry,
    FileEntry,
    GraphEntry,
    KVLayout,
    Manifest,
    ModelEntry,
    RopeEntry,
    TableEntry,
)
from gemma4_export.configs.model import ModelConfig, RopeConfig
from gemma4_export.configs.recipe import Recipe
from gemma4_export.configs.target import Target
from gemma4_export.exporter.checkpoint import Checkpoint, weight_files
from gemma4_export.exporter.lower import GRAPHS_FOLDER, lower_ort_cpu
from gemma4_export.exporter.package import copy_tokenizer, hash_file, hash_files, hash_header, partial_folder
from gemma4_export.exporter.trace import trace_decoder
from gemma4_export.exporter.weights import PlacedWeight, place_weights, write_weights

BACKEND = "ort-cpu"  # the only one that this version lowers to
DECODER_FILE = f"{GRAPHS_FOLDER}/decoder.onnx"
GLOBAL_BUCKET = 1024  # slots; onnxruntime's attention reads a linear cache whole, so it starts small and doubles

Stage = Literal["download", "trace", "weights", "package"]
OnProgress = Callable[[Stage, str, int, int], None]
"""Called with stage, what is being done, and done and total units (bytes for download and weights, steps otherwise)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What to build, all choices made."""

    model_name: str
    target: Target
    recipe: Recipe
    context: int
    chunk: int


def check_target(target: Target) -> None:
    """Refuse a target that none of our backends runs on: no CPU graph ever carries the name of a GPU.

    Raises:
        ConfigError: the target's backends do not exist yet.
    """
    if BACKEND not in target.backends:
        raise ConfigError(
            f"target {target.name} runs {' or '.join(target.backends)}; this version builds {BACKEND} only",
            hint="--target cpu builds a folder that runs on any machine's processor",
        )


def resolve_options(
    config: ModelConfig, *, model_name: str, target: Target, recipe: Recipe, context: int | None, chunk: int | None
) -> BuildOptions:
    """Fill in what the user left open, and refuse what cannot be built.

    Raises:
        ConfigError: the target's backends do not exist yet, or context and chunk are out of range.
    """
    check_target(target)
    longest = config.max_position_embeddings
    context = longest if context is None else context
    if not 1 <= context <= longest:
        raise ConfigError(
            f"--context {context}: expected 1 to {longest}, the model's max_position_embeddings",
            hint=f"leave --context out for {longest} tokens",
        )
    default = min(target.chunk, context)
    chunk = default if chunk is None else chunk
    if not 1 <= chunk <= context:
        raise ConfigError(
            f"--chunk {chunk}: expected 1 to {context}, the context", hint=f"leave --chunk out for {default} tokens"
        )
    return BuildOptions(model_name=model_name, target=target, recipe=recipe, context=context, chunk=chunk)


def build_artifact(checkpoint: Checkpoint, options: BuildOptions, out: Path, on_progress: OnProgress) -> Manifest:
    """Build ``out`` from an opened checkpoint, whole or not at all; equal inputs give equal bytes.

    Raises:
        ConfigError: ``out`` exists or is being written, or a tokenizer file is missing.
        CheckpointError: a weight file is damaged.
    """
    config = checkpoint.config
    with partial_folder(out) as work:
        is_chat = copy_tokenizer(checkpoint.folder, work, vocab_size=config.vocab_size)
        placed = place_weights(checkpoint.specs.values(), options.recipe)
        on_progress("trace", f"{config.num_layers} layers on fake tensors", 0, 1)
        model = lower_ort_cpu(trace_decoder(config), placed)
        (work / GRAPHS_FOLDER).mkdir()
        ir.save(model, work / DECODER_FILE)
        on_progress("trace", f"{len(model.graph)} nodes", 1, 1)

        total, done = sum(placed[name].num_bytes for name in checkpoint.specs), 0

        def on_bytes(name: str, count: int) -> None:
            nonlocal done
            done += count
            on_progress("weights", name, done, total)

        written = write_weights(checkpoint, placed, work, on_bytes)
        on_progress("package", "hashing", 0, 1)
        known = {file: FileEntry(bytes=size, sha256=digest) for file, (size, digest) in written.items()}
        manifest = _manifest(checkpoint, options, placed, hash_files(work, known), is_chat=is_chat)
        (work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        on_progress("package", "done", 1, 1)
    return manifest


def _manifest(
    checkpoint: Checkpoint,
    options: BuildOptions,
    placed: dict[str, PlacedWeight],
    files: dict[str, FileEntry],
    *,
    is_chat: bool,
) -> Manifest:
    config = checkpoint.config
    sliding, full = config.rope("sliding_attention"), config.rope("full_attention")
    assert full is not None  # the last layer is always global
    ple = config.hidden_size_per_layer_input
    sources = {path.name: hash_header(path) for path in weight_files(checkpoint.folder)}
    sources["config.json"] = hash_file(checkpoint.folder / "config.json")
    packages = ("torch", "onnx", "onnx-ir", "onnxscript", "gemma4-export")
    return Manifest(
        format=FORMAT,
        model=ModelEntry(
            name=options.model_name,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            hidden_size_per_layer_input=ple,
            max_position_embeddings=config.max_position_embeddings,
            is_chat=is_chat,
        ),
        target=options.target.name,
        recipe=options.recipe.name,
        context=options.context,
        chunk=options.chunk,
        rope_sliding=None if sliding is None else _rope_entry(sliding),
        rope_global=_rope_entry(full),
        kv=_kv_layout(config, options),
        embed_tokens=_table(placed[names.EMBED_TOKENS], scale=config.hidden_size),
        embed_tokens_per_layer=_table(placed[names.EMBED_TOKENS_PER_LAYER], scale=ple) if ple else None,
        graphs={
            "decoder": GraphEntry(
                file=DECODER_FILE,
                backend=BACKEND,
                inputs=names.decoder_inputs(config),
                outputs=names.decoder_outputs(config),
            )
        },
        not_packed=checkpoint.not_packed,
        versions={name: importlib.metadata.version(name) for name in packages},
        sources=sources,
        files=files,
    )


def _rope_entry(rope: RopeConfig) -> RopeEntry:
    return RopeEntry(theta=rope.theta, head_dim=rope.head_dim, num_frequencies=rope.num_frequencies)


def _kv_layout(config: ModelConfig, options: BuildOptions) -> KVLayout:
    window = config.sliding_window
    return KVLayout(
        sliding_window=window,
        sliding_slots=0 if window is None else window - 1 + options.chunk,
        global_bucket=min(GLOBAL_BUCKET, options.context),
        caches=[
            CacheEntry(
                layer=layer.index,
                kind="sliding" if layer.is_sliding else "global",
                num_kv_heads=layer.num_kv_heads,
                head_dim=layer.head_dim,
            )
            for layer in config.layers
            if layer.owns_kv
        ],
    )


def _table(weight: PlacedWeight, *, scale: int) -> TableEntry:
    # transformers rounds sqrt(size) to the dtype it computes in, and ort-cpu computes in float32.
    return TableEntry(
        file=weight.file,
        offset=weight.offset,
        format=weight.format,
        rows=weight.shape[0],
        columns=weight.shape[1],
        scale=float(np.float32(math.sqrt(scale))),
    )
