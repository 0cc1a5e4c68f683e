"""Gemma4Linear: torch op against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma4_export.configs.errors import ContractError
from gemma4_export.plugins.linear import torch_op  # noqa: F401  (registers torch.ops.gemma4.linear)
from gemma4_export.plugins.linear.reference import linear

# Unit roundoff of each dtype: half the distance from 1 to the next number.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

CASES = [((1, 1, 8), 4), ((2, 7, 33), 17), ((5, 16), 1), ((300, 64), 40), ((0, 8), 4)]


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize(("shape", "rows"), CASES)
def test_torch_op_equals_reference(shape: tuple[int, ...], rows: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    input = torch.from_numpy(generator.standard_normal(shape)).to(dtype)
    weight = torch.from_numpy(generator.standard_normal((rows, shape[-1]))).to(dtype)
    expected = linear(input.double().numpy(), weight.double().numpy())
    found = torch.ops.gemma4.linear(input, weight)
    assert found.dtype == dtype
    # K products summed in fp32 in any order, then one rounding to the dtype.
    magnitude = np.abs(input.double().numpy()) @ np.abs(weight.double().numpy()).T
    bound = (shape[-1] + 1) * 2.0**-24 * magnitude + ROUNDOFF[dtype] * np.abs(expected)
    assert (np.abs(found.double().numpy() - expected) <= bound).all()
    if expected.size > 1:
        assert (np.abs(np.roll(found.double().numpy(), 1) - expected) > bound).any(), "the tolerance must bite"


def test_weight_rows_are_output_channels() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = torch.ops.gemma4.linear(torch.tensor([[1.0, 0.0]]), weight)
    assert found.tolist() == [[1.0, 3.0]]  # the transposed mutant gives [1, 2]


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.gemma4.linear.default, (torch.randn(2, 3, 8), torch.randn(4, 8)))


@pytest.mark.parametrize(
    "run", [linear, lambda input, weight: torch.ops.gemma4.linear(*map(torch.from_numpy, (input, weight)))]
)
def test_disagreeing_sizes_are_an_error(run) -> None:
    with pytest.raises(ContractError, match=r"gemma4::Gemma4Linear weight \[N, K\]: expected K = 8, found 9"):
        run(np.zeros((2, 8), np.float32), np.zeros((4, 9), np.float32))
