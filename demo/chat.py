"""Chat rendering for the demo: the checkpoint's own template, run by jinja2 as transformers runs it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = Path(__file__).parent.parent / "exporter" / "small_chat_template.jinja"


@cache
def _template(path: Path) -> Any:
    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(path.read_text(encoding="utf-8"))


def render(
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    enable_thinking: bool = False,
    template: Path = TEMPLATE,
) -> str:
    """The prompt text of a conversation, generation prompt included."""
    return str(
        _template(template).render(
            messages=messages,
            tools=tools,
            enable_thinking=enable_thinking,
            add_generation_prompt=True,
            bos_token="<bos>",
        )
    )


def literal(value: Any) -> str:
    """A value in tool-call syntax: strings between quote tokens, everything else bare."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def call_text(call: dict[str, Any]) -> str:
    """One tool call as the model writes it."""
    function = call["function"]
    arguments = ",".join(f"{key}:{literal(value)}" for key, value in sorted(function["arguments"].items()))
    return f"<|tool_call>call:{function['name']}{{{arguments}}}<tool_call|>"


def wanted_reply(item: Any, *, open_thought: bool) -> str:
    """What the model should generate, up to and with its stop token.

    Args:
        item: a ``demo.tasks.Item``.
        open_thought: the prompt already ends inside the thought channel (thinking on, after a tool's result).
    """
    thought = ""
    if item.enable_thinking:
        thought = f"{item.thought}\n<channel|>" if open_thought else f"<|channel>thought\n{item.thought}\n<channel|>"
    if item.calls:
        return thought + "".join(map(call_text, item.calls)) + "<|tool_response>"
    return f"{thought}{item.text}<turn|>"
