"""``make demo``: build the demo artifact for this machine's processor and talk to it, offline."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.tasks import TOOLS
from gemma4_export.runtime import Gemma4, Reply, TextPiece, ThoughtPiece, ToolCall, ToolCallPiece

CHECKPOINT = Path("demo/checkpoints/tiny-e")
ARTIFACT = Path("build/demo/gemma4-tiny-e-cpu")
# Whether the model may think, and what is said. Each is a conversation of its own, as in the model's training.
SCRIPT = (
    (False, "Hello!"),
    (False, "Who are you?"),
    (True, "What is 48213 + 93779?"),
    (True, "What is 345 * 7?"),
    (True, "What is the weather in Paris and Oslo?"),
    (False, "Thank you!"),
)
OFFERED = tuple(tool["declaration"] for tool in TOOLS if tool["name"] in ("get_weather", "set_timer"))
_WEATHER = {"Paris": "sunny, 21 degrees", "Oslo": "snowy, 3 degrees"}


def use(call: ToolCall) -> str:
    """What the tool answers: a stand-in for a weather service."""
    return _WEATHER[call.arguments["city"]]


def say(model: Gemma4, messages: Sequence[dict[str, Any]], *, thinks: bool) -> Reply:
    """Print an answer piece by piece as it comes."""
    tools = OFFERED if "weather" in messages[0]["content"] else None
    stream = model.stream(messages, tools, enable_thinking=thinks, temperature=0)
    speaker, held = None, ""  # line ends wait for what follows them
    for event in stream:
        if isinstance(event, ToolCallPiece):
            arguments = ", ".join(f"{key}={value!r}" for key, value in event.call.arguments.items())
            print(f"\ncalls   {event.call.name}({arguments})", end="", flush=True)
        elif isinstance(event, TextPiece | ThoughtPiece):
            if speaker is not type(event):
                print("\nthinks  " if isinstance(event, ThoughtPiece) else "\ngemma   ", end="")
                held = ""
            text = held + event.text
            shown = text.rstrip("\n")
            held = text[len(shown) :]
            print(shown.replace("\n", "\n        "), end="", flush=True)
        speaker = type(event)
    return stream.reply


def answer(model: Gemma4, text: str, *, thinks: bool) -> int:
    """One conversation, tools used as often as the model asks; returns the number of tokens that it made."""
    print(f"\nyou     {text}", end="")
    messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
    reply = say(model, messages, thinks=thinks)
    num_tokens = len(reply.ids)
    while reply.tool_calls:
        messages.append(reply.message())
        for call in reply.tool_calls:
            print(f"\ntool    {use(call)}", end="")
            messages.append({"role": "tool", "name": call.name, "content": use(call)})
        reply = say(model, messages, thinks=thinks)
        num_tokens += len(reply.ids)
    print()
    return num_tokens


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(ARTIFACT, ignore_errors=True)
    ARTIFACT.parent.mkdir(parents=True, exist_ok=True)
    command = ["gemma4-export", "build", "--checkpoint", str(CHECKPOINT), "--target", "cpu", "--out", str(ARTIFACT)]
    print("$", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "gemma4_export.exporter", *command[1:]], check=True)
    with Gemma4.load(ARTIFACT) as model:
        before = time.perf_counter()
        num_tokens = sum(answer(model, text, thinks=thinks) for thinks, text in SCRIPT)
        seconds = time.perf_counter() - before
    print(f"\n{num_tokens} tokens in {seconds:.1f} s; {time.perf_counter() - started:.0f} s in all, build included")
    command = Path(sys.executable).with_name("gemma4-run")
    print(f'next: {command} generate {ARTIFACT} --prompt "What is 12 + 30?"  (it knows sums and small talk, no more)')
    print(f"      {command} eval {ARTIFACT} demo/data/sum_long.jsonl --thinking both --limit 20")


if __name__ == "__main__":
    main()
