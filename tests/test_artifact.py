"""An artifact is whole or not at all: its manifest is read strictly, damage is named, a killed build never loads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import artifacts
import pytest
import tiny
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_export.configs import artifact as artifact_module
from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError, CheckpointError, ConfigError, ContractError
from gemma4_export.configs.manifest import (
    FORMAT,
    LOCK_NAME,
    MANIFEST_NAME,
    CacheEntry,
    CensusEntry,
    CompiledEntry,
    EnginesEntry,
    FileEntry,
    GraphEntry,
    GroupEntry,
    KVLayout,
    Manifest,
    ModelEntry,
    RopeEntry,
    ScalesEntry,
    TableEntry,
    VerifyEntry,
    sealed,
)
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.exporter.package import partial_folder
from gemma4_export.runtime import Gemma4

WEIGHTS = "graphs/weights/decoder.bin"
TOKENS = "graphs/weights/embed_tokens.bin"


def small_artifact(**arguments: Any) -> Path:
    """The quickest one to build. Not to be written into."""
    return artifacts.artifact("31b", context=64, fresh_trace=False, **arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(small_artifact(), tmp_path / "artifact")


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text("utf-8"))
    del values["sha256"]
    edit(values)
    path.write_text(sealed(values), encoding="utf-8")


def list_again(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed on purpose."""
    content = (folder / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, lambda values: values["files"].update({name: entry}))


def refused(folder: Path, **arguments: Any) -> ArtifactError:
    """The error with which ``folder`` does not open."""
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(folder, **arguments)
    assert "\n" not in caught.value.cause
    assert caught.value.hint
    return caught.value


# ---------------------------------------------------------------------------------------------------------------------
# Manifest


def fixed_manifest() -> Manifest:
    return Manifest(
        format=FORMAT,
        model=ModelEntry(
            name="tiny",
            model_type="gemma4",
            vocab_size=10,
            hidden_size=4,
            num_layers=2,
            hidden_size_per_layer_input=3,
            max_position_embeddings=64,
            num_experts=0,
            top_k_experts=0,
            is_chat=True,
        ),
        target="cpu",
        recipe="bf16",
        has_dummy_weights=False,
        activations="int8",
        census={
            "decoder.mlp": CensusEntry(
                format="int4/32", tensors=6, parameters=64, bytes=48, relative_error=0.125, codes=64, codes_kept=32
            )
        },
        context=32,
        chunk=8,
        rope_sliding=RopeEntry(theta=10000.0, head_dim=4, num_frequencies=2),
        rope_global=RopeEntry(theta=1e6, head_dim=8, num_frequencies=1),
        kv=KVLayout(
            dtype="float32",
            sliding_window=5,
            sliding_slots=12,
            global_bucket=16,
            caches=[
                CacheEntry(layer=0, kind="sliding", num_kv_heads=2, head_dim=4, num_readers=2),
                CacheEntry(layer=1, kind="global", num_kv_heads=1, head_dim=8, num_readers=1),
            ],
        ),
        embed_tokens=TableEntry(
            file="w/é.bin",
            offset=240,
            format="bfloat16",
            has_signed_codes=False,
            scales=None,
            rows=10,
            columns=4,
            scale=2.0,
        ),
        embed_tokens_per_layer=TableEntry(
            file="w/é.bin",
            offset=0,
            format="int8",
            has_signed_codes=True,
            scales=ScalesEntry(offset=64, dtype="float32", per_row=1),
            rows=10,
            columns=6,
            scale=0.1,
        ),
        graphs={"decoder": GraphEntry(file="graphs/decoder.onnx", backend="ort-cpu", inputs=["x"], outputs=["logits"])},
        verify=VerifyEntry(
            oracle="oracle.safetensors",
            graphs={"head.0": GraphEntry(file="graphs/decoder.onnx", backend="ort-cpu", inputs=["h"], outputs=["l"])},
            load_peak_bytes=5,
        ),
        engines=EnginesEntry(
            backend="tensorrt",
            compute_capability="9.0",
            float_type="bfloat16",
            experts="plugin",
            phases={
                "decoder": [
                    GroupEntry(
                        file="graphs/decoder.onnx",
                        first=0,
                        last=2,
                        weight_bytes=9,
                        inputs=["x"],
                        outputs=["top_logits"],
                        profiles={"decode": {"x": [[1, 1], [1, 2], [1, 3]]}},
                        engine="engines/0123",
                    )
                ]
            },
            compiled=CompiledEntry(library_version="10.15.1", compute_capabilities=["9.0"]),
        ),
        not_packed=["model.vision_tower.a"],
        versions={"torch": "2.13.0"},
        sources={"config.json": FileEntry(bytes=7, sha256="c0ffee")},
        files={
            "engines/0123/engine.json": FileEntry(bytes=4, sha256="33"),
            "engines/0123/model.engine": FileEntry(bytes=6, sha256="44"),
            "graphs/decoder.onnx": FileEntry(bytes=3, sha256="00"),
            "oracle.safetensors": FileEntry(bytes=1, sha256="22"),
            "w/é.bin": FileEntry(bytes=320, sha256="11"),
        },
    )


