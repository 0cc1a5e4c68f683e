"""Gemma4Linear: a matrix product whose weight format is chosen later, by the lowering."""

from gemma4_export.plugins.common.contract import OpContract

LINEAR = OpContract(
    domain="gemma4",
    name="Gemma4Linear",
    version=1,
    inputs={"input": "real ... K", "weight": "real N K"},
    outputs={"output": "real ... N"},
    types={"real": ("float32", "float16", "bfloat16", "float64")},
    attributes={},
    limits=(),
    source="torch.nn.functional.linear without bias; no linear of a Gemma 4 decoder has one",
)
