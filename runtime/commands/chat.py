"""``gemma4-run chat``: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gemma4_export.configs.errors import ConfigError
from gemma4_export.runtime.chat_session import ChatSession
from gemma4_export.runtime.commands import options
from gemma4_export.runtime.commands.chat_terminal import ChatTerminal
from gemma4_export.runtime.gemma4 import DEFAULT_MAX_NEW_TOKENS, Gemma4
from gemma4_export.runtime.text_files import parse_json, read_text


def chat(
    artifact: options.ArtifactFolder,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON file, a list of tools; you are asked for the results of calls.")
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
    hide_thoughts: Annotated[bool, typer.Option("--hide-thoughts", help="Say only that the model thinks.")] = False,
    threads: options.Threads = None,
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
    tools = parse_json(read_text(path, hint), str(path), hint)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"{path}: expected a list of tools", hint=hint)
    return tools
