"""Named mutants: one fact of the model changed in the one place where it lives, seen by the parity test.

A mutant goes the whole way, from where it sits to logits: build, load, forward, compare with transformers on a prompt
of several buffers. It is killed when its logits are wrong by more than ten times the bound that the right ones keep.

Two facts cannot be seen in logits at all: each multiplies all channels of a token alike, and the RMS norm that follows
undoes that. What enters the norm is compared in their place.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
import torch
from artifacts import artifact, build_artifact, expected, traces
from oracle import oracle
from tiny import STRUCTURES

from gemma4_export.configs.manifest import Manifest, TableEntry
from gemma4_export.configs.model import LayerConfig, ModelConfig
from gemma4_export.exporter.models import text
from gemma4_export.exporter.passes import lower_moe
from gemma4_export.runtime import Gemma4, kv_cache

Patch = Callable[[pytest.MonkeyPatch], None]
Layers = tuple[LayerConfig, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Three places where a fact can live: a line of code, the resolved config, the manifest


def line(owner: type | ModuleType, function: str, *changes: tuple[str, str]) -> Patch:
    """The function with a piece of its source changed; a piece that is not there exactly once is an error."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, function)
        source = textwrap.dedent(inspect.getsource(original))
        for right, wrong in changes:
            assert source.count(right) == 1, f"{function}: {right!r} is there {source.count(right)} times; update me"
            source = source.replace(right, wrong)
        flags = __future__.annotations.compiler_flag
        code = compile(source, f"<mutant of {function}>", "exec", flags=flags)
        made: dict[str, object] = {}
        exec(code, inspect.getmodule(original).__dict__, made)
        patch.setattr(owner, function, made[function])

    return apply


def layers(edit: Callable[[Layers], Layers]) -> Patch:
    """Every config resolves to other layers."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        resolve = ModelConfig.from_hf

        def wrong(config: dict[str, object]) -> ModelConfig:
            right = resolve(config)
            return replace(right, layers=edit(right.layers))

        patch.setattr(ModelConfig, "from_hf", staticmethod(wrong))

    return apply


def manifest(edit: Callable[[Manifest], Manifest]) -> Patch:
    """Every manifest says something else."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        read = Manifest.from_json
        patch.setattr(Manifest, "from_json", staticmethod(lambda text: edit(read(text))))

    return apply


def unscaled(table: TableEntry | None) -> TableEntry:
    assert table is not None
    return replace(table, scale=1.0)


def own_kv(right: Layers) -> Layers:
    assert any(not layer.owns_kv for layer in right)
    return tuple(replace(layer, kv_source=layer.index) for layer in right)


def earlier_donor(right: Layers) -> Layers:
    """Shared layers read the last but one owner of their type, where there are several."""
    wrong = []
    for layer in right:
        if not layer.owns_kv:
            owners = [other.index for other in right if other.owns_kv and other.layer_type == layer.layer_type]
            layer = replace(layer, kv_source=owners[-2:][0])
        wrong.append(layer)
    assert tuple(wrong) != right
    return tuple(wrong)


def windowed(change: int) -> Callable[[Manifest], Manifest]:
    def edit(right: Manifest) -> Manifest:
        kv, window = right.kv, right.kv.sliding_window
        assert window is not None
        # The buffer stays as long as such a window needs.
        kv = replace(kv, sliding_window=window + change, sliding_slots=kv.sliding_slots + change)
        return replace(right, kv=kv)

    return edit


def rotated_width_as_denominator(right: Manifest) -> Manifest:
    rope = right.rope_global
    assert 2 * rope.num_frequencies < rope.head_dim
    return replace(right, rope_global=replace(rope, head_dim=2 * rope.num_frequencies))


# ---------------------------------------------------------------------------------------------------------------------
# The table

