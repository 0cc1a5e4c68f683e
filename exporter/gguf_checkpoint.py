"""A GGUF file as a source of weights: Q4_0 and Q8_0 leave as the codes they are, other types are rounded by the recipe.

config.json and the tokenizer files are those of the plain checkpoint, beside the file or in a folder of their own: a
GGUF carries both in spellings of its own that are not read here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_export.configs.errors import CheckpointError, ConfigError
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import FileEntry
from gemma4_export.configs.names import TensorSpec, check_shape, decoder_tensors, redundant_tensors
from gemma4_export.exporter.checkpoint import read_config, resolve_config
from gemma4_export.exporter.compressed_tensors import quantization_of
from gemma4_export.exporter.gguf_file import BLOCKS, GGUFTensor, decode_rows, is_auxiliary, read_gguf_header
from gemma4_export.exporter.package import hash_file
from gemma4_export.exporter.pread import OpenFiles
from gemma4_export.exporter.quantize import QuantizedRows, check_scales
from gemma4_export.exporter.tokenizer_files import copy_tokenizer

Array = np.ndarray[Any, np.dtype[Any]]

ARCHITECTURE = "gemma4"
INSTEAD = "use a Q4_0 or Q8_0 GGUF of the model, or its bf16 checkpoint with --recipe int4-rtn"
# Angles of global layers, 1 for the pairs that turn and 1e30 for those that stand. config.json says the same.
_ROPE_FREQS = "rope_freqs.weight"

# What llama.cpp calls the decoder's tensors (its gguf-py constants, MODEL_ARCH.GEMMA4). Its converter (Gemma4Model in
# convert_hf_to_gguf.py) stores values as they are: norms are not shifted by one as those of Gemma 1 to 3 are, queries
# and keys are not permuted, and the two scales of the router hang on the tensors they are applied with.
_WHOLE = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "norm.weight": "output_norm.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}


def gguf_name(name: str) -> str:
    """``layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``: what llama.cpp calls a decoder weight."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"blk.{layer[1]}.{_IN_LAYER[layer[2]]}" if layer else _WHOLE[name]


@dataclass(frozen=True, slots=True)
class _Segment:
    """Consecutive rows of one stored tensor that are part of a decoder weight."""

    tensor: GGUFTensor
    stored_name: str
    first_row: int
    num_rows: int


