"""``python -m gemma4_export.plugins.compile``: the native library of our plugins, with nvcc from PATH or from pip."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gemma4_export.configs.errors import ArtifactError

PLUGINS = Path(__file__).parent
LIBRARY = PLUGINS / "lib" / "libgemma4_plugins.so"
"""Where `main` puts it and where builds look for it."""
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120", "compute_120")
"""Machine code for these, and code that newer GPUs translate; sm_80 runs on 8.6 and 8.7 as well."""
_MOE = PLUGINS / "moe"
_HEADERS = (_MOE, PLUGINS / "common")
_SOURCES = tuple(_MOE / name for name in ("trt_plugin.cpp", "ort_op.cpp", "kernel_cpu.cpp", "kernel_cuda.cu"))


def library_sources() -> list[Path]:
    """Every file that the library is made from, this one with its options included."""
    headers = (path for folder in _HEADERS for path in folder.iterdir() if path.suffix in (".h", ".cuh"))
    return [*_SOURCES, *sorted(headers), Path(__file__)]


def ensure_library(say: Callable[[str], None]) -> None:
    """Compile `LIBRARY` unless it was made from the sources as they are; of two processes the second one waits.

    Raises:
        ArtifactError: as `compile_library`.
    """
    LIBRARY.parent.mkdir(exist_ok=True)
    with LIBRARY.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made_from = _made_from(LIBRARY)
        if LIBRARY.is_file() and made_from.is_file() and made_from.read_text(encoding="utf-8") == _sources_sha256():
            return
        say(f"compiling {LIBRARY.name}: minutes, once for these sources")
        compile_library(LIBRARY)


def _made_from(library: Path) -> Path:
    """The file that says from which sources ``library`` was made."""
    return library.with_suffix(".sources")


def _sources_sha256() -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in library_sources())).hexdigest()


def find_nvcc() -> tuple[Path, Path]:
    """nvcc and the folder of its libraries.

    Raises:
        ArtifactError: neither on PATH nor installed by the ``kernels`` extra.
    """
    on_path = shutil.which("nvcc")
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [Path(on_path).resolve()] if on_path else [n for p in places for n in sorted(Path(p).glob("cu1*/bin/nvcc"))]
    if not found:
        raise ArtifactError(
            "nvcc is not installed: it compiles the plugins", hint='pip install "gemma4-export[kernels]"'
        )
    return found[0], found[0].parent.parent / "lib"


def compile_library(
    out: Path, *, architectures: Sequence[str] = ARCHITECTURES, options: Sequence[str] = ("-O3",)
) -> None:
    """Compile all plugins into one library that needs no driver to load: the CUDA runtime is linked statically.

    Raises:
        ArtifactError: no compiler, or it does not compile; the first error is the cause.
    """
    nvcc, libraries = find_nvcc()
    out.parent.mkdir(parents=True, exist_ok=True)
    _made_from(out).unlink(missing_ok=True)
    sources = _sources_sha256()
    codes = [f"-gencode=arch={a.replace('sm_', 'compute_')},code={a}" for a in architectures]
    command = [
        *(str(nvcc), "-std=c++17", "-shared", "-cudart=static", "--threads=2", *options, *codes),
        *("-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror"),
        *map(str, _SOURCES),
        *(f"-L{libraries}", "-o", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "nothing said")
        raise ArtifactError(f"{nvcc} does not compile the plugins: {first}", hint="CUDA 13.0 and a C++17 compiler do")
    _made_from(out).write_text(sources, encoding="utf-8")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    compile_library(LIBRARY)
    logging.getLogger(__name__).info("%s: %.1f MB", LIBRARY, LIBRARY.stat().st_size / 1e6)


if __name__ == "__main__":
    try:
        main()
    except ArtifactError as error:
        sys.exit(f"error: {error}")
