"""Finds TensorRT-RTX's libraries in the wheel that carries them and gives them the names that they look for."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from gemma4_export.configs.errors import ArtifactError

WHEEL = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
"""The only wheel that carries the real library and installs from PyPI alone; NVIDIA's own fetch from another index."""
_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
SUPPORTED = "1.7"
"""The layout of ``cpp_interface`` was read from this one; another minor version may have moved a slot."""
_INSTALL = 'pip install "gemma4-export[rtx]"'


@dataclass(frozen=True, slots=True, kw_only=True)
class RtxLibrary:
    """The two libraries of one version."""

    core: Path
    parser: Path
    version: str

    def link_into(self, folder: Path) -> Path:
        """Make links under every name that is looked for and return ``folder``, for LD_LIBRARY_PATH.

        The parser opens the unversioned ``libtensorrt_rtx.so`` and ends the process where it finds none. The folder is
        ours, because the one the wheel was installed into may be read-only.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for library in (self.core, self.parser):
            stem, _, version = library.name.partition(".so.")
            for name in (f"{stem}.so", f"{stem}.so.{version.split('.')[0]}", library.name):
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(library)
        return folder


def find_rtx_library() -> RtxLibrary:
    """The libraries of the installed wheel.

    Raises:
        ArtifactError: not installed, incomplete, or of a version whose layout is not known.
    """
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ArtifactError("TensorRT-RTX is not installed: no engine can be built", hint=_INSTALL)
    return rtx_library_in(Path(spec.submodule_search_locations[0]))


def rtx_library_in(folder: Path) -> RtxLibrary:
    """The libraries lying in ``folder``; see `find_rtx_library`."""
    core, parser = _only(folder, "libtensorrt_rtx"), _only(folder, "libtensorrt_onnxparser_rtx")
    version = core.name.partition(".so.")[2]
    check_version(version, core.name)
    return RtxLibrary(core=core, parser=parser, version=version)


def check_version(version: str, what: str) -> None:
    """Refuse a library whose virtual tables were never read: calling a wrong slot would do anything.

    Raises:
        ArtifactError: ``version`` is not `SUPPORTED`.
    """
    if not version.startswith(f"{SUPPORTED}."):
        raise ArtifactError(
            f"{what}: TensorRT-RTX {version}, this version of gemma4-export binds {SUPPORTED}.x",
            hint=f'pip install "{WHEEL}==0.5.0"',
        )


def _only(folder: Path, stem: str) -> Path:
    versioned = re.compile(re.escape(stem) + r"\.so\.\d+(\.\d+)+")
    found = sorted(path for path in folder.iterdir() if versioned.fullmatch(path.name) and not path.is_symlink())
    if len(found) != 1:
        raise ArtifactError(
            f"{folder}: expected one {stem}.so.VERSION, found {len(found)}",
            hint=f"pip install --force-reinstall {WHEEL}",
        )
    return found[0]
