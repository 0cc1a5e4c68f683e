"""A build as it is asked for: where the weights come from and what was left open, to a finished artifact."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.manifest import Manifest
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.models import ReleasedModel, name_of, other_checkpoint
from gemma4_export.configs.names import decoder_tensors
from gemma4_export.configs.recipe import Recipe
from gemma4_export.configs.target import Target
from gemma4_export.exporter.build import BuildOptions, OnProgress, build_artifact, resolve_options
from gemma4_export.exporter.child import check_engine_builder, compile_engines
from gemma4_export.exporter.dummy import DummySource
from gemma4_export.exporter.engine_graphs import Experts
from gemma4_export.exporter.hub import download
from gemma4_export.exporter.memory import engine_bytes
from gemma4_export.exporter.oracle import oracle_bytes
from gemma4_export.exporter.package import partial_of
from gemma4_export.exporter.passes.matmul import Activations
from gemma4_export.exporter.plan import check_fits, make_plan
from gemma4_export.exporter.source import open_source
from gemma4_export.exporter.weights import place_weights
from gemma4_export.exporter.write import WeightSource, check_room


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What is asked for; None is left to the model, the target or the name."""

    origin: Path | ReleasedModel | str
    """A checkpoint folder, a released model, or a hub id beside those."""
    target: Target
    recipe: Recipe
    activations: Activations = "int8"
    has_dummy_weights: bool = False
    """Random weights of a released model's size."""
    out: Path | None = None
    context: int | None = None
    chunk: int | None = None
    experts: Experts = "plugin"
    compiles_engines: bool = True
    """Of a target that runs engines; False: write what they are compiled from."""
    build_memory_bytes: int | None = None
    """What compiling may take; None: what is free."""

    @property
    def name(self) -> str:
        """The model's, and with the target's that of a folder nobody named."""
        if isinstance(self.origin, Path):
            return name_of(self.origin.resolve().name)
        if isinstance(self.origin, str):
            return name_of(self.origin)
        return f"{self.origin.name}-dummy" if self.has_dummy_weights else self.origin.name

    @property
    def folder(self) -> Path:
        """Where the artifact will be."""
        return self.out or Path(f"gemma4-{self.name}-{self.target.name}")

    def options(self, config: ModelConfig) -> BuildOptions:
        """All choices made, for a model of this ``config``.

        Raises:
            ConfigError: the target cannot be built for, or context and chunk are out of range.
        """
        return resolve_options(
            config,
            model_name=self.name,
            target=self.target,
            recipe=self.recipe,
            activations=self.activations,
            has_dummy_weights=self.has_dummy_weights,
            context=self.context,
            chunk=self.chunk,
            experts=self.experts,
        )


def build_requested(request: BuildRequest, on_progress: OnProgress, say: Callable[[str], None]) -> Manifest:
    """Download what is asked for, unless it is here or drawn, and build ``request.folder``.

    Args:
        say: called with a line to keep, empty where there is nothing to tell.
    Raises:
        ConfigError, CheckpointError: as `build_artifact`, `open_source` and `download`.
        ConfigError: the model does not fit the target's memory.
        ArtifactError: nothing here can compile the target's engines, or compiling them failed.
    """
    with contextlib.ExitStack() as stack:
        source = _open(request, stack, on_progress, say)
        options = request.options(source.config)
        check_target_memory(options, source.config)
        finish = None
        if options.has_engines and request.compiles_engines:
            _check_builder(request, source.config)
            finish = functools.partial(_compile, request, on_progress, say)
        return build_artifact(source, options, request.folder, on_progress, finish=finish)


def check_target_memory(options: BuildOptions, config: ModelConfig) -> None:
    """Refuse a GPU whose memory the model and its longest sequence do not fit: its caches are allocated at once.

    Raises:
        ConfigError: it has too little; the hint names what fits.
    """
    if options.target.memory_bytes is None:
        return
    name = options.model_name
    model = ReleasedModel(name=name, title=name, hub_id="", checkpoint_bytes=0, config=config, qat=None)
    check_fits(make_plan(model, options), model, options)


def _check_builder(request: BuildRequest, config: ModelConfig) -> None:
    has_experts = config.layers[0].moe is not None
    check_engine_builder(request.target, needs_plugins=has_experts and request.experts == "plugin")


def _compile(request: BuildRequest, on_progress: OnProgress, say: Callable[[str], None], work: Path) -> Manifest:
    on_progress("engines", "", 0, 1)

    def on_engine(line: str, done: int, total: int) -> None:
        say(line)
        on_progress("engines", f"{done} of {total}", done, total)

    return compile_engines(work, memory_bytes=request.build_memory_bytes, on_engine=on_engine)


def _open(
    request: BuildRequest, stack: contextlib.ExitStack, on_progress: OnProgress, say: Callable[[str], None]
) -> WeightSource:
    origin = request.origin
    if isinstance(origin, Path):
        return stack.enter_context(open_source(origin))
    if not request.has_dummy_weights:
        return _download(request, origin, stack, on_progress, say)
    if isinstance(origin, str):
        raise ConfigError(f"--weights dummy knows released sizes only, not {origin}", hint="--model e2b")
    return DummySource(origin.config)


def _download(
    request: BuildRequest,
    model: ReleasedModel | str,
    stack: contextlib.ExitStack,
    on_progress: OnProgress,
    say: Callable[[str], None],
) -> WeightSource:
    recipe = request.recipe
    wanted = other_checkpoint(model, recipe) if isinstance(model, str) else model.checkpoint_for(recipe)
    say(wanted.note)

    def check_before_weights(config: ModelConfig, cache: Path, download_bytes: int) -> None:
        options = request.options(config)
        check_target_memory(options, config)
        compiles = options.has_engines and request.compiles_engines
        if compiles:
            _check_builder(request, config)
        placement = place_weights(decoder_tensors(config).values(), recipe, packing=options.packing)
        check_room(
            placement,
            partial_of(request.folder),
            oracle_bytes=oracle_bytes(config),
            engine_bytes=engine_bytes(placement) if compiles else 0,
            cache=cache,
            download_bytes=download_bytes,
        )

    downloaded = download(
        wanted.hub_id,
        plain_id=wanted.plain_id,
        on_config=check_before_weights,
        on_progress=functools.partial(on_progress, "download"),
    )
    return stack.enter_context(open_source(downloaded.folder, downloaded.companions))
