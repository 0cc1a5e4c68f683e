"""Quantised checkpoints keep their codes and scales on the way into an artifact, or are refused by name."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import quantized
import tiny
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import find_prompt, oracle
from safetensors.torch import save_file

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError, CheckpointError, ConfigError, Gemma4Error
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import CensusEntry, Manifest
from gemma4_export.configs.names import EMBED_TOKENS, decoder_tensors, expert_tensor
from gemma4_export.configs.recipe import Recipe, load_recipe
from gemma4_export.configs.target import load_target
from gemma4_export.exporter.build import build_artifact, census, resolve_options
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.exporter.compressed_tensors import CompressedTensorsCheckpoint
from gemma4_export.exporter.gguf_checkpoint import GGUFCheckpoint, gguf_name
from gemma4_export.exporter.gguf_file import BLOCKS, TYPE_NAMES, decode_rows, read_gguf_header
from gemma4_export.exporter.quantize import QuantizedRows, check_scales, dequantize, pack_int4, unpack_int4
from gemma4_export.exporter.source import open_source
from gemma4_export.exporter.weights import PlacedWeight, place_weights
from gemma4_export.exporter.write import write_weights
from gemma4_export.runtime.gemma4 import Gemma4
from gemma4_export.runtime.tables import EmbeddingTable

PREFIX = "model.language_model."
BOUND = 1e-3  # logits; activations and scales are float32 on both sides, so only the order of sums differs


def recipe(**changes: str) -> Recipe:
    """float32 but for the roles named, with a dot spelt ``_``."""
    formats = dict(load_recipe("fp32").formats)
    formats |= {role.replace("_", ".", 1): WeightFormat.parse(text) for role, text in changes.items()}
    return Recipe(name="test", title="test", formats=MappingProxyType(formats), prefers_qat=False)


def build(folder: Path, chosen: Recipe, out: Path) -> Manifest:
    with open_source(folder) as source:
        options = resolve_options(
            source.config,
            model_name="tiny",
            target=load_target("cpu"),
            recipe=chosen,
            activations="fp32",
            context=256,
            chunk=16,
        )
        return build_artifact(source, options, out, lambda *_: None)


def write_only(folder: Path, chosen: Recipe, out: Path) -> dict[str, CensusEntry]:
    """The weights of an artifact without its graph, which takes most of a build's time here; returns the census."""
    with open_source(folder) as source:
        placement = place_weights(source.specs.values(), chosen, wide_scales=source.wide_scales)
        out.mkdir()
        return census(placement, write_weights(source, placement, out, key="", on_bytes=lambda *_: None))


def placed_weights(folder: Path, chosen: Recipe) -> dict[str, PlacedWeight]:
    with open_source(folder) as source:
        return place_weights(source.specs.values(), chosen, wide_scales=source.wide_scales).weights


