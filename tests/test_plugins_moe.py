"""Gemma4MoE: torch op against the float64 reference, against transformers, and the mutants that must not pass."""

# ruff: noqa: N803 (shape letters are capitals, as in the contract)

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_export.configs.errors import ContractError
from gemma4_export.plugins.moe import reference, torch_op  # importing torch_op registers torch.ops.gemma4.moe
from gemma4_export.plugins.moe.reference import moe

# Unit roundoff of each dtype; below it, what the op computes in.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
COMPUTED_IN = {dtype: torch.promote_types(dtype, torch.float32) for dtype in ROUNDOFF}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The inputs of one call, float64 values that are exact in the dtype under test."""

    hidden_states: Array
    router_logits: Array
    per_expert_scale: Array
    gate_up_proj: Array
    down_proj: Array
    top_k: int

    def arrays(self) -> tuple[Array, ...]:
        return (self.hidden_states, self.router_logits, self.per_expert_scale, self.gate_up_proj, self.down_proj)

    def reference(self) -> Array:
        return moe(*self.arrays(), top_k=self.top_k)

    def torch(self, dtype: torch.dtype) -> torch.Tensor:
        result: torch.Tensor = torch.ops.gemma4.moe(*(torch.from_numpy(a).to(dtype) for a in self.arrays()), self.top_k)
        return result


def make_call(
    *,
    B: int = 1,
    T: int,
    E: int = 16,
    X: int = 8,
    F: int = 12,
    top_k: int,
    router: str = "random",
    dtype: torch.dtype = torch.float32,
) -> Call:
    generator = np.random.default_rng((B, T, E, X, F, top_k))

    def normal(*shape: int, size: float = 1.0) -> Array:
        return torch.from_numpy(size * generator.standard_normal(shape)).to(dtype).double().numpy()

    logits = normal(B, T, X)
    if router == "one expert":
        logits[..., X // 2] = 9.0
    elif router == "all experts":
        logits[:] = -1.0
        rows = np.arange(B * T).reshape(B, T)
        for j in range(top_k):
            np.put_along_axis(logits, ((rows * top_k + j) % X)[..., None], 2.0 - j / 8, axis=-1)
    elif router == "ties":
        logits = np.round(logits)
    return Call(
        hidden_states=normal(B, T, E),
        router_logits=logits,
        per_expert_scale=torch.linspace(0.5, 2.0, X).to(dtype).double().numpy(),
        gate_up_proj=normal(X, 2 * F, E, size=E**-0.5),
        down_proj=normal(X, E, F, size=F**-0.5),
        top_k=top_k,
    )


CASES = {
    "one token, one expert": {"T": 1, "top_k": 1},
    "one token, eight of sixteen": {"T": 1, "X": 16, "top_k": 8},
    "no token": {"T": 0, "top_k": 2},
    "seven tokens, k = 1": {"B": 2, "T": 7, "top_k": 1},
    "seven tokens, k = 8": {"T": 7, "X": 24, "top_k": 8},
    "every expert for every token": {"T": 3, "X": 8, "top_k": 8},
    "all experts hit": {"T": 8, "X": 8, "top_k": 2, "router": "all experts"},
    "one expert hit": {"T": 9, "top_k": 1, "router": "one expert"},
    "ties": {"T": 20, "X": 6, "top_k": 3, "router": "ties"},
    "odd sizes": {"B": 3, "T": 5, "E": 33, "X": 5, "F": 17, "top_k": 3},
}


def bound(call: Call, expected: Array, dtype: torch.dtype) -> Array:
    """How far a computation in fp32 (fp64 for fp64) may be from the exact one, per output element.

    Each sum of n products is off by at most n u times the sum of their magnitudes. gelu has slope at most 1.13 and
    |gelu(z)| <= |z|, so gate and up together add 2.13 (E + 1) u; down adds F + 1, the softmax X + 8, the sum over
    experts top_k, tanh and the products 16. Then one rounding to the dtype.
    """
    magnitude = np.zeros_like(expected)
    F = call.down_proj.shape[2]
    for b, t in np.ndindex(*expected.shape[:2]):
        experts, weights = reference.route(call.router_logits[b, t], call.per_expert_scale, call.top_k)
        for expert, weight in zip(experts, weights, strict=True):
            projected = np.abs(call.gate_up_proj[expert]) @ np.abs(call.hidden_states[b, t])
            magnitude[b, t] += abs(weight) * np.abs(call.down_proj[expert]) @ (projected[:F] * projected[F:])
    E, X = call.hidden_states.shape[-1], call.router_logits.shape[-1]
    steps = 2.13 * (E + 1) + (F + 1) + (X + 8) + call.top_k + 16
    result: Array = steps * ROUNDOFF[COMPUTED_IN[dtype]] * magnitude + ROUNDOFF[dtype] * np.abs(expected)
    return result


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_torch_op_equals_reference(case: str, dtype: torch.dtype) -> None:
    call = make_call(**CASES[case], dtype=dtype)
    expected = call.reference()
    found = call.torch(dtype)
    assert found.dtype == dtype
    assert (np.abs(found.double().numpy() - expected) <= bound(call, expected, dtype)).all()


def test_the_cases_hit_what_they_say() -> None:
    def experts_hit(case: str) -> int:
        call = make_call(**CASES[case])
        rows = call.router_logits.reshape(-1, call.router_logits.shape[-1])
        return len({int(e) for row in rows for e in reference.route(row, call.per_expert_scale, call.top_k)[0]})

    assert experts_hit("all experts hit") == 8
    assert experts_hit("one expert hit") == 1


def _no_renormalisation(logits: Array, scale: Array, top_k: int) -> tuple[Array, Array]:
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    experts = np.argsort(-logits, kind="stable")[:top_k]
    return experts, probabilities[experts] * scale[experts]


def _scale_before_top_k(logits: Array, scale: Array, top_k: int) -> tuple[Array, Array]:
    probabilities = np.exp(logits - logits.max())
    probabilities = probabilities / probabilities.sum() * scale
    experts = np.argsort(-probabilities, kind="stable")[:top_k]
    return experts, probabilities[experts] / probabilities[experts].sum()


def _scale_before_renormalisation(logits: Array, scale: Array, top_k: int) -> tuple[Array, Array]:
    experts, weights = _no_renormalisation(logits, scale, top_k)
    return experts, weights / weights.sum()


def _scale_before_softmax(logits: Array, scale: Array, top_k: int) -> tuple[Array, Array]:
    experts, weights = _no_renormalisation(logits * scale, np.ones_like(scale), top_k)
    return experts, weights / weights.sum()


def _scale_dropped(logits: Array, scale: Array, top_k: int) -> tuple[Array, Array]:
    experts, weights = _no_renormalisation(logits, np.ones_like(scale), top_k)
    return experts, weights / weights.sum()


def _gelu_erf(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


FUNCTION_MUTANTS = {
    "SiLU for GELU": ("gelu_tanh", lambda x: x / (1 + np.exp(-x))),
    "exact GELU for tanh": ("gelu_tanh", _gelu_erf),
    "no renormalisation": ("route", _no_renormalisation),
    "scale before top-k": ("route", _scale_before_top_k),
    "scale before renormalisation": ("route", _scale_before_renormalisation),
    "scale before softmax": ("route", _scale_before_softmax),
    "scale dropped": ("route", _scale_dropped),
}


@pytest.mark.parametrize("mutant", FUNCTION_MUTANTS)
def test_the_tolerance_tells_a_mutant_from_the_op(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, where the tolerance is 1e-14 and the formula is all that can differ."""
    call = make_call(**CASES["seven tokens, k = 8"])
    tolerance = bound(call, call.reference(), torch.float64)
    monkeypatch.setattr(reference, *FUNCTION_MUTANTS[mutant])
    assert (np.abs(call.torch(torch.float64).numpy() - call.reference()) > tolerance).mean() > 0.9


