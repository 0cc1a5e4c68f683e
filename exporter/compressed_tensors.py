"""Reads a compressed-tensors checkpoint of 4-bit weights in groups of 32: codes and scales leave as they came.

A module's weight is stored as ``NAME_packed`` [N, K // 8] int32, eight codes per integer, the first in the lowest bits,
each 8 above its signed value; ``NAME_scale`` [N, K // 32]; and ``NAME_shape``. On a little-endian file the bytes of
``NAME_packed`` therefore are our own layout with every nibble offset by 8. Source: the package compressed-tensors 0.20,
pack_to_int32. Weights that are not packed are ordinary floats, and the recipe rounds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_export.configs.errors import CheckpointError, ConfigError
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.names import NOT_PACKED_PREFIXES, check_shape
from gemma4_export.exporter.checkpoint import FLOATS, Checkpoint, StoredTensor, read_all_headers, read_config
from gemma4_export.exporter.quantize import QuantizedRows, check_scales, dequantize

Array = np.ndarray[Any, np.dtype[Any]]

METHOD = "compressed-tensors"
GROUP = 32
INSTEAD = "use the model's w4a16 checkpoint or its Q4_0 GGUF, or the bf16 one with --recipe int4-rtn"
_FORMAT = WeightFormat("int4", GROUP)
_PACKED, _SCALE, _SHAPE = "_packed", "_scale", "_shape"
# What other schemes store beside the codes. A weight is more than code times scale then.
_OTHER_PARTS = ("_zero_point", "_g_idx", "_global_scale")


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The block of a config.json that says how its weights are quantised, wherever it stands; None: they are not."""
    text = config.get("text_config")
    for values in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if values.get(key):
                return values[key]
    return None


