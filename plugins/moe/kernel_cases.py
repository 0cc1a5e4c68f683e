"""Case files for kernel_driver.cu: inputs, what the reference makes of them, and how far a kernel may be from it.

A case file is 16 little-endian int64 (``_header``), then the arrays of ``kernel.h`` in its order without gaps: inputs
as the kernel reads them, ``expected`` and ``bound`` as float64 [T, E]. A bound below zero asks for NaN. A mutant's file
holds what a wrong formula gives, and the kernel must differ from it.

    python -m gemma4_export.plugins.moe.kernel_cases FOLDER
"""

# ruff: noqa: N806 (shape letters are capitals, as in the contract)

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma4_export.plugins.moe import reference

Array = npt.NDArray[Any]
Generator = np.random.Generator

MAGIC = 0x4D6F4543617365  # "MoECase"
_FLOAT_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
_WEIGHT_FORMATS = {"float": 0, "int8": 1, "int4": 2}
# Half the distance from 1 to the next number: what one rounding to the type may cost.
_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
# fp32 sums; tensor cores cut off where fp32 would round, which costs twice as much.
_SUM_ROUNDOFF = 2.0**-23
_TF32_ROUNDOFF = 2.0**-11
# The table compares about a million elements; one in 5e8 lies beyond six standard deviations.
_SIGMAS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sizes, types and the shape of the routing; ``router`` is one of the keys of ``_LOGITS``."""

    name: str
    num_tokens: int
    top_k: int
    router: str = "random"
    num_experts: int = 16
    hidden_size: int = 96  # no multiple of the 64 columns that a tile takes along K
    intermediate_size: int = 160
    real: str = "bfloat16"
    router_type: str = "float32"
    weights: str = "float"
    block: int = 0
    scales: str = "float16"  # of int4
    gain: float = 1.0  # on hidden_states; 60 takes gate * up beyond fp16


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as its bytes in the file, and as the float64 numbers they stand for."""

    parts: tuple[Array, ...]
    values: Array
    reach: Array  # the largest magnitude a kernel's intermediate stands for, per weight: see ``_bound``


TABLE = (
    Case(name="k1-one-token", num_tokens=1, top_k=1),
    Case(name="k8-one-token", num_tokens=1, top_k=8),
    Case(name="k8-no-token", num_tokens=0, top_k=8),
    Case(name="k8-seven-tokens", num_tokens=7, top_k=8),
    Case(name="k1-seven-tokens", num_tokens=7, top_k=1),
    Case(name="k8-of-8", num_tokens=5, top_k=8, num_experts=8),
    Case(name="k8-300-tokens-all-experts", num_tokens=300, top_k=8, router="all experts"),
    Case(name="k1-300-tokens-one-expert", num_tokens=300, top_k=1, router="one expert"),
    Case(name="k3-ties", num_tokens=40, top_k=3, router="ties"),
    Case(name="k8-128-experts", num_tokens=20, top_k=8, num_experts=128, hidden_size=64, intermediate_size=64),
    Case(name="k2-wide-range", num_tokens=70, top_k=2, gain=60.0),
    Case(name="k4-nan-logit", num_tokens=9, top_k=4, router="nan"),
)
TYPES: tuple[dict[str, Any], ...] = (
    {"real": "bfloat16", "weights": "float", "router_type": "bfloat16"},
    {"real": "bfloat16", "weights": "int8", "router_type": "float32"},
    {"real": "bfloat16", "weights": "int4", "block": 32, "router_type": "bfloat16"},
    {"real": "float16", "weights": "float", "router_type": "float16"},
    {"real": "float16", "weights": "int8", "router_type": "float32"},
    {"real": "float16", "weights": "int4", "block": 32, "router_type": "float32"},
    {"real": "bfloat16", "weights": "int4", "block": 32, "router_type": "float32", "scales": "bfloat16"},
)
# Blocks above 32, and the width of 26B-A4B (E 2816, F 704) in every format a build packs.
_WIDE = Case(name="k8-width-26b", num_tokens=3, top_k=8, num_experts=10, hidden_size=2816, intermediate_size=704)
EXTRA = (
    Case(name="k8-block-64", num_tokens=33, top_k=8, hidden_size=128, intermediate_size=192, weights="int4", block=64),
    Case(
        name="k8-block-128", num_tokens=33, top_k=8, hidden_size=256, intermediate_size=128, weights="int4", block=128
    ),
    replace(_WIDE, weights="int4", block=32),
    replace(_WIDE, weights="int4", block=64, real="float16"),
    replace(_WIDE, weights="int8", num_experts=9),
)


def cases() -> Iterator[Case]:
    """Every case of the table in every combination of types, then the extra ones."""
    for types in TYPES:
        for case in TABLE:
            yield replace(case, **types)
    yield from EXTRA


