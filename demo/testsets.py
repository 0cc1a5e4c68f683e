"""Write the held-out question sets to demo/data: ``python -m demo.testsets``. Fixed seeds; the files are committed.

Nothing here can be drawn in training: questions lie on the other side of the split by hash, and spoken digits come from
other voices. Pictures and sounds are stored, so that scoring needs neither fonts nor espeak-ng.
"""

from __future__ import annotations

import json
import random
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from demo import pictures, speech
from demo.tasks import Item, draw, make_recall, make_sum, make_tool_answer, make_tool_call

DATA = Path(__file__).parent / "data"

TEXT: dict[str, tuple[int, Callable[[random.Random], Item]]] = {
    "sum_thinking": (200, lambda rng: make_sum(rng, thinking=True)),
    "sum_long": (150, lambda rng: make_sum(rng, thinking=True, shortest=8, longest=9)),
    "tool_call": (200, make_tool_call),
    "tool_answer": (200, make_tool_answer),
    "recall": (200, lambda rng: make_recall(rng, fillers=(4, 6))),
}
# name -> number, kind of text, font size in pixels at 280 soft tokens (half of it at 70), whether training saw the text
PICTURES = {
    "picture_digits": (120, "digits", (50.0, 130.0), False),
    "picture_words": (100, "word", (50.0, 130.0), True),
    "picture_new_words": (40, "word", (50.0, 130.0), False),
    "picture_letters": (60, "letters", (50.0, 130.0), False),
    "picture_small": (100, "digits", (18.0, 26.0), False),
}
SOUNDS = 85


def question(item: Item, task: str) -> dict[str, Any]:
    """One line of a question set, as ``gemma4_export.runtime.questions`` reads it."""
    calls = [{"name": c["function"]["name"], "arguments": c["function"]["arguments"]} for c in item.calls]
    return {
        "messages": item.messages,
        **({"tools": item.tools} if item.tools else {}),
        "enable_thinking": item.enable_thinking,
        **({"calls": calls} if calls else {"answer": item.text}),
        "task": task,
    }


def _write(name: str, questions: list[dict[str, Any]], folder: Path) -> None:
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in questions]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def text_questions(name: str) -> list[dict[str, Any]]:
    """The questions of one text set, no two with the same content."""
    number, make = TEXT[name]
    rng, seen, out = random.Random(f"test/{name}"), set(), []
    while len(out) < number:
        item = draw(make, rng, test=True)
        if (content := json.dumps(item.messages)) not in seen:
            seen.add(content)
            out.append(question(item, name))
    return out


def write_wave(path: Path, samples: np.ndarray) -> None:
    """8-bit mono WAV at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(speech.RATE)
        file.writeframes(np.clip(np.round(samples * 127 + 128), 0, 255).astype(np.uint8).tobytes())


def main(folder: Path = DATA) -> None:
    for media in ("pictures", "speech"):
        (folder / media).mkdir(parents=True, exist_ok=True)
    for name in TEXT:
        _write(name, text_questions(name), folder)
    for name, (number, kind, text_pixels, known) in PICTURES.items():
        rng, lines = random.Random(f"test/{name}"), []
        for index in range(number):
            item, drawing = pictures.make_picture(
                rng, budget=280, text_pixels=text_pixels, kind=kind, test=True, known=known
            )
            file = f"pictures/{name}_{index:03d}.png"
            drawing.colored().save(folder / file, optimize=True)
            item.messages[0]["content"][0] = {"type": "image", "image": file}
            lines.append(question(item, name))
        _write(name, lines, folder)
    rng, lines = random.Random("test/speech"), []
    for index in range(SOUNDS):
        item, samples = speech.make_speech(rng, test=True)
        file = f"speech/{index:03d}.wav"
        write_wave(folder / file, samples)
        item.messages[0]["content"][0] = {"type": "audio", "audio": file}
        lines.append(question(item, "speech"))
    _write("speech", lines, folder)


if __name__ == "__main__":
    main()
