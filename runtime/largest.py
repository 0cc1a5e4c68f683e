"""The largest of a vocabulary's scores, exactly, in few calls of NumPy's.

After the model has used the processor's caches for its weights any call takes 5 to 20 µs, and a pass over 262,144
scores 25 µs more: fewer calls count, and data that lie together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma4_export.configs.errors import ContractError

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Int64 = np.ndarray[Any, np.dtype[np.int64]]

_RUN, _EVERY = 64, 4096
"""A sample of the scores: the first 64 of every 4096, each run four cache lines."""
_MIN_SAMPLE = 1024

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def most_likely(scores: Float32) -> int:
    """Id of the largest score, the lower of equals.

    Raises:
        ContractError: a score is NaN, or none is a number above -inf.
    """
    at = int(scores.argmax())  # the first NaN, if there is one
    best = float(scores[at])
    if not -np.inf < best < np.inf:
        raise ContractError(
            f"logits: the largest of {len(scores)} is {scores[at]}, so there is no next token",
            hint="gemma4-export inspect ARTIFACT --check finds damaged weights",
        )
    return at


def largest(scores: Float32, count: int) -> tuple[Int64, Float32]:
    """The ``count`` largest scores above -inf and all that equal the smallest of them: ids, ascending, and scores.

    Raises:
        ContractError: a score is NaN, or none is a number above -inf.
    """
    most_likely(scores)
    ids, found = likely(scores, count)
    if len(ids) > count:
        (taken,) = (found >= np.partition(found, len(found) - count)[len(found) - count]).nonzero()
        ids, found = ids[taken], found[taken]
    if found.min() == -np.inf:
        (taken,) = (found > -np.inf).nonzero()
        ids, found = ids[taken], found[taken]
    return ids, found


def likely(scores: Float32, count: int, mask: Mask | None = None) -> tuple[Int64, Float32]:
    """All scores above some bound that leaves ``count`` or more, few more where it can; NaNs among them.

    The bound comes from a sample and is lowered until it leaves enough, so a sample that misleads costs time only.

    Args:
        scores: [V].
        count: at most V.
        mask: [V] to work in; None: a new one.
    Returns:
        ids, ascending, and scores.
    """
    for bound in _bounds(scores, count):
        # What is not less, so that a NaN is seen.
        mask = np.less(scores, bound, out=mask)
        (ids,) = np.logical_not(mask, out=mask).nonzero()
        if len(ids) >= count:
            break
    return ids, scores[ids]


def _bounds(scores: Float32, count: int) -> Iterator[np.float32 | float]:
    """Scores that ``count`` others or more are likely to reach, from the highest; the last one all do."""
    rows = len(scores) // _EVERY
    size = rows * _RUN
    if size >= _MIN_SAMPLE:
        sample = scores[: rows * _EVERY].reshape(rows, _EVERY)[:, :_RUN].ravel()
        mean = count * size / len(scores)  # of the wanted ones in the sample, were it drawn by lot; three sigmas more
        rank = int(mean + 3 * mean**0.5 + 2)
        while rank <= size // 2:
            sample.partition(size - rank)
            yield sample[size - rank]
            rank *= 8
    yield -np.inf