def file_name(case: Case, mutant: str | None = None) -> str:
    scales = "-bf16-scales" if case.scales == "bfloat16" else ""
    weights = case.weights + (f"x{case.block}{scales}" if case.block else "")
    return f"{'mutant-' + mutant + '-' if mutant else ''}{case.real}-{weights}-{case.name}.case"


def write_case(case: Case, folder: Path, mutant: str | None = None) -> Path:
    """Write one case file; with ``mutant`` a key of ``MUTANTS``, one that a right kernel must not agree with."""
    generator = np.random.default_rng([ord(letter) for letter in case.name])
    T, E, F, X = case.num_tokens, case.hidden_size, case.intermediate_size, case.num_experts
    hidden = _floats(case.gain * generator.standard_normal((T, E)), case.real)
    logits = _floats(_LOGITS[case.router](generator, case), case.router_type)
    scale = _floats(generator.uniform(0.5, 2.0, X), case.router_type)
    gate_up = _weights(generator, (X, 2 * F, E), case)
    down = _weights(generator, (X, E, F), case)
    expected = _expected(case, hidden.values, logits.values, scale.values, gate_up.values, down.values, mutant)
    bound = _bound(case, hidden.values, logits.values, scale.values, gate_up, down, expected)
    arrays = [part for tensor in (hidden, logits, scale, gate_up, down) for part in tensor.parts] + [expected, bound]
    path = folder / file_name(case, mutant)
    with path.open("wb") as file:
        file.write(_header(case, mutant).tobytes())
        for array in arrays:
            file.write(np.ascontiguousarray(array).tobytes())
    return path


def _header(case: Case, mutant: str | None) -> Array:
    fields = [
        MAGIC,
        case.num_tokens,
        case.hidden_size,
        case.num_experts,
        case.intermediate_size,
        case.top_k,
        _FLOAT_TYPES[case.real],
        _FLOAT_TYPES[case.router_type],
        _WEIGHT_FORMATS[case.weights],
        case.block,
        int(mutant is not None),
        _FLOAT_TYPES[case.scales],
    ]
    return np.array(fields + [0] * (16 - len(fields)), "<i8")


def _random(generator: Generator, case: Case) -> Array:
    return generator.standard_normal((case.num_tokens, case.num_experts))


def _all_experts(generator: Generator, case: Case) -> Array:
    """Token t takes experts t*k, t*k + 1, … around the circle, so that all are hit."""
    logits = generator.uniform(-1, 0, (case.num_tokens, case.num_experts))
    for t, j in np.ndindex(case.num_tokens, case.top_k):
        logits[t, (t * case.top_k + j) % case.num_experts] = 2 - j / 8
    return logits


