"""Quantised twins of the tiny checkpoints, made by the packages that define the formats, with their dequantised values.

Each maker writes two folders: the quantised checkpoint, and a float32 one of the values that it stands for, which the
oracle reads. The values come from the same package, never from our reader.
"""

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import tiny
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

_scratch = tempfile.TemporaryDirectory(prefix="gemma4-quantized-")

# What Google's w4a16 checkpoints leave in bfloat16 (shared/data/hub_configs/quantization.json).
IGNORED = ("lm_head", "re:.*vision_tower.*", "re:.*embed_tokens.*", "re:.*per_layer.*")
_QUANTIZED = re.compile(r".*\.(self_attn|mlp|experts)\..*_proj.*")


@dataclass(frozen=True)
class Quantized:
    """Two folders, and what the packed weights of the first hold, under the names of the plain checkpoint."""

    folder: Path
    plain: Path
    codes: Mapping[str, np.ndarray]
    """Signed, [N, K] or [X, N, K] int8."""
    scales: Mapping[str, np.ndarray]
    """[N, K // 32] or [X, N, K // 32] float32."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _copy_without_weights(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


def scheme(**weights: object) -> QuantizationScheme:
    """w4a16, or what ``weights`` change about it."""
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))


def quantization_config(group: QuantizationScheme, **values: object) -> dict[str, object]:
    """The block of config.json as the package writes it."""
    config = QuantizationConfig(
        config_groups={"group_0": group},
        format="pack-quantized",
        ignore=list(IGNORED),
        quantization_status="compressed",
        **values,
    )
    return json.loads(config.model_dump_json())


def write_json(path: Path, edit: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text("utf-8"))
    edit(values)
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def compressed_tensors(structure: str, *, scale_dtype: str = "bfloat16", fused: bool = False) -> Quantized:
    """A w4a16 checkpoint: attention, MLPs and experts in codes, everything else as it was.

    Args:
        scale_dtype: of the scales; "bfloat16" as the released files have it.
        fused: experts as one packed tensor per layer, as some repositories store them, else one by one.
    """
    return _compressed_tensors(structure, scale_dtype, fused)


@functools.cache
def _compressed_tensors(structure: str, scale_dtype: str, fused: bool) -> Quantized:
    source = tiny.checkpoint(structure, dtype="bfloat16", experts="fused" if fused else "per_expert")
    name = f"{structure}-{scale_dtype}-{fused}"
    folder = _copy_without_weights(source, Path(_scratch.name) / f"ct-{name}")
    plain = _copy_without_weights(source, Path(_scratch.name) / f"ct-{name}-plain")
    group, stored, values, codes, scales = scheme(), {}, {}, {}, {}
    for key, tensor in tensors_of(source).items():
        if not _QUANTIZED.fullmatch(key) or "language_model" not in key:
            stored[key] = tensor
            values[key] = tensor.float()
            continue
        # One scale short of the largest weight, so that code -8 occurs as well.
        blocks = tensor.float().unflatten(-1, (-1, 32))
        scale = (blocks.abs().amax(-1) / 7.5).to(getattr(torch, scale_dtype))
        parts = _compress(tensor, scale, group)
        # A module's parameter is NAME.weight; fused experts are parameters themselves, without ".weight".
        stored |= {key + part.removeprefix("weight"): packed for part, packed in parts.items()}
        values[key] = _decompress(parts, group)
        codes[key] = unpack_from_int32(parts["weight_packed"], 4, tensor.shape).numpy()
        scales[key] = scale.float().numpy()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", lambda config: config.update(quantization_config=quantization_config(group)))
    return Quantized(folder, plain, codes, scales)


def _compress(weight: torch.Tensor, scale: torch.Tensor, group: QuantizationScheme) -> dict[str, torch.Tensor]:
    if weight.ndim == 2:
        return PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, group)
    parts = [_compress(one, own, group) for one, own in zip(weight, scale, strict=True)]
    whole = {key: torch.stack([part[key] for part in parts]) for key in ("weight_packed", "weight_scale")}
    return whole | {"weight_shape": torch.tensor(weight.shape)}


def _decompress(parts: dict[str, torch.Tensor], group: QuantizationScheme) -> torch.Tensor:
    """Values in float32: in bfloat16, the package's default, code times scale is rounded."""
    if parts["weight_packed"].ndim == 3:
        shape = parts["weight_shape"][1:]
        each = zip(parts["weight_packed"], parts["weight_scale"], strict=True)
        return torch.stack(
            [_decompress({"weight_packed": p, "weight_scale": s, "weight_shape": shape}, group) for p, s in each]
        )
    wide = parts | {"weight_scale": parts["weight_scale"].float()}
    return PackedQuantizationCompressor.decompress(wide, group)["weight"]


# ---------------------------------------------------------------------------------------------------------------------
# GGUF

GGUF_NAME = "model.gguf"
Types = Callable[[str, torch.Tensor], Type]


