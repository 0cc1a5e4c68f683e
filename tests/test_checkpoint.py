"""A checkpoint opens in every spelling and storage, reads only what is asked for, and names what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemma4_export.configs.errors import CheckpointError, ConfigError, Gemma4Error
from gemma4_export.configs.formats import FLOAT32
from gemma4_export.configs.names import decoder_tensors, redundant_tensors
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.exporter.checkpoint import Checkpoint, read_header
from gemma4_export.exporter.weights import place_weights
from gemma4_export.exporter.write import write_weights

Tensors = dict[str, torch.Tensor]
PREFIX = "model.language_model."
NUMPY = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def stored_tensors(folder: Path) -> Tensors:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def edited(source: Path, folder: Path, edit: Callable[[Tensors], Any]) -> Path:
    """A copy of a checkpoint of one file whose tensors ``edit`` has changed in place."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a safetensors file, its data left as it is."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def refused(folder: Path, kind: type[Gemma4Error] = CheckpointError) -> Gemma4Error:
    """The error with which ``folder`` does not open."""
    with pytest.raises(kind) as caught:
        Checkpoint(folder)
    assert "\n" not in caught.value.cause
    assert caught.value.hint
    return caught.value


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


# ---------------------------------------------------------------------------------------------------------------------
# What is read


STORAGES: list[tuple[str, dict[str, Any]]] = [
    *((structure, {}) for structure in tiny.STRUCTURES),
    *((structure, {"text_only": True, "spelling": "resaved"}) for structure in ("e2b", "12b", "26b-a4b")),
    ("31b", {"spelling": "resaved", "dtype": "bfloat16"}),
    ("e4b", {"shards": 3, "redundant_shared_kv": True}),
    ("26b-a4b", {"shards": 2, "experts": "per_expert"}),
]
MEDIA = ("vision_tower", "vision_embedder", "audio_tower", "embed_vision", "embed_audio")


@pytest.mark.parametrize(("structure", "storage"), STORAGES)
def test_every_decoder_tensor_is_read_as_stored(structure: str, storage: dict[str, Any]) -> None:
    folder = tiny.checkpoint(structure, **storage)
    prefix = "model." if storage.get("text_only") else PREFIX
    tensors = stored_tensors(folder)
    fused = stored_tensors(tiny.checkpoint(structure)) if "experts" in storage else tensors
    with Checkpoint(folder) as checkpoint:
        assert list(checkpoint.specs) == list(decoder_tensors(checkpoint.config))
        for name, spec in checkpoint.specs.items():
            expected = as_numpy(fused[prefix + name])
            assert expected.shape == spec.shape
            found = checkpoint.rows(name, 0, spec.row_shape[0])
            assert found.dtype == expected.dtype == NUMPY[storage.get("dtype", "float32")]
            assert np.array_equal(found, expected.reshape(spec.row_shape)), name
        media = sorted(name for name in tensors if name.split(".")[1] in MEDIA)
        assert checkpoint.not_packed == media
        assert bool(media) != bool(storage.get("text_only"))


def test_both_spellings_of_12b_s_vision_embedder_are_known(tmp_path: Path) -> None:
    def save_again(tensors: Tensors) -> None:
        projection = "model.embed_vision.embedding_projection.weight"
        tensors[projection.replace("embedding_", "multimodal_embedder.embedding_")] = tensors.pop(projection)
        for name in [name for name in tensors if name.startswith("model.vision_embedder.")]:
            tensors[name.replace("vision_embedder", "embed_vision")] = tensors.pop(name)

    folder = edited(tiny.checkpoint("12b"), tmp_path / "again", save_again)
    with Checkpoint(folder) as again, Checkpoint(tiny.checkpoint("12b")) as released:
        assert len(again.not_packed) == len(released.not_packed) == 11
        assert again.not_packed != released.not_packed


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_float_dtypes_are_read_and_converted_once(dtype: str, tmp_path: Path) -> None:
    def convert(tensors: Tensors) -> None:
        tensors |= {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}

    folder = edited(tiny.checkpoint("31b", text_only=True), tmp_path / "source", convert)
    tensors = stored_tensors(folder)
    with Checkpoint(folder) as checkpoint:
        name = "layers.2.mlp.up_proj.weight"
        rows = checkpoint.rows(name, 3, 9)
        assert rows.dtype == NUMPY[dtype]
        assert np.array_equal(rows, tensors[f"model.{name}"][3:9].numpy())
        for recipe in ("fp32", "bf16"):
            placed = place_weights(checkpoint.specs.values(), load_recipe(recipe))
            out = tmp_path / recipe
            out.mkdir()
            write_weights(checkpoint, placed, out, key="", on_bytes=lambda name, count: None)
            for name in checkpoint.specs:
                weight = placed.weights[name]
                kind, count = weight.format.kind, int(np.prod(weight.shape))
                written = np.fromfile(out / weight.file, NUMPY[kind], count, offset=weight.offset)
                expected = tensors[f"model.{name}"].to(getattr(torch, kind))
                assert np.array_equal(written, as_numpy(expected).ravel()), name


