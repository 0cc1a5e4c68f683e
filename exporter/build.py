"""Checkpoint folder to artifact folder: trace, lower, stream the weights, package."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from gemma4_export.configs import names
from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.evidence import GRAPHS_FOLDER, ORACLE_FILE, oracle_identity
from gemma4_export.configs.manifest import (
    FORMAT,
    MANIFEST_NAME,
    CacheEntry,
    CensusEntry,
    EnginesEntry,
    FileEntry,
    GraphEntry,
    KVLayout,
    Manifest,
    ModelEntry,
    RopeEntry,
    ScalesEntry,
    TableEntry,
    VerifyEntry,
)
from gemma4_export.configs.model import ModelConfig, RopeConfig
from gemma4_export.configs.output import naming
from gemma4_export.configs.recipe import Recipe
from gemma4_export.configs.target import FloatType, Target, check_buildable, check_recipe
from gemma4_export.exporter.engine_graphs import EngineTarget, Experts, write_engine_graphs
from gemma4_export.exporter.lower import lower_ort_cpu
from gemma4_export.exporter.memory import engine_bytes, load_peak_bytes
from gemma4_export.exporter.oracle import encode_prompts, oracle_bytes, record_oracle
from gemma4_export.exporter.package import hash_files, partial_folder
from gemma4_export.exporter.passes.matmul import Activations
from gemma4_export.exporter.split_groups import MAX_GROUP_BYTES
from gemma4_export.exporter.tokenizer_files import CHAT_TEMPLATE
from gemma4_export.exporter.trace import trace_decoder
from gemma4_export.exporter.verify_graphs import write_verify_graphs
from gemma4_export.exporter.versions import package_versions
from gemma4_export.exporter.weights import Packing, PlacedWeight, Placement, place_weights
from gemma4_export.exporter.write import (
    WeightSource,
    WeightStats,
    Written,
    check_room,
    relative_error,
    write_weights,
)

TOKENIZER_FOLDER = "tokenizer"
DECODER_FILE = f"{GRAPHS_FOLDER}/decoder.onnx"
GLOBAL_BUCKET = 256  # slots; onnxruntime's attention reads a linear cache whole, so it starts small and doubles

_ENGINE_ACTIVATIONS: dict[FloatType, Literal["fp32", "fp16", "bf16"]] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}

Stage = Literal["download", "trace", "weights", "oracle", "package", "engines"]
OnProgress = Callable[[Stage, str, int, int], None]
"""Called with stage, what is being done, and done and total units (bytes for download and weights, steps otherwise)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What to build, all choices made."""

    model_name: str
    target: Target
    recipe: Recipe
    activations: Activations
    has_dummy_weights: bool
    context: int
    chunk: int
    float_type: FloatType
    """What matrix products and caches are computed in."""
    experts: Experts
    """Of engines: who computes routed experts."""
    max_group_bytes: int = MAX_GROUP_BYTES
    """Of engines: weights that are built into one."""

    @property
    def has_engines(self) -> bool:
        return self.target.built_backend not in (None, "ort-cpu")

    @property
    def packing(self) -> Packing:
        return "tensorrt" if self.has_engines else "ort-cpu"


def resolve_options(
    config: ModelConfig,
    *,
    model_name: str,
    target: Target,
    recipe: Recipe,
    activations: Activations = "int8",
    has_dummy_weights: bool = False,
    context: int | None = None,
    chunk: int | None = None,
    experts: Experts = "plugin",
) -> BuildOptions:
    """Fill in what the user left open, and refuse what cannot be built.

    Raises:
        ConfigError: the target's backends do not exist yet or do not multiply with the recipe's weights, or context and
            chunk are out of range.
    """
    check_buildable(target)
    check_recipe(target, recipe)
    context, chunk = resolve_lengths(config, target, context=context, chunk=chunk)
    return BuildOptions(
        model_name=model_name,
        target=target,
        recipe=recipe,
        activations=activations,
        has_dummy_weights=has_dummy_weights,
        context=context,
        chunk=chunk,
        float_type=target.float_type,
        experts=experts,
    )


def resolve_lengths(config: ModelConfig, target: Target, *, context: int | None, chunk: int | None) -> tuple[int, int]:
    """Context and chunk in tokens: the model's longest and the target's own where the user left them open.

    Raises:
        ConfigError: one is out of range.
    """
    longest = config.max_position_embeddings
    context = longest if context is None else context
    if not 2 <= context <= longest:  # a prompt and an answer of one token each
        raise ConfigError(
            f"--context {context}: expected 2 to {longest}, the model's max_position_embeddings",
            hint=f"leave --context out for {longest} tokens",
        )
    default = min(target.chunk, context)
    chunk = default if chunk is None else chunk
    if not 1 <= chunk <= context:
        raise ConfigError(
            f"--chunk {chunk}: expected 1 to {context}, the context", hint=f"leave --chunk out for {default} tokens"
        )
    return context, chunk


def build_artifact(
    source: WeightSource,
    options: BuildOptions,
    out: Path,
    on_progress: OnProgress,
    *,
    finish: Callable[[Path], Manifest] | None = None,
) -> Manifest:
    """Build ``out`` from an opened source, whole or not at all; equal inputs give equal bytes.

    Args:
        finish: called with the work folder before it becomes ``out``: compiles engines there and returns the manifest
            that lists them. What it raises leaves the folder for the same build to go on.
    Raises:
        ConfigError: ``out`` exists or is being written, the disk is too small, or a tokenizer file is missing.
        CheckpointError: a weight file is damaged.
    """
    config = source.config
    placement = place_weights(
        source.specs.values(), options.recipe, wide_scales=source.wide_scales, packing=options.packing
    )
    with partial_folder(out) as work:
        check_room(
            placement, work, oracle_bytes=oracle_bytes(config), engine_bytes=engine_bytes(placement) if finish else 0
        )
        source.write_tokenizer(work / TOKENIZER_FOLDER)
        on_progress("trace", f"{config.num_layers} layers on fake tensors", 0, 1)
        traced = trace_decoder(config)
        (work / GRAPHS_FOLDER).mkdir(exist_ok=True)
        graphs, engines = _write_graphs(traced, config, options, placement, work)
        verify_graphs = {} if engines else write_verify_graphs(config, placement, work)
        on_progress("trace", f"{len(traced.graph)} nodes", 1, 1)

        sources = source.sources()
        total, done = sum(w.placed.code_bytes + w.placed.scale_bytes for w in placement.stored), 0

        def on_bytes(name: str, count: int) -> None:
            nonlocal done
            done += count
            on_progress("weights", name, done, total)

        key = _build_key(options, source.weight_paths, sources)
        written = write_weights(source, placement, work, key=key, on_bytes=on_bytes)
        roles = census(placement, written)
        on_progress("oracle", f"layer 0 of {config.num_layers}", 0, config.num_layers)
        record_oracle(
            config,
            placement,
            work,
            encode_prompts(work / TOKENIZER_FOLDER / "tokenizer.json", context=options.context),
            identity=oracle_identity(roles, sources),
            on_layer=lambda done: on_progress(
                "oracle", f"layer {done} of {config.num_layers}", done, config.num_layers
            ),
        )
        on_progress("package", "hashing", 0, 1)
        known = {file: FileEntry(bytes=size, sha256=digest) for file, (size, digest) in written.files.items()}
        files = hash_files(work, known)
        manifest = _manifest(
            source,
            options,
            placement,
            roles,
            graphs=graphs,
            engines=engines,
            files=files,
            sources=sources,
            verify_graphs=verify_graphs,
        )
        with naming(work / MANIFEST_NAME):
            (work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        on_progress("package", "done", 1, 1)
        if finish is not None:
            manifest = finish(work)
    return manifest


def _write_graphs(
    traced: ir.Model, config: ModelConfig, options: BuildOptions, placement: Placement, work: Path
) -> tuple[dict[str, GraphEntry], EnginesEntry | None]:
    """Lower and write what the target's backend loads or compiles. ``traced`` may be consumed."""
    backend, target = options.target.built_backend, options.target
    if backend == "ort-cpu":
        lowered = lower_ort_cpu(traced, placement, activations=options.activations)
        with naming(work / DECODER_FILE):
            ir.save(lowered, work / DECODER_FILE)
        inputs, outputs = names.decoder_inputs(config), names.decoder_outputs(config)
        return {"decoder": GraphEntry(file=DECODER_FILE, backend=backend, inputs=inputs, outputs=outputs)}, None
    assert backend is not None, f"{target.name}: check_buildable let it through"
    assert target.compute_capability is not None, f"{target.name}: engines are for a compute capability"
    engine_target = EngineTarget(
        backend=backend,
        compute_capability=target.compute_capability,
        float_type=options.float_type,
        experts=options.experts,
        max_group_bytes=options.max_group_bytes,
    )
    layout, lengths = kv_layout(config, options), {"chunk": options.chunk, "context": options.context}
    return {}, write_engine_graphs(traced, config, placement, layout, engine_target, **lengths, folder=work)