def stored_codes(artifact: Path, placed: PlacedWeight) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes [..., N, K] and float32 scales [..., N, K // block] as they lie in an artifact's file."""
    content = (artifact / placed.file).read_bytes()
    raw = np.frombuffer(content, np.uint8, placed.code_bytes, placed.offset)
    if placed.format.kind == "int4":
        codes = np.stack([raw & 15, raw >> 4], axis=1).astype(np.int8) - 8
    else:
        codes = (raw.astype(np.int16) - 128).astype(np.int8)
    assert placed.scales is not None
    rows, per_row = placed.row_shape[0], placed.scales.per_row
    scales = np.frombuffer(content, placed.scales.dtype, rows * per_row, placed.scales.offset)
    return codes.reshape(placed.shape), scales.reshape(*placed.shape[:-1], per_row).astype(np.float32)


def stored_values(artifact: Path, placed: PlacedWeight) -> np.ndarray:
    """A weight stored as float32."""
    content = (artifact / placed.file).read_bytes()
    return np.frombuffer(content, np.float32, placed.code_bytes // 4, placed.offset).reshape(placed.shape)


def refused(folder: Path, kind: type[Gemma4Error]) -> Gemma4Error:
    with pytest.raises(kind) as caught, open_source(folder):
        pass
    assert "\n" not in caught.value.cause
    assert caught.value.hint
    return caught.value


def check_logits(artifact: Path, plain: Path) -> None:
    reference = oracle(plain)
    ids = find_prompt(reference, length=24)
    logits = Gemma4.load(artifact).forward(ids)
    assert np.abs(logits - reference.logits(ids)).max() < BOUND


# ---------------------------------------------------------------------------------------------------------------------
# compressed-tensors

CT_RECIPE = recipe(decoder_attention="int4/32", decoder_mlp="int4/32", decoder_experts="int4/32")


@pytest.mark.parametrize(
    ("structure", "options", "runs"),
    [
        ("e2b", {}, True),
        ("31b", {"scale_dtype": "float16"}, True),
        ("26b-a4b", {}, True),
        ("26b-a4b", {"fused": True}, False),  # the bytes of the one before
    ],
)
def test_compressed_tensors_codes_and_scales_reach_the_artifact_unchanged(
    structure: str, options: dict[str, Any], runs: bool, tmp_path: Path
) -> None:
    made = quantized.compressed_tensors(structure, **options)
    roles = made_roles(made, CT_RECIPE, tmp_path / "out", runs=runs)
    placed = placed_weights(made.folder, CT_RECIPE)
    num_codes = 0
    for name, codes in made.codes.items():
        short = name.removeprefix(PREFIX)
        for weight, expected, expected_scales in split(short, codes, made.scales[name]):
            found, scales = stored_codes(tmp_path / "out", view(placed, weight))
            assert np.array_equal(found, expected), weight
            assert np.array_equal(scales.view(np.uint32), expected_scales.view(np.uint32)), weight
        num_codes += codes.size
    check_census(roles, num_codes)
    if runs:
        check_logits(tmp_path / "out", made.plain)


def made_roles(made: quantized.Quantized, chosen: Recipe, out: Path, *, runs: bool) -> dict[str, CensusEntry]:
    return build(made.folder, chosen, out).census if runs else write_only(made.folder, chosen, out)


def check_census(roles: dict[str, CensusEntry], num_codes: int) -> None:
    """0 of ``num_codes`` codes changed."""
    entries = [entry for entry in roles.values() if entry.codes]
    assert sum(entry.codes for entry in entries) == sum(entry.codes_kept for entry in entries) == num_codes > 0
    assert all(entry.relative_error == 0 for entry in entries)


def split(name: str, codes: np.ndarray, scales: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """One stored tensor as the parts that the artifact has a name for: an expert, or the whole."""
    if codes.ndim == 2:
        return [(name, codes, scales)]
    return [(expert_tensor(name, expert), codes[expert], scales[expert]) for expert in range(len(codes))]


def view(placed: dict[str, PlacedWeight], name: str) -> PlacedWeight:
    """Where a stored tensor lies; experts kept one by one are halves of our fused gate_up_proj, or its down_proj."""
    if name in placed:
        return placed[name]
    stem, part = name.removesuffix(".weight").rsplit(".", 1)
    if part == "down_proj":
        return placed[f"{stem}.down_proj"]
    whole = placed[f"{stem}.gate_up_proj"]
    assert whole.scales is not None
    half, second = whole.shape[0] // 2, part == "up_proj"
    scales = type(whole.scales)(
        offset=whole.scales.offset + second * whole.scale_bytes // 2,
        dtype=whole.scales.dtype,
        per_row=whole.scales.per_row,
    )
    offset = whole.offset + second * whole.code_bytes // 2
    return PlacedWeight(
        file=whole.file, offset=offset, format=whole.format, shape=(half, whole.shape[1]), scales=scales
    )


def edited(structure: str, folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], **options: object) -> Path:
    """A copy of a w4a16 checkpoint whose tensors ``edit`` has changed."""
    shutil.copytree(quantized.compressed_tensors(structure, **options).folder, folder)
    tensors = quantized.tensors_of(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_fused_experts_with_weight_in_their_names_are_the_same(tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            stem, part = name.rsplit("_", 1)
            tensors[f"{stem}.weight_{part}"] = tensors.pop(name)

    folder = edited("26b-a4b", tmp_path / "renamed", rename, fused=True)
    form = WeightFormat("int4", 32)
    with (
        CompressedTensorsCheckpoint(folder) as renamed,
        CompressedTensorsCheckpoint(quantized.compressed_tensors("26b-a4b", fused=True).folder) as usual,
    ):
        for name in ("layers.1.experts.gate_up_proj", "layers.4.experts.down_proj"):
            pairs = zip(renamed.slices(name, form, 1 << 12), usual.slices(name, form, 1 << 12), strict=True)
            for one, other in pairs:
                assert isinstance(one, QuantizedRows)
                assert isinstance(other, QuantizedRows)
                assert np.array_equal(one.codes, other.codes)


def test_codes_come_out_as_values_where_the_recipe_wants_those(tmp_path: Path) -> None:
    made = quantized.compressed_tensors("31b")
    roles = write_only(made.folder, recipe(decoder_mlp="int8"), tmp_path / "out")
    attention, mlp = roles["decoder.attention"], roles["decoder.mlp"]
    assert (attention.format, attention.codes, attention.relative_error) == ("float32", 0, 0)
    assert (mlp.format, mlp.codes_kept) == ("int8", 0)
    assert 0 < mlp.relative_error < 0.01
    placed = placed_weights(made.folder, recipe(decoder_mlp="int8"))["layers.0.self_attn.q_proj.weight"]
    expected = quantized.tensors_of(made.plain)[f"{PREFIX}layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(stored_values(tmp_path / "out", placed), expected.numpy())


def test_rows_of_a_packed_weight_are_its_values() -> None:
    made = quantized.compressed_tensors("e2b")
    expected = quantized.tensors_of(made.plain)[f"{PREFIX}layers.2.mlp.up_proj.weight"].numpy()
    with CompressedTensorsCheckpoint(made.folder) as checkpoint:
        assert np.array_equal(checkpoint.rows("layers.2.mlp.up_proj.weight", 3, 11), expected[3:11])


def test_packed_token_table_keeps_its_bfloat16_scales_in_float32(tmp_path: Path) -> None:
    """A table's scales are float16 elsewhere, which rounds most bfloat16 values below 6e-5."""
    generator = torch.Generator().manual_seed(5)
    scale_values = {}

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors.pop(f"{PREFIX}{EMBED_TOKENS}")
        shape = (table.shape[0], table.shape[1] // 32)
        scale = (torch.rand(shape, generator=generator) * 1e-5 + 1e-7).bfloat16()
        codes = torch.randint(-8, 8, table.shape, generator=generator, dtype=torch.int8)
        assert not torch.equal(scale.half().float(), scale.float())
        tensors[f"{PREFIX}{EMBED_TOKENS}_packed"] = pack_to_int32(codes, 4)
        tensors[f"{PREFIX}{EMBED_TOKENS}_scale"] = scale
        scale_values["codes"], scale_values["scale"] = codes.numpy(), scale.float().numpy()

    folder = edited("31b", tmp_path / "packed", pack)
    chosen = recipe(embeddings_tokens="int4/32", decoder_head="float32")
    manifest = build(folder, chosen, tmp_path / "out")
    entry = manifest.census["embeddings.tokens"]
    assert entry.codes == entry.codes_kept > 0
    assert manifest.embed_tokens.scales is not None
    assert manifest.embed_tokens.scales.dtype == "float32"
    codes, scales = stored_codes(tmp_path / "out", placed_weights(folder, chosen)[EMBED_TOKENS])
    assert np.array_equal(codes, scale_values["codes"])
    assert np.array_equal(scales, scale_values["scale"])
    table = EmbeddingTable(Artifact.open(tmp_path / "out"), manifest.embed_tokens)
    ids = np.arange(40, dtype=np.int64)
    exact = (codes.reshape(len(codes), -1, 32) * scales[:, :, None]).reshape(len(codes), -1)[:40]
    assert np.array_equal(table.gather(ids), exact * np.float32(manifest.embed_tokens.scale))


@pytest.mark.parametrize("is_tied", [True, False])
def test_second_copy_of_the_tied_head_is_accepted(is_tied: bool, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[f"{PREFIX}{EMBED_TOKENS}"].clone()

    folder = edited("31b", tmp_path / "head", add)
    quantized.write_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=is_tied))
    with open_source(folder) as source:
        assert "lm_head.weight" not in source.specs


def test_head_of_its_own_is_refused(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors[f"{PREFIX}{EMBED_TOKENS}"].clone()
        head[-1, -1] += 1
        tensors["lm_head.weight"] = head

    error = refused(edited("31b", tmp_path / "head", add), CheckpointError)
    assert error.cause.startswith(f"lm_head.weight: differs from {PREFIX}{EMBED_TOKENS}")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"group_size": 128}, "config_groups.group_0.weights.group_size: 128, this version copies 32 only"),
        ({"num_bits": 8}, "config_groups.group_0.weights.num_bits: 8, this version copies 4 only"),
        ({"symmetric": False}, "config_groups.group_0.weights.symmetric: False, this version copies True only"),
        (
            {"strategy": "channel", "group_size": None},
            "config_groups.group_0.weights.strategy: 'channel', this version copies 'group' only",
        ),
    ],
)
def test_other_schemes_of_compressed_tensors_are_named(change: dict[str, Any], cause: str, tmp_path: Path) -> None:
    block = quantized.quantization_config(quantized.scheme(**change))
    error = refused(with_quantization(tmp_path / "other", block), ConfigError)
    assert error.cause == f"config.json: quantization_config: {cause}"
    assert "w4a16" in str(error.hint)
    assert "int4-rtn" in str(error.hint)


def with_quantization(folder: Path, block: object) -> Path:
    shutil.copytree(quantized.compressed_tensors("31b").folder, folder)
    quantized.write_json(folder / "config.json", lambda config: config.update(quantization_config=block))
    return folder


def test_other_methods_are_named(tmp_path: Path, shared_data: Path) -> None:
    released = json.loads((shared_data / "hub_configs" / "quantization.json").read_text("utf-8"))
    expected = {
        "nvidia/Gemma-4-31B-IT-NVFP4@4135a98a": "quant_method modelopt (NVFP4)",
        "bg-digitalservices/Gemma-4-26B-A4B-it-NVFP4A16@main": "quant_method modelopt (NVFP4)",
        "google/gemma-4-E2B-it-qat-mobile-transformers": "quant_method gemma",
    }
    for index, (name, cause) in enumerate(expected.items()):
        block = released[name]["quantization_config"]
        error = refused(with_quantization(tmp_path / str(index), block), ConfigError)
        assert error.cause == (f"config.json: quantization_config: {cause}: this version reads compressed-tensors only")


def block_with(**changes: object) -> dict[str, Any]:
    """quantization_config of a w4a16 checkpoint with other values on top."""
    return quantized.quantization_config(quantized.scheme()) | changes


def group_with(**changes: object) -> dict[str, Any]:
    """The same with other values in its one group."""
    block = block_with()
    return block | {"config_groups": {"a": block["config_groups"]["group_0"] | changes}}


# The package refuses to make these, older versions of it did not.
_BY_ACTIVATION = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "actorder": "group",
}


@pytest.mark.parametrize(
    ("block", "cause"),
    [
        ("gptq", "expected an object, found 'gptq'"),
        (block_with(format="nvfp4-pack-quantized"), "config_groups.group_0: format 'nvfp4-pack-quantized'"),
        (block_with(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: a quantised KV cache"),
        (block_with(transform_config={"config_groups": {"a": 1}}), "transform_config: rotated weights"),
        (block_with(sparsity_config={"format": "dense"}), "sparsity_config: sparse weights"),
        (block_with(config_groups={}), "config_groups: expected an object, found {}"),
        (block_with(config_groups={"a": 3}), "config_groups.a: expected an object, found 3"),
        (block_with(config_groups={"a": {}}), "config_groups.a.weights: expected an object, found None"),
        (
            group_with(input_activations={"num_bits": 8}),
            "config_groups.a.input_activations: activations are quantised",
        ),
        (group_with(weights=_BY_ACTIVATION), "config_groups.a.weights.actorder: 'group', its columns are permuted"),
    ],
)
def test_odd_quantization_config_is_refused(block: object, cause: str, tmp_path: Path) -> None:
    error = refused(with_quantization(tmp_path / "odd", block), ConfigError)
    assert error.cause.startswith(f"config.json: quantization_config: {cause}")


Q_PROJ = f"{PREFIX}layers.0.self_attn.q_proj.weight"


def _set(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__setitem__(name, make(tensors[name]).contiguous())


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda tensors: tensors.pop(f"{Q_PROJ}_scale"), f"{Q_PROJ}_packed: has no {Q_PROJ}_scale"),
        (
            lambda tensors: tensors.__setitem__(f"{Q_PROJ}_zero_point", torch.zeros(2, 2)),
            f"{Q_PROJ}_zero_point: this version reads symmetric weights only",
        ),
        (
            lambda tensors: tensors.__setitem__(Q_PROJ, torch.zeros(128, 96)),
            f"{Q_PROJ}: stored as codes and as values",
        ),
        (_set(f"{Q_PROJ}_packed", lambda t: t.to(torch.int64)), f"{Q_PROJ}_packed: expected I32 codes, found I64"),
        (_set(f"{Q_PROJ}_scale", lambda t: t.to(torch.float64)), f"{Q_PROJ}_packed: expected scales in F16, BF16 or"),
        (
            _set(f"{Q_PROJ}_scale", lambda t: t[:, :1]),
            f"{Q_PROJ}_packed: 96 columns in groups of 32 need scales [128, 3], found [128, 1]",
        ),
        (_set(f"{Q_PROJ}_shape", lambda t: t.flip(0)), f"{Q_PROJ}_shape: expected shape [128, 96]"),
        (_set(f"{Q_PROJ}_shape", lambda t: t.float()), f"{Q_PROJ}_shape: expected 2 integers, found F32 [2]"),
        (
            lambda tensors: [tensors.pop(f"{Q_PROJ}_{part}") for part in ("packed", "scale", "shape")],
            "broken: 1 decoder tensors are missing, first layers.0.self_attn.q_proj.weight [128, 96]",
        ),
        (
            lambda tensors: tensors.pop(f"{Q_PROJ}_packed"),
            "broken: 1 decoder tensors are missing, first layers.0.self_attn.q_proj.weight [128, 96]",
        ),
    ],
)
def test_packed_tensors_that_do_not_belong_together_are_named(
    edit: Callable[[dict[str, torch.Tensor]], object], cause: str, tmp_path: Path
) -> None:
    error = refused(edited("31b", tmp_path / "broken", edit), CheckpointError)
    assert error.cause.startswith(cause)


@pytest.mark.parametrize(
    ("value", "cause", "make"),
    [
        (0.0, "1 of 384 scales are 0 where the codes are not", build),
        (float("nan"), "scales: 1 values are NaN or Inf", write_only),
    ],
)
def test_scales_that_cannot_be_are_named(
    value: float, cause: str, make: Callable[[Path, Recipe, Path], object], tmp_path: Path
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}_scale"][5, 1] = value

    folder = edited("31b", tmp_path / "broken", damage)
    with pytest.raises(CheckpointError) as caught:
        make(folder, CT_RECIPE, tmp_path / "out")
    assert cause in caught.value.cause
    assert Q_PROJ in caught.value.cause
    if make is write_only:
        return
    # A build leaves nothing that looks like an artifact.
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtifactError):
        Artifact.open(tmp_path / "out.partial")


