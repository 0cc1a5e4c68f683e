"""A sharded safetensors checkpoint of random bfloat16 weights, of any size, laid out as the hub's are."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma4_export.configs import models
from gemma4_export.configs.formats import BFLOAT16
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.names import TensorSpec
from gemma4_export.exporter.dummy import DummySource

PREFIX = "model.language_model."
_SLICE_ROWS = 4096


def released_hub_config(model: str) -> dict[str, Any]:
    """A released model's config.json, as far as the decoder goes."""
    toml = Path(models.__file__).with_name(f"{model}.toml")
    config: dict[str, Any] = tomllib.loads(toml.read_text(encoding="utf-8"))["config"]
    return config


def write_random_checkpoint(folder: Path, hub: dict[str, Any], *, shard_bytes: int = 2_000_000_000) -> int:
    """Write the decoder of ``hub``, a few thousand rows in memory at once; returns the bytes of its weights."""
    source = DummySource(ModelConfig.from_hf(hub))
    source.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(hub), encoding="utf-8")
    shards = _shards(list(source.specs.values()), shard_bytes)
    weight_map = {}
    for index, specs in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= {_name(spec): file for spec in specs}
        _write_shard(folder / file, specs, source)
    total = sum(2 * spec.num_elements for spec in source.specs.values())
    index_json = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_json, encoding="utf-8")
    return total


def _shards(specs: list[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Tensors in order, a new file when the last is full; a tensor is never cut."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if size and size + 2 * spec.num_elements > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += 2 * spec.num_elements
    return shards


def _name(spec: TensorSpec) -> str:
    return PREFIX + spec.name


def _write_shard(path: Path, specs: list[TensorSpec], source: DummySource) -> None:
    header, offset = {}, 0
    for spec in specs:
        end = offset + 2 * spec.num_elements
        header[_name(spec)] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            num_rows = spec.row_shape[0]
            for start in range(0, num_rows, _SLICE_ROWS):
                rows = source.rows(spec.name, BFLOAT16, start, min(start + _SLICE_ROWS, num_rows))
                assert isinstance(rows, np.ndarray)
                file.write(rows.astype(ml_dtypes.bfloat16).tobytes())  # norms come as float32