def _manifest(
    source: WeightSource,
    options: BuildOptions,
    placement: Placement,
    roles: dict[str, CensusEntry],
    *,
    graphs: dict[str, GraphEntry],
    engines: EnginesEntry | None,
    files: dict[str, FileEntry],
    sources: dict[str, FileEntry],
    verify_graphs: dict[str, GraphEntry],
) -> Manifest:
    config = source.config
    sliding, full = config.rope("sliding_attention"), config.rope("full_attention")
    assert full is not None  # the last layer is always global
    ple, moe = config.hidden_size_per_layer_input, config.layers[0].moe
    weights = placement.weights
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
            num_experts=moe.num_experts if moe else 0,
            top_k_experts=moe.top_k if moe else 0,
            is_chat=f"{TOKENIZER_FOLDER}/{CHAT_TEMPLATE}" in files,
        ),
        target=options.target.name,
        recipe=options.recipe.name,
        has_dummy_weights=options.has_dummy_weights,
        activations=_ENGINE_ACTIVATIONS[options.float_type] if engines else options.activations,
        census=roles,
        context=options.context,
        chunk=options.chunk,
        rope_sliding=None if sliding is None else _rope_entry(sliding),
        rope_global=_rope_entry(full),
        kv=kv_layout(config, options),
        embed_tokens=_table(weights[names.EMBED_TOKENS], scale=config.hidden_size),
        embed_tokens_per_layer=_table(weights[names.EMBED_TOKENS_PER_LAYER], scale=ple) if ple else None,
        graphs=graphs,
        engines=engines,
        verify=VerifyEntry(
            oracle=ORACLE_FILE,
            graphs=verify_graphs,
            load_peak_bytes=load_peak_bytes(placement, is_cpu=engines is None),
        ),
        not_packed=list(source.not_packed),
        versions=package_versions(),
        sources=sources,
        files=files,
    )


