"""``gemma4-run bench``: how fast an artifact runs here, against a plain read of the same bytes."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from gemma4_export.runtime.bench import bench as measure
from gemma4_export.runtime.commands import options
from gemma4_export.runtime.commands.screen import say


def bench(
    artifact: options.ArtifactFolder,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens to prefill.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Runs; medians are reported.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure load, prefill and decode of an artifact on this machine."""

    result = measure(artifact, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, say=say)
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(f"model     {result.model}, {result.recipe}")
    print(f"load      {result.load_s:.2f} s, {result.resident_gb:.2f} GB resident")
    print(f"prefill   {result.prefill_tokens_per_s:.1f} tok/s ({result.prompt_tokens} tokens)")
    overhead = f"{result.overhead_ms_per_token:.2f} ms a token outside the graph"
    print(f"decode    {result.decode_tokens_per_s:.1f} tok/s, {overhead}")
    read = f"{result.plain_read_gb_per_s:.0f} GB/s with {result.num_threads} threads"
    print(
        f"bandwidth {result.decode_gb_per_s:.1f} GB/s of weights and KV ({result.gb_per_token:.3f} GB a token), "
        f"{result.share_of_plain_read:.0%} of a plain read ({read})"
    )
