"""The demo models' vocabulary: the words that the text tasks use, in the hub's tokenizer layout.

Digits are never part of a longer token. Words in pictures are spelt by letters where the chat words do not cover them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

from demo.chat import render
from demo.tasks import (
    Mixture,
    draw_training_item,
    make_recall,
    make_small_talk,
    make_sum,
    make_tool_answer,
    make_tool_call,
)

_SYNTAX = (
    *("declaration:", "{description:", ",parameters:{properties:{", ":{description:", ",type:"),
    *(
        "}},required:[",
        "],type:",
        "call:",
        "response:",
        "{value:",
        "STRING",
        "OBJECT",
        "}}",
        "},",
        "thought",
        "user",
        "system",
        "model",
    ),
)
# The order of words in a sample decides their ids, so what is sampled stays as it is when the training mixture changes.
_SAMPLED: Mixture = (
    (0.44, lambda rng: make_sum(rng, thinking=True, longest=7)),
    (0.10, lambda rng: make_sum(rng, thinking=False, longest=7)),
    (0.13, make_tool_call),
    (0.09, make_tool_answer),
    (0.17, make_recall),
    (0.07, make_small_talk),
)
_RAREST = 40  # how often a word must occur in the sampled conversations


@cache
def words(samples: int = 20_000) -> list[str]:
    """The tokens to ask for, most frequent first: deterministic, drawn from one mixture with a fixed seed."""
    rng = random.Random("vocabulary")
    counts: Counter[str] = Counter()
    for _ in range(samples):
        item = draw_training_item(rng, _SAMPLED)
        text = render(item.messages, tools=item.tools, enable_thinking=item.enable_thinking)
        said = " ".join([text, item.thought or "", item.text or ""])
        counts.update(re.findall(r"▁?[A-Za-z_]{2,}|▁[A-Za-z]", re.sub(r"<[^<>]*>", "\n", said).replace(" ", "▁")))
    return [*_SYNTAX, *(word for word, count in counts.most_common() if count >= _RAREST and word not in _SYNTAX)]


def write_tokenizer(folder: Path, *, empty_thought: bool) -> int:
    """Write the tokenizer and chat files of one model; returns the vocabulary size."""
    from gemma4_export.exporter.small_tokenizer import write_small_tokenizer

    return write_small_tokenizer(folder, words=words(), empty_thought=empty_thought)


def main() -> None:
    """Write the tokenizer and chat files that training reads."""
    from demo.models import NAMES, empty_thought

    for name in NAMES:
        folder = Path(__file__).parent / ".work" / name
        print(f"{folder}: {write_tokenizer(folder, empty_thought=empty_thought(name))} tokens")


if __name__ == "__main__":
    main()