GOLDEN = """\
{
 "activations": "int8",
 "census": {
  "decoder.mlp": {
   "bytes": 48,
   "codes": 64,
   "codes_kept": 32,
   "format": "int4/32",
   "parameters": 64,
   "relative_error": 0.125,
   "tensors": 6
  }
 },
 "chunk": 8,
 "context": 32,
 "embed_tokens": {
  "columns": 4,
  "file": "w/é.bin",
  "format": "bfloat16",
  "has_signed_codes": false,
  "offset": 240,
  "rows": 10,
  "scale": 2.0,
  "scales": null
 },
 "embed_tokens_per_layer": {
  "columns": 6,
  "file": "w/é.bin",
  "format": "int8",
  "has_signed_codes": true,
  "offset": 0,
  "rows": 10,
  "scale": 0.1,
  "scales": {
   "dtype": "float32",
   "offset": 64,
   "per_row": 1
  }
 },
 "engines": {
  "backend": "tensorrt",
  "compiled": {
   "compute_capabilities": [
    "9.0"
   ],
   "library_version": "10.15.1"
  },
  "compute_capability": "9.0",
  "experts": "plugin",
  "float_type": "bfloat16",
  "phases": {
   "decoder": [
    {
     "engine": "engines/0123",
     "file": "graphs/decoder.onnx",
     "first": 0,
     "inputs": [
      "x"
     ],
     "last": 2,
     "outputs": [
      "top_logits"
     ],
     "profiles": {
      "decode": {
       "x": [
        [
         1,
         1
        ],
        [
         1,
         2
        ],
        [
         1,
         3
        ]
       ]
      }
     },
     "weight_bytes": 9
    }
   ]
  }
 },
 "files": {
  "engines/0123/engine.json": {
   "bytes": 4,
   "sha256": "33"
  },
  "engines/0123/model.engine": {
   "bytes": 6,
   "sha256": "44"
  },
  "graphs/decoder.onnx": {
   "bytes": 3,
   "sha256": "00"
  },
  "oracle.safetensors": {
   "bytes": 1,
   "sha256": "22"
  },
  "w/é.bin": {
   "bytes": 320,
   "sha256": "11"
  }
 },
 "format": 3,
 "graphs": {
  "decoder": {
   "backend": "ort-cpu",
   "file": "graphs/decoder.onnx",
   "inputs": [
    "x"
   ],
   "outputs": [
    "logits"
   ]
  }
 },
 "has_dummy_weights": false,
 "kv": {
  "caches": [
   {
    "head_dim": 4,
    "kind": "sliding",
    "layer": 0,
    "num_kv_heads": 2,
    "num_readers": 2
   },
   {
    "head_dim": 8,
    "kind": "global",
    "layer": 1,
    "num_kv_heads": 1,
    "num_readers": 1
   }
  ],
  "dtype": "float32",
  "global_bucket": 16,
  "sliding_slots": 12,
  "sliding_window": 5
 },
 "model": {
  "hidden_size": 4,
  "hidden_size_per_layer_input": 3,
  "is_chat": true,
  "max_position_embeddings": 64,
  "model_type": "gemma4",
  "name": "tiny",
  "num_experts": 0,
  "num_layers": 2,
  "top_k_experts": 0,
  "vocab_size": 10
 },
 "not_packed": [
  "model.vision_tower.a"
 ],
 "recipe": "bf16",
 "rope_global": {
  "head_dim": 8,
  "num_frequencies": 1,
  "theta": 1000000.0
 },
 "rope_sliding": {
  "head_dim": 4,
  "num_frequencies": 2,
  "theta": 10000.0
 },
 "sha256": "a2223d15b47c596d182ff726567d598aff0a6cf57ce5b95dc5c88b75a79b26e0",
 "sources": {
  "config.json": {
   "bytes": 7,
   "sha256": "c0ffee"
  }
 },
 "target": "cpu",
 "verify": {
  "graphs": {
   "head.0": {
    "backend": "ort-cpu",
    "file": "graphs/decoder.onnx",
    "inputs": [
     "h"
    ],
    "outputs": [
     "l"
    ]
   }
  },
  "load_peak_bytes": 5,
  "oracle": "oracle.safetensors"
 },
 "versions": {
  "torch": "2.13.0"
 }
}
"""


def test_golden_manifest() -> None:
    assert fixed_manifest().to_json() == GOLDEN
    assert Manifest.from_json(GOLDEN) == fixed_manifest()


