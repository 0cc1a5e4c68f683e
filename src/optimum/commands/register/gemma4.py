"""``optimum-cli`` reads every file of this namespace when it starts; this one adds ``export gemma4`` to it."""

from __future__ import annotations

from optimum.commands.export.base import ExportCommand

from gemma4_export.exporter.optimum_command import Gemma4Command

REGISTER_COMMANDS = [(Gemma4Command, ExportCommand)]
