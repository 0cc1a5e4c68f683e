"""``gemma4-run chat``: a conversation in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma4_export.configs.errors import ConfigError
from gemma4_export.runtime.chat_session import ChatSession
from gemma4_export.runtime.commands.chat_terminal import ChatTerminal
from gemma4_export.runtime.gemma4 import DEFAULT_MAX_NEW_TOKENS, Gemma4


def chat(
    artifact: Annotated[Path, typer.Argument(help="Folder that gemma4-export build wrote.")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON file, a list of tools; you are asked for the results of calls.")
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
    seed: Annotated[int | None, typer.Option(help="The same answers again. Default: others each time.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End an answer before this text; may be repeated.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Ask for a thought before each answer.")] = False,
    thinking_budget: Annotated[int | None, typer.Option(help="Longest thought in tokens.", min=1)] = None,
    hide_thoughts: Annotated[bool, typer.Option("--hide-thoughts", help="Say only that the model thinks.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads that compute. Default: one a core.")] = None,
) -> None:
    """Talk to a model; /help lists what can be typed. Answers go to stdout, all else to stderr."""
    schemas = None if tools is None else _read_tools(tools)
    with Gemma4.load(artifact, num_threads=threads) as model:
        session = ChatSession(
            model,
            system=system,
            enable_thinking=thinking,
            tools=schemas,
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
        ChatTerminal(session, hide_thoughts=hide_thoughts).run()


def _read_tools(path: Path) -> list[dict[str, Any]]:
    hint = '[{"type": "function", "function": {"name": …, "description": …, "parameters": {JSON schema}}}]'
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}", hint=hint) from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"{path}: expected a list of tools", hint=hint)
    return tools
