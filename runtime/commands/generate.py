"""``gemma4-run generate``: prompts in, answers out."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, TextIO

import typer

from gemma4_export.configs.errors import ConfigError
from gemma4_export.runtime.gemma4 import DEFAULT_MAX_NEW_TOKENS, Gemma4
from gemma4_export.runtime.prompts import Prompt, read_prompt, read_prompts
from gemma4_export.runtime.reply import Finished, TextPiece, ThoughtPiece, ToolCallPiece
from gemma4_export.runtime.stream import Stream

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def generate(
    artifact: Annotated[Path, typer.Argument(help="Folder that gemma4-export build wrote.")],
    prompt: Annotated[str | None, typer.Option(help="What to say to the model; - reads standard input.")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(help="A prompt a line; *.jsonl: a conversation a line, with its tools; - reads standard input."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer in tokens, its thought included.", min=1)
    ] = DEFAULT_MAX_NEW_TOKENS,
    temperature: Annotated[
        float | None, typer.Option(help="0: always the most likely token, reproducible. Default: the checkpoint's.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many of the likeliest tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest that reach this; 1: all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Choose among those this near the likeliest; 0: all.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less. 1: off.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Above 0: stay less on one thing. 0: off.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same answer again. Default: another each time.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Ask for a thought before the answer.")] = False,
    thinking_budget: Annotated[int | None, typer.Option(help="Longest thought in tokens.", min=1)] = None,
    hide_thoughts: Annotated[bool, typer.Option("--hide-thoughts", help="Show no thoughts on stderr.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat, one BOS in front.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads that compute. Default: one a core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each prompt.")] = False,
) -> None:
    """Answer prompts, printing text as it comes; thoughts go to stderr."""
    if (prompt is None) == (prompt_file is None):
        raise ConfigError(
            "give one of --prompt and --prompt-file", hint='gemma4-run generate ARTIFACT --prompt "Hello"'
        )
    prompts = read_prompts(prompt_file) if prompt is None else [read_prompt(prompt)]  # type: ignore[arg-type]
    started = time.perf_counter()
    with Gemma4.load(artifact, num_threads=threads) as model:
        load_s = round(time.perf_counter() - started, 3)
        for each in prompts:
            stream = model.stream_ids(
                _encode(model, each, is_raw=raw, thinking=thinking),
                max_new_tokens=max_new_tokens,
                stop=stop or (),
                thinking_budget=thinking_budget,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                seed=seed,
            )
            if as_json:
                print(
                    json.dumps(dataclasses.asdict(stream.wait()) | {"load_s": load_s}, ensure_ascii=False), flush=True
                )
            else:
                _show(stream, None if hide_thoughts else sys.stderr)


def _encode(model: Gemma4, prompt: Prompt, *, is_raw: bool, thinking: bool) -> list[int]:
    if not is_raw:
        return model.encode(prompt.messages, prompt.tools, enable_thinking=thinking)
    if prompt.text is None:
        raise ConfigError("--raw continues text, a .jsonl file holds conversations", hint="leave --raw out")
    return model.encode_raw(prompt.text)


def _show(stream: Stream, thoughts: TextIO | None) -> None:
    """Text and calls on stdout; thoughts, dimmed in a terminal, and what was odd on stderr."""
    is_dim = thoughts is not None and thoughts.isatty() and not os.environ.get("NO_COLOR")
    dim, plain = (_DIM, _PLAIN) if is_dim else ("", "")
    was_thought = False
    for event in stream:
        is_thought = isinstance(event, ThoughtPiece)
        if was_thought and not is_thought and thoughts is not None:
            print(file=thoughts, flush=True)
        was_thought = is_thought
        if isinstance(event, TextPiece):
            print(event.text, end="", flush=True)
        elif isinstance(event, ThoughtPiece) and thoughts is not None:
            print(f"{dim}{event.text}{plain}", end="", file=thoughts, flush=True)
        elif isinstance(event, ToolCallPiece):
            print(f"call {event.call.name} {json.dumps(event.call.arguments, ensure_ascii=False)}", flush=True)
        elif isinstance(event, Finished):
            print(flush=True)
            for problem in event.reply.problems if sys.stderr is not None else ():
                print(f"note: {problem}", file=sys.stderr, flush=True)