@pytest.fixture(scope="module")
def per_expert() -> Iterator[Checkpoint]:
    with Checkpoint(tiny.checkpoint("26b-a4b", experts="per_expert")) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def fused() -> Tensors:
    return stored_tensors(tiny.checkpoint("26b-a4b"))


READ = ("embed_tokens.weight", "norm.weight", "layers.1.experts.gate_up_proj", "layers.1.experts.down_proj")


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_rows_equal_those_of_the_whole(data: st.DataObject, per_expert: Checkpoint, fused: Tensors) -> None:
    name = data.draw(st.sampled_from(READ))
    num_rows, columns = per_expert.specs[name].row_shape
    start = data.draw(st.integers(0, num_rows - 1))
    stop = data.draw(st.integers(start + 1, num_rows))
    whole = fused[PREFIX + name].numpy().reshape(num_rows, columns)
    assert np.array_equal(per_expert.rows(name, start, stop), whole[start:stop])


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(READ), max_bytes=st.integers(1, 200_000))
def test_slices_make_up_the_whole_in_order(name: str, max_bytes: int, per_expert: Checkpoint, fused: Tensors) -> None:
    num_rows, columns = per_expert.specs[name].row_shape
    slices = list(per_expert.slices(name, FLOAT32, max_bytes))
    assert all(len(rows) == 1 or rows.nbytes <= max_bytes for rows in slices)
    assert np.array_equal(np.concatenate(slices), fused[PREFIX + name].numpy().reshape(num_rows, columns))


def test_rows_reads_no_byte_more_than_asked(per_expert: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    name, counts, preadv = "layers.1.experts.gate_up_proj", [], os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    columns = per_expert.specs[name].row_shape[1]
    per_expert.rows(name, 30, 34)  # gate rows 30, 31 and up rows 0, 1 of expert 0: two stored tensors
    assert counts == [2 * columns * 4] * 2
    counts.clear()
    per_expert.rows("embed_tokens.weight", 7, 8)
    assert counts == [per_expert.config.hidden_size * 4]


def test_short_reads_are_continued(per_expert: Checkpoint, fused: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def at_most_100_bytes(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:100]], offset)

    monkeypatch.setattr(os, "preadv", at_most_100_bytes)
    rows = per_expert.rows("embed_tokens.weight", 3, 9)
    assert np.array_equal(rows, fused[f"{PREFIX}embed_tokens.weight"][3:9].numpy())


def test_opening_reads_headers_only_and_closing_frees_the_files() -> None:
    def open_weights() -> list[str]:
        links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.exists()]
        return [link for link in links if link.endswith(".safetensors")]

    before = open_weights()
    with Checkpoint(tiny.checkpoint("e2b")) as checkpoint:
        assert open_weights() == before
        checkpoint.rows("norm.weight", 0, 1)
        assert len(open_weights()) == len(before) + 1
    assert open_weights() == before


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that are missing, misshapen, or read by nobody


def test_missing_tensors_are_counted_and_the_first_named(tmp_path: Path) -> None:
    def remove(tensors: Tensors) -> None:
        for layer in (2, 4):
            del tensors[f"{PREFIX}layers.{layer}.mlp.up_proj.weight"]

    error = refused(edited(tiny.checkpoint("31b"), tmp_path / "broken", remove))
    assert error.cause == "broken: 2 decoder tensors are missing, first layers.2.mlp.up_proj.weight [128, 96]"


def test_missing_expert_is_named(tmp_path: Path) -> None:
    def remove(tensors: Tensors) -> None:
        del tensors[f"{PREFIX}layers.3.experts.11.up_proj.weight"]

    error = refused(edited(tiny.checkpoint("26b-a4b", experts="per_expert"), tmp_path / "broken", remove))
    assert error.cause == "broken: 1 decoder tensors are missing, first layers.3.experts.11.up_proj.weight [32, 64]"