def test_block_of_zeros_may_have_a_zero_scale() -> None:
    codes = np.zeros((2, 64), np.int8)
    codes[1, 40] = 3
    scales = np.array([[0, 1], [0, 1]], np.float16)
    check_scales(QuantizedRows(WeightFormat("int4", 32), pack_int4(codes), scales), "w")
    scales[1, 1] = 0
    with pytest.raises(CheckpointError, match="1 of 4 scales"):
        check_scales(QuantizedRows(WeightFormat("int4", 32), pack_int4(codes), scales), "w")


# ---------------------------------------------------------------------------------------------------------------------
# GGUF

Q4_RECIPE = recipe(
    decoder_attention="int4/32",
    decoder_mlp="int4/32",
    decoder_experts="int4/32",
    decoder_per_layer="int4/32",
    decoder_head="int8/32",
    embeddings_tokens="int8/32",
    embeddings_per_layer="int8/32",
)


def q8_recipe() -> Recipe:
    shipped = load_recipe("int8-blocks")
    formats = dict(shipped.formats) | {"decoder.router": WeightFormat("float32")}
    return Recipe(name="q8", title="q8", formats=MappingProxyType(formats), prefers_qat=False)


@pytest.mark.parametrize(
    ("structure", "types", "chosen", "runs"),
    [
        ("e4b", quantized.q4_0_types, Q4_RECIPE, True),
        ("12b", quantized.q4_0_types, Q4_RECIPE, True),
        ("26b-a4b", quantized.q4_0_types, Q4_RECIPE, True),
        ("e2b", quantized.q8_0_types, q8_recipe(), True),
        ("26b-a4b", quantized.q8_0_types, q8_recipe(), False),
    ],
)
def test_gguf_codes_and_scales_reach_the_artifact_unchanged(
    structure: str, types: quantized.Types, chosen: Recipe, runs: bool, tmp_path: Path
) -> None:
    made = quantized.gguf_checkpoint(structure, types)
    roles = made_roles(made, chosen, tmp_path / "out", runs=runs)
    placed = placed_weights(made.folder, chosen)
    for name, codes in made.codes.items():
        found, scales = stored_codes(tmp_path / "out", placed[name.removeprefix(PREFIX)])
        assert np.array_equal(found, codes), name
        assert np.array_equal(scales.view(np.uint32), made.scales[name].view(np.uint32)), name
    check_census(roles, sum(codes.size for codes in made.codes.values()))
    if runs:
        check_logits(tmp_path / "out", made.plain)