def q4_0_types(name: str, tensor: torch.Tensor) -> Type:
    """As a Q4_0 file of llama.cpp: matrices in Q4_0, tables in Q8_0, vectors and the router in F32."""
    if tensor.ndim == 1 or "router" in name:
        return Type.F32
    return Type.Q8_0 if "embed_tokens" in name else Type.Q4_0


def q8_0_types(name: str, tensor: torch.Tensor) -> Type:
    return Type.F32 if tensor.ndim == 1 or "router" in name else Type.Q8_0


def quantized(values: np.ndarray, kind: Type) -> np.ndarray:
    """Bytes (or floats) of float32 values in a type; Q6_K, which the package only reads, is drawn at random."""
    if kind == Type.Q6_K:
        rows, columns = values.shape
        blocks = np.random.default_rng(0).integers(0, 256, (rows, columns // 256, 210), np.uint8)
        # 6-bit codes to 32 and scales to 128: this block scale gives weights of the size of those replaced.
        blocks[:, :, 208:] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        return blocks.reshape(rows, -1)
    return gguf.quants.quantize(values, kind)


def write_gguf(
    tensors: Mapping[str, torch.Tensor], config: dict, path: Path, types: Types, *, architecture: str = "gemma4"
) -> dict[str, np.ndarray]:
    """Write a file as llama.cpp's converter does; returns the values that it stands for, by the name of each tensor."""
    text = config.get("text_config", config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, text["num_hidden_layers"])
    writer, values = gguf.GGUFWriter(path, architecture), {}
    writer.add_name("tiny")
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_token_list([f"token {index}" for index in range(5)])
    writer.add_token_scores([0.0] * 5)
    for name, tensor in tensors.items():
        kind = types(name, tensor)
        data = quantized(tensor.float().numpy(), kind)
        values[name] = gguf.quants.dequantize(data, kind).reshape(tensor.shape).astype(np.float32)
        writer.add_tensor(gguf_name(names, name), data, raw_dtype=kind)
    half, turning = text["global_head_dim"] // 2, int(text["global_head_dim"] * 0.25 / 2)
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * turning + [1e30] * (half - turning), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    """The converter's own steps (Gemma4Model.filter_tensors and modify_tensors), then the package's table."""
    name = name.replace("model.language_model.", "model.")
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if name.endswith("router.scale"):
        return gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.FFN_GATE_INP].format(bid=layer[1]) + ".scale"
    if name.endswith("per_expert_scale"):
        return gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.FFN_DOWN_EXP].format(bid=layer[1]) + ".scale"
    if name.endswith("layer_scalar") or (".experts." in name and not name.endswith(".weight")):
        name += ".weight"
    found = names.get_name(name, try_suffixes=(".weight",))
    assert found is not None, name
    return found


def gguf_checkpoint(structure: str, types: Types = q4_0_types) -> Quantized:
    """A folder with a GGUF file of the decoder and the plain checkpoint's other files."""
    return _gguf_checkpoint(structure, types)


@functools.cache
def _gguf_checkpoint(structure: str, types: Types) -> Quantized:
    source = tiny.checkpoint(structure)
    folder = _copy_without_weights(source, Path(_scratch.name) / f"gguf-{structure}-{types.__name__}")
    plain = _copy_without_weights(source, Path(_scratch.name) / f"gguf-{structure}-{types.__name__}-plain")
    config = json.loads((source / "config.json").read_text("utf-8"))
    tensors = tensors_of(source)
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith("model.language_model.")}
    values = write_gguf(decoder, config, folder / GGUF_NAME, types)
    codes, scales = {}, {}
    reader = gguf.GGUFReader(folder / GGUF_NAME)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, config["text_config"]["num_hidden_layers"])
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in decoder.items():
        stored = by_name[gguf_name(names, name)]
        if stored.tensor_type in (Type.Q4_0, Type.Q8_0):
            codes[name], scales[name] = _slow_codes(stored.data, stored.tensor_type, tuple(tensor.shape))
    whole = tensors | {name: torch.from_numpy(value) for name, value in values.items()}
    save_file(whole, plain / "model.safetensors", metadata={"format": "pt"})
    return Quantized(folder, plain, codes, scales)


def _slow_codes(data: np.ndarray, kind: Type, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of Q4_0 or Q8_0, block by block as ggml-common.h lays them out."""
    codes, scales = [], []
    for block in np.ascontiguousarray(data).reshape(-1, 18 if kind == Type.Q4_0 else 34):
        scales.append(block[:2].view(np.float16)[0])
        if kind == Type.Q4_0:
            codes += [int(byte & 15) - 8 for byte in block[2:]] + [int(byte >> 4) - 8 for byte in block[2:]]
        else:
            codes += block[2:].view(np.int8).tolist()
    per_row = (*shape[:-1], shape[-1] // 32)
    return np.array(codes, np.int8).reshape(shape), np.array(scales, np.float32).reshape(per_row)
