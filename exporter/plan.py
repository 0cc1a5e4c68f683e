"""What a build will take and what it will give: bytes of everything, whether it fits, and the limit of its speed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.manifest import KVLayout
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.models import ReleasedModel
from gemma4_export.configs.names import decoder_tensors
from gemma4_export.configs.recipe import Recipe, load_recipe
from gemma4_export.configs.step_bytes import PROCESS_BYTES, cpu_matrix_bytes, step_bytes
from gemma4_export.configs.target import Target, check_recipe
from gemma4_export.exporter.build import BuildOptions, kv_layout, resolve_lengths
from gemma4_export.exporter.memory import held_bytes, load_peak_bytes, role_sizes
from gemma4_export.exporter.oracle import oracle_bytes
from gemma4_export.exporter.weights import place_weights

# Of each size the recipe that suits any checkpoint, largest first.
_RECIPES_BY_SIZE = ("bf16", "int8", "int4-quality", "int4")
_OTHER_FILES_BYTES = 40 << 20  # tokenizer.json is 32 MB, graphs up to a few


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinExperts:
    """What ``--experts builtin`` changes: engines whose routed experts are standard ops and not our plugin."""

    weights_in_memory_bytes: int
    """Decoding and prefill are engines of their own, and each holds all weights."""
    bytes_per_token: int
    decode_limit_tokens_per_s: float | None
    longest_context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All sizes in bytes; ``None`` where only a measurement on the machine can tell."""

    model: str
    target: str
    recipe: str
    context: int
    role_bytes: dict[str, int]
    artifact_bytes: int
    download_from: str | None
    """Hub id of the weights; None: nothing is downloaded."""
    download_bytes: int
    engine_bytes: int
    """Weights in compiled engines, beside the files that those are compiled from; 0 for a target without engines."""
    build_disk_bytes: int
    """Download, artifact and engines together: what has to be free at once."""
    weights_in_memory_bytes: int
    """Matrices as the backend holds them; mapped tables are not counted."""
    kv_bytes: int
    scratch_bytes: int
    process_bytes: int
    """Python, its libraries and the tokenizer, without a weight."""
    needed_bytes: int
    """Weights, KV, scratch and process together: what has to fit into ``memory_bytes``."""
    load_peak_bytes: int
    memory_bytes: int
    longest_context: int
    """Longest that fits beside the weights; 0: the weights alone do not."""
    bytes_per_token: int
    """Weights and KV that one decode step reads when the context is full."""
    kv_bytes_per_token: int
    """Of these, KV: a cache counts for each layer that attends to it, so more may be read than is kept."""
    decode_limit_tokens_per_s: float | None
    builtin_experts: BuiltinExperts | None
    """None: no routed experts, or no engines."""

    @property
    def fits(self) -> bool:
        return self.longest_context >= self.context


def resolve_plan(
    model: ReleasedModel, *, target: Target, recipe: Recipe, dummy: bool, context: int | None, chunk: int | None
) -> BuildOptions:
    """Build options for a plan: also for targets that this version cannot build for yet.

    Raises:
        ConfigError: context or chunk out of range, or weights that the target does not multiply with.
    """
    check_recipe(target, recipe)
    context, chunk = resolve_lengths(model.config, target, context=context, chunk=chunk)
    return BuildOptions(
        model_name=model.name,
        target=target,
        recipe=recipe,
        activations="int8",
        has_dummy_weights=dummy,
        context=context,
        chunk=chunk,
        float_type=target.float_type,
        experts="plugin",
    )