def other_types(name: str, tensor: torch.Tensor) -> Type:
    """One of each type that is rounded anew, and Q8_0 where the recipe wants int4."""
    if tensor.ndim == 1:
        return Type.F32
    if "embed_tokens_per_layer" in name:
        return Type.Q6_K
    if "mlp" in name:
        return Type.BF16
    return Type.F16 if "embed_tokens" in name else Type.Q8_0


def test_other_types_are_rounded_by_the_recipe_and_counted(tmp_path: Path) -> None:
    made = quantized.gguf_checkpoint("e4b", other_types)
    roles = write_only(made.folder, load_recipe("int4"), tmp_path / "int4")
    for role in ("decoder.attention", "decoder.mlp", "embeddings.tokens", "embeddings.per_layer"):
        entry = roles[role]
        assert (entry.format, entry.codes_kept) == ("int4/32", 0)
        assert entry.codes > 0
        assert 0.01 < entry.relative_error < 0.2
    write_only(made.folder, load_recipe("fp32"), tmp_path / "fp32")
    plain = quantized.tensors_of(made.plain)
    placed = placed_weights(made.folder, load_recipe("fp32"))
    for name in decoder_tensors(Checkpoint(made.plain).config):
        assert np.array_equal(stored_values(tmp_path / "fp32", placed[name]), plain[PREFIX + name].numpy()), name


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from(["Q4_0", "Q8_0", "Q6_K"]), st.integers(0, 2**32 - 1))
def test_decoded_blocks_equal_the_gguf_package_bit_for_bit(rows: int, blocks: int, kind: str, seed: int) -> None:
    """Any bytes are a block; only the float16 scale is kept finite."""
    weights, size = BLOCKS[kind]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, blocks, size), np.uint8)
    scales = generator.normal(size=(rows, blocks, 1)).astype(np.float16).view(np.uint8)
    raw[:, :, -2:] = raw[:, :, -2:] if kind != "Q6_K" else scales
    raw[:, :, :2] = raw[:, :, :2] if kind == "Q6_K" else scales
    expected = gguf.quants.dequantize(raw.reshape(rows, -1), Type[kind])
    decoded = decode_rows(raw.reshape(rows, -1), kind)
    values = dequantize(decoded) if isinstance(decoded, QuantizedRows) else decoded
    assert values.shape == (rows, blocks * weights)
    assert np.array_equal(values.view(np.uint32), expected.view(np.uint32))


