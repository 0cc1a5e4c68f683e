"""The packages whose version decides what a build writes."""

from __future__ import annotations

import importlib.metadata

_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "gemma4-export")


def package_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
