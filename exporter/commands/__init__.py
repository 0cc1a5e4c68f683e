"""``gemma4-export``: checkpoint folders to artifact folders."""

from __future__ import annotations

from gemma4_export.configs.command_line import run
from gemma4_export.configs.commands.app import make_app
from gemma4_export.exporter.commands.build import build
from gemma4_export.exporter.commands.inspect import inspect
from gemma4_export.exporter.commands.matrix import matrix
from gemma4_export.exporter.commands.plan import plan

app = make_app(
    "gemma4-export",
    "Turn a Gemma 4 checkpoint into a folder that runs.",
    {"build": build, "inspect": inspect, "matrix": matrix, "plan": plan},
)


def main() -> None:
    run(app)
