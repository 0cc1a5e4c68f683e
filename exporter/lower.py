"""One lowering per backend: a traced graph of semantic ops becomes what that backend runs."""

from __future__ import annotations

import onnx_ir as ir

from gemma4_export.exporter.passes.lower_attention import LowerAttention
from gemma4_export.exporter.passes.lower_linear import LowerLinear
from gemma4_export.exporter.passes.lower_moe import LowerMoE
from gemma4_export.exporter.passes.matmul import Activations, MatMul
from gemma4_export.exporter.passes.place_initializers import PlaceInitializers
from gemma4_export.exporter.passes.static_reshapes import StaticReshapes
from gemma4_export.exporter.passes.tidy import Tidy
from gemma4_export.exporter.passes.unit_norms import UnitNorms
from gemma4_export.exporter.weights import Placement


def ort_cpu_passes(placement: Placement, *, activations: Activations) -> list[ir.passes.InPlacePass]:
    """The passes of the ``ort-cpu`` lowering, in order; running any of them again changes nothing."""
    matmul = MatMul(placement, activations)
    return [
        Tidy(),
        StaticReshapes(),
        UnitNorms(),
        LowerLinear(matmul),
        LowerAttention(),
        LowerMoE(matmul),
        Tidy(),
        # Last: folding constants must never see, let alone widen, the weights themselves.
        PlaceInitializers(placement),
    ]


def lower_ort_cpu(model: ir.Model, placement: Placement, *, activations: Activations) -> ir.Model:
    """onnxruntime's CPU provider, computing in float32 with its built-in kernels. ``model`` is consumed."""
    lowered = ir.passes.PassManager(ort_cpu_passes(placement, activations=activations))(model).model
    left = sorted({node.op_type for node in lowered.graph if node.domain == "gemma4"})
    assert not left, f"semantic ops not lowered: {left}"
    return lowered
