"""Arguments and options that several commands take, with their help."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from gemma4_export.configs.commands.app import completing
from gemma4_export.configs.models import model_names
from gemma4_export.configs.recipe import recipe_names
from gemma4_export.configs.target import target_names

Weights = Literal["model", "dummy"]
Verify = Literal["off", "layers", "full"]
Target = Annotated[
    str, typer.Option(help="Where it will run, e.g. cpu or rtx4090.", autocompletion=completing(target_names))
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help=f"How weights are stored: {', '.join(recipe_names())}, or FILE.toml.",
        autocompletion=completing(recipe_names),
        show_default="the target's",
    ),
]
complete_model = completing(model_names)
Context = Annotated[int | None, typer.Option(help="Longest sequence in tokens.", show_default="the model's")]
Chunk = Annotated[int | None, typer.Option(help="Longest prefill step in tokens.", show_default="the target's")]
