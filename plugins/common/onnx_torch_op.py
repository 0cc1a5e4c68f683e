"""From a contract to an ONNX schema and to the callable that torch.onnx puts into its translation table."""

from __future__ import annotations

import onnx.defs
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

from gemma4_export.plugins.common.contract import OpContract, TensorSpec

# ONNX spells dtypes in its own way inside type strings.
_ONNX_TYPES = {
    "float64": "tensor(double)",
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
}
_ATTRIBUTE_TYPES = {float: OpSchema.AttrType.FLOAT, int: OpSchema.AttrType.INT}


def onnx_schema(contract: OpContract) -> OpSchema:
    """The ONNX schema of a contract: names, types, optional inputs and required attributes."""

    def parameter(name: str, line: str) -> OpSchema.FormalParameter:
        spec = TensorSpec.parse(line)
        option = OpSchema.FormalParameterOption
        return OpSchema.FormalParameter(
            name,
            spec.dtype if spec.dtype in contract.types else _ONNX_TYPES[spec.dtype],
            description=str(spec),
            param_option=option.Optional if spec.is_optional else option.Single,
        )

    return OpSchema(
        contract.name,
        contract.domain,
        contract.version,
        doc=f"Source: {contract.source}",
        inputs=[parameter(name, line) for name, line in contract.inputs.items()],
        outputs=[parameter(name, line) for name, line in contract.outputs.items()],
        type_constraints=[(name, [_ONNX_TYPES[d] for d in dtypes], "") for name, dtypes in contract.types.items()],
        attributes=[
            OpSchema.Attribute(name, _ATTRIBUTE_TYPES[kind], required=True)
            for name, kind in contract.attributes.items()
        ],
    )


def onnx_op(contract: OpContract) -> Op:
    """The onnxscript op of a contract, its schema registered with onnx on the first call."""
    if not onnx.defs.has(contract.name, contract.version, contract.domain):
        onnx.defs.register_schema(onnx_schema(contract))
    return Op(Opset(contract.domain, contract.version), contract.name, onnx_schema(contract))
