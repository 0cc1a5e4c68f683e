"""The manifest: the one file that describes an artifact folder.

``manifest.json`` is UTF-8 JSON with sorted keys and no timestamps: equal inputs give equal bytes. Rules a reader holds:

* ``format`` is an integer. A reader refuses one that it does not know, and any key that it does not know.
* ``sha256`` is that of the file without this key. A reader refuses a file that is not, byte for byte, what it would
  write of the same values: a flipped bit in a RoPE frequency would change every answer and contradict nothing.
* Every path is relative, with forward slashes, and lies inside the folder.
* ``files`` lists every file with its size and sha256, but for build logs and reports, which are added later. Compiling
  engines adds theirs and writes the manifest anew.
* Tables are row-major regions of listed files; graphs name their inputs and outputs as ``configs/names.py`` does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gemma4_export import __version__
from gemma4_export.configs.errors import ArtifactError, ConfigError
from gemma4_export.configs.formats import WeightFormat

FORMAT = 3
MANIFEST_NAME = "manifest.json"
ENGINES_FOLDER = "engines"
ENGINE_NAME, RECORD_NAME = "model.engine", "engine.json"
"""A compiled engine and what it was built from, in a folder of its own below `ENGINES_FOLDER`."""
LOCK_NAME = ".gemma4-export.lock"
"""Lies in a folder as long as it is being built, and for good when that build was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeEntry:
    """Frequencies ``theta ** (-2 i / head_dim)`` for i below ``num_frequencies``."""

    theta: float
    head_dim: int
    num_frequencies: int


@dataclass(frozen=True, slots=True)
class ScalesEntry:
    """Scales [rows, per_row] in the table's file; column c of a row takes scale ``c // (columns // per_row)``."""

    offset: int
    dtype: Literal["float16", "float32"]
    per_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """Rows that the host gathers: the embedding of token i is row i times ``scale``, in float32.

    ``format`` is float32, bfloat16, int8, int8/BLOCK or int4/BLOCK (``configs/formats.py``). The decoder's head may
    read the same bytes, so codes are stored as its backend takes them: signed, or unsigned, 8 or 128 above that.
    """

    file: str
    format: str
    offset: int
    has_signed_codes: bool
    scales: ScalesEntry | None
    rows: int
    columns: int
    scale: float

    @property
    def end(self) -> int:
        """Offset of the byte behind the last value, code or scale."""
        end = self.offset + self.rows * WeightFormat.parse(self.format).row_bytes(self.columns)
        if self.scales is not None:
            item = 2 if self.scales.dtype == "float16" else 4
            end = max(end, self.scales.offset + self.rows * self.scales.per_row * item)
        return end