def test_gate_and_up_are_not_interchangeable() -> None:
    call = make_call(**CASES["seven tokens, k = 8"])
    swapped = replace(call, gate_up_proj=np.roll(call.gate_up_proj, 12, axis=1))
    expected = swapped.reference()
    assert (np.abs(call.torch(torch.float32).numpy() - expected) > bound(call, expected, torch.float32)).mean() > 0.5


def test_among_equal_logits_the_lower_index_wins() -> None:
    logits = np.array([1.0, 3.0, 2.0, 3.0, 3.0, 2.0])
    scale = np.ones(6)
    assert reference.route(logits, scale, 2)[0].tolist() == [1, 3]
    assert reference.route(logits, scale, 4)[0].tolist() == [1, 3, 4, 2]
    experts, _ = torch_op.route(torch.from_numpy(logits)[None].repeat(300, 1), torch.ones(6).double(), 4)
    assert experts.tolist() == [[1, 3, 4, 2]] * 300


def test_a_large_logit_does_not_overflow() -> None:
    experts, weights = reference.route(np.array([1e4, -1e4, 9.9e3]), np.array([2.0, 1.0, 1.0]), 2)
    assert experts.tolist() == [0, 2]
    assert weights == pytest.approx([2.0, 0.0])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), T=st.integers(1, 6), top_k=st.integers(1, 5))
