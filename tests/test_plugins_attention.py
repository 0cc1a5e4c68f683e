"""Gemma4Attention and Gemma4SharedAttention: torch ops against the float64 reference, and what a run of slots means."""

# ruff: noqa: N803 (shape letters are capitals, as in the contract)

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_export.configs.errors import ContractError
from gemma4_export.plugins.attention import torch_op  # noqa: F401  (registers the torch ops)
from gemma4_export.plugins.attention.reference import attention, shared_attention

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The inputs of one call, float64 values that are exact in the dtype under test."""

    query: Array
    key: Array
    value: Array
    key_cache: Array
    value_cache: Array
    write_index: Array
    visible_start: Array | None
    visible_end: Array
    scale: float

    def reference(self) -> tuple[Array, Array, Array]:
        return attention(*self.tensors(), scale=self.scale)

    def tensors(self) -> tuple[Any, ...]:
        return (
            self.query,
            self.key,
            self.value,
            self.key_cache,
            self.value_cache,
            self.write_index,
            self.visible_start,
            self.visible_end,
        )

    def torch_tensors(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        def convert(array: Array | None) -> torch.Tensor | None:
            if array is None:
                return None
            tensor = torch.from_numpy(array)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return [convert(array) for array in self.tensors()]


def make_call(
    *,
    B: int,
    T: int,
    Hq: int,
    Hkv: int,
    D: int,
    C: int,
    write: int,
    window: int | None,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """A causal call at slot ``write``; with a window each query sees itself and the window - 1 slots before it."""
    generator = np.random.default_rng((B, T, Hq, Hkv, D, C, write))

    def normal(*shape: int) -> Array:
        return torch.from_numpy(generator.standard_normal(shape)).to(dtype).double().numpy()

    write_index = np.full(B, write, np.int64)
    last = write_index[:, None] + np.arange(T)
    return Call(
        query=normal(B, T, Hq, D),
        key=normal(B, T, Hkv, D),
        value=normal(B, T, Hkv, D),
        key_cache=normal(B, Hkv, C, D),
        value_cache=normal(B, Hkv, C, D),
        write_index=write_index,
        visible_start=None if window is None else np.maximum(last - window + 1, 0).astype(np.int32),
        visible_end=(last + 1).astype(np.int32),
        scale=0.7,
    )


CASES = {
    "first token": {"B": 1, "T": 1, "Hq": 1, "Hkv": 1, "D": 4, "C": 1, "write": 0, "window": None},
    "decode, one group": {"B": 1, "T": 1, "Hq": 4, "Hkv": 4, "D": 8, "C": 12, "write": 6, "window": None},
    "groups of two": {"B": 2, "T": 3, "Hq": 4, "Hkv": 2, "D": 8, "C": 12, "write": 2, "window": 4},
    "groups of eight": {"B": 1, "T": 5, "Hq": 8, "Hkv": 1, "D": 16, "C": 20, "write": 9, "window": None},
    "two groups of eight, window in the middle": {
        "B": 2,
        "T": 4,
        "Hq": 16,
        "Hkv": 2,
        "D": 8,
        "C": 40,
        "write": 20,
        "window": 5,
    },
    "last slots": {"B": 1, "T": 7, "Hq": 4, "Hkv": 2, "D": 8, "C": 16, "write": 9, "window": 4},
    "longer than the window": {"B": 1, "T": 16, "Hq": 2, "Hkv": 1, "D": 32, "C": 19, "write": 3, "window": 4},
    "window of one": {"B": 1, "T": 3, "Hq": 2, "Hkv": 1, "D": 4, "C": 8, "write": 2, "window": 1},
}


def bound(call: Call, dtype: torch.dtype) -> float:
    """How far an fp32 computation of ``call`` may be from the exact one, at any element of the output.

    A score sums D products, so it is off by at most (D + 1) u |scale| |q| |k|. A weight is exp of a score over a sum
    of up to C of them: relative error twice that, plus C + 8 roundings. The output is a convex combination of values,
    summed over up to C slots, then rounded once to the dtype.
    """
    u = 2.0**-24
    D, C = call.query.shape[-1], call.key_cache.shape[2]
    longest_query = np.linalg.norm(call.query, axis=-1).max()
    longest_key = max(np.linalg.norm(call.key_cache, axis=-1).max(), np.linalg.norm(call.key, axis=-1).max())
    largest_value = max(np.abs(call.value_cache).max(), np.abs(call.value).max())
    score_error = (D + 1) * u * abs(call.scale) * longest_query * longest_key
    return float((2 * score_error + (2 * C + 8) * u + ROUNDOFF[dtype]) * largest_value)


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_torch_op_equals_reference(case: str, dtype: torch.dtype) -> None:
    call = make_call(**CASES[case], dtype=dtype)
    expected, present_key, present_value = call.reference()
    inputs = call.torch_tensors(dtype)
    before = [None if tensor is None else tensor.clone() for tensor in inputs]
    output, found_key, found_value = torch.ops.gemma4.attention(*inputs, call.scale)
    assert output.dtype == dtype
    assert np.abs(output.double().numpy() - expected).max() <= bound(call, dtype)
    assert (found_key.double().numpy() == present_key).all()
    assert (found_value.double().numpy() == present_value).all()
    for tensor, copy in zip(inputs, before, strict=True):
        assert tensor is None or torch.equal(tensor, copy), "inputs are never changed"


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_shared_attention_reads_the_donors_present_cache(case: str, dtype: torch.dtype) -> None:
    """On the rows R that are wanted, the shared op over the present caches gives what the owner gets."""
    call = make_call(**CASES[case], dtype=dtype)
    expected, present_key, present_value = call.reference()
    rows = sorted({0, call.query.shape[1] // 2, call.query.shape[1] - 1})
    start = None if call.visible_start is None else call.visible_start[:, rows]
    arguments = (call.query[:, rows], present_key, present_value, start, call.visible_end[:, rows])
    assert (shared_attention(*arguments, scale=call.scale) == expected[:, rows]).all()

    tensors = [None if array is None else torch.from_numpy(array) for array in arguments]
    tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
    found = torch.ops.gemma4.shared_attention(*tensors, call.scale)
    assert np.abs(found.double().numpy() - expected[:, rows]).max() <= bound(call, dtype)


def _shift(array: Array | None, by: int) -> Array:
    assert array is not None
    return (array + by).astype(array.dtype)


MUTANTS = {
    "run one longer": lambda call: replace(call, visible_start=_shift(call.visible_start, -1)),
    "run one shorter": lambda call: replace(call, visible_start=_shift(call.visible_start, 1)),
    "end one later": lambda call: replace(call, visible_end=_shift(call.visible_end, 1)),
    "end one earlier": lambda call: replace(call, visible_end=_shift(call.visible_end, -1)),
    "start ignored": lambda call: replace(call, visible_start=None),
    "K and V swapped": lambda call: replace(
        call, key=call.value, value=call.key, key_cache=call.value_cache, value_cache=call.key_cache
    ),
    "caches swapped": lambda call: replace(call, key_cache=call.value_cache, value_cache=call.key_cache),
    "scale dropped": lambda call: replace(call, scale=1.0),
    "written one slot late": lambda call: replace(call, write_index=call.write_index + 1),
    "KV heads interleaved": lambda call: replace(
        call, query=call.query.reshape(2, 4, 2, 8, 8).swapaxes(2, 3).reshape(call.query.shape)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_tolerance_tells_a_mutant_from_the_op(mutant: str) -> None:
    call = make_call(**CASES["two groups of eight, window in the middle"])
    expected, _, _ = MUTANTS[mutant](call).reference()
    output, _, _ = torch.ops.gemma4.attention(*call.torch_tensors(torch.float32), call.scale)
    worst = np.abs(output.double().numpy() - expected).max(axis=(0, 1, 3))
    assert worst.max() > 100 * bound(call, torch.float32)


def test_a_run_of_one_slot_returns_that_value() -> None:
    call = make_call(**CASES["window of one"])
    output, _, _ = call.reference()
    assert (output == np.repeat(call.value, 2, axis=2)).all()


@pytest.mark.parametrize("op", ["reference", "torch"])
def test_slots_outside_the_runs_may_hold_anything(op: str) -> None:
    call = make_call(**CASES["two groups of eight, window in the middle"])
    assert call.visible_start is not None
    expected, _, _ = call.reference()
    dirty = replace(call, key_cache=call.key_cache.copy(), value_cache=call.value_cache.copy())
    outside = np.ones(40, bool)
    outside[call.visible_start.min() : call.visible_end.max()] = False
    dirty.key_cache[:, :, outside] = np.nan
    dirty.value_cache[:, :, outside] = np.inf
    if op == "reference":
        assert (dirty.reference()[0] == expected).all()
    else:
        output, _, _ = torch.ops.gemma4.attention(*dirty.torch_tensors(torch.float64), call.scale)
        assert np.abs(output.numpy() - expected).max() < 1e-12  # fp64 in, fp64 arithmetic


@settings(deadline=None, max_examples=40)
@given(
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 4),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 6),
    free=st.integers(0, 3),
)
def test_chunks_equal_one_call(
    num_kv_heads: int, group_size: int, chunks: list[int], window: int | None, free: int
) -> None:
    """Feeding tokens in chunks, caches handed on, gives the same output and caches as feeding them at once."""
    T = sum(chunks)
    whole = make_call(B=1, T=T, Hq=num_kv_heads * group_size, Hkv=num_kv_heads, D=4, C=T + free, write=0, window=window)
    expected, expected_key, expected_value = torch.ops.gemma4.attention(
        *whole.torch_tensors(torch.float64), whole.scale
    )
    query, key, value, key_cache, value_cache, _, start, end = whole.torch_tensors(torch.float64)
    done = 0
    for chunk in chunks:
        part = slice(done, done + chunk)
        output, key_cache, value_cache = torch.ops.gemma4.attention(
            query[:, part],
            key[:, part],
            value[:, part],
            key_cache,
            value_cache,
            torch.tensor([done]),
            None if start is None else start[:, part],
            end[:, part],
            whole.scale,
        )
        assert torch.allclose(output, expected[:, part], rtol=0, atol=1e-12)
        done += chunk
    assert torch.equal(key_cache, expected_key)
    assert torch.equal(value_cache, expected_value)


def test_rows_of_a_batch_write_at_their_own_index() -> None:
    call = make_call(**CASES["groups of two"])
    write_index = np.array([2, 7], np.int64)
    end = (write_index[:, None] + np.arange(3) + 1).astype(np.int32)
    call = replace(
        call, write_index=write_index, visible_end=end, visible_start=np.maximum(end - 4, 0).astype(np.int32)
    )
    expected, present_key, _ = call.reference()
    output, found_key, _ = torch.ops.gemma4.attention(*call.torch_tensors(torch.float32), call.scale)
    assert np.abs(output.double().numpy() - expected).max() <= bound(call, torch.float32)
    assert (present_key[1, :, 7:10] == call.key[1].swapaxes(0, 1)).all()
    assert (found_key.double().numpy() == present_key).all()


@pytest.mark.parametrize("start", [True, False])
def test_opcheck(start: bool) -> None:
    call = make_call(**CASES["groups of two"])
    call = call if start else replace(call, visible_start=None)
    query, _, _, key_cache, value_cache, _, visible_start, visible_end = inputs = call.torch_tensors(torch.float32)
    torch.library.opcheck(torch.ops.gemma4.attention.default, (*inputs, 0.7))
    torch.library.opcheck(
        torch.ops.gemma4.shared_attention.default, (query, key_cache, value_cache, visible_start, visible_end, 0.7)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"write_index": np.array([2, 10])},
            "write_index + T <= C does not hold for write_index[1] = 10, T = 3, C = 12",
        ),
        ({"write_index": np.array([-1, 2])}, "write_index >= 0 does not hold for write_index[0] = -1"),
        (
            {"visible_end": np.array([[3, 4, 5], [3, 0, 5]], np.int32)},
            "visible_start < visible_end does not hold for visible_start[1, 1] = 0, visible_end[1, 1] = 0",
        ),
        (
            {"visible_end": np.array([[3, 4, 5], [3, 4, 13]], np.int32)},
            "visible_end <= C does not hold for visible_end[1, 2] = 13, C = 12",
        ),
        (
            {"visible_start": np.array([[0, 0, -3], [0, 0, 0]], np.int32)},
            "visible_start >= 0 does not hold for visible_start[0, 2] = -3",
        ),
        ({"query": np.zeros((2, 3, 5, 8))}, "Hq % Hkv == 0 does not hold for Hq = 5, Hkv = 2"),
        ({"value_cache": np.zeros((2, 2, 11, 8))}, "value_cache [B, Hkv, C, D]: expected C = 12, found 11"),
        ({"visible_end": np.zeros((2, 3), np.int64)}, "visible_end: expected int32, found int64"),
    ],
)
def test_a_broken_promise_is_an_error(changes: dict[str, Array], message: str) -> None:
    call = replace(make_call(**CASES["groups of two"]), **changes)
    with pytest.raises(ContractError) as error:
        call.reference()
    assert message in str(error.value)
    assert str(error.value).startswith("gemma4::Gemma4Attention")
    with pytest.raises(ContractError) as error:
        torch.ops.gemma4.attention(*call.torch_tensors(torch.float64), call.scale)
    assert message in str(error.value)


def test_a_run_outside_the_donors_cache_is_an_error() -> None:
    call = make_call(**CASES["groups of two"])
    end = np.full((2, 3), 13, np.int32)
    with pytest.raises(ContractError, match="gemma4::Gemma4SharedAttention: visible_end <= C does not hold"):
        shared_attention(call.query, call.key_cache, call.value_cache, None, end, scale=1.0)