@dataclass(frozen=True, slots=True, kw_only=True)
class CensusEntry:
    """What the weights of one role were stored as.

    ``relative_error`` is sqrt(sum of squared rounding errors / sum of squared weights). ``codes_kept`` of ``codes``
    were copied from a quantised checkpoint as they were.
    """

    format: str
    tensors: int
    parameters: int
    bytes: int
    relative_error: float
    codes: int
    codes_kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """The KV cache of one layer that owns one: key and value [1, num_kv_heads, slots, head_dim] each."""

    layer: int
    kind: Literal["sliding", "global"]
    num_kv_heads: int
    head_dim: int
    num_readers: int
    """Layers that attend to it, its own included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """``sliding_slots`` = sliding_window - 1 + the longest chunk; global caches grow by buckets up to the context."""

    dtype: Literal["float32", "float16", "bfloat16"]
    sliding_window: int | None
    sliding_slots: int
    global_bucket: int
    caches: list[CacheEntry]

    def num_bytes(self, global_slots: int) -> int:
        """Bytes of all caches, keys and values, when the global ones have ``global_slots`` slots."""
        return sum(
            2
            * (4 if self.dtype == "float32" else 2)
            * cache.num_kv_heads
            * cache.head_dim
            * (self.sliding_slots if cache.kind == "sliding" else global_slots)
            for cache in self.caches
        )

    def cache_read_by(self, layer: int, kind: Literal["sliding", "global"]) -> CacheEntry:
        """The cache that a layer of this kind attends to, as ``LayerConfig.kv_source``: its own, or the kind's last."""
        of_kind = [cache for cache in self.caches if cache.kind == kind]
        return next((cache for cache in of_kind if cache.layer == layer), of_kind[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """The facts about the model that a runtime needs."""

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    hidden_size_per_layer_input: int
    max_position_embeddings: int
    num_experts: int
    """Routed experts per layer; 0: the model has none."""
    top_k_experts: int
    is_chat: bool
    """A chat template came with the checkpoint; base models have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphEntry:
    file: str
    backend: str
    inputs: list[str]
    outputs: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyEntry:
    """What the artifact is verified with; names of tensors and taps: ``configs/evidence.py``."""

    oracle: str
    graphs: dict[str, GraphEntry]
    """``inputs`` (models with PLE only), ``layers.0`` …, and ``head.0`` …: slices of the vocabulary in order."""
    load_peak_bytes: int
    """Memory that loading the whole decoder takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupEntry:
    """Layers ``first`` to ``last`` of the decoder as a graph that is compiled into one engine.

    The head counts as the layer after the last. ``profiles``: name -> input -> its least, best and largest shape;
    inputs of one size are not listed. Inputs and outputs that ``configs/names.py`` does not list are
    ``hidden_states.N``, from group to group. A group that reads caches of an earlier one runs on the same buffers.
    """

    file: str
    first: int
    last: int
    weight_bytes: int
    inputs: list[str]
    outputs: list[str]
    profiles: dict[str, dict[str, list[list[int]]]]
    engine: str | None
    """The folder of its engine, such as ``engines/0123``; None: not compiled yet."""

    def layers(self, num_layers: int) -> str:
        """What is in it of a model of ``num_layers``, in words."""
        if self.last < num_layers:
            return f"layers {self.first} to {self.last}"
        return "the head" if self.first == self.last else f"layers {self.first} to {num_layers - 1} and the head"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledEntry:
    """What the engines were compiled by and for; the groups name their folders."""

    library_version: str
    """Engines load into this version of the backend's library only."""
    compute_capabilities: list[str]
    """GPUs that each engine runs on, such as "8.9"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginesEntry:
    """What is compiled for a GPU. ``phases``: the groups in order, for every call or apart for decoding and prefill."""

    backend: Literal["tensorrt", "tensorrt-rtx"]
    compute_capability: str
    float_type: Literal["float32", "float16", "bfloat16"]
    experts: Literal["plugin", "builtin"]
    """Who computes Gemma4MoE nodes, where there are any."""
    phases: dict[str, list[GroupEntry]]
    compiled: CompiledEntry | None
    """None: only what engines are compiled from is here."""

    @property
    def groups(self) -> list[GroupEntry]:
        """Of all phases, in order."""
        return [group for groups in self.phases.values() for group in groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about an artifact that is not in its other files."""

    format: int
    model: ModelEntry
    target: str
    recipe: str
    has_dummy_weights: bool
    """Random weights, for sizes and speed only: what it says means nothing."""
    activations: Literal["int8", "fp32", "fp16", "bf16"]
    """What quantised matrices are multiplied with: activations rounded to int8 per block, or floats of this type."""
    census: dict[str, CensusEntry]
    """By role."""
    context: int
    """Longest sequence, prompt and answer together (tokens)."""
    chunk: int
    """Longest run of tokens in one call of the decoder."""
    rope_sliding: RopeEntry | None
    rope_global: RopeEntry
    kv: KVLayout
    embed_tokens: TableEntry
    embed_tokens_per_layer: TableEntry | None
    graphs: dict[str, GraphEntry]
    """What a backend loads as it is; ``decoder`` unless there are engines."""
    engines: EnginesEntry | None
    verify: VerifyEntry
    not_packed: list[str]
    """Checkpoint tensors that this version knows and leaves out (vision and audio towers)."""
    versions: dict[str, str]
    sources: dict[str, FileEntry]
    """The checkpoint files that the artifact was made from; of weight files, the sha256 is that of the header."""
    files: dict[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        return sealed(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest strictly.

        Raises:
            ArtifactError: it is no manifest, of another format, contradicts itself, names a file outside its folder, or
                was changed since it was written.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{MANIFEST_NAME}: not JSON ({error})", hint=_REBUILD) from error
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            newer = isinstance(found, int) and found > FORMAT
            raise ArtifactError(
                f"{MANIFEST_NAME}: format {found!r}, this version reads format {FORMAT}{_made_by_newer(values)}",
                hint=_UPGRADE if newer else _REBUILD,
            )
        seal = values.pop(_SEAL, None)
        try:
            manifest: Manifest = _parse(cls, values, MANIFEST_NAME)
        except ArtifactError as error:
            if newer_version := _made_by_newer(values):
                raise ArtifactError(f"{error.cause}{newer_version}", hint=_UPGRADE) from error
            raise
        paths = [*manifest.files, *(graph.file for graph in manifest.graphs.values()), manifest.embed_tokens.file]
        paths += [manifest.verify.oracle, *(graph.file for graph in manifest.verify.graphs.values())]
        if manifest.embed_tokens_per_layer:
            paths.append(manifest.embed_tokens_per_layer.file)
        if manifest.engines:
            groups = manifest.engines.groups
            paths += [group.file for group in groups]
            paths += [f"{g.engine}/{name}" for g in groups if g.engine for name in (ENGINE_NAME, RECORD_NAME)]
        for path in paths:
            check_inside(path)
            if path not in manifest.files:
                raise ArtifactError(f"{MANIFEST_NAME}: {path} is used but not listed under files", hint=_REBUILD)
        _check_numbers(manifest)
        if manifest.to_json() != text:  # last: what is wrong in particular says more
            found = hashlib.sha256(_dump(values).encode()).hexdigest()
            raise ArtifactError(
                f"{MANIFEST_NAME}: changed since it was written; its sha256 says {str(seal)[:12]}…, now {found[:12]}…",
                hint="copy the folder again, or build it again with gemma4-export build",
            )
        return manifest


def sealed(values: dict[str, Any]) -> str:
    """The text of a manifest with these values: they and their sha256."""
    return _dump(values | {_SEAL: hashlib.sha256(_dump(values).encode()).hexdigest()})


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


_SEAL = "sha256"
_REBUILD = "the folder is damaged; build it again with gemma4-export build"
_UPGRADE = "pip install --upgrade gemma4-export"


def _made_by_newer(values: Any) -> str:
    """Words for a version after this one that wrote ``values``, which may be any JSON; empty where none did."""
    versions = values.get("versions") if isinstance(values, dict) else None
    made_by = versions.get("gemma4-export") if isinstance(versions, dict) else None
    if not isinstance(made_by, str) or _numbers(made_by) <= _numbers(__version__):
        return ""
    return f"; made by gemma4-export {made_by}, this is {__version__}"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d{1,9}", version)[:3]]


def check_inside(path: str) -> None:
    """Raise ArtifactError unless ``path`` stays inside the artifact folder."""
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path or pure.as_posix() != path:
        raise ArtifactError(
            f"{MANIFEST_NAME}: {path!r} is not a path inside the artifact",
            hint="do not use this folder: its manifest was not written by gemma4-export",
        )


def _check_numbers(manifest: Manifest) -> None:
    """Raise ArtifactError where two entries contradict each other, before a buffer is sized by one of them."""
    model, kv, context, chunk = manifest.model, manifest.kv, manifest.context, manifest.chunk
    engines = manifest.engines
    slots = 0 if kv.sliding_window is None else kv.sliding_window - 1 + chunk
    thetas = [rope.theta for rope in (manifest.rope_sliding, manifest.rope_global) if rope is not None]
    promises = [
        (min(thetas) > 0, f"rope theta {min(thetas)}: expected above 0"),
        (context <= model.max_position_embeddings, f"context {context} of {model.max_position_embeddings} positions"),
        ("decoder" in manifest.graphs or engines is not None, "graphs: no decoder"),
        (
            engines is None or all((group.engine is None) == (engines.compiled is None) for group in engines.groups),
            "engines: every group has one, or none has and nothing was compiled",
        ),
        (1 <= chunk <= context, f"chunk {chunk} of context {context}: expected 1 <= chunk <= context"),
        (kv.sliding_window != 0 and kv.global_bucket > 0, "kv: sliding_window and global_bucket must be above 0"),
        (
            kv.sliding_slots == slots,
            f"kv.sliding_slots {kv.sliding_slots}: expected {slots}, sliding_window - 1 + chunk",
        ),
    ]
    tables = {
        "embed_tokens": (manifest.embed_tokens, model.hidden_size),
        "embed_tokens_per_layer": (
            manifest.embed_tokens_per_layer,
            model.num_layers * model.hidden_size_per_layer_input,
        ),
    }
    for name, (table, columns) in tables.items():
        found = 0 if table is None else table.columns
        promises.append((found == columns, f"{name}: {found} columns, expected {columns} (model)"))
        if table is not None:
            _check_format(name, table)
            promises.append((table.rows >= model.vocab_size, f"{name}: {table.rows} rows for {model.vocab_size} ids"))
            end, size = table.end, manifest.files[table.file].bytes
            promises.append((end <= size, f"{name}: ends at byte {end} of {table.file}, which has {size}"))
    for holds, cause in promises:
        if not holds:
            raise ArtifactError(f"{MANIFEST_NAME}: {cause}", hint=_REBUILD)


def _check_format(name: str, table: TableEntry) -> None:
    try:
        form = WeightFormat.parse(table.format)
    except ConfigError as error:
        raise ArtifactError(f"{MANIFEST_NAME}: {name}: {error.cause}", hint=_REBUILD) from error
    if form.is_quantized != (table.scales is not None):
        raise ArtifactError(
            f"{MANIFEST_NAME}: {name}: {form} {'without' if form.is_quantized else 'with'} scales", hint=_REBUILD
        )


def _parse(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``, where kinds are the dataclasses above and the types their fields use."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _parse(arguments[0], value, where)
    if origin is Literal and value in arguments:
        return value
    if origin is list and isinstance(value, list):
        return [_parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(key): _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        wrong = sorted(set(value) ^ set(hints))
        if wrong:
            state = "unknown" if wrong[0] in value else "missing"
            raise ArtifactError(f"{where}: key {wrong[0]!r} is {state}", hint=_REBUILD)
        return kind(**{key: _parse(hint, value[key], f"{where}.{key}") for key, hint in hints.items()})  # type: ignore[operator]
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind and not (kind is int and value < 0):
        return value
    raise ArtifactError(f"{where}: expected {getattr(kind, '__name__', kind)}, found {value!r}", hint=_REBUILD)
