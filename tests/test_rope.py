"""Rotary tables: the reference's constants, transformers' frequencies to the last bit but one, far positions."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

from gemma4_export.configs.manifest import RopeEntry
from gemma4_export.configs.model import LayerType
from gemma4_export.configs.models import load_model
from gemma4_export.runtime.rope import RopeTable

LAYER_TYPES: tuple[LayerType, LayerType] = ("sliding_attention", "full_attention")
every_type = pytest.mark.parametrize("layer_type", LAYER_TYPES)


def table(layer_type: LayerType) -> RopeTable:
    """The table of the released models; all five have the same two."""
    rope = load_model("31b").config.rope(layer_type)
    assert rope is not None
    return RopeTable(RopeEntry(theta=rope.theta, head_dim=rope.head_dim, num_frequencies=rope.num_frequencies))


@functools.cache
def oracle() -> Gemma4TextRotaryEmbedding:
    return Gemma4TextRotaryEmbedding(
        Gemma4TextConfig(
            head_dim=256,
            global_head_dim=512,
            num_hidden_layers=2,
            layer_types=list(LAYER_TYPES),
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            },
        )
    )


def oracle_frequencies(layer_type: LayerType) -> np.ndarray:
    return getattr(oracle(), f"{layer_type}_inv_freq").numpy()


# Reference §15.1.
CONSTANTS = {
    "sliding_attention": {0: 1.0, 1: 0.9305720, 2: 0.8659643, 126: 1.154783e-4, 127: 1.074608e-4},
    "full_attention": {0: 1.0, 1: 0.9474635, 2: 0.8976871, 62: 0.03522695, 63: 0.03337625},
}


@every_type
def test_frequencies_are_the_constants_of_the_reference(layer_type):
    found = table(layer_type).inv_freq
    assert found.dtype == np.float32
    assert len(found) == {"sliding_attention": 128, "full_attention": 64}[layer_type]
    for index, printed in CONSTANTS[layer_type].items():
        # Seven digits are printed, and one of them is off by one: index 126 is 1.1547820e-4, here and in transformers.
        assert found[index] == pytest.approx(printed, rel=1e-6)


@pytest.mark.parametrize("size", ["e2b", "e4b", "12b", "26b-a4b", "31b"])
@every_type
def test_all_released_sizes_turn_alike(size, layer_type):
    rope = load_model(size).config.rope(layer_type)
    assert rope == load_model("31b").config.rope(layer_type)


@every_type
def test_frequencies_equal_transformers_within_one_ulp(layer_type):
    ours, theirs = table(layer_type).inv_freq, oracle_frequencies(layer_type)
    turning = theirs[: len(ours)]
    assert np.all(np.abs(ours - turning) <= np.spacing(np.maximum(ours, turning)))
    # Pairs past ours stand still: they are not in the table at all.
    assert not theirs[len(ours) :].any()
    assert len(theirs) == {"sliding_attention": 128, "full_attention": 256}[layer_type]


@pytest.mark.parametrize("position", [0, 1, 4095, 100_000, 131_000, 262_143])
@every_type
def test_cosines_and_sines_equal_transformers_at_far_positions(layer_type, position):
    rope = table(layer_type)
    found = rope.cos_sin(position, 2)
    assert found.shape == (1, 2, 2, len(rope.inv_freq))
    assert found.dtype == np.float32
    positions = torch.tensor([[position, position + 1]])
    halves = oracle()(torch.zeros(1, dtype=torch.float32), positions, layer_type)  # [1, 2, head_dim] each
    half = halves[0].shape[-1] // 2
    for part, values in enumerate(halves):
        wanted = values.numpy()
        assert np.array_equal(wanted[..., :half], wanted[..., half:])  # one angle for both channels of a pair
        still = wanted[..., len(rope.inv_freq) : half]
        assert np.all(still == 1 - part)  # the cosine of nothing is 1, the sine 0: what padding writes
        difference = np.abs(found[:, :, part] - wanted[..., : len(rope.inv_freq)])
        assert np.all(difference <= tolerance(rope.inv_freq, oracle_frequencies(layer_type), position + 1))


def tolerance(ours: np.ndarray, theirs: np.ndarray, position: int) -> np.ndarray:
    """How far two cosines may be apart, per frequency.

    Both sides multiply position and frequency in float32, so equal frequencies give equal angles; where a frequency is
    an ulp off, so is the angle, times the position, and each product rounds on its own (one step of the angle for
    both). A cosine moves no faster than its angle. Then each side rounds a value of at most 1: half a step of 2^-24 for
    ours, which is taken from float64, and a whole one of 2^-24 or less for torch's float32 cosine.
    """
    theirs = theirs[: len(ours)]
    angle = position * np.abs(ours.astype(np.float64) - theirs)
    angle += np.where(ours == theirs, 0, np.spacing(np.float32(position) * ours))
    return angle + 2**-25 + 2**-24


@every_type
def test_a_chunk_is_the_positions_one_by_one(layer_type):
    rope = table(layer_type)
    whole = rope.cos_sin(131_000, 7)
    assert np.array_equal(whole, np.concatenate([rope.cos_sin(131_000 + step, 1) for step in range(7)], axis=1))
