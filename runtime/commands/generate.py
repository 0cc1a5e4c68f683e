"""``gemma4-run generate``: one prompt, one answer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from gemma4_export.configs.errors import ConfigError
from gemma4_export.runtime.gemma4 import Gemma4


def generate(
    artifact: Annotated[Path, typer.Argument(help="Folder that gemma4-export build wrote.")],
    prompt: Annotated[str, typer.Option(help="What to say to the model.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat, one BOS in front.")] = False,
) -> None:
    """Answer a prompt greedily, printing text as it comes."""
    if not prompt.strip():
        raise ConfigError("--prompt is empty", hint='gemma4-run generate ARTIFACT --prompt "Hello"')
    started = time.perf_counter()
    model = Gemma4.load(artifact)
    ids = model.encode_raw(prompt) if raw else model.encode([{"role": "user", "content": prompt}])
    loaded = time.perf_counter()
    if not as_json:
        for piece in model.stream_text(ids, max_new_tokens=max_new_tokens):
            print(piece, end="", flush=True)
        print()
        return
    reply = model.reply(ids, model.generate_ids(ids, max_new_tokens=max_new_tokens))
    seconds = time.perf_counter() - loaded
    result = {
        "text": reply.text,
        "ids": reply.ids,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.num_prompt_tokens,
        "new_tokens": len(reply.ids),
        "load_s": round(loaded - started, 3),
        "generate_s": round(seconds, 3),
    }
    print(json.dumps(result, ensure_ascii=False))