def _rope_entry(rope: RopeConfig) -> RopeEntry:
    return RopeEntry(theta=rope.theta, head_dim=rope.head_dim, num_frequencies=rope.num_frequencies)


def kv_layout(config: ModelConfig, options: BuildOptions) -> KVLayout:
    window = config.sliding_window
    return KVLayout(
        dtype=options.float_type,
        sliding_window=window,
        sliding_slots=0 if window is None else window - 1 + options.chunk,
        # An engine's caches are allocated once: TensorRT wants their size static.
        global_bucket=options.context if options.has_engines else min(GLOBAL_BUCKET, options.context),
        caches=[
            CacheEntry(
                layer=layer.index,
                kind="sliding" if layer.is_sliding else "global",
                num_kv_heads=layer.num_kv_heads,
                head_dim=layer.head_dim,
                num_readers=sum(reader.kv_source == layer.index for reader in config.layers),
            )
            for layer in config.layers
            if layer.owns_kv
        ],
    )


def _table(weight: PlacedWeight, *, scale: int) -> TableEntry:
    rows, columns = weight.row_shape
    scales = weight.scales
    return TableEntry(
        file=weight.file,
        format=str(weight.format),
        offset=weight.offset,
        has_signed_codes=weight.has_signed_codes,
        scales=None if scales is None else ScalesEntry(scales.offset, scales.dtype, scales.per_row),
        rows=rows,
        columns=columns,
        # transformers rounds sqrt(size) to the dtype it computes in, and ort-cpu computes in float32.
        scale=float(np.float32(math.sqrt(scale))),
    )


def census(placement: Placement, written: Written) -> dict[str, CensusEntry]:
    """What each role became, summed over its weights. Every weight was written, or the weights stage had failed."""
    sums: dict[str, WeightStats] = {}
    counts: dict[str, int] = {}
    formats: dict[str, str] = {}
    for weight in placement.stored:
        sums.setdefault(weight.role, WeightStats()).add(written.stats[weight.name])
        counts[weight.role] = counts.get(weight.role, 0) + 1
        formats[weight.role] = str(weight.placed.format)
    return {
        role: CensusEntry(
            format=formats[role],
            tensors=counts[role],
            parameters=stats.parameters,
            bytes=stats.bytes,
            relative_error=relative_error(stats),
            codes=stats.codes,
            codes_kept=stats.codes_kept,
        )
        for role, stats in sums.items()
    }


def _build_key(options: BuildOptions, weight_paths: Sequence[Path], sources: dict[str, FileEntry]) -> str:
    """Names everything that decides the bytes of the weight files.

    ``sources`` hash the headers of weight files only, and those of a model and its fine-tune are the same: the times of
    the files tell them apart.
    """
    formats = {role: str(form) for role, form in options.recipe.formats.items()}
    changed = [path.stat().st_mtime_ns for path in weight_paths]
    parts = [
        formats,
        options.has_engines,
        {name: asdict(entry) for name, entry in sources.items()},
        changed,
        package_versions(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
