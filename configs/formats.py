"""Storage formats of a weight, their spelling, and how many bytes they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemma4_export.configs.errors import ConfigError, nearest

Kind = Literal["float32", "bfloat16", "fp8", "int8", "int4"]
_INT8_MULTIPLE = 16  # onnxruntime's smallest block, which a row with one scale is cut into
BLOCKS = (32, 64, 128)
"""Weights along K that can share one scale."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a matrix [N, K] is stored.

    ``int8``: signed codes -128…127. ``int4``: signed codes -8…7, low nibble first. One scale per ``block`` weights
    along K; ``int8`` without a block has one scale per row. ``fp8``: floats of 4 exponent and 3 mantissa bits (E4M3FN,
    up to 448), one scale per row. A weight is its code times its scale; no zero points.
    """

    kind: Kind
    block: int = 0

    def __str__(self) -> str:
        return f"{self.kind}/{self.block}" if self.block else self.kind

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """``float32``, ``bfloat16``, ``fp8``, ``int8``, ``int8/BLOCK`` or ``int4/BLOCK``.

        Raises:
            ConfigError: it is none of these.
        """
        known = {str(form): form for form in (cls("float32"), cls("bfloat16"), cls("fp8"), cls("int8"))}
        known |= {str(form): form for form in (cls(kind, size) for kind in ("int4", "int8") for size in BLOCKS)}
        if text not in known:
            # Of "int4" alone the nearest spelling would be int8.
            blocks = [name for name in known if name.startswith("int4")]
            hint = f"known: {', '.join(blocks)}" if text.startswith("int4") else nearest(text, known)
            raise ConfigError(f"weight format {text!r} is not known", hint=hint)
        return known[text]

    @property
    def is_quantized(self) -> bool:
        return self.kind in ("fp8", "int8", "int4")

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row's values or codes, scales not counted."""
        bits = {"float32": 32, "bfloat16": 16, "fp8": 8, "int8": 8, "int4": 4}[self.kind]
        return columns * bits // 8

    def check_columns(self, columns: int, role: str, name: str) -> None:
        """Refuse a matrix whose rows the block does not divide.

        Args:
            role, name: of the weight.
        Raises:
            ConfigError: the hint is a recipe's line with the largest block that does, or with the nearest other format.
        """
        multiple = self.block or (_INT8_MULTIPLE if self.kind == "int8" else 1)
        if columns % multiple == 0:
            return
        legal = [str(WeightFormat(self.kind, size)) for size in BLOCKS if self.block and columns % size == 0]
        other = "int8" if columns % _INT8_MULTIPLE == 0 else "bfloat16"
        cause = f"block {self.block} does not divide its {columns} columns"
        if not self.block:
            cause = f"int8 needs columns in multiples of {multiple}, found {columns}"
        raise ConfigError(
            f"{role}, {name}: {cause}",
            hint=f'write "{role}" = "{[other, *legal][-1]}" below [roles] in a recipe of your own, --recipe FILE.toml '
            "(docs/quantization.md has a whole one)",
        )


FLOAT32, BFLOAT16 = WeightFormat("float32"), WeightFormat("bfloat16")
INT8, FP8 = WeightFormat("int8"), WeightFormat("fp8")