def test_canonical_nibbles_are_neighbours() -> None:
    codes = np.arange(-8, 8, dtype=np.int8).repeat(2)[None]
    block = np.concatenate([np.frombuffer(np.float16(1).tobytes(), np.uint8), gguf_nibbles(codes[0])])
    decoded = decode_rows(block[None], "Q4_0")
    assert isinstance(decoded, QuantizedRows)
    assert np.array_equal(unpack_int4(decoded.codes), codes)


def gguf_nibbles(codes: np.ndarray) -> np.ndarray:
    unsigned = (codes + 8).astype(np.uint8)
    return unsigned[:16] | unsigned[16:] << 4


def test_names_and_types_are_those_of_the_gguf_package() -> None:
    assert {int(kind): kind.name for kind in Type} == TYPE_NAMES
    for kind, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[Type[kind]] == block
    for structure in tiny.STRUCTURES:
        with Checkpoint(tiny.checkpoint(structure)) as checkpoint:
            names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, checkpoint.config.num_layers)
            for name in decoder_tensors(checkpoint.config):
                assert gguf_name(name) == quantized.gguf_name(names, f"model.{name}")


def test_header_holds_what_the_gguf_package_reads() -> None:
    path = quantized.gguf_checkpoint("e4b").folder / quantized.GGUF_NAME
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert header.metadata["general.architecture"] == "gemma4"
    assert header.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert (found.type, found.start) == (tensor.tensor_type.name, tensor.data_offset)
        assert found.shape == tuple(int(size) for size in reversed(tensor.shape))


