"""Arguments and options that several commands of ``gemma4-run`` take: each is described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma4_export.configs.artifact import artifact_path

ArtifactFolder = Annotated[
    Path, typer.Argument(help="Folder that gemma4-export build wrote.", parser=artifact_path, metavar="ARTIFACT")
]
Threads = Annotated[int | None, typer.Option(help="Threads that compute. Default: one a core.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer in tokens, its thought included.", min=1)]
Temperature = Annotated[
    float | None, typer.Option(help="0: always the most likely token, reproducible. Default: the checkpoint's.")
]
TopK = Annotated[int | None, typer.Option(help="Choose among so many of the likeliest tokens; 0: all.")]
TopP = Annotated[float | None, typer.Option(help="Choose among the likeliest that reach this; 1: all.")]
MinP = Annotated[float | None, typer.Option(help="Choose among those this near the likeliest; 0: all.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: repeat less. 1: off.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Above 0: stay less on one thing. 0: off.")]
Seed = Annotated[int | None, typer.Option(help="The same answers again. Default: others each time.")]
Stop = Annotated[list[str] | None, typer.Option(help="End an answer before this text; may be repeated.")]
Thinking = Annotated[bool, typer.Option("--thinking", help="Ask for a thought before each answer.")]
ThinkingBudget = Annotated[int | None, typer.Option(help="Longest thought in tokens.", min=1)]
