"""How every command of ours ends: exit 0 done, 1 a check failed, 2 misuse, 3 left out; cause and hint, no traceback."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gemma4_export import __version__
from gemma4_export.configs.errors import ConfigError, Gemma4Error
from gemma4_export.configs.output import written_output

CHECK_FAILED, MISUSE, SKIPPED, INTERRUPTED = 1, 2, 3, 130
EXIT_CODES = {
    0: "done",
    CHECK_FAILED: "a check failed or something broke",
    MISUSE: "an argument or config is wrong",
    SKIPPED: "an artifact of a matrix does not fit its target",
    INTERRUPTED: "Ctrl-C",
}
_log = logging.getLogger("gemma4_export")
# What the base install leaves out and gemma4-export needs.
_EXPORT_PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "huggingface_hub")


def check_output(option: str, path: Path, suffix: str) -> None:
    """Refuse a file that cannot be written before the work whose result it gets.

    Raises:
        ConfigError: ``path`` is a folder, or lies in none.
    """
    if path.is_dir():
        raise ConfigError(f"{option} {path}: a folder, not a file", hint=f"{option} {path / 'report'}{suffix}")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: no folder {path.parent}", hint=f"mkdir -p '{path.parent}'")


_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]i?)?B?")


def parse_bytes(option: str, text: str) -> int:
    """12GB, 11.5GiB, 800MB or a plain number of bytes.

    Raises:
        ConfigError: none of these, or no bytes at all.
    """
    match = _BYTES.fullmatch(text.strip())
    base, unit = (1024 if match and match[2] and "i" in match[2] else 1000), (match[2] or "" if match else "")
    number = int(float(match[1]) * base ** " kMG".index(unit[:1] or " ")) if match else 0
    if number < 1:
        raise ConfigError(f"{option} {text!r}: not a number of bytes", hint=f"{option} 12GB")
    return number


def run(command: Callable[[], object]) -> None:
    """Run a command line and turn errors that are somebody's input into two lines on stderr and an exit code."""
    try:
        with written_output():
            command()
    except Gemma4Error as error:
        _log.debug("where this error came from:", exc_info=True)
        _end(str(error), MISUSE if isinstance(error, ConfigError) else CHECK_FAILED)
    except OSError as error:
        _end((f"{error.filename}: " if error.filename else "") + (error.strerror or str(error)), CHECK_FAILED)
    except MemoryError as error:
        _end(f"out of memory {error}\nhint: give a smaller --context or recipe", CHECK_FAILED)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXPORT_PACKAGES:
            raise
        _end(f'{package} is not installed\nhint: pip install "gemma4-export[export,cpu]"', MISUSE)
    except UnicodeEncodeError as error:
        _end(f"the terminal's encoding {error.encoding} lacks a character\nhint: PYTHONUTF8=1", CHECK_FAILED)


def _end(message: str, code: int) -> NoReturn:
    if sys.stderr is not None:  # closed: the exit code says it alone
        sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def set_verbosity(level: int) -> None:
    """How much is told on stderr: from WARNING on no progress, at DEBUG what modules log, and which module it was."""
    _log.setLevel(level)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    _log.handlers[:] = [handler] if level <= logging.DEBUG else []


def shows_progress() -> bool:
    return _log.level <= logging.INFO


# Of these the versions decide what an artifact becomes or how it runs.
_VERSIONS = (
    *("numpy", "tokenizers", "jinja2", "safetensors", "onnxruntime", "onnxruntime-gpu"),
    *("onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-cu13", "torch", "onnx", "onnx-ir", "onnxscript"),
    *("optimum", "polygraphy"),
)


def installed_versions() -> dict[str, str]:
    """Distribution -> version of those that are installed and matter, read without importing any."""
    from importlib.metadata import PackageNotFoundError, version  # 20 ms that other commands need not wait for

    found = {"gemma4-export": __version__}
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
