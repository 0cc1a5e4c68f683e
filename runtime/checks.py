"""Checks of what a caller passes in: one place, so that one mistake is told in the same words everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma4_export.configs.errors import ConfigError, ContractError, Gemma4Error

Int64 = np.ndarray[Any, np.dtype[np.int64]]


def integer(
    name: str, value: Any, low: int, high: int | None, hint: str, *, kind: type[Gemma4Error] = ConfigError
) -> int:
    """``value`` as a plain int; ``True`` is no integer here.

    Raises:
        ``kind``: no integer, below ``low`` or above ``high``.
    """
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise kind(f"{name}: expected an integer of at least {low}{most}, found {value!r:.60}", hint=hint)
    return int(value)


def integers(name: str, values: Any, hint: str) -> Int64:
    """``values`` as an array [N] int64; a list, a tuple or an array of one axis, and [] for an empty one.

    Raises:
        ContractError: anything else.
    """
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.asarray(values, object)
    if array.ndim == 1 and array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        found = f"{values!r:.60}" if array.ndim == 0 else f"shape {list(array.shape)} of {array.dtype}"
        raise ContractError(f"{name}: expected a list of integers, found {found}", hint=hint)
    return array.astype(np.int64)


def token_ids(values: Any, vocab_size: int) -> Int64:
    """``values`` as an array [N] int64 of ids of a vocabulary.

    Raises:
        ContractError: no list of integers, or one of them is outside the vocabulary.
    """
    ids = integers("ids", values, "model.encode(messages) or model.encode_raw(text) makes one")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        worst = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise ContractError(
            f"ids: {worst} is outside the vocabulary of {vocab_size}", hint="encode with this artifact's own tokenizer"
        )
    return ids


def text(name: str, value: Any, hint: str) -> str:
    """``value``, a string.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{name}: expected a string, found {value!r:.60}", hint=hint)
    return value


def named_values(name: str, value: Any, reserved: tuple[str, ...]) -> dict[str, Any]:
    """``value``, a mapping from names to anything, as a dict.

    Raises:
        ConfigError: no mapping, or a name in it is no string or belongs to an argument of its own.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(
            f"{name}: expected a mapping from names to values, found {value!r:.60}",
            hint=f'{name}={{"preserve_thinking": True}}',
        )
    for key in reserved:
        if key in value:
            raise ConfigError(f"{name}: {key} is no variable of the caller's", hint=f"leave {key} out of {name}")
    return dict(value)
