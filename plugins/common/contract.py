"""What an op promises: names, types, shapes, attributes and limits, in one place that every language reads.

A tensor is written as one line, ``"real B T Hq D"``: a type, then one size per axis. The rules:

* a type is a dtype name (``int64``) or a type variable of ``types``; a variable stands for one dtype per call;
* ``?`` after the type marks an optional input (``"int32? B T"``), which counts as 0 in ``limits``;
* a letter binds to the first size met, and is the same size wherever it appears again; ``2F`` is twice F;
* ``...``, first only, stands for any number of leading axes, the same ones wherever it appears.

``limits`` are expressions over size letters, attributes and integer tensors that hold for every element, such as
``"write_index + T <= C"``. Limits over sizes and attributes are checked in Python and in C++; those that read tensor
values only in Python, because a kernel would have to wait for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Protocol

import numpy as np

from gemma4_export.configs.errors import ContractError, nearest

Sizes = dict[str, int]

_SIZE = re.compile(r"(\d*)([A-Za-z]+)")


class ArrayLike(Protocol):
    """A NumPy array or a torch tensor: anything with a shape and a dtype whose last word is the dtype's name."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One parsed line of a contract: ``"int32? B T"`` -> dtype ``int32``, optional, axes ``("B", "T")``."""

    dtype: str
    axes: tuple[str, ...]
    is_optional: bool

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        dtype, *axes = text.split()
        return cls(dtype=dtype.removesuffix("?"), axes=tuple(axes), is_optional=dtype.endswith("?"))

    def __str__(self) -> str:
        return f"[{', '.join(self.axes)}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpContract:
    """The promise of one custom op; see the module docstring for the notation.

    Attributes:
        domain, name, version: the ONNX identity; ``version`` rises when the meaning of a graph would change.
        inputs, outputs: tensor name -> line, in the order of the ONNX node.
        types: type variable -> dtype names it may stand for.
        attributes: name -> ``int`` or ``float``; every one is required, a default could vanish from a graph.
        limits: expressions that hold for every element.
        source: where the meaning comes from.
    """

    domain: str
    name: str
    version: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    types: Mapping[str, tuple[str, ...]]
    attributes: Mapping[str, type[int] | type[float]]
    limits: tuple[str, ...]
    source: str

    def check(self, arrays: Mapping[str, ArrayLike | None], attributes: Mapping[str, int | float]) -> Sizes:
        """Check one call against the contract.

        Args:
            arrays: every required input by name, optional inputs (absent or None when not given), and any outputs.
            attributes: every attribute by name.
        Returns:
            The size of each letter.
        Raises:
            ContractError: naming the op, the tensor or attribute, what was expected and what came.
        """
        present = {name: array for name, array in arrays.items() if array is not None}
        specs = {name: TensorSpec.parse(line) for name, line in {**self.inputs, **self.outputs}.items()}
        for name in present:
            if name not in specs:
                raise ContractError(f"{self} has no tensor {name}", hint=nearest(name, specs))
        for name in self.inputs:
            if name not in present and not specs[name].is_optional:
                raise ContractError(f"{self} {name}: expected {specs[name].dtype} {specs[name]}, found nothing")
        self._check_attributes(attributes)

        sizes: Sizes = {}
        leading: tuple[int, ...] | None = None
        bound_types: dict[str, str] = {}
        for name, spec in specs.items():
            if name in present:
                self._check_dtype(name, spec, present[name], bound_types)
                leading = self._check_shape(name, spec, tuple(present[name].shape), sizes, leading)
        self._check_limits(present, attributes, sizes)
        return sizes

    def __str__(self) -> str:
        return f"{self.domain}::{self.name}"

    def _check_attributes(self, attributes: Mapping[str, int | float]) -> None:
        for name in attributes:
            if name not in self.attributes:
                raise ContractError(f"{self} has no attribute {name}", hint=nearest(name, self.attributes))
        for name, kind in self.attributes.items():
            found = attributes.get(name)
            if type(found) is not kind:
                came = "nothing" if found is None else f"{type(found).__name__} {found}"
                raise ContractError(f"{self} {name}: expected an attribute of type {kind.__name__}, found {came}")

    def _check_dtype(self, name: str, spec: TensorSpec, array: ArrayLike, bound: dict[str, str]) -> None:
        found = str(array.dtype).rpartition(".")[2]  # "torch.float32" and "float32" are the same promise
        allowed = self.types.get(spec.dtype, (spec.dtype,))
        if found not in allowed:
            raise ContractError(f"{self} {name}: expected {' or '.join(allowed)}, found {found}")
        if spec.dtype in self.types and bound.setdefault(spec.dtype, found) != found:
            raise ContractError(
                f"{self} {name}: expected {bound[spec.dtype]} like the other {spec.dtype} tensors, found {found}"
            )

    def _check_shape(
        self, name: str, spec: TensorSpec, shape: tuple[int, ...], sizes: Sizes, leading: tuple[int, ...] | None
    ) -> tuple[int, ...] | None:
        """Bind the letters of one tensor into ``sizes``; return the leading axes that ``...`` stands for so far."""
        axes = spec.axes
        if axes[:1] == ("...",):
            axes = axes[1:]
            if len(shape) >= len(axes):
                lead, shape = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
                if leading is not None and lead != leading:
                    raise ContractError(f"{self} {name} {spec}: expected leading axes {leading}, found {lead}")
                leading = lead
        if len(shape) != len(axes):
            raise ContractError(f"{self} {name}: expected {len(axes)} axes {spec}, found shape {shape}")
        for axis, size in zip(axes, shape, strict=True):
            factor, letter = parse_size(axis)
            if letter not in sizes and size % factor == 0:
                sizes[letter] = size // factor
            if letter not in sizes:
                raise ContractError(f"{self} {name} {spec}: expected {axis} to be a multiple of {factor}, found {size}")
            if factor * sizes[letter] != size:
                raise ContractError(f"{self} {name} {spec}: expected {axis} = {factor * sizes[letter]}, found {size}")
        return leading

    def _check_limits(
        self, arrays: Mapping[str, ArrayLike], attributes: Mapping[str, int | float], sizes: Sizes
    ) -> None:
        for limit in self.limits:
            code = compile(limit, f"limit of {self}", "eval")
            values = {name: self._limit_value(name, arrays, attributes, sizes) for name in code.co_names}
            if not np.all(_evaluate(code, values)):
                raise ContractError(f"{self}: {limit} does not hold for {_first_violation(code, values)}")

    def _limit_value(
        self, name: str, arrays: Mapping[str, ArrayLike], attributes: Mapping[str, int | float], sizes: Sizes
    ) -> Any:
        if name in sizes:
            return sizes[name]
        if name in attributes:
            return attributes[name]
        if name in arrays:
            return np.asarray(arrays[name])
        assert TensorSpec.parse(self.inputs[name]).is_optional, f"{self}: unknown name {name} in a limit"
        return 0


def parse_size(axis: str) -> tuple[int, str]:
    """``"2F"`` -> (2, "F"); ``"B"`` -> (1, "B")."""
    match = _SIZE.fullmatch(axis)
    assert match is not None, f"not a size: {axis}"
    return int(match[1] or 1), match[2]


def _evaluate(code: CodeType, values: Mapping[str, Any]) -> Any:
    return eval(code, {"__builtins__": {}}, dict(values))


def _first_violation(code: CodeType, values: Mapping[str, Any]) -> str:
    """The values at the first element where a limit fails: ``write_index[1] = 6, T = 3, C = 8``."""
    index = np.argwhere(~np.asarray(_evaluate(code, values)))[0]
    shape = np.shape(_evaluate(code, values))
    parts = []
    for name, value in values.items():
        if np.ndim(value) == 0:
            parts.append(f"{name} = {value}")
        else:
            where = ", ".join(str(i) for i in index)
            parts.append(f"{name}[{where}] = {np.broadcast_to(value, shape)[tuple(index)]}")
    return ", ".join(parts)
