"""``python -m gemma4_export.exporter``: the same as ``gemma4-export``."""

from gemma4_export.exporter.commands import main

main()
