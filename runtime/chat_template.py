"""A checkpoint's chat_template.jinja, rendered as transformers renders it, in a sandbox.

The template is code from a checkpoint, untrusted: it runs in jinja2's immutable sandbox and sees plain JSON data only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from gemma4_export.configs.errors import ConfigError
from gemma4_export.runtime.messages import MAX_DEPTH

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]

# What a template prints when no tokenizer_config.json lies beside it; the names are the same in every Gemma tokenizer.
DEFAULT_SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}

# A message's thought goes by three names; templates are promised the first.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# What expressions inside a template raise on odd data, beside jinja's own.
_DATA_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

# Appended to the text to continue, so that its end can be found in the prompt. Its own trailing space tells whether the
# template trims. A noncharacter of Unicode: no text for interchange contains it.
_CONTINUE_HERE = "\ufdd2 "


class ChatTemplate:
    """One compiled template; ``render`` is a pure function of its arguments."""

    def __init__(self, path: Path | str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        """Read and compile.

        Args:
            path: chat_template.jinja.
            special_tokens: what ``bos_token`` and the like print; by default from tokenizer_config.json beside it.
        Raises:
            ConfigError: no such file (a base checkpoint has none), or it is not a template.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(
                f"{self.path}: no chat template here; base checkpoints ship none and cannot chat",
                hint="use an -it checkpoint, or complete text with gemma4-run generate ARTIFACT --raw --prompt TEXT",
            )
        try:
            self.source = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path}: not UTF-8 ({error.reason})", hint="copy the file again") from error
        if special_tokens is None:
            special_tokens = read_special_tokens(self.path.parent)
        self.special_tokens = dict(special_tokens)
        self._template = _compile(self.path, self.source)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        enable_thinking: bool = False,
        *,
        continue_final_message: bool | str = False,
        mark_text: Callable[[str], str] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt as text, equal to transformers' ``render_jinja_template`` character for character.

        Args:
            messages: mappings with ``role`` and usually ``content`` (a string or a list of parts).
            tools: JSON schemas, ``{"type": "function", "function": {...}}``.
            add_generation_prompt: end with the opening of a model turn; default: yes, unless a message is continued.
            enable_thinking: ask for a thought before the answer.
            continue_final_message: leave the last message open at its end; a string names the field that goes on.
            mark_text: applied to every string (also mapping keys) of messages, tools and variables before the template
                sees it; how ``Tokenizer.encode_chat`` tells the caller's text from the template's.
            variables: further template variables, such as ``preserve_thinking``.
        Raises:
            ConfigError: malformed messages or tools, data that is not JSON, or the template refused them.
        """
        if continue_final_message and add_generation_prompt:
            raise ConfigError(
                "add_generation_prompt opens a model turn, continue_final_message leaves the last one open: not both",
                hint="leave add_generation_prompt out",
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        _check_mappings("messages", messages, need="role")
        if tools is not None:
            _check_mappings("tools", tools)
        mark = mark_text or str
        chat = [_with_reasoning_names(_plain(message, f"messages[{i}]", mark)) for i, message in enumerate(messages)]
        goes_on = self._mark_end(chat, continue_final_message) if continue_final_message else None
        values = self.special_tokens | {
            "documents": None,
            **{name: _plain(value, name, mark) for name, value in variables.items()},
            "messages": chat,
            "tools": _plain(tools, "tools", mark),
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": enable_thinking,
        }
        text = self._run(values)
        return text if goes_on is None else self._cut_at_end(text, goes_on)

    def _run(self, values: Mapping[str, Any]) -> str:
        import jinja2

        try:
            return self._template.render(values)
        except (jinja2.TemplateError, *_DATA_ERRORS) as error:
            raise ConfigError(
                f"{self.path.name} refused the messages: {error}",
                hint="check roles, content, tool calls and tool results against the template; its own words are above",
            ) from error

    def _mark_end(self, chat: list[dict[str, Any]], field: bool | str) -> str:
        """Append the end marker to the last message's text, in place; return the text without it."""
        name = field if isinstance(field, str) else "content"
        last = chat[-1]
        text = last.get(name)
        same = [other for other in REASONING_FIELDS if last.get(other) == text] if name in REASONING_FIELDS else [name]
        if text is None or not any(other in self.source for other in same):
            found = "is not a field of the template" if text is not None else "is absent from the last message"
            raise ConfigError(
                f"continue_final_message: {name!r} {found}", hint="end messages with the text to continue"
            )
        if isinstance(text, str):
            last.update(dict.fromkeys(same, text + _CONTINUE_HERE))
            return text
        for part in reversed(text if isinstance(text, (list, tuple)) else []):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                final = str(part["text"])
                part["text"] = final + _CONTINUE_HERE
                return final
        raise ConfigError("continue_final_message: the last message has no text part", hint="add a text part to it")

    def _cut_at_end(self, text: str, goes_on: str) -> str:
        marker = _CONTINUE_HERE.strip()
        if goes_on.strip() not in text or marker not in text:
            raise ConfigError(
                f"continue_final_message: {self.path.name} does not print the last message as it is: {goes_on!r}",
                hint="templates cut thoughts out of history; pass the thought as the field reasoning instead",
            )
        at = text.rindex(marker)
        # the marker's space survived: the template does not trim, so white space before it is the caller's
        return text[:at] if text.startswith(_CONTINUE_HERE, at) else text[:at].rstrip()


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The ``…_token`` entries of tokenizer_config.json, name -> text; Gemma's usual names where the file is absent."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return dict(DEFAULT_SPECIAL_TOKENS)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}", hint="copy the tokenizer files again") from error
    if not isinstance(config, dict):
        found = type(config).__name__
        raise ConfigError(f"{path}: expected a JSON object, found {found}", hint="copy the tokenizer files again")
    tokens = {}
    for name, value in config.items():
        if name.endswith("_token") and value is not None:
            # transformers once wrote {"content": "<bos>", "lstrip": false, ...} instead of the string
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise ConfigError(f"{path}: {name}: expected a string, found {value!r}", hint="copy the file again")
            tokens[name] = text
    return DEFAULT_SPECIAL_TOKENS | tokens


