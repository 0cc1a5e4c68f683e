"""``gemma4-run``: artifact folders to text."""

from __future__ import annotations

from gemma4_export.configs.command_line import run
from gemma4_export.configs.commands.app import make_app
from gemma4_export.runtime.commands.bench import bench
from gemma4_export.runtime.commands.build import build
from gemma4_export.runtime.commands.chat import chat
from gemma4_export.runtime.commands.doctor import doctor
from gemma4_export.runtime.commands.eval import evaluate_command
from gemma4_export.runtime.commands.generate import generate
from gemma4_export.runtime.commands.verify import verify

app = make_app(
    "gemma4-run",
    "Run what gemma4-export built.",
    {
        "chat": chat,
        "generate": generate,
        "bench": bench,
        "build": build,
        "eval": evaluate_command,
        "verify": verify,
        "doctor": doctor,
    },
)


def main() -> None:
    run(app)