@pytest.mark.parametrize(
    ("structure", "storage", "name", "shape", "expected"),
    [
        ("31b", {}, "embed_tokens.weight", (7, 96), (tiny.vocab_size(), 96)),
        ("31b", {}, "layers.2.self_attn.k_proj.weight", (64, 48), (64, 96)),
        ("31b", {}, "layers.0.layer_scalar", (2,), (1,)),
        ("31b", {}, "layers.0.layer_scalar", (), (1,)),
        ("26b-a4b", {}, "layers.0.experts.down_proj", (16, 32, 64), (16, 64, 32)),
        ("26b-a4b", {"experts": "per_expert"}, "layers.0.experts.5.gate_proj.weight", (64, 64), (32, 64)),
        ("e2b", {"redundant_shared_kv": True}, "layers.7.self_attn.k_proj.weight", (32, 32), (16, 32)),
    ],
)
def test_misshapen_tensor_is_named_with_both_shapes(
    structure: str,
    storage: dict[str, Any],
    name: str,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    tmp_path: Path,
) -> None:
    def reshape(tensors: Tensors) -> None:
        assert tensors[PREFIX + name].shape == expected
        tensors[PREFIX + name] = torch.zeros(shape)

    error = refused(edited(tiny.checkpoint(structure, **storage), tmp_path / "broken", reshape))
    assert error.cause == (f"{PREFIX}{name}: expected shape {list(expected)} (from config.json), found {list(shape)}")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.language_model.layers.0.self_attn.q_proj.lora_B.weight",
        "model.language_model.layers.6.input_layernorm.weight",
        "model.language_model.layers.5.self_attn.v_proj.weight",  # a global layer of 31B has none
        "model.layers.0.input_layernorm.weight",  # the text-only spelling beside the multimodal one
        "norm.weight",  # no prefix at all: must not stand in for the real one
        "model.visual.blocks.0.weight",
    ],
)
def test_tensor_that_nobody_reads_is_named(name: str, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[name] = torch.zeros(3, 5)

    error = refused(edited(tiny.checkpoint("31b"), tmp_path / "broken", add))
    assert error.cause == f"broken: 1 tensors are read by nobody, first {name} [3, 5]"
    assert error.hint is not None
    assert "adapters" in error.hint


def test_fused_and_per_expert_storage_at_once_is_refused(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{PREFIX}layers.0.experts.0.gate_proj.weight"] = torch.zeros(32, 64)

    error = refused(edited(tiny.checkpoint("26b-a4b"), tmp_path / "broken", add))
    assert "read by nobody, first model.language_model.layers.0.experts.0.gate_proj.weight [32, 64]" in error.cause


def test_config_of_fewer_layers_leaves_tensors_unread(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.checkpoint("31b"), tmp_path / "broken")
    text = json.loads((folder / "config.json").read_text("utf-8"))["text_config"]
    text |= {"num_hidden_layers": 3, "layer_types": text["layer_types"][:3]}
    edit_config(folder, text_config=text)
    assert "tensors are read by nobody, first model.language_model.layers.3." in refused(folder).cause


def test_redundant_kv_of_shared_layers_is_neither_read_nor_required() -> None:
    for structure in ("e2b", "e4b"):
        with Checkpoint(tiny.checkpoint(structure, redundant_shared_kv=True)) as checkpoint:
            redundant = redundant_tensors(checkpoint.config)
            assert redundant
            assert {PREFIX + name for name in redundant} <= checkpoint.stored.keys()
            assert not redundant.keys() & checkpoint.specs.keys()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "bool", "float8_e4m3fn"])
