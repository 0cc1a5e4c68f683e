"""``gemma4-run eval``: how many questions of a set an artifact answers rightly."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gemma4_export.configs.command_line import check_output
from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.output import naming
from gemma4_export.runtime.bars import bars
from gemma4_export.runtime.commands.options import ArtifactFolder, MaxNewTokens, Threads
from gemma4_export.runtime.commands.screen import say
from gemma4_export.runtime.eval import Score, evaluate
from gemma4_export.runtime.gemma4 import DEFAULT_MAX_NEW_TOKENS, Gemma4
from gemma4_export.runtime.questions import read_questions


class Thinking(StrEnum):
    ASKED, ON, OFF, BOTH = "asked", "on", "off", "both"


def evaluate_command(
    artifact: ArtifactFolder,
    questions: Annotated[list[Path], typer.Argument(help="Question sets: JSONL, a question with its answer a line.")],
    thinking: Annotated[
        Thinking, typer.Option(help="As the questions ask, on or off for all, or both: each question twice.")
    ] = Thinking.ASKED,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each task.", min=1)] = None,
    max_new_tokens: MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
    threads: Threads = None,
    image: Annotated[Path | None, typer.Option(help="Draw the accuracies into this .svg file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, wrong replies included.")] = False,
) -> None:
    """Ask every question, greedily, and report the share of right answers with its 95 % confidence interval."""

    if image is not None:
        if image.suffix != ".svg":
            raise ConfigError(f"--image {image}: only SVG is drawn", hint=f"--image {image.with_suffix('.svg')}")
        check_output("--image", image, ".svg")
    asked = [question for path in questions for question in read_questions(path)]
    with Gemma4.load(artifact, num_threads=threads) as model:
        manifest = model.artifact.manifest
        scores = evaluate(model, asked, thinking=thinking.value, limit=limit, max_new_tokens=max_new_tokens, say=say)
    title = f"{artifact.resolve().name} ({manifest.recipe})"
    if image is not None:
        with naming(image):
            image.write_text(bars(title, scores), encoding="utf-8")
    if as_json:
        head = {"artifact": artifact.resolve().name, "recipe": manifest.recipe, "activations": manifest.activations}
        print(json.dumps(head | {"scores": [dataclasses.asdict(score) for score in scores]}, ensure_ascii=False))
        return
    _show(title, scores)


def _show(title: str, scores: list[Score]) -> None:
    print(title)
    width = max(len(score.task) for score in scores)
    for score in scores:
        mode = "on" if score.thinking else "off"
        interval = f"{score.low:.1%} to {score.high:.1%}"
        rate = score.num_new_tokens / score.seconds
        print(
            f"{score.task:{width}}  thinking {mode:3}  {score.accuracy:6.1%}  {score.right} of {score.total}"
            f"  (95 %: {interval})  {score.seconds:.0f} s, {rate:.0f} tok/s"
        )
        cut = sum(wrong.finish_reason == "length" for wrong in score.wrong)
        if cut:
            print(f"{'':{width}}  {cut} answers were cut off: --max-new-tokens or the context is too short for them")