PER_LAYER, SHARING, K_EQ_V, MOE = ("e4b", "e2b"), ("e4b", "e2b"), ("12b", "26b-a4b", "31b"), ("26b-a4b",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    name: str
    patch: Patch
    structures: tuple[str, ...] = STRUCTURES
    since: Literal["trace", "lower", "run"]
    """The first stage that the changed fact reaches; what comes before is taken from the right build."""
    storage: dict[str, object] = field(default_factory=dict)
    before_norm: str | None = None
    """The norm that hides the mutant from the logits; None: they show it."""


MUTANTS = (
    Mutant(
        name="embedding scale dropped",
        patch=manifest(lambda right: replace(right, embed_tokens=unscaled(right.embed_tokens))),
        since="run",
    ),
    Mutant(
        name="PLE row without x16",  # sqrt(P); P is 256 in the released models
        patch=manifest(lambda right: replace(right, embed_tokens_per_layer=unscaled(right.embed_tokens_per_layer))),
        structures=PER_LAYER,
        since="run",
    ),
    Mutant(
        name="(c+t)/sqrt(2) dropped",
        patch=line(text.Decoder, "merge_per_layer_inputs", (" * 2**-0.5", "")),
        structures=PER_LAYER,
        since="trace",
        before_norm="layers.0.post_per_layer_input_norm",
    ),
    Mutant(
        name="a KV-shared layer using its own K/V",
        patch=layers(own_kv),
        structures=SHARING,
        since="trace",
        storage={"redundant_shared_kv": True},  # where else would such a layer have its own from
    ),
    Mutant(name="the wrong donor", patch=layers(earlier_donor), structures=SHARING, since="trace"),
    Mutant(name="window one longer", patch=manifest(windowed(+1)), since="run"),
    Mutant(name="window one shorter", patch=manifest(windowed(-1)), since="run"),
    Mutant(
        name="p-RoPE with the rotated width as denominator", patch=manifest(rotated_width_as_denominator), since="run"
    ),
    Mutant(
        name="V taken after k_norm",
        patch=line(
            text.Attention,
            "forward",
            (
                "weightless_rms_norm(self._heads(value_projection, self.layer.num_kv_heads), self.eps)",
                "weightless_rms_norm((nn.Identity() if self.v_proj else self.k_norm)("
                "self._heads(value_projection, self.layer.num_kv_heads)), self.eps)",
            ),
        ),
        structures=K_EQ_V,
        since="trace",
    ),
    Mutant(name="SiLU for GELU in the MLP", patch=line(text.MLP, "forward", ("gelu(", "F.silu(")), since="trace"),
    Mutant(
        name="SiLU for GELU in the per-layer gate",
        patch=line(text.DecoderLayer, "forward", ("gelu(", "F.silu(")),
        structures=PER_LAYER,
        since="trace",
    ),
    Mutant(
        name="SiLU for GELU in the experts",
        patch=line(
            lower_moe.LowerMoE,
            "call",
            ('op("Gelu", gate, approximate="tanh")', 'op("Mul", gate, op("Sigmoid", gate))'),
        ),
        structures=MOE,
        since="lower",
    ),
    Mutant(
        name="no renormalisation of the top-k weights",
        patch=line(
            lower_moe,
            "_route",
            ('"TopK", 2, logits,', '"TopK", 2, op("Softmax", logits, axis=-1),'),
            ('op("Softmax", best, axis=-1)', "best"),
        ),
        structures=MOE,
        since="lower",
        before_norm="layers.0.post_feedforward_layernorm_2",
    ),
    Mutant(
        name="per-expert scale before the top-k",
        patch=line(
            lower_moe,
            "_route",
            ('"TopK", 2, logits,', '"TopK", 2, op("Mul", op("Softmax", logits, axis=-1), per_expert_scale),'),
            (
                'op("Mul", op("Softmax", best, axis=-1), op("Gather", per_expert_scale, experts, axis=0))',
                'op("Div", best, op("ReduceSum", best, op.ints(-1), keepdims=1))',
            ),
        ),
        structures=MOE,
        since="lower",
    ),
    Mutant(
        name="experts' rows left in the order of the experts",
        patch=line(
            lower_moe.LowerMoE,
            "call",
            ('op("Gather", outputs, place, axis=0)', 'op("Gather", outputs, order, axis=0)'),
        ),
        structures=MOE,
        since="lower",
    ),
    Mutant(
        name="layer_scalar dropped",
        patch=line(text.DecoderLayer, "forward", ("hidden_states * self.layer_scalar, cache", "hidden_states, cache")),
        since="trace",
    ),
    Mutant(
        name="compaction moving one entry too few: not the newest",
        patch=line(
            kv_cache,
            "move_slots",
            ("head[:count] = head[first : first + count]", "head[: count - 1] = head[first : first + count - 1]"),
        ),
        since="run",
    ),
    Mutant(
        name="compaction moving one entry too few: not the oldest",
        patch=line(
            kv_cache,
            "move_slots",
            ("head[:count] = head[first : first + count]", "head[1:count] = head[first + 1 : first + count]"),
        ),
        since="run",
    ),
)


def cases() -> list[object]:
    """Mutants that trace again take five seconds each: the last structure in the quick tier, the others in the full."""
    found = []
    for mutant in MUTANTS:
        for structure in mutant.structures:
            is_slow = mutant.since == "trace" and structure != mutant.structures[-1]
            marks = [pytest.mark.full] if is_slow else []
            found.append(pytest.param(mutant, structure, marks=marks, id=f"{mutant.name}-{structure}"))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The one path that all of them go


def wrong_by(folder: Path, structure: str, storage: dict[str, object], before_norm: str | None = None) -> float:
    """Bounds by which this artifact differs from transformers: its logits, or what enters one of its norms."""
    want, runtime = expected(structure, **storage), Gemma4.load(folder)
    if before_norm is None:
        logits = runtime.forward(want.ids)
        assert np.isfinite(logits).all()
        return want.difference(logits) / want.bound
    ids = want.ids[: runtime.artifact.manifest.chunk]
    probe = NormProbe(runtime.artifact.path("graphs/decoder.onnx"), before_norm)
    runtime.decoder._session = probe
    runtime.forward(ids)
    right, bound = oracle_before_norm(structure, before_norm, ids)
    assert np.isfinite(probe.seen).all()
    return np.abs(probe.seen - right).max() / bound


class NormProbe:
    """A session that shows what enters a norm. Nothing is bound: it is good for one call on an empty cache."""

    def __init__(self, graph: Path, norm: str) -> None:
        probed = ir.load(graph)
        (node,) = (node for node in probed.graph if [v.name for v in node.inputs if v][1:2] == [f"{norm}.weight"])
        assert node.op_type == "RMSNormalization"
        probed.graph.outputs.append(node.inputs[0])
        self._names = ["logits", node.inputs[0].name]
        ir.save(probed, graph.with_name("probe.onnx"))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors: without binding, TensorScatter warns that it copies
        self._session = onnxruntime.InferenceSession(graph.with_name("probe.onnx"), options)

    def run(self, feeds: dict[str, np.ndarray], cache: kv_cache.KVCache, out: np.ndarray | None = None) -> np.ndarray:
        past = {
            f"past_key_values.{layer}.{part}": buffer
            for layer, pair in cache.buffers.items()
            for part, buffer in zip(("key", "value"), pair, strict=True)
        }
        logits, self.seen = self._session.run(self._names, dict(feeds) | past)
        return logits


def oracle_before_norm(structure: str, norm: str, ids: list[int]) -> tuple[np.ndarray, float]:
    """What enters the norm in transformers, and how far float32 may be off: 4 x |float32 - float64|, as for logits."""
    reference, seen = oracle(tiny.checkpoint(structure)), []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for network in (reference._double, reference.model)
        for name, module in network.named_modules()
        if name.endswith(f"language_model.{norm}")
    ]
    reference.bound(ids)  # a pass in float64, a pass in float32
    for hook in hooks:
        hook.remove()
    exact, single = seen
    assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
    return single.numpy(), 4 * (single.double() - exact).abs().max().item()


