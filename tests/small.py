"""Models whose weights the tests choose: a hub config cut short, a source that holds arrays, and quick builds."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from artifacts import traces
from safetensors.numpy import save_file

from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import FileEntry, Manifest
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.names import TensorSpec, decoder_tensors
from gemma4_export.configs.recipe import Recipe, load_recipe
from gemma4_export.configs.target import load_target
from gemma4_export.exporter import build
from gemma4_export.exporter.small_tokenizer import write_small_tokenizer
from gemma4_export.exporter.write import WeightSource

VOCAB_SIZE = 1728
"""Rows of the tables: what the small tokenizer that comes with random weights needs."""


_scratch = tempfile.TemporaryDirectory(prefix="gemma4-small-")


def scratch_folder() -> str:
    """A fresh folder that lives as long as this process."""
    return tempfile.mkdtemp(dir=_scratch.name)


def hub_config(structure: str, *, num_layers: int | None = None, **changes: Any) -> dict[str, Any]:
    """The text config of a tiny model, with so many layers of its pattern (none of them shares KV), and changed."""
    config: dict[str, Any] = tiny.hub_config(structure, text_only=True)
    config |= {"vocab_size": VOCAB_SIZE, "vocab_size_per_layer_input": VOCAB_SIZE}
    if num_layers is not None:
        layers = [*(config["layer_types"] * num_layers)[: num_layers - 1], "full_attention"]  # the last one always is
        config |= {"num_hidden_layers": num_layers, "layer_types": layers, "num_kv_shared_layers": 0}
        config["use_double_wide_mlp"] = False  # only layers that share KV are
    return config | changes


def model_config(structure: str, *, num_layers: int | None = None, **changes: Any) -> ModelConfig:
    """``hub_config`` resolved."""
    return ModelConfig.from_hf(hub_config(structure, num_layers=num_layers, **changes))


class ArraySource:
    """Weights from a dict of canonical name -> array; absent ones are drawn, the same for the same name."""

    not_packed: tuple[str, ...] = ()
    wide_scales: frozenset[str] = frozenset()
    weight_paths: tuple[Path, ...] = ()

    def __init__(
        self,
        config: ModelConfig,
        arrays: dict[str, np.ndarray] | None = None,
        *,
        specs: dict[str, TensorSpec] | None = None,
    ) -> None:
        self.config = config
        self.specs = decoder_tensors(config) if specs is None else specs
        self.arrays = {name: draw(spec) for name, spec in self.specs.items()} | (arrays or {})

    def slices(self, name: str, form: WeightFormat, max_bytes: int) -> Iterator[np.ndarray]:
        rows = self.arrays[name].reshape(self.specs[name].row_shape)
        step = max(1, min(max_bytes // (4 * rows.shape[1]), 1 + len(rows) // 3))  # several slices, the last one shorter
        for start in range(0, len(rows), step):
            yield rows[start : start + step]

    def sources(self) -> dict[str, FileEntry]:
        digest = hashlib.sha256(b"".join(self.arrays[name].tobytes() for name in sorted(self.arrays)))
        return {"arrays": FileEntry(bytes=0, sha256=digest.hexdigest())}

    def write_tokenizer(self, folder: Path) -> None:
        write_small_tokenizer(folder, vocab_size=self.config.vocab_size)


def draw(spec: TensorSpec, seed: int = 0) -> np.ndarray:
    """Random float32 values of one weight."""
    number = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:8], "little")
    values = np.random.default_rng([seed, number]).standard_normal(spec.shape, np.float32)
    return 1 + 0.3 * values if spec.role == "decoder.norm" else 0.2 * values


def write_checkpoint(folder: Path, *, seed: int = 0, **hub: Any) -> Path:
    """A text-only checkpoint of ``hub_config(**hub)`` in one safetensors file."""
    config = hub_config(**hub)
    write_small_tokenizer(folder, vocab_size=VOCAB_SIZE)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    specs = decoder_tensors(ModelConfig.from_hf(config)).values()
    save_file({f"model.{spec.name}": draw(spec, seed) for spec in specs}, folder / "model.safetensors")
    return folder


def build_artifact(
    source: WeightSource, out: Path, *, recipe: str | Recipe = "int4", on_progress: Any = None, **options: Any
) -> Manifest:
    """What ``gemma4-export build --target cpu`` does with an opened source. Tracing happens once per config."""
    resolved = build.resolve_options(
        source.config,
        model_name="small",
        target=load_target("cpu"),
        recipe=load_recipe(recipe) if isinstance(recipe, str) else recipe,
        **{"chunk": 7} | options,
    )
    with traces(fresh=False):
        return build.build_artifact(source, resolved, out, on_progress or (lambda *progress: None))


def files_of(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