class GGUFCheckpoint:
    """The decoder weights in one GGUF file, by canonical name."""

    wide_scales: frozenset[str] = frozenset()  # those of Q4_0 and Q8_0 are float16

    def __init__(self, path: Path, companions: Path | None = None) -> None:
        """Open ``path`` and match its tensors against the model's config.json.

        Args:
            companions: the folder of config.json and the tokenizer files; None: that of ``path``.
        Raises:
            ConfigError: config.json is missing or describes no model that this version exports.
            CheckpointError: the file is damaged, of another architecture, or holds types that are not read.
        """
        self.path, self.folder = path, companions or path.parent
        if not (self.folder / "config.json").is_file():
            raise ConfigError(
                f"{self.folder}: {path.name} without a config.json",
                hint="copy config.json, tokenizer.json, generation_config.json and chat_template.jinja of the plain "
                "checkpoint (google/gemma-4-… without -qat) into the folder",
            )
        values = read_config(self.folder)
        if quantization_of(values):
            raise ConfigError(
                f"{self.folder}: config.json has a quantization_config, which is not that of {path.name}",
                hint="take config.json from the plain checkpoint",
            )
        self.config = resolve_config(self.folder, values)
        self.specs = decoder_tensors(self.config)
        header = read_gguf_header(path)
        self.tensors, self._data_start = header.tensors, header.data_start
        self.not_packed = tuple(sorted(other.name for other in path.parent.glob("*.gguf") if is_auxiliary(other.name)))
        self._check_metadata(header.metadata)
        self._check_types()
        self._files = OpenFiles()
        self._segments: dict[str, list[_Segment]] = {}
        self._match()

    def _check_metadata(self, metadata: dict[str, Any]) -> None:
        architecture = metadata.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise CheckpointError(
                f"{self.path.name}: general.architecture is {architecture!r}, expected {ARCHITECTURE!r}",
                hint="this version reads GGUF files of Gemma 4 generators; drafters and mmproj files are not",
            )
        parts = metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise CheckpointError(
                f"{self.path.name}: one of {parts} parts", hint="join them with llama-gguf-split --merge FIRST OUT.gguf"
            )

    def _check_types(self) -> None:
        refused = [(name, tensor.type) for name, tensor in self.tensors.items() if tensor.type not in BLOCKS]
        if refused:
            name, kind = refused[0]
            raise CheckpointError(
                f"{self.path.name}: {len(refused)} tensors are of a type that is not read, first {name} in {kind}; "
                "Q4_0 and Q8_0 are copied, F32, F16, BF16 and Q6_K rounded anew",
                hint=INSTEAD,
            )

    def _match(self) -> None:
        unread, missing = set(self.tensors), list[str]()
        for name, spec in self.specs.items():
            stored_name = gguf_name(name)
            if stored_name not in unread and name.endswith("experts.gate_up_proj"):
                # llama.cpp reads gate and up apart, too.
                parts = [stored_name.replace("gate_up", part) for part in ("gate", "up")]
                if all(part in unread for part in parts):
                    self._segments[name] = self._gate_and_up(spec, parts)
                    unread.difference_update(parts)
                    continue
            if stored_name not in unread:
                missing.append(f"{stored_name} {list(spec.shape)}")
                continue
            unread.remove(stored_name)
            self._check_shape(stored_name, spec.shape)
            self._segments[name] = [_Segment(self.tensors[stored_name], stored_name, 0, spec.row_shape[0])]
        if missing:
            raise CheckpointError(
                f"{self.path.name}: {len(missing)} decoder tensors are missing, first {missing[0]}",
                hint="the file is incomplete, or config.json belongs to another model",
            )
        for name, shape in redundant_tensors(self.config).items():
            if gguf_name(name) in unread:
                self._check_shape(gguf_name(name), shape)
                unread.remove(gguf_name(name))
        if _ROPE_FREQS in unread:
            self._check_rope_freqs()
            unread.remove(_ROPE_FREQS)
        if unread:
            name = min(unread)
            raise CheckpointError(
                f"{self.path.name}: {len(unread)} tensors are read by nobody, first {name} "
                f"{list(self.tensors[name].shape)}",
                hint="config.json describes less than the file holds, or another model",
            )

    def _check_shape(self, stored_name: str, shape: tuple[int, ...]) -> None:
        check_shape(stored_name, shape, self.tensors[stored_name].shape)

    def _gate_and_up(self, spec: TensorSpec, parts: list[str]) -> list[_Segment]:
        """Gate and up of one expert after the other, as the fused weight has them."""
        num_experts, num_rows, columns = spec.shape
        half = num_rows // 2
        for part in parts:
            self._check_shape(part, (num_experts, half, columns))
        return [
            _Segment(self.tensors[part], part, expert * half, half) for expert in range(num_experts) for part in parts
        ]

    def _check_rope_freqs(self) -> None:
        rope = self.config.rope("full_attention")
        assert rope is not None  # the last layer is always global
        tensor = self.tensors[_ROPE_FREQS]
        if tensor.shape != (rope.head_dim // 2,) or tensor.type != "F32":
            raise CheckpointError(
                f"{_ROPE_FREQS}: expected F32 {[rope.head_dim // 2]}, found {tensor.type} {list(tensor.shape)}",
                hint="config.json belongs to another model",
            )
        factors = np.empty(tensor.shape, np.float32)
        self._files.read(self.path, tensor.start, factors, _ROPE_FREQS)
        turning = np.arange(len(factors)) < rope.num_frequencies
        if not ((factors[turning] == 1).all() and (factors[~turning] >= 1e20).all()):
            raise CheckpointError(
                f"{_ROPE_FREQS}: config.json turns {rope.num_frequencies} of {len(factors)} pairs, the file others",
                hint="config.json belongs to another model",
            )

    def slices(self, name: str, form: WeightFormat, max_bytes: int) -> Iterator[Array | QuantizedRows]:
        """All rows of a decoder weight in order: Q4_0 and Q8_0 as codes and scales, other types as values."""
        columns = self.specs[name].row_shape[1]
        step = max(1, max_bytes // (columns * 4))
        for segment in self._segments[name]:
            for start in range(0, segment.num_rows, step):
                yield self._read(segment, start, min(start + step, segment.num_rows))

    def _read(self, segment: _Segment, start: int, stop: int) -> Array | QuantizedRows:
        tensor = segment.tensor
        raw = np.empty((stop - start, tensor.row_bytes), np.uint8)
        offset = (segment.first_row + start) * tensor.row_bytes
        self._files.read(self.path, tensor.start + offset, raw, segment.stored_name)
        rows = decode_rows(raw, tensor.type)
        if isinstance(rows, QuantizedRows):
            check_scales(rows, segment.stored_name)
        return rows

    @property
    def weight_paths(self) -> list[Path]:
        return [self.path]

    def sources(self) -> dict[str, FileEntry]:
        """The GGUF file by its header and size, config.json whole."""
        with self.path.open("rb") as file:
            digest = hashlib.sha256(file.read(self._data_start)).hexdigest()
        entry = FileEntry(bytes=self.path.stat().st_size, sha256=digest)
        return {self.path.name: entry, "config.json": hash_file(self.folder / "config.json")}

    def write_tokenizer(self, folder: Path) -> None:
        """Copy the plain checkpoint's tokenizer files into ``folder``, which is made.

        Raises:
            ConfigError: one is missing, or does not fit the model.
        """
        copy_tokenizer(self.folder, folder, vocab_size=self.config.vocab_size)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> GGUFCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
