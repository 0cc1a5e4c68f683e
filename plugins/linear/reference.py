"""What Gemma4Linear means, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gemma4_export.plugins.linear.contract import LINEAR

Array = npt.NDArray[Any]


def linear(input: Array, weight: Array) -> Array:
    """Multiply each row of the input with every row of the weight.

        output[..., n] = sum_k input[..., k] * weight[n, k]

    Args:
        input: [..., K]; weight: [N, K], rows are output channels.
    Returns:
        output [..., N] in the dtype of ``input``, rounded once.
    Raises:
        ContractError: the sizes or dtypes disagree.
    """
    LINEAR.check({"input": input, "weight": weight}, {})
    output: Array = np.einsum("...k,nk->...n", input.astype(np.float64), weight.astype(np.float64))
    return output.astype(input.dtype)