def test_dtype_of_a_quantised_checkpoint_is_refused(dtype: str, tmp_path: Path) -> None:
    name = f"{PREFIX}layers.0.mlp.gate_proj.weight"

    def quantise(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(getattr(torch, dtype))

    error = refused(edited(tiny.checkpoint("31b"), tmp_path / "broken", quantise))
    spelt = {"int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3"}
    assert error.cause == f"{name}: dtype {spelt[dtype]} is not one of F64, F32, F16, BF16"


# ---------------------------------------------------------------------------------------------------------------------
# Files that are damaged


@pytest.mark.parametrize("part", ["nothing", "length", "half a header", "header", "half the data", "all but a byte"])
def test_truncated_file_does_not_open(part: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.checkpoint("31b"), tmp_path / "broken")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    size = {
        "nothing": 0,
        "length": 8,
        "half a header": header // 2,
        "header": header,
        "half the data": (header + len(content)) // 2,
        "all but a byte": len(content) - 1,
    }[part]
    path.write_bytes(content[:size])
    error = refused(folder)
    assert error.cause.startswith("model.safetensors: ")
    assert str(size) in error.cause
    assert error.hint == "the download is incomplete or damaged; fetch this file again"


def test_file_truncated_after_opening_is_noticed_by_the_read(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.checkpoint("31b"), tmp_path / "broken")
    with Checkpoint(folder) as checkpoint:
        last = max(checkpoint.specs, key=lambda name: checkpoint.stored[PREFIX + name].start)
        stored = checkpoint.stored[PREFIX + last]
        os.truncate(stored.path, stored.start + 3)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.rows(last, 0, checkpoint.specs[last].row_shape[0])
    assert caught.value.cause == (f"model.safetensors: {PREFIX}{last}: ended {stored.num_bytes - 3} bytes early")


def safetensors_bytes(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: object, end: object, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED: dict[str, tuple[bytes, str]] = {
    "length beyond the file": (struct.pack("<Q", 1000) + b"{}", "its header claims 1000 bytes, the file has 10"),
    "length of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", f"its header claims {1 << 63} bytes, the file has 10"),
    "no JSON": (safetensors_bytes(b"{'a': 1}", b""), "its header of 8 bytes is not JSON ("),
    "no UTF-8": (safetensors_bytes(b'{"\xff": 1}', b""), "its header of 8 bytes is not JSON ("),
    "nested without end": (safetensors_bytes(b"[" * 200_000, b""), "its header of 200000 bytes is not JSON ("),
    "a list": (safetensors_bytes([], b""), "its header is no JSON object"),
    "entry without dtype": (safetensors_bytes({"a": {}}, b""), "a: its header entry is malformed (KeyError('dtype'))"),
    "entry is a number": (safetensors_bytes({"a": 3}, b""), "a: its header entry is malformed (TypeError("),
    "shape is a string": (safetensors_bytes({"a": entry(0, 8, "x")}, bytes(8)), "a: its header entry is malformed ("),
    "shape is fractional": (
        safetensors_bytes({"a": entry(0, 8, [2.5])}, bytes(8)),
        "a: its header entry is malformed (",
    ),
    "shape is negative": (
        safetensors_bytes({"a": entry(0, 8, [-1, -2])}, bytes(8)),
        "a: its header entry is malformed (",
    ),
    "offsets are fractional": (
        safetensors_bytes({"a": entry(0, 8.5)}, bytes(9)),
        "a: its header entry is malformed (",
    ),
    "three offsets": (
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
        "a: its header entry is malformed (",
    ),
    "too few bytes": (safetensors_bytes({"a": entry(0, 4)}, bytes(4)), "a: F32 [2] needs 8 bytes, has 4"),
    "ends before it begins": (safetensors_bytes({"a": entry(8, 0)}, bytes(8)), "a: F32 [2] needs 8 bytes, has -8"),
    "begins before the data": (safetensors_bytes({"a": entry(-8, 0)}, bytes(8)), "a: its header entry is malformed ("),
    "ends after the file": (
        safetensors_bytes({"a": entry(0, 8)}, bytes(7)),
        "its tensors end at byte 77, the file has 76",
    ),
    "begins inside the data": (safetensors_bytes({"a": entry(8, 16)}, bytes(16)), "a: begins at byte 78, expected 70"),
    "two tensors overlap": (
        safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "b: begins at byte",
    ),
    "a hole between tensors": (
        safetensors_bytes({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
        "b: begins at byte",
    ),
    "bytes after the last tensor": (
        safetensors_bytes({"a": entry(0, 8)}, bytes(11)),
        "its tensors end at byte 77, the file has 80",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_header_is_described(kind: str, tmp_path: Path) -> None:
    content, cause = DAMAGED[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.cause.startswith(f"model.safetensors: {cause}")
    assert "\n" not in caught.value.cause


def test_sound_headers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(8, 12, [], "F32"),
        "a": entry(0, 8),
        "c": entry(12, 12, [0, 3]),
    }
    path.write_bytes(safetensors_bytes(header, bytes(12)))
    tensors = read_header(path)
    start = path.stat().st_size - 12
    assert {name: (tensor.start - start, tensor.num_bytes, tensor.shape) for name, tensor in tensors.items()} == {
        "a": (0, 8, (2,)),
        "b": (8, 4, ()),
        "c": (12, 0, (0, 3)),
    }


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_flipped_header_bytes_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header = {"layers.0.a": entry(0, 8), "layers.0.b": entry(8, 20, [3, 1])}
    content = bytearray(safetensors_bytes(header, bytes(20)))
    flips = st.tuples(st.integers(0, len(content) - 21), st.integers(1, 255))
    for place, bits in data.draw(st.lists(flips, min_size=1, max_size=3)):
        content[place] ^= bits
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert sum(tensor.num_bytes for tensor in tensors.values()) <= 20
    assert all(tensor.start + tensor.num_bytes <= len(content) for tensor in tensors.values())


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are incomplete


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return shutil.copytree(tiny.checkpoint("e4b", shards=3), tmp_path / "sharded")


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text("utf-8"))
    edit(index)
    path.write_text(json.dumps(index), encoding="utf-8")


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    error = refused(sharded)
    assert error.cause == (
        "model.safetensors.index.json: 1 of 3 files it names are missing, first model-00002-of-00003.safetensors"
    )
    assert error.hint == "the download is incomplete; fetch the missing files"


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "a/b.safetensors", ""]
)
def test_index_that_names_a_file_elsewhere_is_refused(name: str, sharded: Path) -> None:
    (sharded / "a").mkdir()
    for target in (sharded / "a" / "b.safetensors", sharded.parent / "other.safetensors"):
        shutil.copy(sharded / "model-00001-of-00003.safetensors", target)
    edit_index(sharded, lambda index: index["weight_map"].update({f"{PREFIX}norm.weight": name}))
    assert refused(sharded).cause == f"model.safetensors.index.json: {name!r} is not a file of this folder"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_index_without_a_weight_map_is_refused(content: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert refused(sharded).cause.startswith("model.safetensors.index.json: no weight_map (")


def test_tensor_stored_twice_is_named_with_both_files(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    name = sorted(load_file(first))[0]
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    error = refused(sharded)
    assert error.cause == f"{name}: stored twice, in {first.name} and {second.name}"


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.checkpoint("31b"), tmp_path / "broken")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(folder)
    assert error.cause == f"{folder}: neither model.safetensors nor model.safetensors.index.json"
    assert error.hint is not None
    assert ".bin" in error.hint


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, ConfigError).cause == f"{tmp_path}: no config.json in it"
    missing = tmp_path / "missing"
    assert refused(missing, ConfigError).cause == f"{missing}: no such folder"


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "not JSON ("),
        (b"{", "not JSON ("),
        (b"\xff\xfe{}", "not JSON ("),
        (b"[" * 200_000, "not JSON ("),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_config_that_is_no_object_is_refused(content: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert refused(tmp_path, ConfigError).cause.startswith(f"{path}: {cause}")


def test_drafter_is_refused_before_its_weights_are_looked_at(tmp_path: Path) -> None:
    text = tiny.hub_config("31b", text_only=True)
    text |= {"num_kv_shared_layers": text["num_hidden_layers"]}
    config = {"model_type": "gemma4_assistant", "backbone_hidden_size": 96, "num_centroids": 8}
    config |= {"centroid_intermediate_top_k": 2, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    error = refused(tmp_path, ConfigError)
    assert error.cause == f"{tmp_path.name}: a drafter (assistant) has no KV of its own and cannot run alone"
    assert error.hint == "give the checkpoint of its target model to --checkpoint"


# ---------------------------------------------------------------------------------------------------------------------
# A tied head that is stored a second time


def with_head(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = change(tensors[f"{PREFIX}embed_tokens.weight"].clone())

    return edited(tiny.checkpoint("31b"), folder, add)


def test_a_head_equal_to_the_token_table_is_accepted_and_not_read_again(tmp_path: Path) -> None:
    with Checkpoint(with_head(tmp_path / "tied", lambda table: table)) as checkpoint:
        assert "lm_head.weight" not in checkpoint.specs


def one_bit(table: torch.Tensor) -> torch.Tensor:
    """The last value's lowest bit flipped."""
    table.view(torch.int32 if table.element_size() == 4 else torch.int16)[-1, -1] ^= 1
    return table


@pytest.mark.parametrize(
    "change", [one_bit, lambda table: table[:-1], lambda table: table.to(torch.float64)], ids=["bit", "shape", "dtype"]
)
def test_a_head_of_its_own_is_refused(change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    error = refused(with_head(tmp_path / "own", change))
    assert error.cause.startswith(f"lm_head.weight: differs from {PREFIX}embed_tokens.weight")
    assert "tied embeddings" in str(error.hint)
