"""Which files of this package an artifact is made by: the modules that a module imports, and the data they name."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path

import gemma4_export

_PACKAGE = Path(gemma4_export.__file__).parent
_NAME = "gemma4_export"


def source_hashes(roots: Collection[str], *, without: Collection[str]) -> dict[str, str]:
    """File below the package -> sha256, of ``roots`` and all that they import, directly or not.

    Imports inside functions count. TOML files do not: what they say becomes configs, which are compared as such.

    Args:
        roots: modules such as ``exporter.build``.
        without: modules that are not entered; what only they import is left out.
    """
    wanted, found = list(roots), dict[str, str]()
    while wanted:
        module = wanted.pop()
        path = _path_of(module)
        if path is None or module in without or _below(path) in found:
            continue
        text = path.read_text(encoding="utf-8")
        for file in (path, *_data_of(path, text)):
            found[_below(file)] = file_hash(file)
        wanted += _imports(text)
        wanted += [module.rpartition(".")[0]]  # importing a.b.c runs a and a.b
    return found


def _path_of(module: str) -> Path | None:
    """The file of a module; None: there is none, as where the last part names a function."""
    path = _PACKAGE.joinpath(*module.split(".")) if module else _PACKAGE
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _below(path: Path) -> str:
    return path.relative_to(_PACKAGE).as_posix()


@functools.cache
def _imports(text: str) -> tuple[str, ...]:
    """Modules of this package, without its name; also ``module.name`` where that may be a function."""
    return tuple(_imported(text))


def _imported(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            dotted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name.removeprefix(f"{_NAME}.") for name in dotted if name.startswith(f"{_NAME}."))


def _data_of(path: Path, text: str) -> tuple[Path, ...]:
    """Files beside a module that its text names."""
    beside = (file for file in path.parent.iterdir() if file.is_file() and file.suffix not in (".py", ".toml", ".md"))
    return tuple(sorted(file for file in beside if f'"{file.name}"' in text))


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
