"""The packed training forward is transformers' own forward; the optimiser and the schedule do what they say."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

sys.path.insert(0, str(Path(__file__).parent.parent))  # demo/ is not part of the installed package

from demo import batches, forward, models, pictures, speech, train
from demo.optimizer import Optimizer, _orthogonal

CHECKPOINTS = Path(__file__).parent.parent / "demo" / "checkpoints"


def _packed(name: str) -> tuple[batches.Encoder, dict[str, torch.Tensor]]:
    """One row: a picture and some text conversations."""
    encoder = batches.Encoder(CHECKPOINTS / name)
    shape = batches.Shape(rows=1, length=256, images=((70, 1),), sounds=0)
    batch = batches.new_batch(shape)
    batches.fill(batch, shape, encoder, seed=3, index=0)
    return encoder, {key: torch.from_numpy(value) for key, value in batch.items()}


@pytest.mark.parametrize("name", models.NAMES)
def test_packed_forward_is_transformers_forward(name: str) -> None:
    torch.manual_seed(0)
    encoder, batch = _packed(name)
    model = models.build(models.config(name, encoder.tokenizer), seed=2).eval()
    original = Gemma4TextExperts.forward
    try:
        Gemma4TextExperts.forward = forward.dense_experts
        with torch.no_grad():
            got = forward.forward(model, batch, [70])[0]
    finally:
        Gemma4TextExperts.forward = original
    image = encoder.ids["<|image|>"]
    segments = int(batch["segment"].max())
    assert segments >= 2
    for number in range(1, segments + 1):
        here = (batch["segment"][0] == number).nonzero().flatten()
        ids = batch["ids"][0][here].long()[None]
        media = {}
        if (ids == image).any():
            pixels = forward.paint(batch["levels_70"], batch["colors_70"])
            media = {"pixel_values": pixels, "image_position_ids": batch["places_70"].long()}
        with torch.no_grad():
            wanted = model(input_ids=ids, mm_token_type_ids=(ids == image).long(), **media).logits[0]
        # fp32, other order of sums in attention: a few ulp of logits that reach 20
        assert (wanted - got[here]).abs().max() < 5e-5


def test_batches_depend_on_seed_and_number_only() -> None:
    encoder = batches.Encoder(CHECKPOINTS / "tiny-e")
    shape = batches.Shape(rows=2, length=256, images=((70, 1),))
    first, second, other = (batches.new_batch(shape) for _ in range(3))
    batches.fill(first, shape, encoder, seed=1, index=5)
    batches.fill(second, shape, encoder, seed=1, index=5)
    batches.fill(other, shape, encoder, seed=1, index=6)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    assert (first["ids"] != other["ids"]).any()
    described = batches.describe(first)
    assert described["filled"] > 0.5
    # the last thing to learn in each conversation is to stop
    stops = {encoder.tokenizer.token_to_id(token) for token in ("<turn|>", "<|tool_response>")}
    for labels, segment in zip(first["labels"], first["segment"], strict=True):
        assert {labels[segment == number][-1] for number in range(1, segment.max() + 1)} <= stops


def test_painting_on_the_device_is_the_same_as_on_the_host() -> None:
    _, drawing = pictures.make_picture(random.Random(1), budget=70, text_pixels=(20, 60))
    grey, _ = pictures.patches(drawing.levels, 70)
    colors = torch.tensor([[drawing.ground, drawing.ink]], dtype=torch.float32)
    painted = forward.paint(torch.from_numpy(grey)[None], colors)[0]
    wanted = pictures.colors(grey, drawing.ground, drawing.ink).reshape(len(grey), -1)
    assert (painted * 255 - torch.from_numpy(wanted)).abs().max() <= 1


def test_orthogonal_update_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for rows, columns in ((8, 32), (32, 8), (16, 16)):
        values = torch.linalg.svdvals(_orthogonal(torch.randn(3, rows, columns)).float())
        assert values.min() > 0.5, values.min()
        assert values.max() < 1.3, values.max()


def test_optimizer_lowers_a_loss_and_resumes_exactly() -> None:
    def make() -> tuple[torch.nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 1))
        return model, Optimizer(model, muon_lr=0.02, adam_lr=0.02, decay=0.0)

    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    target = inputs[:, :1] * inputs[:, 1:2]

    def step(model: torch.nn.Module, optimizer: Optimizer) -> float:
        value = torch.nn.functional.mse_loss(model(inputs), target)
        value.backward()
        optimizer.step(1.0)
        return float(value.detach())

    model, optimizer = make()
    losses = [step(model, optimizer) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    again, resumed = make()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # Adam would share its tensors
    assert [step(model, optimizer) for _ in range(3)] == [step(again, resumed) for _ in range(3)]


def test_schedule_warms_up_and_falls() -> None:
    rates = [train.schedule(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 60)
    assert rates[:60] == sorted(rates[:60])
    assert set(rates[60:501]) == {1.0}
    assert rates[750] == pytest.approx(0.5)
    assert rates[999] == 0.02
    # the number of steps is not known at first, and what is done until then does not depend on it
    assert [train.schedule(step, None) for step in range(501)] == rates[:501]


def test_room_for_every_sound() -> None:
    assert speech.soft_tokens(speech.FRAMES) == 75