sizes, words = st.integers(1, 2**40), st.text(max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
files = st.builds(FileEntry, bytes=st.just(2**60), sha256=words)
thetas = st.floats(1e-300, allow_infinity=False)
ropes = st.builds(RopeEntry, theta=thetas, head_dim=sizes, num_frequencies=sizes)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that a reader accepts."""
    window, chunk, vocab_size, hidden_size = draw(st.none() | sizes), draw(sizes), draw(sizes), draw(sizes)
    model = draw(
        st.builds(
            ModelEntry,
            name=words,
            model_type=words,
            vocab_size=st.just(vocab_size),
            hidden_size=st.just(hidden_size),
            num_layers=st.integers(1, 99),
            hidden_size_per_layer_input=st.integers(0, 2),
            max_position_embeddings=st.just(2**60),
            num_experts=st.integers(0, 128),
            top_k_experts=st.integers(0, 8),
            is_chat=st.booleans(),
        )
    )
    paths = draw(st.lists(st.from_regex(r"[a-z]{1,3}(/[.a-z]?[a-z]{1,3}){0,2}", fullmatch=True), min_size=1))
    path = st.sampled_from(paths)
    plain, quantized = st.sampled_from(["float32", "bfloat16"]), st.sampled_from(["int8", "int8/64", "int4/32"])
    formats = plain | quantized
    dtypes = st.sampled_from(["float16", "float32"])
    scales = st.builds(ScalesEntry, offset=st.integers(0, 64), dtype=dtypes, per_row=st.integers(1, 9))

    def table(rows: st.SearchStrategy[int], columns: int) -> st.SearchStrategy[TableEntry]:
        shared = {
            "file": path,
            "offset": st.integers(0, 64),
            "rows": rows,
            "columns": st.just(columns),
            "scale": numbers,
        }
        with_scales = st.builds(TableEntry, format=quantized, scales=scales, **shared)
        return st.builds(TableEntry, format=plain, scales=st.none(), **shared) | with_scales

    census = st.builds(
        CensusEntry,
        format=formats,
        tensors=sizes,
        parameters=sizes,
        bytes=sizes,
        relative_error=numbers,
        codes=sizes,
        codes_kept=sizes,
    )
    tokens = table(st.just(vocab_size % 1000 + 1), hidden_size % 1000 + 1)
    model = dataclasses.replace(model, vocab_size=vocab_size % 1000 + 1, hidden_size=hidden_size % 1000 + 1)
    columns = model.num_layers * model.hidden_size_per_layer_input
    per_layer = table(st.integers(1001, 2000), columns)
    caches = st.builds(
        CacheEntry,
        layer=st.integers(0, 99),
        kind=st.sampled_from(["sliding", "global"]),
        num_kv_heads=sizes,
        head_dim=sizes,
        num_readers=sizes,
    )
    graph = st.builds(GraphEntry, file=path, backend=words, inputs=st.lists(words), outputs=st.lists(words))
    return Manifest(
        format=FORMAT,
        model=model,
        target=draw(words),
        recipe=draw(words),
        has_dummy_weights=draw(st.booleans()),
        activations=draw(st.sampled_from(["int8", "fp32"])),
        census=draw(st.dictionaries(words, census, max_size=2)),
        context=chunk + draw(st.integers(0, 99)),
        chunk=chunk,
        rope_sliding=draw(st.none() | ropes),
        rope_global=draw(ropes),
        kv=KVLayout(
            dtype="float32",
            sliding_window=window,
            sliding_slots=0 if window is None else window - 1 + chunk,
            global_bucket=draw(sizes),
            caches=draw(st.lists(caches, max_size=3)),
        ),
        embed_tokens=draw(tokens),
        embed_tokens_per_layer=draw(per_layer) if columns else None,
        graphs={"decoder": draw(graph)},
        verify=VerifyEntry(
            oracle=draw(path), graphs=draw(st.dictionaries(words, graph, max_size=2)), load_peak_bytes=draw(sizes)
        ),
        engines=None,
        not_packed=draw(st.lists(words, max_size=2)),
        versions=draw(st.dictionaries(words, words, max_size=2)),
        sources=draw(st.dictionaries(words, files, max_size=2)),
        files={path: draw(files) for path in paths},
    )


@settings(deadline=None, max_examples=80)
@given(manifests())
def test_manifests_survive_writing_and_reading(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text


@pytest.mark.parametrize("seed", range(8))
def test_a_changed_byte_in_the_manifest_is_noticed(seed: int, folder: Path) -> None:
    """Anywhere in the file: numbers that still fit together, names, even white space."""
    path, draw = folder / MANIFEST_NAME, random.Random(seed)
    whole = path.read_bytes()
    for place in draw.sample(range(len(whole)), 40):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(7)
        path.write_bytes(changed)
        with pytest.raises(ArtifactError):
            Artifact.open(folder)
    path.write_bytes(whole)
    Artifact.open(folder)


def test_an_artifact_has_a_decoder_or_engines() -> None:
    neither = dataclasses.replace(fixed_manifest(), graphs={}, engines=None)
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(neither.to_json())
    assert caught.value.cause == "manifest.json: graphs: no decoder"
    engines_only = dataclasses.replace(fixed_manifest(), graphs={})
    assert Manifest.from_json(engines_only.to_json()) == engines_only


def test_engines_are_all_compiled_and_listed_or_none_is() -> None:
    whole = fixed_manifest()
    assert whole.engines is not None
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(
            dataclasses.replace(whole, engines=dataclasses.replace(whole.engines, compiled=None)).to_json()
        )
    assert caught.value.cause == ("manifest.json: engines: every group has one, or none has and nothing was compiled")
    files = {name: entry for name, entry in whole.files.items() if name != "engines/0123/model.engine"}
    with pytest.raises(ArtifactError, match=r"engines/0123/model\.engine is used but not listed under files"):
        Manifest.from_json(dataclasses.replace(whole, files=files).to_json())


def test_a_changed_number_that_contradicts_nothing_is_told_from_damage() -> None:
    text = fixed_manifest().to_json()
    assert text.count('"theta": 10000.0') == 1
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(text.replace('"theta": 10000.0', '"theta": 10001.0'))
    assert re.fullmatch(
        r"manifest.json: changed since it was written; its sha256 says [0-9a-f]{12}…, now [0-9a-f]{12}…",
        caught.value.cause,
    )
    assert caught.value.hint is not None
    for other in (text.replace(" ", "  ", 1), text.replace('\n "sha256": ', '\n "sha255": '), text + "\n"):
        with pytest.raises(ArtifactError):
            Manifest.from_json(other)


def edited(path: str, value: object) -> str:
    """The golden manifest with one value replaced."""
    values = json.loads(GOLDEN)
    *parents, last = path.split(" ")
    at = values
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(last) if isinstance(at, list) else last] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("path", "value", "cause"),
    [
        ("chunk", "8", "manifest.json.chunk: expected int, found '8'"),
        ("chunk", 8.0, "manifest.json.chunk: expected int, found 8.0"),
        ("chunk", True, "manifest.json.chunk: expected int, found True"),
        ("chunk", -8, "manifest.json.chunk: expected int, found -8"),
        ("chunk", None, "manifest.json.chunk: expected int, found None"),
        ("target", 3, "manifest.json.target: expected str, found 3"),
        ("model is_chat", 1, "manifest.json.model.is_chat: expected bool, found 1"),
        ("rope_global theta", "1e6", "manifest.json.rope_global.theta: expected float, found '1e6'"),
        ("rope_global theta", float("nan"), "manifest.json.rope_global.theta: expected float, found nan"),
        ("rope_global", None, "manifest.json.rope_global: expected RopeEntry, found None"),
        ("kv caches", {}, "manifest.json.kv.caches: expected list, found {}"),
        ("kv caches 1 kind", "ring", "manifest.json.kv.caches[1].kind: expected Literal, found 'ring'"),
        ("files", [], "manifest.json.files: expected dict, found []"),
        ("motors", {}, "manifest.json: key 'motors' is unknown"),
        ("kv quantised", True, "manifest.json.kv: key 'quantised' is unknown"),
        ("kv caches 0", {"layer": 0}, "manifest.json.kv.caches[0]: key 'head_dim' is missing"),
        ("graphs decoder file", "x.onnx", "manifest.json: x.onnx is used but not listed under files"),
        ("verify oracle", "x.bin", "manifest.json: x.bin is used but not listed under files"),
        ("verify graphs head.0 file", "x.onnx", "manifest.json: x.onnx is used but not listed under files"),
        ("verify oracle", None, "manifest.json.verify.oracle: expected str, found None"),
        ("embed_tokens file", "x.bin", "manifest.json: x.bin is used but not listed under files"),
        ("embed_tokens_per_layer file", "x.bin", "manifest.json: x.bin is used but not listed under files"),
        ("embed_tokens rows", 11, "manifest.json: embed_tokens: ends at byte 328 of w/é.bin, which has 320"),
        ("embed_tokens rows", 9, "manifest.json: embed_tokens: 9 rows for 10 ids"),
        ("embed_tokens_per_layer rows", 9, "manifest.json: embed_tokens_per_layer: 9 rows for 10 ids"),
        ("embed_tokens offset", 241, "manifest.json: embed_tokens: ends at byte 321 of w/é.bin, which has 320"),
        ("embed_tokens_per_layer", None, "manifest.json: embed_tokens_per_layer: 0 columns, expected 6 (model)"),
        ("model hidden_size", 5, "manifest.json: embed_tokens: 4 columns, expected 5 (model)"),
        ("chunk", 0, "manifest.json: chunk 0 of context 32: expected 1 <= chunk <= context"),
        ("chunk", 33, "manifest.json: chunk 33 of context 32: expected 1 <= chunk <= context"),
        ("chunk", 9, "manifest.json: kv.sliding_slots 12: expected 13, sliding_window - 1 + chunk"),
        ("kv global_bucket", 0, "manifest.json: kv: sliding_window and global_bucket must be above 0"),
    ],
)
def test_wrong_entry_is_named(path: str, value: object, cause: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(edited(path, value))
    assert caught.value.cause == cause
    assert caught.value.hint == "the folder is damaged; build it again with gemma4-export build"


def test_missing_key_is_named() -> None:
    values = json.loads(GOLDEN)
    del values["recipe"]
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(json.dumps(values))
    assert caught.value.cause == "manifest.json: key 'recipe' is missing"


@pytest.mark.parametrize("found", [FORMAT + 1, 10**30, 0, -1, "1", None, [1]])
def test_other_format_is_refused_and_a_newer_one_asks_for_an_upgrade(found: object) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(edited("format", found))
    assert caught.value.cause == f"manifest.json: format {found!r}, this version reads format {FORMAT}"
    is_newer = isinstance(found, int) and found > FORMAT
    assert (caught.value.hint == "pip install --upgrade gemma4-export") == is_newer


def test_newer_format_is_refused_before_its_unknown_keys() -> None:
    with pytest.raises(ArtifactError, match=f"format {FORMAT + 1}, this version reads format {FORMAT}"):
        Manifest.from_json(f'{{"format": {FORMAT + 1}, "sharding": {{}}}}')


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, GOLDEN[:-30]])
def test_text_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"^manifest.json: not JSON \("):
        Manifest.from_json(text)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{}"])
def test_json_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match=rf"^manifest\.json: format None, this version reads format {FORMAT}\n"):
        Manifest.from_json(text)


OUTSIDE = ["../x", "/etc/passwd", "a/../../b", "a/../b", "..", ".", "", "a\\b", "..\\x", "a//b", "./a", "a/", "C:\\x"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("where", ["files", "graphs decoder file", "embed_tokens file", "embed_tokens_per_layer file"])
def test_path_outside_the_folder_is_refused(path: str, where: str) -> None:
    values = json.loads(GOLDEN)
    values["files"][path] = {"bytes": 1, "sha256": ""}
    text = json.dumps(values) if where == "files" else edited(where, path)
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(text)
    assert caught.value.cause == f"manifest.json: {path!r} is not a path inside the artifact"
    assert caught.value.hint == "do not use this folder: its manifest was not written by gemma4-export"


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_undamaged_artifact_opens_and_lists_every_file() -> None:
    folder = small_artifact()
    manifest = Artifact.open(folder, check="full").manifest
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*manifest.files, MANIFEST_NAME}
    assert {WEIGHTS, TOKENS, "graphs/decoder.onnx", "tokenizer/tokenizer.json"} <= found


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["graphs/decoder.onnx", "tokenizer/tokenizer.json", "tokenizer/chat_template.jinja"])
@pytest.mark.parametrize("place", [0, -1])
def test_flipped_bit_in_a_small_file_is_refused_at_load(name: str, place: int, folder: Path) -> None:
    flip(folder / name, place)
    with pytest.raises(ArtifactError) as caught:
        Gemma4.load(folder)
    assert caught.value.cause.startswith(f"{name}: sha256 ")
    assert ", expected " in caught.value.cause


@pytest.mark.parametrize("name", [WEIGHTS, TOKENS])
def test_flipped_bit_in_large_weights_is_refused_by_the_full_check(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(folder / name, 1000)
    monkeypatch.setattr(artifact_module, "SMALL_FILE_BYTES", 1000)  # weights of this size are not "small" then
    Artifact.open(folder)
    assert refused(folder, check="full").cause.startswith(f"{name}: sha256 ")
    with pytest.raises(ArtifactError):
        Gemma4.load(folder, check="full")


@pytest.mark.parametrize("name", [WEIGHTS, TOKENS, "graphs/decoder.onnx", "tokenizer/generation_config.json"])
def test_truncated_file_is_refused(name: str, folder: Path) -> None:
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size - 1)
    assert refused(folder).cause == f"{name}: expected {size} bytes, found {size - 1}"


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer/tokenizer.json"])
def test_missing_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert refused(folder).cause == f"{name}: listed in manifest.json, missing in {folder}"


def test_folder_in_a_file_s_place_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assert refused(folder).cause.startswith(f"{WEIGHTS}: listed in manifest.json, missing")


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer", "graphs"])
def test_link_that_leads_outside_is_refused(name: str, folder: Path) -> None:
    moved = folder.parent / "elsewhere"
    (folder / name).rename(moved)
    (folder / name).symlink_to(moved)
    cause = refused(folder).cause
    assert cause.endswith(f": a link that leads out of {folder}")
    assert cause.startswith(name)


def test_links_inside_and_to_the_folder_are_followed(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "moved.bin")
    (folder / WEIGHTS).symlink_to(folder / "moved.bin")
    link = folder.parent / "link"
    link.symlink_to(folder)
    Artifact.open(link, check="full")


def test_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path).cause == f"{tmp_path}: no manifest.json in it"
    assert refused(tmp_path / "x").cause == f"{tmp_path / 'x'}: no such folder"
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file").cause == f"{tmp_path / 'file'}: a file, not a folder"


def test_manifest_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_bytes(b"\xff\xfe{}")
    assert refused(folder).cause == f"{folder / MANIFEST_NAME}: not UTF-8 (invalid start byte)"


def test_files_added_later_are_welcome(folder: Path) -> None:
    (folder / "engines").mkdir()
    (folder / "engines" / "note.txt").write_text("added")
    Artifact.open(folder, check="full")


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (
            lambda values: values["graphs"]["decoder"].update(backend="tensorrt"),
            "this version cannot run backend 'tensorrt'",
        ),
        (lambda values: values["kv"]["caches"][2].update(num_kv_heads=3), "past_key_values.2.key"),
        (lambda values: values["kv"]["caches"].pop(), "past_key_values.5."),
        (lambda values: values["rope_global"].update(num_frequencies=5), "rope_global"),
        (lambda values: values.update(rope_sliding=None), "rope_sliding"),
    ],
)
def test_manifest_that_contradicts_its_graph_is_refused_at_load(edit: Callable, cause: str, folder: Path) -> None:
    edit_manifest(folder, edit)
    with pytest.raises(ArtifactError) as caught:
        Gemma4.load(folder)
    assert cause in caught.value.cause
    assert "\n" not in caught.value.cause


# ---------------------------------------------------------------------------------------------------------------------
# Builds that fail, collide or die


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def build(checkpoint: Path, out: Path) -> Path:
    with artifacts.traces(fresh=False):
        return artifacts.build_artifact(checkpoint, out, context=64)


def test_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(ConfigError) as caught:
        build(tiny.checkpoint("31b"), out)
    assert caught.value.cause == f"{out}: exists already"
    assert caught.value.hint == "give another --out"  # it is no artifact, so nobody is told to remove it
    assert names_in(tmp_path) == ["out"]
    assert (out / "precious").read_text() == "kept"


def test_second_build_in_one_place_is_refused_and_the_first_finishes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with partial_folder(out) as work:
        (work / "weights").write_text("half")
        with pytest.raises(ConfigError) as caught, partial_folder(out):
            pytest.fail("two builds at once")
        assert f"another build is writing here (process {os.getpid()} on " in caught.value.cause
        assert names_in(work) == [LOCK_NAME, "weights"]
        assert refused(work).cause == f"{work}: its build has not finished"
    assert names_in(tmp_path) == ["out"]
    assert names_in(out) == ["weights"]


def test_partial_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "thesis.tex").write_text("kept")
    with pytest.raises(ConfigError, match="exists and was not made by gemma4-export"):
        build(tiny.checkpoint("31b"), tmp_path / "out")
    assert names_in(work) == ["thesis.tex"]


def test_build_that_fails_midway_keeps_its_finished_weights_and_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = shutil.copytree(tiny.checkpoint("31b"), tmp_path / "checkpoint")
    out, seen = tmp_path / "out", []
    rows = Checkpoint.rows

    def truncating(self: Checkpoint, name: str, start: int, stop: int) -> Any:
        if name == "layers.3.mlp.up_proj.weight":
            seen.append(names_in(out.with_name("out.partial")))
            os.truncate(checkpoint / "model.safetensors", 5000)
        return rows(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "rows", truncating)
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*: ended \d+ bytes early"):
        build(checkpoint, out)
    assert seen == [[LOCK_NAME, "graphs", "journal.jsonl", "tokenizer"]]  # it was midway indeed
    assert names_in(tmp_path) == ["checkpoint", "out.partial"]
    assert refused(tmp_path / "out.partial").cause.endswith("its build has not finished")
    finished = [
        json.loads(line)["name"] for line in (tmp_path / "out.partial/journal.jsonl").read_text().splitlines()[1:]
    ]
    assert f"out.partial: {len(finished)} finished weights are kept" in caplog.text
    assert f"rm -r {tmp_path / 'out.partial'}" in caplog.text


def test_build_that_fails_before_its_first_weight_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: Checkpoint, name: str, start: int, stop: int) -> Any:
        raise CheckpointError("model.safetensors: damaged")

    monkeypatch.setattr(Checkpoint, "rows", damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        build(tiny.checkpoint("31b"), tmp_path / "out")
    assert names_in(tmp_path) == []


def test_interrupted_build_leaves_a_folder_to_go_on_from_that_never_loads(tmp_path: Path) -> None:
    def interrupted() -> None:
        with partial_folder(tmp_path / "out") as work:
            (work / "folder").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_in(tmp_path) == ["out.partial"]
    assert refused(tmp_path / "out.partial").cause.endswith("its build has not finished")


def test_folder_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def collide() -> None:
        with partial_folder(out) as work:
            (work / "file").write_text("ours")
            out.mkdir()
            (out / "file").write_text("theirs")

    with pytest.raises(OSError, match="not empty"):
        collide()
    assert (out / "file").read_text() == "theirs"
    (out / "file").unlink()
    out.rmdir()
    with partial_folder(out) as work:  # what was left is replaced
        assert names_in(work) == [LOCK_NAME]


@pytest.mark.parametrize("leftover", ["all but the rename", "half", "only the lock", "an empty folder"])
def test_leftovers_of_a_killed_build_never_load_and_are_replaced(leftover: str, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial"
    work.mkdir()
    if leftover == "all but the rename":
        shutil.copytree(small_artifact(), work, dirs_exist_ok=True)
    if leftover == "half":
        shutil.copytree(small_artifact() / "graphs", work / "graphs")
    if leftover != "an empty folder":
        (work / LOCK_NAME).touch()
        (work / "stray").write_text("from the killed build")
    with pytest.raises(ArtifactError):
        Gemma4.load(work)
    build(tiny.checkpoint("31b"), out)
    assert names_in(tmp_path) == ["out"]
    assert artifacts_equal(out, small_artifact())


def artifacts_equal(left: Path, right: Path) -> bool:
    """Both hold the same files with the same bytes."""
    contents = [
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (left, right)
    ]
    return contents[0] == contents[1]


KILLED_BUILD = """
import sys, time
from pathlib import Path
from gemma4_export.exporter.package import partial_folder
with partial_folder(Path(sys.argv[1])) as work:
    (work / "manifest.json").write_text("{}")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_killed_process_frees_its_folder(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial"
    with subprocess.Popen([sys.executable, "-c", KILLED_BUILD, out], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with pytest.raises(ConfigError, match="another build is writing here"):
                build(tiny.checkpoint("31b"), out)
            assert refused(work).cause == f"{work}: its build has not finished"
        finally:
            process.kill()
    assert refused(work).cause == f"{work}: its build has not finished"
    build(tiny.checkpoint("31b"), out)
    assert names_in(tmp_path) == ["out"]
    Artifact.open(out, check="full")


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("generation_config.json", None, "no generation_config.json"),
        ("tokenizer.json", b"{", "tokenizer.json: not JSON ("),
        ("tokenizer.json", b"[]", "tokenizer.json: expected a JSON object, found list"),
        ("tokenizer.json", b'{"model": {}}', "tokenizer.json: has no vocabulary (KeyError('vocab'))"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 440}}}', "tokenizer.json: token id 440, the model's vocabulary"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8 ("),
    ],
)
def test_unusable_tokenizer_file_fails_the_build(name: str, content: bytes | None, cause: str, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny.checkpoint("31b"), tmp_path / "checkpoint")
    assert tiny.vocab_size() == 440
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        build(checkpoint, tmp_path / "out")
    assert cause in caught.value.cause
    assert "\n" not in caught.value.cause
    assert caught.value.hint
    assert names_in(tmp_path) == ["checkpoint"]