def test_order_of_experts_and_company_of_rows_do_not_matter(seed: int, T: int, top_k: int) -> None:
    call = make_call(T=T, X=5, top_k=top_k)
    generator = np.random.default_rng(seed)
    call = replace(call, router_logits=generator.standard_normal(call.router_logits.shape))
    whole = call.torch(torch.float64).numpy()
    order = generator.permutation(5)
    shuffled = replace(
        call,
        router_logits=call.router_logits[..., order],
        per_expert_scale=call.per_expert_scale[order],
        gate_up_proj=call.gate_up_proj[order],
        down_proj=call.down_proj[order],
    )
    np.testing.assert_allclose(shuffled.torch(torch.float64).numpy(), whole, atol=1e-12)
    row = int(generator.integers(T))
    alone = replace(
        call, hidden_states=call.hidden_states[:, row : row + 1], router_logits=call.router_logits[:, row : row + 1]
    )
    np.testing.assert_allclose(alone.torch(torch.float64).numpy(), whole[:, row : row + 1], atol=1e-12)


def test_transformers_agrees() -> None:
    """The oracle's router (after its projection) and experts give the same block output."""
    modeling = pytest.importorskip("transformers.models.gemma4.modeling_gemma4", reason="the oracle is a dev extra")
    config_module = pytest.importorskip("transformers.models.gemma4.configuration_gemma4")
    config = config_module.Gemma4TextConfig(
        hidden_size=16,
        num_experts=8,
        top_k_experts=3,
        moe_intermediate_size=12,
        enable_moe_block=True,
        num_hidden_layers=2,
    )
    config._attn_implementation = config._experts_implementation = "eager"
    router, experts = modeling.Gemma4TextRouter(config).double(), modeling.Gemma4TextExperts(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*router.parameters(), *experts.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5 + 0.1)
        residual = torch.randn(5, 16, generator=generator, dtype=torch.float64)
        expert_input = torch.randn(5, 16, generator=generator, dtype=torch.float64)
        captured: list[torch.Tensor] = []
        router.proj.register_forward_hook(lambda module, inputs, output: captured.append(output))
        _, weights, indices = router(residual)
        expected = experts(expert_input, indices, weights)
    found = moe(
        expert_input.numpy()[None],
        captured[0].numpy()[None],
        router.per_expert_scale.detach().numpy(),
        experts.gate_up_proj.detach().numpy(),
        experts.down_proj.detach().numpy(),
        top_k=3,
    )
    # transformers takes the softmax in fp32 whatever the input: 2^-24 per probability, 8 of them in a sum.
    np.testing.assert_allclose(found[0], expected.numpy(), atol=16 * 2.0**-24 * np.abs(expected.numpy()).max())


def test_opcheck() -> None:
    call = make_call(T=3, top_k=2)
    tensors = [torch.from_numpy(array).float() for array in call.arrays()]
    torch.library.opcheck(torch.ops.gemma4.moe.default, (*tensors, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k >= 1 does not hold for top_k = 0"),
        ({"top_k": 9}, "top_k <= X does not hold for top_k = 9, X = 8"),
        (
            {"gate_up_proj": np.zeros((8, 23, 16))},
            "gate_up_proj [X, 2F, E]: expected 2F to be a multiple of 2, found 23",
        ),
        ({"down_proj": np.zeros((8, 16, 11))}, "down_proj [X, E, F]: expected F = 12, found 11"),
        ({"per_expert_scale": np.ones(7)}, "per_expert_scale [X]: expected X = 8, found 7"),
        (
            {"down_proj": np.zeros((8, 16, 12), np.float32)},
            "down_proj: expected float64 like the other real tensors, found float32",
        ),
    ],
)
def test_a_broken_promise_is_an_error(changes: dict[str, Any], message: str) -> None:
    call = replace(make_call(T=3, top_k=2), **changes)
    with pytest.raises(ContractError) as error:
        call.reference()
    assert str(error.value) == f"gemma4::Gemma4MoE{': ' if 'hold' in message else ' '}{message}"
    with pytest.raises(ContractError) as error:
        torch.ops.gemma4.moe(*(torch.from_numpy(a) for a in call.arrays()), call.top_k)
    assert message in str(error.value)
