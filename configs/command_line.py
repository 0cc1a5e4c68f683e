"""How every command of ours ends: exit 0 done, 1 a check failed, 2 misuse; a cause and a hint, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from gemma4_export.configs.errors import ConfigError, Gemma4Error

CHECK_FAILED, MISUSE, INTERRUPTED = 1, 2, 130


def run(command: Callable[[], object]) -> None:
    """Run a command line and turn errors that are somebody's input into two lines on stderr and an exit code."""
    try:
        command()
    except Gemma4Error as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(MISUSE if isinstance(error, ConfigError) else CHECK_FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"error: {where}{error.strerror or error}\n")
        sys.exit(CHECK_FAILED)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
