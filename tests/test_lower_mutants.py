"""Named mutants of the TensorRT lowering: one fact changed where it lives, seen by the test of the float32 twin.

A mutant is killed when the twin's logits are wrong by more than ten times the bound that the right ones keep, in calls
of seven tokens and of one. One fact cannot be seen in logits: it multiplies all channels alike, and the norm that
follows undoes that. What enters the norm is compared in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from artifacts import traces
from engine_twin import EngineTwin, engine_artifact, write_engine_artifact
from test_int4_parity import grid_artifact, grid_checkpoint
from test_lower_tensorrt import BOUND, expected, worst
from test_mutants import NormProbe, Patch, earlier_donor, layers, line

from gemma4_export.exporter import split_groups
from gemma4_export.exporter.models import text
from gemma4_export.exporter.passes import trt_attention, trt_interface, trt_moe, trt_weights
from gemma4_export.runtime import Gemma4

ATTENTION = trt_attention.LowerAttentionToTensorRT


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    name: str
    patch: Patch
    structure: str = "e2b"
    experts: str = "plugin"
    recipe: str = "int4"
    since: Literal["trace", "lower"] = "lower"
    """The first stage that the changed fact reaches; what comes before is taken from the right build."""


MUTANTS = (
    Mutant(
        name="window one shorter at its old edge",
        patch=line(ATTENTION, "_visible", ('"GreaterOrEqual"', '"Greater"')),
    ),
    Mutant(
        name="a sliding query sees the token after it",
        patch=line(ATTENTION, "_visible", ('op("Less", slots, ends)', 'op("LessOrEqual", slots, ends)')),
    ),
    Mutant(
        name="a global query sees the token after it",
        patch=line(trt_attention, "_global_slots", ('"Less"', '"LessOrEqual"')),
    ),
    Mutant(
        name="the visible run read one slot late",
        patch=line(trt_attention, "_sliding_slots", ("op.scalar(0, _INT64), length", "op.scalar(1, _INT64), length")),
    ),
    Mutant(
        name="global keys and values written one slot late",
        patch=line(
            ATTENTION,
            "_write",
            ("node.write_index,", 'node.write_index if node.start else op("Add", node.write_index, op.ints(1)),'),
        ),
    ),
    Mutant(
        name="keys and values change places in the caches",
        patch=line(ATTENTION, "_write", ("zip(node.new,", "zip(node.new[::-1],")),
    ),
    Mutant(
        name="query heads paired with the wrong KV head",
        patch=line(
            ATTENTION,
            "_attend_written_out",
            ("op.ints(1, -1, num_kv_heads, group, head_dim)", "op.ints(1, -1, group, num_kv_heads, head_dim)"),
            ("perm=[0, 2, 1, 3, 4])  # [1", "perm=[0, 3, 1, 2, 4])  # [1"),
        ),
        structure="31b",
    ),
    Mutant(
        name="scales of blocks transposed",
        patch=line(
            trt_weights.StoredWeights,
            "values",
            (
                'return op("DequantizeLinear", codes, narrow, axis=len',
                "assert placed.scales is not None\n"
                "        if len(placed.shape) == 2:\n"
                '            narrow = op("Reshape", narrow, op.ints(placed.scales.per_row, -1))\n'
                '            narrow = op("Transpose", narrow, perm=[1, 0])\n'
                '        return op("DequantizeLinear", codes, narrow, axis=len',
            ),
        ),
        structure="26b-a4b",
    ),
    Mutant(
        name="a later group takes an earlier one's values for keys",
        patch=line(
            split_groups,
            "_cut_values",
            (
                "cuts[names.present_value(layer)] = names.past_value",
                "cuts[names.present_value(layer)] = names.past_key",
            ),
        ),
    ),
    Mutant(name="a KV-shared layer reads the wrong donor", patch=layers(earlier_donor), since="trace"),
    Mutant(
        name="softcap dropped",
        patch=line(
            text.Decoder,
            "head",
            (
                "torch.tanh(logits / self.config.final_logit_softcapping) * self.config.final_logit_softcapping",
                "logits",
            ),
        ),
        since="trace",
    ),
    Mutant(
        name="norm weights used as 1 + weight",
        patch=line(
            text.RMSNorm,
            "forward",
            ("self.weight, self.eps)", "self.weight, self.eps) + weightless_rms_norm(hidden_states, self.eps)"),
        ),
        structure="31b",
        since="trace",
    ),
    Mutant(
        name="logsumexp over the best 64 only",
        patch=line(
            trt_interface.EngineInterface, "_best", ('op("Sub", biased, largest)', 'op("Sub", values, largest)')
        ),
    ),
    Mutant(
        name="ids of the lowest logits",
        patch=line(
            trt_interface.EngineInterface,
            "_best",
            (
                'op.several("TopK", 2, biased, op.ints(count), axis=last)',
                '(op.several("TopK", 2, biased, op.ints(count), axis=last)[0], '
                'op.several("TopK", 2, biased, op.ints(count), axis=last, largest=0)[1])',
            ),
        ),
    ),
    *(
        Mutant(name=f"{name}, experts of standard ops", patch=patch, structure="26b-a4b", experts="builtin")
        for name, patch in (
            (
                "per-expert scale dropped",
                line(
                    trt_moe,
                    "_route",
                    (
                        'op("Mul", op("Softmax", best, axis=-1), op("Gather", per_expert_scale, experts, axis=0))',
                        'op("Softmax", best, axis=-1)',
                    ),
                ),
            ),
            ("gate and up change places", line(trt_moe, "_gated", ("gate, up = op", "up, gate = op"))),
            (
                "SiLU for GELU",
                line(
                    trt_moe,
                    "_gated",
                    ('op("Gelu", gate, approximate="tanh")', 'op("Mul", gate, op("Sigmoid", gate))'),
                ),
            ),
            (
                "the next expert in place of the chosen one",
                line(
                    trt_moe,
                    "_route",
                    ("return experts, ", 'return op("Mod", op("Add", experts, op.ints(1)), op.ints(16)), '),
                ),
            ),
        )
    ),
)


def cases() -> list[object]:
    """Mutants that trace again take five seconds each: full."""
    return [
        pytest.param(mutant, marks=pytest.mark.full if mutant.since == "trace" else (), id=mutant.name)
        for mutant in MUTANTS
    ]


def build(mutant: Mutant) -> Path:
    checkpoint = grid_checkpoint(mutant.structure, mutant.recipe)
    if mutant.since == "trace":
        return write_engine_artifact(checkpoint, mutant.recipe, float_type="float32", experts=mutant.experts)
    with traces(fresh=False):
        return write_engine_artifact(checkpoint, mutant.recipe, float_type="float32", experts=mutant.experts)


@pytest.mark.parametrize("mutant", cases())
def test_mutant_is_killed(mutant, monkeypatch):
    ids, logits = expected(mutant.structure, mutant.recipe)  # before the patch: the other side is right
    mutant.patch(monkeypatch)
    assert worst(EngineTwin(build(mutant)), ids, logits) > 10 * BOUND


# ---------------------------------------------------------------------------------------------------------------------
# Top-k shares that are not renormalised are seen before the norm only

NORM = "layers.0.post_feedforward_layernorm_2"


def before_norm(folder: Path, ids: list[int]) -> np.ndarray:
    """What enters the norm behind the first layer's experts, [1, T, E], in the artifact's last phase."""
    engines = EngineTwin(folder)
    group, _ = engines.phases[list(engines.phases)[-1]][0]
    model = onnx.load(folder / group.file, load_external_data=False)
    (norm,) = (node for node in model.graph.node if f"{NORM}.weight" in node.input)
    assert norm.op_type == "RMSNormalization"
    model.graph.output.append(onnx.ValueInfoProto(name=norm.input[0]))
    onnx.save(model, folder / "graphs" / "probe.onnx")
    feeds = engines.feeds(ids, engines.new_cache(), [0])
    session = onnxruntime.InferenceSession(folder / "graphs" / "probe.onnx", providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    return session.run([norm.input[0]], {name: value for name, value in feeds.items() if name in wanted})[0]


def ort_cpu_before_norm(ids: list[int]) -> np.ndarray:
    runtime = Gemma4.load(grid_artifact("26b-a4b", "int4", "fp32"))
    runtime.decoder._session = probe = NormProbe(runtime.artifact.path("graphs/decoder.onnx"), NORM)
    runtime.forward(ids)
    return probe.seen


def test_shares_are_renormalised(monkeypatch):
    ids, _ = expected("26b-a4b", "int4")
    right, ids = (
        engine_artifact(grid_checkpoint("26b-a4b", "int4"), "int4", float_type="float32", experts="builtin"),
        ids[:7],
    )
    wanted = ort_cpu_before_norm(ids)
    bound = BOUND * np.abs(wanted).max()
    assert np.abs(before_norm(right, ids) - wanted).max() < bound
    line(
        trt_moe,
        "_route",
        ('"TopK", 2, logits,', '"TopK", 2, op("Softmax", logits, axis=-1),'),
        ('op("Softmax", best, axis=-1)', "best"),
    )(monkeypatch)
    with traces(fresh=False):
        wrong = write_engine_artifact(
            grid_checkpoint("26b-a4b", "int4"), "int4", float_type="float32", experts="builtin"
        )
    assert np.abs(before_norm(wrong, ids) - wanted).max() > 10 * bound
