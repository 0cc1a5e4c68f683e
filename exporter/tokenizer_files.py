"""The tokenizer files of a checkpoint: copied as they are, checked against the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.output import naming

CHAT_TEMPLATE = "chat_template.jinja"
_REQUIRED = ("tokenizer.json", "generation_config.json")
_OPTIONAL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)


def copy_tokenizer(checkpoint: Path, folder: Path, *, vocab_size: int) -> None:
    """Copy a checkpoint's tokenizer files as they are.

    Raises:
        ConfigError: a file is missing, is not JSON, or names ids that the model does not have.
    """
    folder.mkdir()
    for name in (*_REQUIRED, *_OPTIONAL):
        source = checkpoint / name
        if source.is_file():
            with naming(folder / name):
                shutil.copyfile(source, folder / name)
        elif name in _REQUIRED:
            raise ConfigError(f"{checkpoint}: no {name}", hint="download it from the model's page into the same folder")
    highest = _highest_id(folder / "tokenizer.json")
    if highest >= vocab_size:
        raise ConfigError(
            f"tokenizer.json: token id {highest}, the model's vocabulary has {vocab_size}",
            hint="tokenizer.json and config.json belong to different models",
        )
    generation = _read_json(folder / "generation_config.json")
    for key in ("eos_token_id", "suppress_tokens"):
        value = generation.get(key)
        for index in value if isinstance(value, list) else [] if value is None else [value]:
            if type(index) is not int or not 0 <= index < vocab_size:
                raise ConfigError(
                    f"generation_config.json: {key}: {index!r} is no id of a vocabulary of {vocab_size}",
                    hint="generation_config.json and config.json belong to different models",
                )
    if generation.get("eos_token_id") in (None, []):
        raise ConfigError("generation_config.json: no eos_token_id, so nothing would stop", hint="download it again")
    template = read_chat_template(checkpoint)
    if template is not None:
        _check_template(template)
        (folder / CHAT_TEMPLATE).write_bytes(template.encode())
    _check_tokenizer(folder)


def _check_tokenizer(folder: Path) -> None:
    """Refuse now what the runtime would refuse at load, after minutes of writing weights."""
    import tokenizers

    config = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    bos = config.get("bos_token") or "<bos>"
    bos = bos.get("content") if isinstance(bos, dict) else bos
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises Exception itself, for whatever it does not like
        raise ConfigError(f"tokenizer.json: no tokenizer ({error})", hint="download it again") from error
    names = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    if bos not in names:
        raise ConfigError(
            f"tokenizer.json: {bos!r} is not among its {len(names)} control tokens",
            hint="copy tokenizer.json and tokenizer_config.json from one checkpoint",
        )


def _check_template(template: str) -> None:
    import jinja2

    hint = "download chat_template.jinja again, or remove it to build a model that only continues text"
    if not template.strip():
        raise ConfigError("chat_template.jinja: empty", hint=hint)
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError as error:
        if "generation" not in str(error):  # transformers' own tag, which the runtime knows
            raise ConfigError(f"chat_template.jinja, line {error.lineno}: {error.message}", hint=hint) from error


def read_chat_template(checkpoint: Path) -> str | None:
    """The checkpoint's chat template: its own file, or, as older transformers saved it, in tokenizer_config.json."""
    template, config = checkpoint / CHAT_TEMPLATE, checkpoint / "tokenizer_config.json"
    if template.is_file():
        try:
            return template.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{template.name}: not UTF-8 ({error.reason})", hint="download it again") from error
    inline = _read_json(config).get("chat_template") if config.is_file() else None
    return inline if isinstance(inline, str) else None


def _highest_id(path: Path) -> int:
    tokenizer = _read_json(path)
    try:
        ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer.get("added_tokens", []))]
        return max(int(index) for index in ids)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path.name}: has no vocabulary ({error!r})", hint="download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name}: not JSON ({error})", hint="download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path.name}: expected a JSON object, found {type(value).__name__}", hint="download it again"
        )
    return value
