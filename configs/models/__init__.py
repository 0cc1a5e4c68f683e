"""The released models: short names, hub ids and resolved configs, one TOML file per size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma4_export.configs.errors import ConfigError, nearest
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.recipe import Recipe
from gemma4_export.configs.toml import check_keys, load_named, names_in

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class QatCheckpoint:
    """The decoder of a released model as quantisation-aware training left it: a repository with one Q4_0 GGUF file."""

    hub_id: str
    file_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCheckpoint:
    """What a build downloads for one recipe."""

    hub_id: str
    plain_id: str | None
    """The plain checkpoint's, for a GGUF without config and tokenizer."""
    num_bytes: int
    """Of its weights; 0: only the hub knows."""
    note: str
    """What to tell about the choice; may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedModel:
    """One released checkpoint: ``26b-a4b`` is the instruction-tuned one, ``26b-a4b-base`` the base one."""

    name: str
    title: str
    hub_id: str
    checkpoint_bytes: int
    """Of its safetensors files, vision and audio towers included."""
    config: ModelConfig
    qat: QatCheckpoint | None
    """None: none was released, as of every base model."""

    def checkpoint_for(self, recipe: Recipe) -> HubCheckpoint:
        """The quantisation-aware checkpoint where ``recipe`` prefers one and there is one, else the plain one."""
        if recipe.prefers_qat and self.qat is not None:
            return HubCheckpoint(
                hub_id=self.qat.hub_id,
                plain_id=self.hub_id,
                num_bytes=self.qat.file_bytes,
                note=f"{recipe.name}: taking the quantisation-aware checkpoint {self.qat.hub_id} "
                f"(--recipe int4-rtn rounds {self.hub_id} instead)",
            )
        note = f"{recipe.name}: no quantisation-aware checkpoint of {self.hub_id} is known; its weights are rounded"
        return HubCheckpoint(
            hub_id=self.hub_id,
            plain_id=None,
            num_bytes=self.checkpoint_bytes,
            note=note if recipe.prefers_qat else "",
        )


def model_names() -> list[str]:
    """Every short name."""
    return [name for size in names_in(_FOLDER) for name in (size, f"{size}-base")]


def load_model(name: str) -> ReleasedModel:
    """The released checkpoint with this short name or hub id.

    Raises:
        ConfigError: there is none; the hint names the nearest.
    """
    for model in _released():
        if name.lower() in (model.name, model.hub_id.lower()):
            return model
    known = [model.hub_id for model in _released()] if "/" in name else model_names()
    raise ConfigError(f"model {name!r} is not known", hint=nearest(name if "/" in name else name.lower(), known))


def released_ids() -> list[str]:
    """Every hub id of a released checkpoint, in lower case."""
    return [model.hub_id.lower() for model in _released()]


def is_other(model: str) -> bool:
    """A hub id beside the released ones: a fine-tune or a quantised one, named as the hub names it."""
    return "/" in model and model.lower() not in released_ids()


def other_checkpoint(hub_id: str, recipe: Recipe) -> HubCheckpoint:
    """A repository beside the released ones (a fine-tune, a quantised one) for ``recipe``."""
    note = f"{recipe.name}: no quantisation-aware checkpoint of {hub_id} is known; what is not 4-bit yet is rounded"
    return HubCheckpoint(
        hub_id=hub_id, plain_id=plain_id_of(hub_id), num_bytes=0, note=note if recipe.prefers_qat else ""
    )


def plain_id_of(hub_id: str) -> str | None:
    """The released checkpoint that a repository called ``hub_id`` was made from, by its name; None: it names none.

    ``bartowski/google_gemma-4-E2B-it-GGUF`` is made from ``google/gemma-4-E2B-it``, not from its base model.
    """
    own_name = _own_name(hub_id)
    found = [model.hub_id for model in _released() if _own_name(model.hub_id) in own_name]
    return max(found, key=len, default=None)


def name_of(checkpoint: str) -> str:
    """What a checkpoint called ``checkpoint`` (a hub id or a folder) is: a released one's short name, else its own."""
    for model in _released():
        if _own_name(model.hub_id) == _own_name(checkpoint):
            return model.name
    return checkpoint.rsplit("/", 1)[-1]


def _own_name(hub_id: str) -> str:
    """Without the owner, in lower case."""
    return hub_id.rsplit("/", 1)[-1].lower()


def _released() -> Iterator[ReleasedModel]:
    for size in names_in(_FOLDER):
        yield from _load_size(size)


def _load_size(size: str) -> tuple[ReleasedModel, ReleasedModel]:
    values = load_named(_FOLDER, size, "model")
    check_keys(
        values,
        {"name", "title", "hub_id", "base_hub_id", "checkpoint_parameters", "config"},
        {"qat"},
        f"models/{size}.toml",
    )
    qat = QatCheckpoint(**values["qat"]) if "qat" in values else None
    shared = {"checkpoint_bytes": 2 * values["checkpoint_parameters"], "config": ModelConfig.from_hf(values["config"])}
    title = values["title"]
    return (
        ReleasedModel(name=size, title=title, hub_id=values["hub_id"], qat=qat, **shared),
        ReleasedModel(name=f"{size}-base", title=f"{title}, base", hub_id=values["base_hub_id"], qat=None, **shared),
    )