def _compile(path: Path, source: str) -> jinja2.Template:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` … ``{% endgeneration %}``, transformers' mark of what a model wrote: prints its body."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not a valid template: {error.message}", hint="copy the checkpoint's file again"
        ) from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes < and > for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_mappings(name: str, items: Any, *, need: str | None = None) -> None:
    """``items`` is a list of mappings, each with a string under ``need``; an empty list of messages is no prompt."""
    hint = 'messages=[{"role": "user", "content": "Hello"}]' if name == "messages" else "tools=[{JSON schema}, ...]"
    if not isinstance(items, (list, tuple)):
        raise ConfigError(f"{name}: expected a list of mappings, got {type(items).__name__}", hint=hint)
    if need and not items:
        raise ConfigError(f"{name}: expected at least one message, got none", hint=hint)
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise ConfigError(f"{name}[{i}]: expected a mapping, got {type(item).__name__}", hint=hint)
        if need and not isinstance(item.get(need), str):
            raise ConfigError(f"{name}[{i}]: expected a string {need!r}, got {item.get(need)!r}", hint=hint)


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """Give a thought the names that templates read, as transformers does."""
    thought = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _plain(value: Any, where: str, mark: Callable[[str], str], depth: int = 0) -> Any:
    """A copy in plain JSON types, every string passed through ``mark``.

    Media in content parts (arrays, images) becomes ``<TypeName>``: templates look whether it is there, never at it.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(
            f"{where:.40}…: nested deeper than {MAX_DEPTH} levels, or a part of itself",
            hint="pass plain JSON data, at most a few levels deep",
        )
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # the exact type: an enum's str() prints its name
        return mark(str.__str__(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        below = depth + 1
        return {_plain(key, where, mark): _plain(item, f"{where}.{key}", mark, below) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{i}]", mark, depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)  # templates print the two differently
    if isinstance(value, np.generic):
        return _plain(value.item(), where, mark)
    if ".content[" in where:
        return f"<{type(value).__name__}>"
    raise ConfigError(
        f"{where}: expected JSON data (text, number, list, mapping, true, false, null), got {type(value).__name__}",
        hint="convert it first, for example with str(...)",
    )