def make_plan(model: ReleasedModel, options: BuildOptions, *, bandwidth: float | None = None) -> Plan:
    """Add up what building ``model`` with ``options`` takes. Reads no weight and no network.

    Args:
        bandwidth: bytes a second that were measured, such as bench's plain read; None: the target's.
    """
    config, target = model.config, options.target
    placement = place_weights(decoder_tensors(config).values(), options.recipe, packing=options.packing)
    is_cpu = "ort-cpu" in target.backends
    layout = kv_layout(config, options)
    kv_item = 4 if layout.dtype == "float32" else 2
    roles, held = role_sizes(placement), held_bytes(placement, is_cpu=is_cpu)
    weights = sum(held.values())
    memory = target.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    scratch = _scratch_bytes(config, options.chunk)
    room = memory - PROCESS_BYTES - weights - scratch
    artifact = sum(placement.num_bytes.values()) + oracle_bytes(config) + _OTHER_FILES_BYTES
    kv = layout.num_bytes(options.context)
    moe = config.layers[0].moe
    experts = {"num_experts": moe.num_experts if moe else 0, "top_k_experts": moe.top_k if moe else 0}
    per_token = step_bytes(
        cpu_matrix_bytes(roles) if is_cpu else held,
        layout,
        options.context,
        **experts,
        kv_item_bytes=kv_item,
    )
    kv_per_token = step_bytes({}, layout, options.context, **experts, kv_item_bytes=kv_item)
    bandwidth = bandwidth or target.bandwidth_bytes_per_s
    download = None if options.has_dummy_weights else model.checkpoint_for(options.recipe)
    download_bytes = 0 if download is None else download.num_bytes
    engines = weights if options.has_engines else 0
    longest = config.max_position_embeddings
    builtin: BuiltinExperts | None = None
    if moe is not None and options.has_engines:
        more = _expanded_bytes(roles["decoder.experts"].parameters * moe.top_k // moe.num_experts)
        builtin = BuiltinExperts(
            weights_in_memory_bytes=2 * weights,
            bytes_per_token=per_token + more,
            decode_limit_tokens_per_s=None if bandwidth is None else bandwidth / (per_token + more),
            longest_context=_longest_context(layout, room - weights, longest),
        )
    return Plan(
        model=options.model_name,
        target=target.name,
        recipe=options.recipe.name,
        context=options.context,
        role_bytes={role: size.bytes for role, size in roles.items()},
        artifact_bytes=artifact,
        download_from=None if download is None else download.hub_id,
        download_bytes=download_bytes,
        engine_bytes=engines,
        build_disk_bytes=artifact + download_bytes + engines,
        weights_in_memory_bytes=weights,
        kv_bytes=kv,
        scratch_bytes=scratch,
        process_bytes=PROCESS_BYTES,
        needed_bytes=weights + kv + scratch + PROCESS_BYTES,
        load_peak_bytes=load_peak_bytes(placement, is_cpu=is_cpu),
        memory_bytes=memory,
        longest_context=_longest_context(layout, room, longest),
        bytes_per_token=per_token,
        kv_bytes_per_token=kv_per_token,
        decode_limit_tokens_per_s=None if bandwidth is None else bandwidth / per_token,
        builtin_experts=builtin,
    )


def check_fits(plan: Plan, model: ReleasedModel, options: BuildOptions) -> None:
    """Refuse what cannot fit, and name the nearest thing that does.

    Raises:
        ConfigError: weights, KV and scratch need more memory than the target has.
    """
    if plan.fits:
        return
    cause = (
        f"{plan.model} as {plan.recipe} with {plan.context} tokens needs {plan.needed_bytes / 1e9:.1f} GB, "
        f"{plan.target} has {plan.memory_bytes / 1e9:.1f} GB"
    )
    if plan.longest_context > 0:
        raise ConfigError(cause, hint=f"--context {plan.longest_context} fits")
    others = [make_plan(model, replace(options, recipe=load_recipe(name))) for name in _RECIPES_BY_SIZE]
    smaller = [other for other in others if other.weights_in_memory_bytes < plan.weights_in_memory_bytes]
    # Of those that reach the wanted context the largest, which comes first; else the one that reaches furthest.
    best = max(smaller, key=lambda other: min(other.longest_context, plan.context), default=plan)
    if best.longest_context > 0:
        context = min(best.longest_context, plan.context)
        raise ConfigError(cause, hint=f"--recipe {best.recipe} --context {context} fits")
    raise ConfigError(cause, hint="no recipe of this model fits; try a smaller model or a target with more memory")


def _scratch_bytes(config: ModelConfig, chunk: int) -> int:
    """Activations of one chunk in float32: the widest layer's hidden, gate, up and product, and one row of logits."""
    width = max(layer.intermediate_size for layer in config.layers)
    heads = max(layer.num_heads * layer.head_dim for layer in config.layers)
    return 4 * (chunk * (4 * config.hidden_size + 3 * width + 4 * heads) + 2 * config.vocab_size)


def _expanded_bytes(parameters: int) -> int:
    """What gathering experts by standard ops moves beside their codes: 16 bits a weight are written, then read."""
    return 2 * 2 * parameters


def _longest_context(layout: KVLayout, room: int, maximum: int) -> int:
    fixed = layout.num_bytes(0)
    per_token = layout.num_bytes(1) - fixed
    return max(0, min(maximum, (room - fixed) // per_token)) if room > fixed else 0
