"""Where the two commands start: what they need is imported here, so that Ctrl-C ends that quietly as well."""

import sys


def gemma4_run() -> None:
    """``gemma4-run``."""
    _start("gemma4_export.runtime.commands")


def gemma4_export() -> None:
    """``gemma4-export``."""
    _start("gemma4_export.exporter.commands")


def _start(module: str) -> None:
    try:
        from importlib import import_module

        import_module(module).main()
    except KeyboardInterrupt:
        sys.exit(130)  # configs.command_line.INTERRUPTED, which may not be there yet
