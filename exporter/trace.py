"""Traces the decoder on fake tensors into an ``onnx_ir`` model of semantic ops: no weight is ever materialised here."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from gemma4_export.configs import evidence, names
from gemma4_export.configs.model import LayerConfig, ModelConfig
from gemma4_export.exporter.models.probe import HeadProbe, LayerProbe, PerLayerInputsProbe
from gemma4_export.exporter.models.text import Decoder, DecoderLayer
from gemma4_export.plugins.common.torch_ops import translation_table

OPSET = 24  # the first one with TensorScatter

# Example sizes for tracing. None equals another or 1, so that torch sees four unrelated dynamic sizes.
_TOKENS, _ROWS, _SLIDING_SLOTS, _GLOBAL_SLOTS = 5, 3, 11, 13


def trace_decoder(config: ModelConfig) -> ir.Model:
    """The decoder graph of ``config``, one sequence (B = 1), with every size of a call dynamic.

    Initialisers carry the checkpoint's names and no data: ``passes/place_initializers.py`` points them at the
    artifact's files. Dynamic axes are named T, R, sliding_slots and global_slots.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        decoder = Decoder(config).eval()
        inputs = _example_inputs(config)
        caches = _example_caches(config)
        model = _to_onnx(
            decoder,
            (inputs, caches),
            dynamic_shapes=_dynamic_shapes(config),
            input_names=names.decoder_inputs(config),
            output_names=names.decoder_outputs(config),
        )
    model.graph.name = "decoder"
    return model


def trace_layer(layer: LayerConfig, config: ModelConfig) -> ir.Model:
    """One layer's graph with the inputs and taps of ``configs/evidence.py``; T and the caches' slots C are dynamic."""
    inputs: dict[str, Tensor] = {}
    shapes: dict[str, dict[int, Dim]] = {}
    tokens, slots = Dim("T", min=1), Dim("C", min=1)
    sizes: dict[str, tuple[int, ...]] = {
        "hidden_states": (1, _TOKENS, config.hidden_size),
        "per_layer_input": (1, _TOKENS, config.hidden_size_per_layer_input),
        "rope": (1, _TOKENS, 2, layer.rope.num_frequencies),
        "write_index": (1,),
        "start": (1, _TOKENS),
        "end": (1, _TOKENS),
    }
    sizes |= dict.fromkeys(("past_key", "past_value"), (1, layer.num_kv_heads, _GLOBAL_SLOTS, layer.head_dim))
    dtypes = {"write_index": torch.int64, "start": torch.int32, "end": torch.int32}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for name in evidence.layer_inputs(layer, config):
            inputs[name] = torch.zeros(sizes[name], dtype=dtypes.get(name, torch.float32))
            shapes[name] = {2: slots} if name.startswith("past_") else {} if name == "write_index" else {1: tokens}
        model = _to_onnx(
            LayerProbe(DecoderLayer(layer, config), config).eval(),
            (inputs,),
            dynamic_shapes=(shapes,),
            input_names=list(inputs),
            output_names=evidence.layer_taps(layer, config),
        )
    model.graph.name = "layer"
    return model


def trace_per_layer_inputs(config: ModelConfig) -> ir.Model:
    """The graph ``inputs_embeds``, ``per_layer_inputs`` -> ``merged_per_layer_inputs`` of a model with PLE."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        example = _example_inputs(config)
        given = ["inputs_embeds", "per_layer_inputs"]
        tokens = Dim("T", min=1)
        model = _to_onnx(
            PerLayerInputsProbe(config).eval(),
            tuple(example[name] for name in given),
            dynamic_shapes=({1: tokens}, {1: tokens}),
            input_names=given,
            output_names=["merged_per_layer_inputs"],
        )
    model.graph.name = "per_layer_inputs"
    return model


def trace_head(config: ModelConfig) -> ir.Model:
    """The graph ``hidden_states`` [R, E] -> ``logits`` [R, V]."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = _to_onnx(
            HeadProbe(replace(config, layers=())).eval(),
            (torch.zeros(_ROWS, config.hidden_size),),
            dynamic_shapes=({0: Dim("R", min=1)},),
            input_names=["hidden_states"],
            output_names=["logits"],
        )
    model.graph.name = "head"
    return model


def _to_onnx(
    module: nn.Module,
    arguments: tuple[object, ...],
    *,
    dynamic_shapes: tuple[object, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ir.Model:
    exported = torch.export.export(
        module,
        arguments,
        dynamic_shapes=dynamic_shapes,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    with _quiet():
        program = torch.onnx.export(
            exported,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            custom_translation_table=translation_table(),
            verbose=False,
        )
    assert program is not None
    model = program.model
    model.producer_name, model.producer_version = "gemma4-export", None
    return model


def _example_inputs(config: ModelConfig) -> dict[str, Tensor]:
    rope = {kind: config.rope(kind) for kind in ("sliding_attention", "full_attention")}
    sizes: dict[str, tuple[int, ...]] = {
        "inputs_embeds": (1, _TOKENS, config.hidden_size),
        "per_layer_inputs": (1, _TOKENS, config.num_layers, config.hidden_size_per_layer_input),
        "sliding_write_index": (1,),
        "global_write_index": (1,),
        "sliding_start": (1, _TOKENS),
        "sliding_end": (1, _TOKENS),
        "global_end": (1, _TOKENS),
        "output_rows": (_ROWS,),
    }
    for name, kind in (("rope_sliding", "sliding_attention"), ("rope_global", "full_attention")):
        table = rope[kind]
        if table is not None:
            sizes[name] = (1, _TOKENS, 2, table.num_frequencies)
    dtypes = dict.fromkeys(("sliding_write_index", "global_write_index", "output_rows"), torch.int64)
    dtypes |= dict.fromkeys(("sliding_start", "sliding_end", "global_end"), torch.int32)
    wanted = [name for name in names.decoder_inputs(config) if not name.startswith("past_key_values.")]
    return {name: torch.zeros(sizes[name], dtype=dtypes.get(name, torch.float32)) for name in wanted}


def _example_caches(config: ModelConfig) -> list[tuple[Tensor, Tensor]]:
    caches = []
    for layer in config.layers:
        if layer.owns_kv:
            slots = _SLIDING_SLOTS if layer.is_sliding else _GLOBAL_SLOTS
            shape = (1, layer.num_kv_heads, slots, layer.head_dim)
            caches.append((torch.zeros(shape), torch.zeros(shape)))
    return caches


def _dynamic_shapes(config: ModelConfig) -> tuple[object, object]:
    tokens, rows = Dim("T", min=1), Dim("R", min=1)
    slots = {True: Dim("sliding_slots", min=1), False: Dim("global_slots", min=1)}
    inputs: dict[str, dict[int, Dim]] = {}
    for name in _example_inputs(config):
        inputs[name] = {0: rows} if name == "output_rows" else {} if name.endswith("write_index") else {1: tokens}
    caches = [({2: slots[layer.is_sliding]},) * 2 for layer in config.layers if layer.owns_kv]
    return inputs, caches


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints its progress and logs a warning per custom op; neither is news to the user of a build."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