def test_gate_and_up_stored_apart_are_joined_expert_by_expert(tmp_path: Path) -> None:
    source = tiny.checkpoint("26b-a4b")
    folder = shutil.copytree(source, tmp_path / "apart", ignore=shutil.ignore_patterns("*.safetensors"))
    whole = quantized.gguf_checkpoint("26b-a4b")
    rewrite(whole.folder / quantized.GGUF_NAME, folder / quantized.GGUF_NAME, _apart)
    name = "layers.2.experts.gate_up_proj"
    with GGUFCheckpoint(folder / quantized.GGUF_NAME) as checkpoint:
        parts = list(checkpoint.slices(name, WeightFormat("int4", 32), 1 << 30))
        assert len(parts) == 32  # gate and up of 16 experts
        codes = np.concatenate([unpack_int4(part.codes) for part in parts if isinstance(part, QuantizedRows)])
    assert np.array_equal(codes, whole.codes[PREFIX + name].reshape(codes.shape))


def _apart(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
    if "gate_up" not in name:
        return {name: data}
    half = data.shape[1] // 2
    return {name.replace("gate_up", "gate"): data[:, :half], name.replace("gate_up", "up"): data[:, half:]}


def rewrite(
    source: Path, path: Path, edit: Callable[[str, np.ndarray], dict[str, np.ndarray]], **values: object
) -> None:
    """A GGUF file with its tensors edited, written by the package; ``values``: architecture, and an extra count."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, str(values.get("architecture", "gemma4")))
    if "split" in values:
        writer.add_uint16("split.count", int(str(values["split"])))
    for tensor in reader.tensors:
        for name, data in edit(tensor.name, tensor.data).items():
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copied(folder: Path, structure: str = "12b") -> Path:
    return Path(shutil.copytree(quantized.gguf_checkpoint(structure).folder, folder))


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0"])
def test_type_that_is_not_imported_is_named(kind: str, tmp_path: Path) -> None:
    def types(name: str, tensor: torch.Tensor) -> Type:
        return Type[kind] if "mlp.up_proj" in name else quantized.q4_0_types(name, tensor)

    source = tiny.checkpoint("12b")
    folder = shutil.copytree(source, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text("utf-8"))
    tensors = {name: t for name, t in quantized.tensors_of(source).items() if name.startswith(PREFIX)}
    quantized.write_gguf(tensors, config, folder / quantized.GGUF_NAME, types)
    error = refused(folder, CheckpointError)
    assert error.cause.startswith(
        f"model.gguf: 6 tensors are of a type that is not read, first blk.0.ffn_up.weight in {kind}; Q4_0 and Q8_0"
    )
    assert error.hint == "use a Q4_0 or Q8_0 GGUF of the model, or its bf16 checkpoint with --recipe int4-rtn"


def _same(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
    return {name: data}


@pytest.mark.parametrize(
    ("edit", "values", "cause"),
    [
        (_same, {"architecture": "gemma3"}, "model.gguf: general.architecture is 'gemma3', expected 'gemma4'"),
        (_same, {"split": 3}, "model.gguf: one of 3 parts"),
        (
            lambda name, data: {} if name == "blk.2.attn_q.weight" else {name: data},
            {},
            "model.gguf: 1 decoder tensors are missing, first blk.2.attn_q.weight",
        ),
        (
            lambda name, data: {name: data} | ({"output.weight": data} if name == "token_embd.weight" else {}),
            {},
            "model.gguf: 1 tensors are read by nobody, first output.weight",
        ),
        (
            lambda name, data: {name: data[:16] if name == "blk.1.attn_k.weight" else data},
            {},
            "blk.1.attn_k.weight: expected shape [32, 32] (from config.json), found [16, 32]",
        ),
        (
            lambda name, data: {name: np.ones_like(data) if name == "rope_freqs.weight" else data},
            {},
            "rope_freqs.weight: config.json turns 4 of 16 pairs, the file others",
        ),
        (
            lambda name, data: {name: data[:8] if name == "rope_freqs.weight" else data},
            {},
            "rope_freqs.weight: expected F32 [16], found F32 [8]",
        ),
    ],
)
def test_gguf_of_another_model_is_named(
    edit: Callable[[str, np.ndarray], dict[str, np.ndarray]], values: dict[str, object], cause: str, tmp_path: Path
) -> None:
    folder = copied(tmp_path / "other")
    rewrite(quantized.gguf_checkpoint("12b").folder / quantized.GGUF_NAME, folder / quantized.GGUF_NAME, edit, **values)
    assert refused(folder, CheckpointError).cause.startswith(cause)


def test_redundant_kv_of_shared_layers_in_a_gguf_is_ignored(tmp_path: Path) -> None:
    source = tiny.checkpoint("e4b", redundant_shared_kv=True)
    folder = shutil.copytree(source, tmp_path / "redundant", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text("utf-8"))
    tensors = {name: t for name, t in quantized.tensors_of(source).items() if name.startswith(PREFIX)}
    quantized.write_gguf(tensors, config, folder / quantized.GGUF_NAME, quantized.q4_0_types)
    with open_source(folder) as opened:
        assert "layers.7.self_attn.k_proj.weight" not in opened.specs


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_truncated_gguf_does_not_open(share: float, tmp_path: Path) -> None:
    folder = copied(tmp_path / "broken")
    path = folder / quantized.GGUF_NAME
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert refused(folder, CheckpointError).cause.startswith("model.gguf: ")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4000), st.integers(1, 255))
def test_damaged_header_is_refused_or_read_but_never_a_crash(position: int, flip: int) -> None:
    path = quantized.gguf_checkpoint("12b").folder / quantized.GGUF_NAME
    content = bytearray(path.read_bytes())
    content[position] ^= flip
    broken = path.with_name("broken.bin")
    broken.write_bytes(content)
    # Any other exception is the failure that this test looks for.
    with contextlib.suppress(CheckpointError):
        read_gguf_header(broken)


def header(*, version: int = 3, alignment: int | None = None, names: Sequence[str] = ()) -> bytes:
    """A GGUF header of one-dimensional tensors of no known type; its metadata is the alignment, if there is one."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    values = b"" if alignment is None else text("general.alignment") + struct.pack("<II", 4, alignment)
    tensors = b"".join(text(name) + struct.pack("<IQIQ", 1, 32, 999, 0) for name in names)
    counts = struct.pack("<IQQ", version, len(names), alignment is not None)
    return b"GGUF" + counts + values + tensors


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (header(version=1), "model.gguf: GGUF version 1, this version reads 2 and 3"),
        (header(alignment=0), "model.gguf: general.alignment is 0"),
        (header(names=["a", "a"]), "model.gguf: a: listed twice"),
    ],
)
def test_header_that_cannot_be_is_named(content: bytes, cause: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_gguf_header(tmp_path / "model.gguf")
    assert caught.value.cause == cause
    assert caught.value.hint


@pytest.mark.parametrize(("kind", "cause"), [(99, "metadata value type 99"), (9, "metadata array of type 77")])
def test_metadata_of_no_known_type_is_refused(kind: int, cause: str, tmp_path: Path) -> None:
    value = struct.pack("<I", kind) + struct.pack("<IQ", 77, 1)  # read as an array of one item where kind is 9
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + value
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^model.gguf: .*{cause} at byte \d+"):
        read_gguf_header(tmp_path / "model.gguf")


def test_row_that_is_no_whole_number_of_blocks_is_refused(tmp_path: Path) -> None:
    tensor = struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 33, 2, 0)  # 33 columns of Q4_0
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor + bytes(256))
    with pytest.raises(CheckpointError, match=r"^model.gguf: .*a: 33 columns are no multiple of Q4_0's 32"):
        read_gguf_header(tmp_path / "model.gguf")