def read_plain_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as that of the model before it was quantised, if it was, and as this version reads.

    Raises:
        ConfigError: there is none, or it is quantised in another way; the hint says what to use.
    """
    config = dict(read_config(folder))
    scheme = quantization_of(config)
    if not scheme:
        return config
    check_scheme(scheme)
    if isinstance(config.get("text_config"), Mapping):
        config["text_config"] = _plain(config["text_config"])
    return _plain(config)


def check_scheme(scheme: Any) -> None:
    """Refuse what is not w4a16, pack-quantized, symmetric, group 32.

    Args:
        scheme: ``quantization_config`` of config.json.
    Raises:
        ConfigError: what was found, and what to use instead.
    """
    if not isinstance(scheme, Mapping):
        raise _refused(f"expected an object, found {scheme!r}")
    method = scheme.get("quant_method")
    if method != METHOD:
        algorithm = scheme.get("quant_algo")
        name = f"{method} ({algorithm})" if algorithm else str(method)
        raise _refused(f"quant_method {name}: this version reads {METHOD} only")
    for key, what in (
        ("kv_cache_scheme", "a quantised KV cache"),
        ("sparsity_config", "sparse weights"),
        ("moe_sparsity_config", "pruned experts"),
        ("transform_config", "rotated weights"),
    ):
        if scheme.get(key):
            raise _refused(f"{key}: {what} are not read by this version")
    groups = scheme.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused(f"config_groups: expected an object, found {groups!r}")
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise _refused(f"config_groups.{name}: expected an object, found {group!r}")
        _check_group(group, scheme.get("format"), f"config_groups.{name}")


def _check_group(group: Mapping[str, Any], whole_format: Any, where: str) -> None:
    stored_as = group.get("format") or whole_format
    if stored_as != "pack-quantized":
        raise _refused(f"{where}: format {stored_as!r}, this version reads 'pack-quantized'")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise _refused(f"{where}.{key}: activations are quantised, this version reads weight-only checkpoints")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise _refused(f"{where}.weights: expected an object, found {weights!r}")
    for key, wanted in (
        ("type", "int"),
        ("num_bits", 4),
        ("symmetric", True),
        ("strategy", "group"),
        ("group_size", GROUP),
    ):
        if weights.get(key) != wanted:
            raise _refused(f"{where}.weights.{key}: {weights.get(key)!r}, this version copies {wanted!r} only")
    # "weight" and "static" order the rounding only; "group" and "dynamic" store columns in another order.
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise _refused(f"{where}.weights.actorder: {weights['actorder']!r}, its columns are permuted")


def _refused(cause: str) -> ConfigError:
    return ConfigError(f"config.json: quantization_config: {cause}", hint=INSTEAD)


class CompressedTensorsCheckpoint(Checkpoint):
    """A checkpoint whose packed weights come out of ``slices`` as codes, the others as they are stored."""

    def __init__(self, folder: Path) -> None:
        """Open ``folder``.

        Raises:
            ConfigError: its config.json is of another scheme; the hint says what to use.
            CheckpointError: as ``Checkpoint``, or codes and scales do not belong together.
        """
        self._scales: dict[str, StoredTensor] = {}
        super().__init__(folder)
        self.wide_scales = {
            name
            for name, segments in self._segments.items()
            if any(self._scales[s.stored_name].dtype != "F16" for s in segments if s.stored_name in self._scales)
        }

    def _read_config(self) -> Mapping[str, Any]:
        return read_plain_config(self.folder)

    def _read_stored(self) -> dict[str, StoredTensor]:
        """Codes, scales and shape become one entry, under the name and with the shape of the weight they hold."""
        stored = read_all_headers(self.folder)
        for packed_name in [name for name in stored if name.endswith(_PACKED)]:
            if packed_name.startswith(NOT_PACKED_PREFIXES):
                continue
            name = packed_name.removesuffix(_PACKED)
            others = [name + part for part in _OTHER_PARTS if name + part in stored]
            if others:
                raise CheckpointError(f"{others[0]}: this version reads symmetric weights only", hint=INSTEAD)
            packed = stored.pop(packed_name)
            scales, shape = stored.pop(name + _SCALE, None), stored.pop(name + _SHAPE, None)
            if scales is None:
                raise CheckpointError(f"{packed_name}: has no {name}{_SCALE}", hint="fetch the checkpoint again")
            whole = self._whole(packed_name, packed, scales)
            if shape is not None:
                self._check_shape_tensor(name + _SHAPE, shape, whole.shape)
            # Fused experts have no ".weight" in our names, however they are stored.
            name = name.removesuffix(".weight") if name.endswith("gate_up_proj.weight") else name
            if whole.shape[:-2] and name.endswith("experts.down_proj.weight"):
                name = name.removesuffix(".weight")
            if name in stored:
                raise CheckpointError(f"{name}: stored as codes and as values", hint="fetch the checkpoint again")
            stored[name], self._scales[name] = whole, scales
        return stored

    def _whole(self, packed_name: str, packed: StoredTensor, scales: StoredTensor) -> StoredTensor:
        """The weight that these codes and scales hold."""
        if packed.dtype != "I32" or not packed.shape:
            raise CheckpointError(
                f"{packed_name}: expected I32 codes, found {packed.dtype} {list(packed.shape)}", hint=INSTEAD
            )
        *rows, words = packed.shape
        if scales.dtype not in ("F16", "BF16", "F32"):
            raise CheckpointError(
                f"{packed_name}: expected scales in F16, BF16 or F32, found {scales.dtype}", hint=INSTEAD
            )
        if scales.shape != (*rows, words * 8 // GROUP) or words * 8 % GROUP:
            raise CheckpointError(
                f"{packed_name}: {words * 8} columns in groups of {GROUP} need scales "
                f"{[*rows, words * 8 // GROUP]}, found {list(scales.shape)}",
                hint=INSTEAD,
            )
        return StoredTensor(packed.path, str(_FORMAT), (*rows, words * 8), packed.start, packed.num_bytes)

    def _check_shape_tensor(self, name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
        if stored.dtype not in ("I64", "I32") or stored.shape != (len(shape),):
            raise CheckpointError(
                f"{name}: expected {len(shape)} integers, found {stored.dtype} {list(stored.shape)}",
                hint="fetch the checkpoint again",
            )
        values = np.empty(len(shape), np.int64 if stored.dtype == "I64" else np.int32)
        self._files.read(stored.path, stored.start, values, name)
        check_shape(name, shape, tuple(values.tolist()))

    def _check_stored(self, stored_name: str, shape: tuple[int, ...]) -> None:
        if stored_name in self._scales:
            check_shape(stored_name, shape, self.stored[stored_name].shape)
        else:
            super()._check_stored(stored_name, shape)

    def slices(self, name: str, form: WeightFormat, max_bytes: int) -> Iterator[Array | QuantizedRows]:
        """All rows of a decoder weight in order: packed ones as codes and scales, others as they are stored."""
        columns = self.specs[name].row_shape[1]
        step = max(1, max_bytes // (columns * 4))
        for segment in self._segments[name]:
            for start in range(0, segment.num_rows, step):
                stop = min(start + step, segment.num_rows)
                if segment.stored_name in self._scales:
                    yield self._read_codes(segment.stored_name, start, stop, columns)
                else:
                    yield super()._read(segment.stored_name, start, stop, columns)

    def _read(self, stored_name: str, start: int, stop: int, columns: int) -> Array:
        if stored_name in self._scales:
            return dequantize(self._read_codes(stored_name, start, stop, columns))
        return super()._read(stored_name, start, stop, columns)

    def _read_codes(self, stored_name: str, start: int, stop: int, columns: int) -> QuantizedRows:
        packed, stored_scales = self.stored[stored_name], self._scales[stored_name]
        codes = np.empty((stop - start, columns // 2), np.uint8)
        self._files.read(packed.path, packed.start + start * codes.shape[1], codes, stored_name)
        codes ^= np.uint8(0x88)  # flipping the top bit of a nibble takes 8 away
        scales = np.empty((stop - start, columns // GROUP), FLOATS[stored_scales.dtype])
        offset = start * scales.shape[1] * scales.itemsize
        self._files.read(stored_scales.path, stored_scales.start + offset, scales, stored_name + _SCALE)
        # NumPy's own dtypes from here on; float32 holds every bfloat16.
        rows = QuantizedRows(_FORMAT, codes, scales.astype(np.float32) if stored_scales.dtype == "BF16" else scales)
        check_scales(rows, stored_name)
        return rows


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as that of the model before it was quantised. Whether its head is tied, the tensors tell."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    return kept | {"tie_word_embeddings": True} if "tie_word_embeddings" in kept else kept
