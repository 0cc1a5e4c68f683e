"""The lowering for TensorRT and TensorRT-RTX, strongly typed, with the float type as its parameter.

``float32`` makes the twin that onnxruntime runs and tests hold to the ``ort-cpu`` artifact; any other type makes the
same nodes but for types and casts. ``float16`` and ``bfloat16`` are what engines are built from.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.target import FloatType
from gemma4_export.exporter.passes.static_reshapes import StaticReshapes
from gemma4_export.exporter.passes.tidy import Tidy
from gemma4_export.exporter.passes.trt_attention import LowerAttentionToTensorRT
from gemma4_export.exporter.passes.trt_interface import EngineInterface
from gemma4_export.exporter.passes.trt_linear import LowerLinearToTensorRT
from gemma4_export.exporter.passes.trt_moe import ExpertsForm, LowerMoEToTensorRT
from gemma4_export.exporter.passes.trt_precision import FLOAT_TYPES, Precision
from gemma4_export.exporter.passes.trt_weights import PlaceStoredWeights, StoredWeights
from gemma4_export.exporter.passes.unit_norms import UnitNorms
from gemma4_export.exporter.weights import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What decides the nodes of an engine's graph beside the model and its weights."""

    float_type: FloatType
    sliding_slots: int
    global_slots: int
    """Slots of a global cache: the longest sequence."""
    experts: ExpertsForm


def tensorrt_passes(config: ModelConfig, placement: Placement, options: EngineOptions) -> list[ir.passes.InPlacePass]:
    """The passes in order; running any of them again changes nothing."""
    precision, weights = Precision(FLOAT_TYPES[options.float_type]), StoredWeights(placement)
    return [
        EngineInterface(
            precision,
            sliding_slots=options.sliding_slots,
            global_slots=options.global_slots,
            sliding_layers={layer.index for layer in config.layers if layer.is_sliding},
        ),
        Tidy(),
        StaticReshapes(),
        UnitNorms(),
        LowerLinearToTensorRT(weights, precision),
        LowerAttentionToTensorRT(precision, sliding_window=config.sliding_window),
        LowerMoEToTensorRT(weights, precision, options.experts),
        Tidy(),
        PlaceStoredWeights(placement),
    ]


def lower_tensorrt(model: ir.Model, config: ModelConfig, placement: Placement, options: EngineOptions) -> ir.Model:
    """One graph of the whole decoder; ``split_groups`` cuts it. ``model`` is consumed."""
    lowered = ir.passes.PassManager(tensorrt_passes(config, placement, options))(model).model
    left = {node.op_type for node in lowered.graph if node.domain == "gemma4"}
    allowed = {"Gemma4MoE"} if options.experts == "plugin" else set()
    assert left <= allowed, f"semantic ops not lowered: {sorted(left - allowed)}"
    return lowered
