"""Where an artifact is to run: one TOML file per target in ``targets/``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.formats import FP8, WeightFormat
from gemma4_export.configs.recipe import Recipe
from gemma4_export.configs.toml import check_keys, load_named, names_in

FloatType = Literal["float32", "float16", "bfloat16"]
EngineBackend = Literal["tensorrt", "tensorrt-rtx"]
BuiltBackend = Literal["ort-cpu", "tensorrt", "tensorrt-rtx"]
BACKENDS = ("ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx")
BUILT_BACKENDS: tuple[BuiltBackend, ...] = get_args(BuiltBackend)
"""Those that this version lowers to. All but ``ort-cpu`` compile engines from what they get."""
RUN_BACKEND = "ort-cpu"
"""The only one that this version runs."""
_FOLDER = Path(__file__).parent / "targets"
_FP8_CAPABILITY = 8.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Sizes that an engine is tuned for, each (min, opt, max): T tokens of a call, and S slots of global caches read.

    Scores of global layers take Hq * T * S values of scratch, so profiles bound the product.
    """

    name: str
    tokens: tuple[int, int, int]
    slots: tuple[int, int, int]


def engine_profiles(*, chunk: int, context: int) -> tuple[Profile, ...]:
    """Decoding one token anywhere, and prefill in calls that get shorter as the sequence gets longer.

    Decoding is for one token or two: for exactly one, TensorRT-RTX 1.7.1 writes out rows of 8-bit weights in 16 bits on
    every call, and keeps unquantised gates and up projections twice (1.6 times the weights of a bfloat16 E2B).
    A shorter chunk or context makes profiles equal; each is listed once, under the first name.
    """
    wanted = (
        ("decode", (1, 2), (4096, context)),
        ("prefill", (512, chunk), (4096, 8192)),
        ("prefill-32k", (512, 128), (16384, 32768)),
        ("prefill-long", (512, 16), (65536, context)),
    )
    profiles: dict[tuple[int, int], Profile] = {}
    for name, (usual_tokens, tokens), (usual, slots) in wanted:
        longest, most = min(tokens, chunk), min(slots, context)
        sizes = ((1, min(usual_tokens, longest), longest), (1, min(usual, most), most))
        profiles.setdefault((longest, most), Profile(name=name, tokens=sizes[0], slots=sizes[1]))
    return tuple(profiles.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device to build for."""

    name: str
    title: str
    backends: tuple[str, ...]
    """What runs on it, best first."""
    chunk: int
    """Longest run of tokens in one call of the decoder, unless --chunk says otherwise."""
    recipe: str
    """How weights are stored, unless --recipe says otherwise."""
    compute_capability: str | None
    memory_bytes: int | None
    """Of the device; None: the machine's own."""
    bandwidth_bytes_per_s: int | None
    float_type: FloatType
    """What matrix products, attention and caches are computed in."""

    @property
    def built_backend(self) -> BuiltBackend | None:
        """The best of the target's backends that this version lowers to."""
        return min((known for known in BUILT_BACKENDS if known in self.backends), key=self.backends.index, default=None)


def target_names() -> list[str]:
    return names_in(_FOLDER)


def load_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        ConfigError: there is none, or its file is wrong; the hint names the nearest.
    """
    values, where = load_named(_FOLDER, name, "target"), f"targets/{name}.toml"
    optional = {"compute_capability", "memory_bytes", "bandwidth_bytes_per_s", "float_type", "recipe"}
    check_keys(values, {"name", "title", "backends", "chunk"}, optional, where)
    unknown = [backend for backend in values["backends"] if backend not in BACKENDS]
    if unknown or values["name"] != name or values["chunk"] < 1:
        raise ConfigError(
            f"{where}: name {values['name']!r}, chunk {values['chunk']}, unknown backends {unknown}",
            hint=f"backends are {', '.join(BACKENDS)}; chunk is at least 1",
        )
    return Target(
        name=name,
        title=values["title"],
        backends=tuple(values["backends"]),
        chunk=values["chunk"],
        recipe=values.get("recipe", "bf16"),
        compute_capability=values.get("compute_capability"),
        memory_bytes=values.get("memory_bytes"),
        bandwidth_bytes_per_s=values.get("bandwidth_bytes_per_s"),
        float_type=_float_type(values.get("float_type", "float32"), where),
    )


def _float_type(value: Any, where: str) -> FloatType:
    for known in get_args(FloatType):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"{where}: float_type {value!r}", hint=f"one of {', '.join(get_args(FloatType))}")


def check_buildable(target: Target) -> None:
    """Refuse a target that none of our backends runs on: no CPU graph ever carries the name of a GPU.

    Raises:
        ConfigError: the target's backends do not exist yet.
    """
    if target.built_backend is None:
        raise ConfigError(
            f"target {target.name} runs {' or '.join(target.backends)}; "
            f"this version builds {', '.join(BUILT_BACKENDS)} only",
            hint="--target cpu builds a folder that runs on any machine's processor",
        )


def check_recipe(target: Target, recipe: Recipe) -> None:
    """Refuse a recipe whose weights nothing of the target multiplies with.

    Raises:
        ConfigError: fp8 for a processor, or for a GPU older than compute capability 8.9.
    """
    check_formats(target, recipe.name, recipe.formats.values())


def check_formats(target: Target, recipe: str, formats: Iterable[WeightFormat]) -> None:
    """`check_recipe` for an artifact that was built: its manifest knows the recipe's name and formats.

    Raises:
        ConfigError: as `check_recipe`.
    """
    if FP8 not in formats:
        return
    capability = target.compute_capability
    if target.built_backend == "ort-cpu" or capability is None:
        cause = "onnxruntime's CPU provider has no product with fp8 weights, it would hold them as float32"
    elif float(capability) < _FP8_CAPABILITY:
        cause = f"fp8 needs compute capability {_FP8_CAPABILITY}, {target.title} has {capability}"
    else:
        return
    raise ConfigError(f"recipe {recipe} for {target.name}: {cause}", hint="--recipe int8 takes as many bytes")