# ---------------------------------------------------------------------------------------------------------------------
# What a caller can get wrong


@pytest.fixture(scope="module")
def model() -> Gemma4:
    return Gemma4.load(small_artifact())


@pytest.mark.parametrize(
    ("ids", "cause"),
    [
        ([], "ids: expected a list of at least one integer, found none"),
        ([-1], "ids: -1 is outside the vocabulary of 440"),
        ([5, 440], "ids: 440 is outside the vocabulary of 440"),
        ([5.0, 6.0], "ids: expected a list of integers, found shape [2] of float64"),
        ([True], "ids: expected a list of integers, found shape [1] of bool"),
        ([[5, 6]], "ids: expected a list of integers, found shape [1, 2] of int64"),
        ([[5], [6, 7]], "ids: expected a list of integers, found shape [2] of object"),
        (["5"], "ids: expected a list of integers, found shape [1] of <U1"),
        (5, "ids: expected a list of integers, found 5"),
        (None, "ids: expected a list of integers, found None"),
        ([10**30], "ids: expected a list of integers, found shape [1] of object"),
        ([5] * 65, "0 + 65 tokens do not fit the context of 64"),
    ],
)
def test_ids_that_are_no_prompt_are_refused_and_write_nothing(model: Gemma4, ids: Any, cause: str) -> None:
    cache = model.new_cache()
    with pytest.raises(ContractError) as caught:
        model.forward(ids, cache=cache)
    assert caught.value.cause == cause
    assert cache.length == 0


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ([3], "rows: 3 is not an index into 3 ids"),
        ([0, -1], "rows: -1 is not an index into 3 ids"),
        ([0.0], "rows: expected a list of integers, found shape [1] of float64"),
        ([[0], [1]], "rows: expected a list of integers, found shape [2, 1] of int64"),
        ([True, False, True], "rows: expected a list of integers, found shape [3] of bool"),
        (["a"], "rows: expected a list of integers, found shape [1] of <U1"),
    ],
)
def test_rows_out_of_range_are_refused_and_write_nothing(model: Gemma4, rows: Any, cause: str) -> None:
    cache = model.new_cache()
    with pytest.raises(ContractError) as caught:
        model.forward([5, 6, 7], rows=rows, cache=cache)
    assert caught.value.cause == cause
    assert cache.length == 0


