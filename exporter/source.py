"""Opens a checkpoint folder as what it is: plain safetensors, compressed-tensors, or GGUF."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gemma4_export.configs.errors import ConfigError
from gemma4_export.exporter.checkpoint import Checkpoint, read_config
from gemma4_export.exporter.compressed_tensors import CompressedTensorsCheckpoint, quantization_of
from gemma4_export.exporter.gguf_checkpoint import GGUFCheckpoint
from gemma4_export.exporter.gguf_file import is_auxiliary
from gemma4_export.exporter.write import WeightSource


@contextlib.contextmanager
def open_source(folder: Path, companions: Path | None = None) -> Iterator[WeightSource]:
    """The weights of ``folder``, closed when the block ends.

    Args:
        companions: for a GGUF file, the folder of config.json and the tokenizer files where that is another one.
    Raises:
        ConfigError: config.json is missing, of no model or quantisation that this version reads, or the folder holds
            several checkpoints.
        CheckpointError: weights are missing, misshapen, of a type that is not read, or a file is damaged.
    """
    with _open(folder, companions) as source:
        yield source


def _open(folder: Path, companions: Path | None) -> Checkpoint | GGUFCheckpoint:
    if folder.is_file() and folder.suffix == ".gguf":
        raise ConfigError(
            f"{folder.name}: --checkpoint takes the folder of a GGUF file", hint=f"--checkpoint {folder.parent}"
        )
    files = sorted(path for path in folder.glob("*.gguf") if not is_auxiliary(path.name))
    if files:
        others = [*files[1:], *sorted(folder.glob("*.safetensors"))]
        if others:
            raise ConfigError(
                f"{folder}: holds {files[0].name} and {others[0].name}; which of them is meant?",
                hint="one checkpoint a folder: move the others elsewhere (llama-gguf-split --merge joins parts)",
            )
        return GGUFCheckpoint(files[0], companions)
    if quantization_of(read_config(folder)):
        return CompressedTensorsCheckpoint(folder)
    return Checkpoint(folder)