def test_tensor_of_too_many_dimensions_is_refused(tmp_path: Path) -> None:
    tensor = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 4_000_000)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor + bytes(256))
    with pytest.raises(CheckpointError, match=r"^model.gguf: .*a: 4000000 dimensions"):
        read_gguf_header(tmp_path / "model.gguf")


def test_name_in_a_damaged_file_cannot_steer_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(header(names=["\x1b[2J\nok", "\x1b[2J\nok"]))
    with pytest.raises(CheckpointError) as caught:
        read_gguf_header(tmp_path / "model.gguf")
    assert caught.value.cause == r"model.gguf: \x1b[2J\nok: listed twice"


def test_folder_without_config_says_where_to_get_it(tmp_path: Path) -> None:
    folder = copied(tmp_path / "bare")
    (folder / "config.json").unlink()
    error = refused(folder, ConfigError)
    assert error.cause == f"{folder}: model.gguf without a config.json"
    assert "tokenizer.json" in str(error.hint)


def test_config_of_a_quantised_checkpoint_beside_a_gguf_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "mixed")
    quantized.write_json(
        folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "x"})
    )
    assert "which is not that of model.gguf" in refused(folder, ConfigError).cause


def test_two_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "two")
    (folder / "model.safetensors").write_bytes(b"")
    assert "holds model.gguf and model.safetensors" in refused(folder, ConfigError).cause
    (folder / "model.safetensors").unlink()
    (folder / "other.gguf").write_bytes(b"")
    assert "holds model.gguf and other.gguf" in refused(folder, ConfigError).cause


def test_towers_beside_a_gguf_are_listed_and_the_file_itself_is_no_folder(tmp_path: Path) -> None:
    folder = copied(tmp_path / "towers")
    (folder / "mmproj-model.gguf").write_bytes(b"")
    with open_source(folder) as source:
        assert list(source.not_packed) == ["mmproj-model.gguf"]
    error = refused(folder / quantized.GGUF_NAME, ConfigError)
    assert error.hint == f"--checkpoint {folder}"


def test_each_folder_opens_as_what_it_is() -> None:
    for folder, kind in (
        (tiny.checkpoint("31b"), Checkpoint),
        (quantized.compressed_tensors("31b").folder, CompressedTensorsCheckpoint),
        (quantized.gguf_checkpoint("12b").folder, GGUFCheckpoint),
    ):
        with open_source(folder) as source:
            assert type(source) is kind


def test_bfloat16_scales_survive_float32() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    scales = bits.view(ml_dtypes.bfloat16)
    finite = scales[np.isfinite(scales.astype(np.float32))]
    assert np.array_equal(finite.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16), finite.view(np.uint16))