def test_no_rows_give_no_logits_but_fill_the_cache(model: Gemma4) -> None:
    cache = model.new_cache()
    assert model.forward([5, 6, 7], rows=[], cache=cache).shape == (0, 440)
    assert cache.length == 3


@pytest.mark.parametrize("chunk", [0, -1, 8, 2.5, "7"])
def test_chunk_out_of_range_is_refused(model: Gemma4, chunk: Any) -> None:
    with pytest.raises(ContractError) as caught:
        model.forward([5, 6, 7], chunk=chunk)
    assert caught.value.cause == f"chunk: expected an integer of at least 1 and at most 7, found {chunk!r}"
    assert caught.value.hint == "build with a larger --chunk for longer ones"


def test_sequence_that_outgrows_its_context_is_refused(model: Gemma4) -> None:
    cache = model.new_cache()
    model.forward([5] * 60, rows=[], cache=cache)
    with pytest.raises(ContractError) as caught:
        model.forward([5] * 5, cache=cache)
    assert caught.value.cause == "60 + 5 tokens do not fit the context of 64"
    assert cache.length == 60
    model.forward([5] * 4, cache=cache)


def test_prompt_without_room_for_an_answer_is_refused(model: Gemma4) -> None:
    for generate in (model.generate_ids, lambda ids: list(model.stream_ids(ids))):
        with pytest.raises(ContractError) as caught:
            generate([5] * 64)
        assert caught.value.cause == "the prompt has 64 tokens, the context 64, and the answer needs one at least"
        assert caught.value.hint == "shorten the prompt, or build with a larger --context"