def _one_expert(generator: Generator, case: Case) -> Array:
    logits = _random(generator, case)
    logits[:, case.num_experts // 3] = 9.0
    return logits


def _ties(generator: Generator, case: Case) -> Array:
    return np.round(_random(generator, case))


def _nan(generator: Generator, case: Case) -> Array:
    logits = _random(generator, case)
    logits[0, 3] = np.nan
    logits[4] = np.nan
    return logits


_LOGITS: dict[str, Callable[[Generator, Case], Array]] = {
    "random": _random,
    "all experts": _all_experts,
    "one expert": _one_expert,
    "ties": _ties,
    "nan": _nan,
}


def _floats(values: Array, dtype: str) -> Stored:
    """Round to the dtype; NumPy has no bfloat16, so its upper 16 bits are made by hand (ties to even)."""
    if dtype != "bfloat16":
        stored = values.astype(dtype)
        return Stored((stored,), stored.astype(np.float64), np.abs(stored.astype(np.float64)))
    bits = values.astype(np.float32).view(np.uint32)
    upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    upper = np.where(np.isnan(values), np.uint16(0x7FC0), upper)
    rounded = (upper.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return Stored((upper,), rounded, np.abs(rounded))


def _weights(generator: Generator, shape: tuple[int, int, int], case: Case) -> Stored:
    """Weights [X, rows, K] of about 1/sqrt(K), in the case's format; codes and scales are drawn, nothing is rounded."""
    size = shape[-1] ** -0.5
    if case.weights == "float":
        return _floats(size * generator.standard_normal(shape), case.real)
    if case.weights == "int8":
        codes = generator.integers(-128, 128, shape, dtype=np.int8)
        scales = (size / 74 * generator.uniform(0.5, 1.5, shape[:-1])).astype(np.float32)
        values = codes * scales[..., None].astype(np.float64)
        return Stored((codes, scales), values, np.abs(values))
    codes = generator.integers(-8, 8, shape, dtype=np.int8)
    blocks = (*shape[:-1], shape[-1] // case.block)
    scales = _floats(size / 4.6 * generator.uniform(0.5, 1.5, blocks), case.scales)
    spread = np.repeat(scales.values, case.block, axis=-1)
    nibbles = (codes & 15).astype(np.uint8)
    packed = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)  # low nibble first
    return Stored((packed, *scales.parts), codes * spread, 144 * spread)


def _silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def _softmax(logits: Array) -> Array:
    exponentials: Array = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum())


def _route_without_renormalisation(logits: Array, scale: Array, top_k: int) -> tuple[Array, Array]:
    experts, _ = reference.route(logits, scale, top_k)
    return experts, _softmax(logits)[experts] * scale[experts]


def _route_scale_before_softmax(logits: Array, scale: Array, top_k: int) -> tuple[Array, Array]:
    return reference.route(logits * scale, np.ones_like(scale), top_k)


def _route_scale_before_top_k(logits: Array, scale: Array, top_k: int) -> tuple[Array, Array]:
    scaled = _softmax(logits) * scale
    experts = np.argsort(-scaled, kind="stable")[:top_k]
    return experts, scaled[experts] / scaled[experts].sum()


Route = Callable[[Array, Array, int], tuple[Array, Array]]
MUTANTS: dict[str, tuple[Route, Callable[[Array], Array]]] = {
    "silu": (reference.route, _silu),
    "no-renormalisation": (_route_without_renormalisation, reference.gelu_tanh),
    "scale-before-softmax": (_route_scale_before_softmax, reference.gelu_tanh),
    "scale-before-top-k": (_route_scale_before_top_k, reference.gelu_tanh),
}


def _expected(
    case: Case, hidden: Array, logits: Array, scale: Array, gate_up: Array, down: Array, mutant: str | None
) -> Array:
    """The reference's output in float64; NaN for tokens whose logits hold a NaN."""
    clean = np.nan_to_num(logits)
    if mutant is None:
        output = reference.moe(hidden[None], clean[None], scale, gate_up, down, top_k=case.top_k)[0]
    else:
        route, activation = MUTANTS[mutant]
        output = np.zeros_like(hidden)
        for t in range(case.num_tokens):
            for expert, weight in zip(*route(clean[t], scale, case.top_k), strict=True):
                gate, up = np.split(gate_up[expert] @ hidden[t], 2)
                output[t] += weight * (down[expert] @ (activation(gate) * up))
    output[np.isnan(logits).any(axis=-1)] = np.nan
    return np.asarray(output)


def _bound(
    case: Case, hidden: Array, logits: Array, scale: Array, gate_up: Stored, down: Stored, expected: Array
) -> Array:
    """How far a right kernel may be from ``expected``, per element [T, E]; -1 where it must give NaN.

    The signs of the summed terms are random here, so the n roundings of a sum add up like sqrt(n), each no larger than
    u times the norm of the terms; ``_SIGMAS`` of that are allowed. For int4 the terms are not code * x but up to
    144 * x: a kernel may read 136 + code and take 136 away at the end. gelu has slope at most 1.13; for negative gates
    1 + tanh cancels, which leaves an absolute error of a few u |gate|. Rounding an activation to tf32 is one more error
    per f, the pair's weight carries top_k + 56 roundings, and the output is rounded once.
    """
    u, F = _SUM_ROUNDOFF, case.intermediate_size
    bound = _ROUNDOFF[case.real] * np.abs(expected) + 2.0**-25  # the second term: fp16 below its normal range
    for t in range(case.num_tokens):
        if np.isnan(expected[t]).any():
            bound[t] = -1.0
            continue
        variance = np.zeros(case.hidden_size)
        for expert, weight in zip(*reference.route(logits[t], scale, case.top_k), strict=True):
            gate, up = np.split(gate_up.values[expert] @ hidden[t], 2)
            norms = np.sqrt(gate_up.reach[expert] ** 2 @ hidden[t] ** 2)
            gate_error, up_error = np.split(np.sqrt(case.hidden_size + 16) * u * norms, 2)
            activated = reference.gelu_tanh(gate) * up
            error = (1.13 * gate_error + 4 * u * np.abs(gate)) * (np.abs(up) + up_error)
            error += np.abs(gate) * up_error + (_TF32_ROUNDOFF + 8 * u) * np.abs(activated)
            variance += weight**2 * (down.values[expert] ** 2 @ error**2)
            variance += weight**2 * (case.top_k * F + 16) * u**2 * (down.reach[expert] ** 2 @ activated**2)
            bound[t] += (case.top_k + 56) * u * np.abs(weight * (down.values[expert] @ activated))
        bound[t] += _SIGMAS * np.sqrt(variance)
    return bound


def main(folder: Path) -> None:
    """Write every case and every mutant into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases():
        write_case(case, folder)
    for types in TYPES:
        for mutant in MUTANTS:
            write_case(replace(TABLE[3], **types), folder, mutant)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
