"""Quantised artifacts against transformers: weights on the recipe's grid lose nothing, so that parity means something.

A random network cannot judge int4: rounding alone scrambles it. So each matrix of a tiny checkpoint is moved to values
that its role's format holds exactly (codes times a power of two, the largest code in every block). The artifact must
then equal float32 transformers on the same checkpoint, and what int8 activations do to it is measured, not hidden.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import small
import tiny
import torch
from oracle import Oracle, find_prompt
from safetensors.torch import load_file, save_file
from tiny import STRUCTURES

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.evidence import ORACLE_FILE
from gemma4_export.configs.formats import BFLOAT16, FLOAT32, INT8, WeightFormat
from gemma4_export.configs.manifest import CensusEntry
from gemma4_export.configs.names import (
    EMBED_TOKENS,
    EMBED_TOKENS_PER_LAYER,
    RECIPE_ROLES,
    TensorSpec,
    decoder_tensors,
)
from gemma4_export.configs.recipe import Recipe, load_recipe
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.exporter.quantize import dequantize, quantize
from gemma4_export.runtime import Gemma4

BOUND = 1e-3  # logits: float32 sums in another order, through up to nine layers
LENGTH = 40  # three sliding buffers of 4 - 1 + 7 slots and more
every_structure = pytest.mark.parametrize("structure", STRUCTURES)

INT4 = WeightFormat("int4", 32)

_scratch = tempfile.TemporaryDirectory(prefix="gemma4-grid-")
MIXED = Recipe(  # the head is stored apart from the token table, and bfloat16 holds the values of an int8 grid
    name="mixed",
    title="",
    formats=dict.fromkeys(RECIPE_ROLES, INT8)
    | {"decoder.attention": INT4, "embeddings.tokens": BFLOAT16, "embeddings.per_layer": FLOAT32},
    prefers_qat=False,
)


def recipe_called(name: str) -> Recipe:
    return MIXED if name == "mixed" else load_recipe(name)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints on a grid


def on_grid(values: np.ndarray, form: WeightFormat) -> np.ndarray:
    """Float32 ``values`` [n, K] moved to ones that ``form`` holds exactly, near where they were."""
    if form.kind == "float32":
        return values
    if form.kind == "bfloat16":
        return torch.tensor(values).bfloat16().float().numpy()
    if form.kind == "fp8":
        return dequantize(quantize(values, form, "grid"))  # scales are powers of two: what is rounded once stays
    limit = 7 if form.kind == "int4" else 127
    blocks = values.reshape(len(values), -1, form.block or values.shape[1]).astype(np.float64)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    scales = 2.0 ** np.round(np.log2(np.maximum(largest, 1e-6) / limit))
    codes = np.clip(np.rint(blocks / scales), -limit, limit)
    place = np.abs(blocks).argmax(axis=2)[..., None]
    sign = np.where(np.take_along_axis(blocks, place, axis=2) < 0, -1, 1)
    np.put_along_axis(codes, place, sign * limit, axis=2)  # else the exporter finds a finer scale than this one
    return (codes * scales).reshape(values.shape).astype(np.float32)


@functools.cache
def grid_checkpoint(structure: str, recipe_name: str) -> Path:
    """``tiny.checkpoint`` with every decoder matrix on the grid of its role's format. Tied tables take the head's."""
    recipe, source = recipe_called(recipe_name), tiny.checkpoint(structure)
    folder = Path(_scratch.name) / f"{structure}-{recipe_name}"
    shutil.copytree(source, folder)
    with Checkpoint(source) as opened:
        specs = opened.specs
    stored = load_file(folder / "model.safetensors")
    moved = 0
    for name, tensor in stored.items():
        spec = specs.get(name.removeprefix("model.language_model."))
        if spec is None or spec.role == "decoder.norm":
            continue
        rows = on_grid(tensor.float().numpy().reshape(spec.row_shape), recipe.format_of(spec.role))
        if spec.name == EMBED_TOKENS:
            rows = on_grid(rows, recipe.format_of("decoder.head"))
        stored[name] = torch.from_numpy(rows.reshape(spec.shape)).to(tensor.dtype).contiguous()
        moved += 1
    assert moved == sum(spec.role != "decoder.norm" for spec in specs.values())
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@functools.cache
def grid_artifact(structure: str, recipe_name: str, activations: str) -> Path:
    return built(grid_checkpoint(structure, recipe_name), recipe_called(recipe_name), activations=activations)


def built(checkpoint: Path, recipe: Recipe, **options: object) -> Path:
    out = Path(tempfile.mkdtemp(dir=_scratch.name)) / "artifact"
    with Checkpoint(checkpoint) as opened:
        small.build_artifact(opened, out, recipe=recipe, **options)
    return out


@functools.cache
def expected(structure: str, recipe_name: str) -> tuple[list[int], np.ndarray]:
    """A prompt without close routing decisions, and its logits by transformers."""
    reference = Oracle(grid_checkpoint(structure, recipe_name))
    ids = find_prompt(reference, length=LENGTH)
    return ids, reference.logits(ids)


def decoded(model: Gemma4, ids: list[int]) -> np.ndarray:
    """Logits of all ids: a prefill of 25 in chunks of seven, then one step per id."""
    cache = model.new_cache()
    steps = [model.forward(ids[:25], cache=cache)]
    return np.concatenate(steps + [model.forward([token], cache=cache) for token in ids[25:]])


# ---------------------------------------------------------------------------------------------------------------------
# Parity and drift


_WIDEST = ("e2b", "26b-a4b")


def _cases() -> list[object]:
    """int4 on all structures; of the other recipes the two structures with most kinds of weights, the rest is full."""
    return [
        pytest.param(structure, recipe, marks=() if recipe == "int4" or structure in _WIDEST else pytest.mark.full)
        for structure in STRUCTURES
        for recipe in ("int4", "int4-quality", "int8", "int8-blocks", "mixed")
    ]


@pytest.mark.parametrize(("structure", "recipe"), _cases())
def test_lossless_weights_and_float32_activations_equal_transformers(structure, recipe):
    ids, logits = expected(structure, recipe)
    model = Gemma4.load(grid_artifact(structure, recipe, "fp32"), check="full")
    difference = np.abs(decoded(model, ids) - logits).max()
    print(f"{structure} {recipe}: {difference:.1e} of logits up to {np.abs(logits).max():.1f}")
    assert difference <= BOUND
    assert np.abs(model.forward(ids) - logits).max() <= BOUND
    census = model.artifact.manifest.census
    assert {role: entry.relative_error for role, entry in census.items()} == dict.fromkeys(census, 0.0)
    assert ("decoder.head" in census) == (recipe == "mixed")


@every_structure
def test_the_drift_of_int8_activations_is_real_and_bounded(structure):
    ids, logits = expected(structure, "int4")
    artifact = grid_artifact(structure, "int4", "int8")
    assert Artifact.open(artifact).manifest.activations == "int8"
    drift = np.abs(decoded(Gemma4.load(artifact), ids) - logits)
    print(f"{structure}: int8 activations move logits by {drift.max():.3f} at most, {drift.mean():.4f} on average")
    assert np.isfinite(drift).all()
    assert drift.max() > 2 * BOUND  # else the option does nothing
    assert drift.mean() < 0.25 * np.abs(logits).mean()


def test_one_block_at_half_its_size_is_seen(tmp_path):
    """The bound is tight enough: 32 of the 3072 weights of one of 18 MLP matrices."""
    ids, logits = expected("12b", "int4")
    folder = shutil.copytree(grid_checkpoint("12b", "int4"), tmp_path / "checkpoint")
    stored = load_file(folder / "model.safetensors")
    stored["model.language_model.layers.3.mlp.up_proj.weight"][5] *= 0.5
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    wrong = built(folder, load_recipe("int4"), activations="fp32")
    assert np.abs(Gemma4.load(wrong).forward(ids) - logits).max() > 2 * BOUND


# ---------------------------------------------------------------------------------------------------------------------
# Every recipe on weights as they come


@functools.cache
def plain_artifact(structure: str, recipe: str) -> Path:
    return built(tiny.checkpoint(structure), recipe_called(recipe))


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "int8", "int8-blocks", "int4-quality", "int4", "mixed"])
@every_structure
def test_every_recipe_builds_loads_and_generates(structure, recipe):
    model = Gemma4.load(plain_artifact(structure, recipe), check="full")
    assert model.artifact.manifest.recipe == recipe
    ids = expected(structure, "int4")[0]
    produced = model.generate_ids(ids, max_new_tokens=6, temperature=0)
    assert 1 <= len(produced) <= 6
    logits = model.forward(ids)
    assert np.isfinite(logits).all()
    # Four bits scramble random weights: of them only the grid above can judge.
    if recipe in {"bf16", "int8", "int8-blocks"}:
        plain = Gemma4.load(plain_artifact(structure, "fp32")).forward(ids)
        assert 0 < np.abs(logits - plain).mean() < 0.35 * np.abs(plain).mean()


def rounding(values: np.ndarray, form: WeightFormat) -> np.ndarray:
    """Float64 reference of what a format makes of [n, K] weights, element for element from the definition."""
    if form.kind == "float32":
        return values.astype(np.float64)
    if form.kind == "bfloat16":
        return torch.from_numpy(values).bfloat16().double().numpy()
    limit, scale_type = (7, np.float16) if form.kind == "int4" else (127, np.float32)
    blocks = values.reshape(len(values), -1, form.block or values.shape[1])
    scales = (np.abs(blocks).max(axis=2, keepdims=True) / np.float32(limit)).astype(scale_type).astype(np.float64)
    return (np.clip(np.rint(blocks / scales), -limit, limit) * scales).reshape(values.shape)


def bytes_of(spec: TensorSpec, form: WeightFormat, *, is_table: bool) -> int:
    """Codes and scales: float32 scales for MatMulNBits, one per block; tables keep the canonical ones."""
    (n, columns), weights = spec.row_shape, spec.num_elements
    if form.kind == "int4":
        return weights // 2 + weights // form.block * (2 if is_table else 4)
    if form.kind == "int8":
        block = form.block or (columns if is_table else math.gcd(columns, 256))
        return weights + n * (columns // block) * 4
    return weights * (2 if form.kind == "bfloat16" else 4)


@pytest.mark.parametrize("recipe", ["bf16", "int8", "int8-blocks", "int4", "int4-quality", "mixed"])
@every_structure
def test_the_census_counts_every_weight_and_its_error(structure, recipe):
    chosen = recipe_called(recipe)
    census = Artifact.open(plain_artifact(structure, recipe)).manifest.census
    with Checkpoint(tiny.checkpoint(structure)) as opened:
        specs = decoder_tensors(opened.config)
        values = {name: opened.rows(name, 0, spec.row_shape[0]) for name, spec in specs.items()}
    weights = [(spec.role, spec) for spec in specs.values()]
    has_own_head = chosen.format_of("decoder.head") != chosen.format_of("embeddings.tokens")
    if has_own_head:
        weights.append(("decoder.head", specs[EMBED_TOKENS]))
    wanted: dict[str, CensusEntry] = {}
    for role in {role for role, _ in weights}:
        members, form = [spec for found, spec in weights if found == role], chosen.format_of(role)
        lost = square = 0.0
        for spec in members:
            exact = values[spec.name].astype(np.float64)
            lost += ((rounding(values[spec.name], form) - exact) ** 2).sum()
            square += (exact**2).sum()
        parameters = sum(spec.num_elements for spec in members)
        is_table = role == "embeddings.per_layer" or (role == "embeddings.tokens" and has_own_head)
        wanted[role] = CensusEntry(
            format=str(form),
            tensors=len(members),
            parameters=parameters,
            bytes=sum(bytes_of(spec, form, is_table=is_table) for spec in members),
            relative_error=math.sqrt(lost / square),
            codes=parameters if form.is_quantized else 0,
            codes_kept=0,
        )
    assert set(census) == set(wanted)
    for role, entry in census.items():
        want = dataclasses.asdict(wanted[role])
        error = want.pop("relative_error")
        found = dataclasses.asdict(entry)
        # The exporter sums squares in float32, slice by slice.
        assert found.pop("relative_error") == pytest.approx(error, rel=1e-4), role
        assert found == want
    total = sum(entry.parameters for role, entry in census.items() if role != "decoder.head")
    assert total == sum(spec.num_elements for spec in specs.values())


def test_the_token_tables_of_an_artifact_are_the_rounded_rows():
    for recipe in ("int4", "int8", "int4-quality", "mixed"):
        model = Gemma4.load(plain_artifact("e2b", recipe))
        with Checkpoint(tiny.checkpoint("e2b")) as opened:
            ids = np.array([3, 0, 77, opened.config.vocab_size - 1])
            for name, table, width in (
                (EMBED_TOKENS, model.decoder._tokens, opened.config.hidden_size),
                (EMBED_TOKENS_PER_LAYER, model.decoder._per_layer, opened.config.hidden_size_per_layer_input),
            ):
                spec = opened.specs[name]
                rows = rounding(
                    opened.rows(name, 0, spec.row_shape[0])[ids], recipe_called(recipe).format_of(spec.role)
                )
                want = rows.astype(np.float32) * np.float32(math.sqrt(width))
                np.testing.assert_allclose(table.gather(ids), want, rtol=1e-6, atol=0)


def test_per_expert_storage_gives_the_same_artifact():
    split = built(tiny.checkpoint("26b-a4b", experts="per_expert"), load_recipe("int4"))
    fused = plain_artifact("26b-a4b", "int4")
    names_the_source = ("manifest.json", ORACLE_FILE)
    one, other = small.files_of(fused), small.files_of(split)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name] and name not in names_the_source] == []
    recorded, again = load_file(fused / ORACLE_FILE), load_file(split / ORACLE_FILE)
    assert recorded.keys() == again.keys()
    assert [name for name in recorded if not torch.equal(recorded[name], again[name])] == []
