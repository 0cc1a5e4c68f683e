"""``gemma4-export plan``: what a build takes and gives, before anything is downloaded."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated

import typer

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.models import load_model
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.configs.target import BUILT_BACKENDS, load_target
from gemma4_export.exporter.commands import options


def plan(
    model: Annotated[
        str,
        typer.Option(help="Released model, e.g. e2b or 26b-a4b-base.", autocompletion=options.complete_model),
    ],
    target: options.Target,
    recipe: options.Recipe = None,
    weights: Annotated[options.Weights, typer.Option(help="dummy: nothing is downloaded.")] = "model",
    context: options.Context = None,
    chunk: options.Chunk = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s of memory, as bench's plain read.", show_default="the target's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Add up weights, KV, memory, disk and the speed limit; refuse what cannot fit and name what does."""
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ConfigError(f"--bandwidth {bandwidth:g}: expected GB/s above 0", hint="--bandwidth 40")
    released, chosen_target = load_model(model), load_target(target)
    chosen_recipe = load_recipe(recipe or chosen_target.recipe)
    from gemma4_export.exporter.plan import Plan, check_fits, make_plan, resolve_plan

    resolved = resolve_plan(
        released, target=chosen_target, recipe=chosen_recipe, dummy=weights == "dummy", context=context, chunk=chunk
    )
    result: Plan = make_plan(released, resolved, bandwidth=None if bandwidth is None else bandwidth * 1e9)
    if as_json:
        print(json.dumps({**dataclasses.asdict(result), "fits": result.fits}))
    else:
        for line in _describe(result):
            print(line)
        if chosen_target.built_backend is None:
            print(f"note      this version cannot build for {target} yet, only for {', '.join(BUILT_BACKENDS)}")
    check_fits(result, released, resolved)


def _describe(plan: object) -> list[str]:
    from gemma4_export.exporter.plan import Plan

    assert isinstance(plan, Plan)
    giga = 1e9
    origin = f" ({plan.download_from})" if plan.download_from else ""
    lines = [f"{plan.model} for {plan.target}, {plan.recipe}, context {plan.context}"]
    lines += [f"  {size / giga:8.3f} GB  {role}" for role, size in sorted(plan.role_bytes.items())]
    lines += [
        f"artifact  {plan.artifact_bytes / giga:.2f} GB; download {plan.download_bytes / giga:.2f} GB{origin}; "
        f"engines {plan.engine_bytes / giga:.2f} GB; free disk needed {plan.build_disk_bytes / giga:.2f} GB",
        f"memory    {plan.weights_in_memory_bytes / giga:.2f} GB weights + {plan.kv_bytes / giga:.2f} GB KV + "
        f"{plan.scratch_bytes / giga:.2f} GB scratch + {plan.process_bytes / giga:.2f} GB process = "
        f"{plan.needed_bytes / giga:.2f} GB of {plan.memory_bytes / giga:.1f} GB; "
        f"{plan.load_peak_bytes / giga:.2f} GB at the peak of loading",
    ]
    if not plan.fits:
        longest = plan.longest_context
        return [*lines, f"context   {f'up to {longest} tokens fit' if longest else 'no token fits beside the weights'}"]
    matrices = plan.bytes_per_token - plan.kv_bytes_per_token
    lines += [
        f"context   up to {plan.longest_context} tokens fit",
        f"decode    reads {matrices / giga:.3f} GB weights + {plan.kv_bytes_per_token / giga:.3f} GB KV = "
        f"{plan.bytes_per_token / giga:.3f} GB a token with the context full",
    ]
    if plan.kv_bytes_per_token > plan.kv_bytes:
        lines.append("          (more KV than is kept: layers that share a cache each read it)")
    if plan.decode_limit_tokens_per_s is None:
        lines.append("limit     not known: pass --bandwidth with the GB/s of gemma4-run bench's plain read")
    else:
        bandwidth = plan.decode_limit_tokens_per_s * plan.bytes_per_token
        lines.append(
            f"limit     {bandwidth / giga:.0f} GB/s / {plan.bytes_per_token / giga:.3f} GB = "
            f"{plan.decode_limit_tokens_per_s:.0f} tok/s"
        )
    builtin = plan.builtin_experts
    if builtin is not None and builtin.decode_limit_tokens_per_s is not None:
        room = f"up to {builtin.longest_context} tokens fit" if builtin.longest_context else "does not fit"
        lines.append(
            f"experts   the limit is our plugin's; --experts builtin: {builtin.decode_limit_tokens_per_s:.0f} tok/s "
            f"({builtin.bytes_per_token / giga:.3f} GB a token), "
            f"{builtin.weights_in_memory_bytes / giga:.2f} GB weights ({room})"
        )
    return lines
