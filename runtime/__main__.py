"""``python -m gemma4_export.runtime``: the same as ``gemma4-run``, for child processes of the exporter."""

from gemma4_export.runtime.commands import main

main()