def right_artifact(structure: str, storage: dict[str, object]) -> Path:
    return artifact(structure, fresh_trace=False, **storage)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_right_artifact_passes(structure):
    assert wrong_by(right_artifact(structure, {}), structure, {}) <= 1


@pytest.mark.parametrize("structure", SHARING)
def test_the_right_artifact_passes_with_unused_kv_weights(structure):
    storage = {"redundant_shared_kv": True}
    assert wrong_by(right_artifact(structure, storage), structure, storage) <= 1


@pytest.mark.parametrize(
    ("structure", "norm"),
    [(structure, m.before_norm) for m in MUTANTS if m.before_norm for structure in m.structures],
)
def test_the_right_artifact_passes_before_norms(structure, norm, tmp_path):
    with traces(fresh=False):
        folder = build_artifact(tiny.checkpoint(structure), tmp_path / "artifact")
    assert wrong_by(folder, structure, {}, norm) <= 1


@pytest.mark.parametrize(("mutant", "structure"), cases())
def test_mutant_is_killed(mutant, structure, tmp_path, monkeypatch):
    folder = right_artifact(structure, mutant.storage)
    expected(structure, **mutant.storage)  # the oracle is not mutated
    mutant.patch(monkeypatch)
    checkpoint, out = tiny.checkpoint(structure, **mutant.storage), tmp_path / "mutant"
    if mutant.since == "trace":
        folder = build_artifact(checkpoint, out)
    elif mutant.since == "lower":
        with traces(fresh=False):
            folder = build_artifact(checkpoint, out)
    assert wrong_by(folder, structure, mutant.storage, mutant.before_norm) > 10
