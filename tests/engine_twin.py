"""Runs the groups of an engine artifact on onnxruntime's CPU provider, one after the other over shared caches.

Engines run on no machine that tests have, and onnxruntime's CPU provider has no bfloat16 products: what is compared are
float32 and float16 twins, built by the same exporter with another float type. ``Gemma4MoE``, our plugin's node, is a
function here, written from the formula of plugins/moe/README.md.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from artifacts import traces

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.manifest import GroupEntry
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.configs.target import load_target
from gemma4_export.exporter import build
from gemma4_export.exporter.checkpoint import Checkpoint
from gemma4_export.runtime.kv_cache import KVCache
from gemma4_export.runtime.rope import RopeTable
from gemma4_export.runtime.tables import EmbeddingTable

_scratch = tempfile.TemporaryDirectory(prefix="gemma4-twins-")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@functools.cache
def engine_artifact(
    checkpoint: Path,
    recipe: str,
    *,
    float_type: str,
    experts: str = "plugin",
    chunk: int = 7,
    context: int = 256,
    group_bytes: int = 60_000,
) -> Path:
    """What ``gemma4-export build --target rtx4090 --engines later`` writes, in ``float_type`` and tiny groups."""
    lengths = {"chunk": chunk, "context": context, "group_bytes": group_bytes}
    with traces(fresh=False):
        return write_engine_artifact(checkpoint, recipe, float_type=float_type, experts=experts, **lengths)


def write_engine_artifact(
    checkpoint: Path,
    recipe: str,
    *,
    float_type: str,
    experts: str = "plugin",
    chunk: int = 7,
    context: int = 256,
    group_bytes: int = 60_000,
) -> Path:
    """The same, written anew."""
    out = Path(tempfile.mkdtemp(dir=_scratch.name)) / "artifact"
    with Checkpoint(checkpoint) as opened:
        options = build.resolve_options(
            opened.config,
            model_name=checkpoint.name,
            target=load_target("rtx4090"),
            recipe=load_recipe(recipe),
            context=context,
            chunk=chunk,
            experts=experts,
        )
        options = dataclasses.replace(options, float_type=float_type, max_group_bytes=group_bytes)
        build.build_artifact(opened, options, out, lambda *progress: None)
    return out


class EngineTwin:
    """The decoder of an engine artifact whose float type onnxruntime's CPU provider computes in."""

    def __init__(self, folder: Path) -> None:
        self.artifact = Artifact.open(folder, check="full")
        self.manifest = manifest = self.artifact.manifest
        assert manifest.engines is not None
        self.dtype = DTYPES[manifest.engines.float_type]
        self.phases = {
            phase: [(group, _session(self.artifact.path(group.file))) for group in groups]
            for phase, groups in manifest.engines.phases.items()
        }
        self._tokens = EmbeddingTable(self.artifact, manifest.embed_tokens)
        per_layer = manifest.embed_tokens_per_layer
        self._per_layer = None if per_layer is None else EmbeddingTable(self.artifact, per_layer)

    def new_cache(self) -> KVCache:
        return KVCache(self.manifest.kv, self.manifest.context)

    def forward(
        self, ids: Sequence[int], cache: KVCache, rows: Sequence[int], bias: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One call: top_logits and top_ids [R, 64], logsumexp [R, 1] of ``rows`` of ``ids``."""
        phase = "decode" if "decode" in self.phases and len(ids) == 1 else list(self.phases)[-1]
        values = self.feeds(ids, cache, rows, bias)
        for group, session in self.phases[phase]:
            self._run(group, session, values, cache)
        cache.advance(len(ids))
        return values["top_logits"], values["top_ids"], values["logsumexp"]

    def feeds(
        self, tokens: Sequence[int], cache: KVCache, rows: Sequence[int], bias: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Everything that the groups take from outside, caches as they are."""
        ids = np.asarray(tokens, np.int64)
        manifest, slots = self.manifest, cache.reserve(len(ids))
        position = cache.length
        # More slots than are written: an engine reads a profiled length, and the mask hides the rest.
        visible = min(position + len(ids) + 3, manifest.context)
        feeds = {
            "inputs_embeds": self._tokens.gather(ids)[None],
            "sliding_write_index": np.array([slots.sliding_write_index], np.int64),
            "global_write_index": np.array([slots.global_write_index], np.int64),
            "sliding_start": slots.sliding_start,
            "sliding_end": slots.sliding_end,
            "global_end": slots.global_end,
            "global_slots": np.arange(visible, dtype=np.int32),
            "output_rows": np.asarray(rows, np.int64),
            "logit_bias": np.zeros((1, manifest.model.vocab_size), np.float32) if bias is None else bias,
            "rope_global": RopeTable(manifest.rope_global).cos_sin(position, len(ids)),
        }
        if manifest.rope_sliding is not None:
            feeds["rope_sliding"] = RopeTable(manifest.rope_sliding).cos_sin(position, len(ids))
        if self._per_layer is not None:
            model = manifest.model
            shape = (1, len(ids), model.num_layers, model.hidden_size_per_layer_input)
            feeds["per_layer_inputs"] = self._per_layer.gather(ids).reshape(shape)
        for layer, pair in cache.buffers.items():
            for part, buffer in zip(("key", "value"), pair, strict=True):
                feeds[f"past_key_values.{layer}.{part}"] = buffer
        return feeds

    def _run(
        self, group: GroupEntry, session: onnxruntime.InferenceSession, values: dict[str, np.ndarray], cache: KVCache
    ) -> None:
        """Feed a group, caches bound in place, and add its outputs to ``values``."""
        binding = session.io_binding()
        for name in group.inputs:
            if name.startswith("past_key_values."):
                binding.bind_input(name, *self._buffer(name, cache))
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(values[name]))
        for name in group.outputs:
            if name.startswith("present."):
                binding.bind_output(name, *self._buffer(name, cache))
            else:
                binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        for name, value in zip(group.outputs, binding.get_outputs(), strict=True):
            if not name.startswith("present."):
                values[name] = value.numpy()

    def _buffer(self, name: str, cache: KVCache) -> tuple[object, ...]:
        """Where a cache lies, as a binding takes it."""
        _, layer, part = name.split(".")
        buffer = cache.buffers[int(layer)][part == "value"]
        return "cpu", 0, self.dtype, buffer.shape, buffer.ctypes.data


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations stay floats
    model = onnx.load(path, load_external_data=False)
    if any(node.op_type == "Gemma4MoE" for node in model.graph.node):
        path = path.with_name(f"defined-{path.name}")
        onnx.save(with_moe_function(model), path)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def with_moe_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with a body for its ``Gemma4MoE`` nodes."""
    node = next(node for node in model.graph.node if node.op_type == "Gemma4MoE")
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    elements = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    types = {value.name: value.data_type for value in model.graph.initializer} | elements
    real = types[node.input[0]]
    weights = "gate_up, down"
    body = "gate_up_values = Identity(gate_up)\n down_values = Identity(down)\n"
    if len(node.input) == 7:
        weights = "gate_up, gate_up_scales, down, down_scales"
        body = "".join(
            f"{name}_wide = Cast <to = 1> ({name}_scales)\n"
            f"{name}_exact = DequantizeLinear <axis = 2, block_size = {{{name}_block}}> ({name}, {name}_wide)\n"
            f"{name}_values = Cast <to = {real}> ({name}_exact)\n"
            for name in ("gate_up", "down")
        )
        shapes = {value.name: tuple(value.dims) for value in model.graph.initializer}
        blocks = {
            f"{name}_block": attributes["block"] or shapes[node.input[at]][2]
            for name, at in (("gate_up", 3), ("down", 5))
        }
        body = body.format(**blocks)
    text = f"""
    <opset_import: ["" : 24], domain: "gemma4">
    Gemma4MoE <top_k, block> (x, logits, scale, {weights}) => (y) {{
        {body}
        k = Constant <value = int64[1] {{{attributes["top_k"]}}}> ()
        probabilities = Softmax <axis = -1> (logits)
        best, experts = TopK <axis = -1> (probabilities, k)
        last = Constant <value = int64[1] {{-1}}> ()
        total = ReduceSum <keepdims = 1> (best, last)
        normalised = Div (best, total)
        scales = Gather <axis = 0> (scale, experts)
        shares = Mul (normalised, scales)
        shape = Shape (logits)
        zeros = ConstantOfShape (shape)
        spread = ScatterElements <axis = 2> (zeros, experts, shares)
        by_expert = Transpose <perm = [2, 1, 0]> (spread)
        gate_up_t = Transpose <perm = [0, 2, 1]> (gate_up_values)
        products = MatMul (x, gate_up_t)
        wide = Cast <to = 1> (products)
        gate, up = Split <axis = 2, num_outputs = 2> (wide)
        activated = Gelu <approximate = "tanh"> (gate)
        gated = Mul (activated, up)
        narrow = Cast <to = {real}> (gated)
        down_t = Transpose <perm = [0, 2, 1]> (down_values)
        outputs = MatMul (narrow, down_t)
        wide_outputs = Cast <to = 1> (outputs)
        weighted = Mul (wide_outputs, by_expert)
        first = Constant <value = int64[1] {{0}}> ()
        sum = ReduceSum <keepdims = 1> (weighted, first)
        y = Cast <to = {real}> (sum)
    }}"""
    model.functions.append(onnx.parser.parse_function(text))
    return model
