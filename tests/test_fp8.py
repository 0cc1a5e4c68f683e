"""What fp8 rows cost on trained weights: float32 twins of engines beside float32, the demo models on text.

``pytest -s tests/test_fp8.py -m full`` prints the figures of docs/measurements/accuracy.md.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from engine_twin import EngineTwin, engine_artifact
from tokenizers import Tokenizer

DEMO = Path(__file__).parent.parent / "demo"
CHUNK, NUM_TEXTS = 16, 20
pytestmark = pytest.mark.full


@functools.cache
def texts(model: str) -> list[list[int]]:
    """The first 64 ids of each text."""
    tokenizer = Tokenizer.from_file(str(DEMO / "checkpoints" / model / "tokenizer.json"))
    lines = (DEMO / "data" / "sum_long.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_TEXTS]
    return [tokenizer.encode(json.dumps(json.loads(line)["messages"])).ids[:64] for line in lines]


@functools.cache
def best(model: str, recipe: str) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities and ids [positions, 64] of the best at every position."""
    twin = EngineTwin(
        engine_artifact(DEMO / "checkpoints" / model, recipe, float_type="float32", chunk=CHUNK, group_bytes=10**9)
    )
    values, ids = [], []
    for text in texts(model):
        cache = twin.new_cache()
        for start in range(0, len(text), CHUNK):
            part = text[start : start + CHUNK]
            top, best_ids, total = twin.forward(part, cache, range(len(part)))
            values.append(top - total)
            ids.append(best_ids)
    return np.concatenate(values), np.concatenate(ids)


def drift(model: str, recipe: str) -> float:
    """Kullback-Leibler divergence from float32 over ids among the best 64 of both, averaged over positions."""
    (wanted, wanted_ids), (found, found_ids) = best(model, "fp32"), best(model, recipe)
    is_same = wanted_ids[:, :, None] == found_ids[:, None, :]
    in_both, place = is_same.any(axis=2), is_same.argmax(axis=2)
    difference = wanted - np.take_along_axis(found, place, axis=1)
    divergence = float((np.exp(wanted) * difference * in_both).sum(axis=1).mean())
    first = float((wanted_ids[:, 0] == found_ids[:, 0]).mean())
    print(f"{model} {recipe}: divergence {divergence:.1e}, the same first id at {first:.1%} of {len(wanted)} positions")
    return divergence


@pytest.mark.parametrize("model", ["tiny-e", "tiny-moe"])
def test_fp8_lies_between_int8_and_int4(model):
    """By theory: 3 bits of mantissa err up to 2^-4 of a value, 8 bits by 1/254 and 4 by 1/14 of the largest one."""
    int8, fp8, int4 = (drift(model, recipe) for recipe in ("int8", "fp8", "int4-rtn"))
    assert int8 < fp8 < 0.2 * int4
