"""Artifact against transformers: every structure, storage, chunk and start; prefill, decode, rows and greedy ids.

Unless a test says otherwise, the tolerance is the design's bound: four times what float32 itself costs the oracle on
the very ids, at least 2e-4. Two of our own runs that differ in the sizes of their calls sum in different orders, so
they are held to the same bound.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from artifacts import PROMPT_LENGTH, WINDOW, artifact, expected, model
from oracle import find_greedy_prompt, oracle
from tiny import STRUCTURES

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ContractError
from gemma4_export.configs.manifest import MANIFEST_NAME
from gemma4_export.exporter.build import GLOBAL_BUCKET
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.runtime import Gemma4

CHUNKS = (1, 7, 16)
every_structure = pytest.mark.parametrize("structure", STRUCTURES)
every_chunk = pytest.mark.parametrize("chunk", CHUNKS)


def slots(chunk: int) -> int:
    """Slots of a sliding buffer."""
    return WINDOW - 1 + chunk


# ---------------------------------------------------------------------------------------------------------------------
# Any structure, any chunk, any start


@every_chunk
@every_structure
def test_forward_equals_transformers_over_three_buffers(structure, chunk):
    runtime, want = model(structure, chunk=chunk), expected(structure)
    assert len(want.ids) >= 3 * slots(chunk)
    cache = runtime.new_cache()
    assert want.difference(runtime.forward(want.ids, cache=cache)) <= want.bound
    assert cache.length == len(want.ids)
    assert cache.num_compactions >= 2
    # Three buffers of tokens went through, and it is still one buffer (and one bucket of the global caches).
    assert cache.num_bytes == runtime.artifact.manifest.kv.num_bytes(GLOBAL_BUCKET)


@every_chunk
@every_structure
def test_a_sequence_may_be_continued_at_any_position(structure, chunk):
    runtime, want = model(structure, chunk=chunk), expected(structure)
    one_buffer = range(1, slots(chunk) + 2)  # every way to meet the first compaction
    for split in {*one_buffer, 2 * slots(chunk), len(want.ids) // 2, len(want.ids) - 1}:
        cache = runtime.new_cache()
        parts = [runtime.forward(ids, cache=cache) for ids in (want.ids[:split], want.ids[split:])]
        assert want.difference(np.concatenate(parts)) <= want.bound, f"continued at {split}"
        assert cache.num_compactions >= 2


@every_chunk
@every_structure
def test_decode_steps_cross_compactions_and_equal_one_longer_prefill(structure, chunk):
    runtime, want = model(structure, chunk=chunk), expected(structure)
    cache, prompt = runtime.new_cache(), want.ids[: slots(chunk) - 1]
    steps = [runtime.forward(prompt, cache=cache)]
    before = cache.num_compactions
    compacting = 0
    for token in want.ids[len(prompt) :]:
        compactions = cache.num_compactions
        steps.append(runtime.forward([token], cache=cache))
        compacting += cache.num_compactions - compactions
    assert compacting == cache.num_compactions - before >= 2
    decoded = np.concatenate(steps)
    assert want.difference(decoded) <= want.bound
    assert np.abs(decoded - runtime.forward(want.ids)).max() <= want.bound


@functools.cache
def greedy_prompt(structure: str) -> tuple[list[int], list[int]]:
    """A prompt and its 64 greedy ids, chosen so that none of them hangs on rounding."""
    return find_greedy_prompt(oracle(tiny.checkpoint(structure)), length=20, count=64)


@every_structure
def test_greedy_prompts_have_a_margin_above_twice_the_bound(structure):
    reference, (prompt, want) = oracle(tiny.checkpoint(structure)), greedy_prompt(structure)
    produced, margin = reference.greedy(prompt, 64)
    assert produced == want
    assert margin > 2 * reference.bound(prompt + want[:-1])


@every_chunk
@every_structure
def test_greedy_ids_equal_transformers(structure, chunk):
    prompt, want = greedy_prompt(structure)
    runtime = model(structure, chunk=chunk)
    assert not set(runtime.stop_ids) & set(want)  # none ends the answer early
    assert runtime.generate_ids(prompt, max_new_tokens=64, temperature=0) == want


@every_structure
def test_shorter_chunks_than_the_artifact_allows(structure):
    runtime, want = model(structure, chunk=16), expected(structure)
    for chunk in (1, 2, WINDOW - 1, WINDOW, 5, 15, 16):
        cache = runtime.new_cache()
        assert want.difference(runtime.forward(want.ids, chunk=chunk, cache=cache)) <= want.bound, f"chunk {chunk}"
        assert cache.num_compactions >= 2


@every_structure
def test_global_caches_grow_through_buckets_while_the_graph_runs(structure):
    opened = Artifact.open(artifact(structure, chunk=7))
    kv = dataclasses.replace(opened.manifest.kv, global_bucket=8)
    runtime = Gemma4(dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, kv=kv)))
    want, cache = expected(structure), runtime.new_cache()
    assert want.difference(runtime.forward(want.ids, cache=cache)) <= want.bound
    assert cache.num_reallocations == 3  # 8 -> 16 -> 32 -> 64 slots
    entry = next(entry for entry in kv.caches if entry.kind == "global")
    assert cache.buffers[entry.layer][0].shape[2] == 64


def test_two_sequences_take_turns():
    runtime, want = model("e2b", chunk=7), expected("e2b")
    first, second = runtime.new_cache(), runtime.new_cache()
    for start in range(0, PROMPT_LENGTH, 3):
        part = want.ids[start : start + 3]
        assert want.difference(runtime.forward(part, cache=first), start) <= want.bound
        if start < 30:
            assert want.difference(runtime.forward(part, cache=second), start) <= want.bound
    assert (first.length, second.length) == (PROMPT_LENGTH, 30)


def test_a_prompt_past_the_context_is_refused_and_the_cache_goes_on():
    runtime, want = model("e2b", context=40, fresh_trace=False), expected("e2b")
    cache = runtime.new_cache()
    runtime.forward(want.ids[:30], cache=cache)
    with pytest.raises(ContractError, match=r"30 \+ 11 tokens do not fit the context of 40"):
        runtime.forward(want.ids[30:41], cache=cache)  # two calls, of which the first would fit
    assert cache.length == 30
    assert want.difference(runtime.forward(want.ids[30:40], cache=cache), start=30) <= want.bound
    with pytest.raises(ContractError, match=r"40 \+ 1 tokens do not fit the context of 40"):
        runtime.forward(want.ids[40:41], cache=cache)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def subsets() -> list[list[int]]:
    """Rows in any order, repeated, none at all, none in whole chunks, and some drawn at random."""
    last = PROMPT_LENGTH - 1
    fixed = [[], [last], [0], [last, 0], [3, 3, 3], [50, 8, 8, 51, 7], list(range(last, -1, -1)), [15, 16, 0]]
    draw = random.Random(0)
    return fixed + [draw.choices(range(PROMPT_LENGTH), k=draw.randrange(1, 80)) for _ in range(8)]


@every_structure
def test_rows_equal_the_rows_of_the_full_run(structure):
    runtime, want = model(structure, chunk=7), expected(structure)
    full = runtime.forward(want.ids)
    # Rows are told apart: none is within the bound of another.
    assert (
        min(np.abs(full - np.roll(full, shift, axis=0)).max(axis=1).min() for shift in range(1, 30)) > 10 * want.bound
    )
    for rows in subsets():
        found = runtime.forward(want.ids, rows=rows)
        assert found.shape == (len(rows), tiny.vocab_size())
        assert np.abs(found - full[rows]).max(initial=0) <= want.bound, f"rows {rows}"


@every_structure
def test_a_chunk_without_wanted_rows_is_written_all_the_same(structure):
    runtime, want = model(structure, chunk=7), expected(structure)
    cache = runtime.new_cache()
    assert runtime.forward(want.ids[:40], rows=[], cache=cache).shape == (0, tiny.vocab_size())
    assert want.difference(runtime.forward(want.ids[40:], cache=cache), start=40) <= want.bound


# ---------------------------------------------------------------------------------------------------------------------
# Any spelling and storage of the checkpoint, any recipe

STORAGES: list[tuple[str, dict[str, object]]] = [
    *((structure, {"spelling": "resaved"}) for structure in STRUCTURES),
    ("e4b", {"text_only": True}),
    ("12b", {"text_only": True, "spelling": "resaved"}),
    ("31b", {"shards": 3}),
    ("26b-a4b", {"experts": "per_expert", "shards": 4}),
    ("e2b", {"redundant_shared_kv": True, "shards": 2}),
    ("e4b", {"redundant_shared_kv": True}),
]


def spelt(value: object) -> str:
    return ",".join(f"{key}={part}" for key, part in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("structure", "storage"), STORAGES, ids=spelt)
def test_one_model_gives_one_artifact_however_it_is_stored(structure, storage):
    hub, other = artifact(structure, fresh_trace=False), artifact(structure, fresh_trace=False, **storage)
    manifests = [Artifact.open(folder).manifest for folder in (hub, other)]
    packed = [{name: entry for name, entry in m.files.items() if name.startswith("graphs/")} for m in manifests]
    assert len(packed[0]) >= 3
    assert packed[0] == packed[1]
    with Checkpoint(tiny.checkpoint(structure)) as left, Checkpoint(tiny.checkpoint(structure, **storage)) as right:
        assert left.config == right.config
    want, runtime = expected(structure, **storage), model(structure, fresh_trace=False, **storage)
    assert want.difference(runtime.forward(want.ids)) <= want.bound


@pytest.mark.parametrize("structure", ["e2b", "26b-a4b"])
def test_bfloat16_checkpoints_compute_in_float32(structure):
    storage = {"dtype": "bfloat16", "fresh_trace": False}
    want, runtime = expected(structure, dtype="bfloat16"), model(structure, **storage)
    assert want.difference(runtime.forward(want.ids)) <= want.bound
    # What is stored in bfloat16 already, the bf16 recipe does not round again.
    packed = model(structure, recipe="bf16", **storage)
    assert want.difference(packed.forward(want.ids)) <= want.bound


@every_structure
def test_the_bf16_recipe_equals_the_oracle_on_rounded_matrices(structure):
    runtime = model(structure, recipe="bf16", fresh_trace=False)
    want = expected(structure, weights="bfloat16")
    assert want.difference(runtime.forward(want.ids)) <= want.bound
    # The rounding is large enough to be seen: the exact model is far away.
    exact = oracle(tiny.checkpoint(structure)).logits(want.ids)
    assert np.abs(exact - want.logits).max() > 10 * want.bound


# ---------------------------------------------------------------------------------------------------------------------
# Equal bytes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The graphs for verification are copies of a trace here as well as there: passes name new nodes otherwise.
_BUILD = """
import sys, pathlib, artifacts
with artifacts.traces(fresh=True):
    artifacts.build_artifact(*map(pathlib.Path, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "structure",
    ["e2b", *(pytest.param(other, marks=pytest.mark.full) for other in STRUCTURES[1:])],  # ten seconds each
)
def test_a_build_in_another_process_gives_the_same_bytes(structure, tmp_path):
    # Another hash seed: an order that comes from a set would show.
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONHASHSEED": "4711", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", _BUILD, str(tiny.checkpoint(structure)), str(tmp_path / "artifact")]
    subprocess.run(command, check=True, env=environment, timeout=300)
    here, there = contents(artifact(structure, chunk=7)), contents(tmp_path / "artifact")
    assert {"manifest.json", "graphs/decoder.onnx", "tokenizer/tokenizer.json"} <= here.keys()
    assert here.keys() == there.keys()
    differing = [name for name in here if here[name] != there[name]]
    assert not differing, differing


@every_structure
def test_chunks_differ_in_the_manifest_only(structure):
    """Each of the three is a build of its own, trace included."""
    first, *others = (contents(artifact(structure, chunk=chunk)) for chunk in CHUNKS)
    for other in others:
        assert first.keys() == other.keys()
        assert [name for name in first if first[name] != other[name]] == [MANIFEST_NAME]