def test_answer_ends_with_the_context(model: Gemma4) -> None:
    ids = model.generate_ids([5] * 60, max_new_tokens=100)
    # The last token comes from position 63 and is not written any more.
    assert len(ids) == 5 or ids[-1] in model.stop_ids


def test_empty_prompt_is_refused(model: Gemma4) -> None:
    for generate in (model.generate_ids, lambda ids: list(model.stream_ids(ids))):
        with pytest.raises(ContractError) as caught:
            generate([])
        assert caught.value.cause == "the prompt has no tokens"
        assert caught.value.hint == "model.encode(messages) or model.encode_raw(text) makes some"


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_answer_of_no_tokens_is_refused(model: Gemma4, count: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        model.generate_ids([5], max_new_tokens=count)
    assert caught.value.cause == f"max_new_tokens: expected an integer of at least 1, found {count}"


@pytest.fixture(scope="module")
def base_model() -> Gemma4:
    return Gemma4.load(small_artifact(chat=False))


def test_base_model_refuses_to_chat_and_says_what_to_do(base_model: Gemma4) -> None:
    message = [{"role": "user", "content": "hello"}]
    for call in (base_model.encode, base_model.generate, base_model.stream):
        with pytest.raises(ConfigError) as caught:
            call(message)
        name = base_model.artifact.manifest.model.name
        assert caught.value.cause == f"{name} is a base model: its checkpoint has no chat template"
        assert caught.value.hint is not None
        assert caught.value.hint.startswith("gemma4-run generate ARTIFACT --raw --prompt TEXT")


def test_raw_text_gets_exactly_one_bos(base_model: Gemma4, tmp_path: Path) -> None:
    bos = base_model.tokenizer.bos_id
    plain = base_model.encode_raw("hello the weather")
    assert plain[0] == bos
    assert plain.count(bos) == 1
    assert base_model.encode_raw("<bos>hello the weather") == plain
    assert base_model.encode_raw("") == [bos]

    # Some re-saved tokenizers add BOS in a post-processor of their own.
    folder = shutil.copytree(base_model.artifact.folder, tmp_path / "artifact")
    name = "tokenizer/tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / name))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    tokenizer.save(str(folder / name))
    assert tokenizer.encode("hello").ids[0] == bos
    list_again(folder, name)
    assert Gemma4.load(folder).encode_raw("hello the weather") == plain
