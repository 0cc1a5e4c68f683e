"""``gemma4-run generate``: prompts in, answers out."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Annotated

import typer

from gemma4_export.configs.errors import ConfigError
from gemma4_export.runtime.commands import options
from gemma4_export.runtime.commands.prompts import Prompt, read_prompt, read_prompts
from gemma4_export.runtime.commands.screen import show
from gemma4_export.runtime.gemma4 import DEFAULT_MAX_NEW_TOKENS, Gemma4
from gemma4_export.runtime.reply import Finished, MalformedCallPiece, TextPiece, ThoughtPiece, ToolCallPiece
from gemma4_export.runtime.stream import Stream


def generate(
    artifact: options.ArtifactFolder,
    prompt: Annotated[str | None, typer.Option(help="What to say to the model; - reads standard input.")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(help="A prompt a line; *.jsonl: a conversation a line, with its tools; - reads standard input."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    thinking: options.Thinking = False,
    thinking_budget: options.ThinkingBudget = None,
    hide_thoughts: Annotated[bool, typer.Option("--hide-thoughts", help="Show no thoughts on stderr.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat, one BOS in front.")] = False,
    threads: options.Threads = None,
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
                _show(stream, hide_thoughts=hide_thoughts)


def _encode(model: Gemma4, prompt: Prompt, *, is_raw: bool, thinking: bool) -> list[int]:
    if not is_raw:
        return model.encode(prompt.messages, prompt.tools, enable_thinking=thinking)
    if prompt.text is None:
        raise ConfigError("--raw continues text, a .jsonl file holds conversations", hint="leave --raw out")
    return model.encode_raw(prompt.text)


def _show(stream: Stream, *, hide_thoughts: bool) -> None:
    """Text and calls on stdout; thoughts, dimmed in a terminal, and what was odd on stderr."""
    thoughts = None if hide_thoughts else sys.stderr
    was_thought = False
    for event in stream:
        is_thought = isinstance(event, ThoughtPiece)
        if was_thought and not is_thought:
            show(thoughts, "\n")
        was_thought = is_thought
        match event:
            case TextPiece(text=text):
                show(sys.stdout, text)
            case ThoughtPiece(text=text):
                show(thoughts, text, dim=True)
            case ToolCallPiece(call=call):
                show(sys.stdout, f"call {call.name} {json.dumps(call.arguments, ensure_ascii=False)}\n")
            case MalformedCallPiece(call=malformed):
                show(sys.stderr, f"malformed {malformed.text}\n")
            case Finished(reply=reply):
                show(sys.stdout, "\n")
                for problem in reply.problems:
                    show(sys.stderr, f"note: {problem}\n")
