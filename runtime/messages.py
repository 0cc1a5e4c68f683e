"""Messages and tools before a template sees them: what it would pass over in silence is refused, with its place.

A template is asked no more than its text: whatever it names in a comparison of roles, or reads from a message, is let
through beside what the templates of released checkpoints know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma4_export.configs.errors import ConfigError, nearest

_ROLES = ("assistant", "developer", "model", "system", "tool", "user")
_KEYS = (
    *("content", "name", "reasoning", "reasoning_content", "role"),
    *("thinking", "tool_call_id", "tool_calls", "tool_responses"),
)
_MEDIA = ("image", "image_url", "audio", "input_audio", "video")
_ASKING = ("user", "system", "developer")
_ANSWERING = ("assistant", "model")
_HINT = '{"role": "user", "content": "Hello"}, or "content": [{"type": "text", "text": "Hello"}]'
_TOOL_HINT = (
    '{"type": "function", "function": {"name": "get_price", "description": "Price of a thing.", '
    '"parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}}}'
)
MAX_DEPTH = 64
"""Lists and mappings inside each other; what holds itself is deeper than any."""


def check_messages(messages: Any, template: str) -> None:
    """Refuse messages that would not be read, or not as meant.

    Args:
        messages: as for ``Gemma4.encode``; what is no list of mappings with roles, the template's renderer refuses.
        template: the text of the checkpoint's template.
    Raises:
        ConfigError: an unknown role or key, a media part, or content that is no text.
    """
    for index, message in enumerate(messages if isinstance(messages, (list, tuple)) else ()):
        if isinstance(message, Mapping) and isinstance(message.get("role"), str):
            _check_names(f"messages[{index}]", message, template)
            _check_content(f"messages[{index}]", message)


def check_tools(tools: Any) -> None:
    """Refuse tools whose declaration would come out empty or wrong.

    Args:
        tools: as for ``Gemma4.encode``; what is no list of mappings, the template's renderer refuses.
    Raises:
        ConfigError: no function with a name in one of them, or parameters that are no JSON schema of an object.
    """
    for index, tool in enumerate(tools if isinstance(tools, (list, tuple)) else ()):
        if not isinstance(tool, Mapping):
            continue
        where = f"tools[{index}]"
        function: Any = tool.get("function")
        _expect(f"{where}.function", function, isinstance(function, Mapping), "a mapping")
        name = function.get("name")
        _expect(f"{where}.function.name", name, isinstance(name, str) and name.strip(), "a name")
        if function.get("parameters") is not None:
            _check_schema(f"{where}.function.parameters", function["parameters"], 0)


def _check_names(where: str, message: Mapping[str, Any], template: str) -> None:
    role = message["role"]
    if role not in _ROLES and not _is_compared(role, template):
        raise ConfigError(f"{where}: role {role!r:.60} is not known", hint=nearest(role, _ROLES))
    for key, value in message.items():
        # other programs' messages list what they leave empty
        if value is not None and key not in _KEYS and not _is_read(str(key), template):
            raise ConfigError(f"{where}: unknown key {key!r:.60}", hint=nearest(str(key), _KEYS))


def _is_compared(role: str, template: str) -> bool:
    """Whether ``template`` compares a role with this one, as in ``message['role'] in ['king', 'queen']``."""
    return bool(re.search(rf"""role['"\])]*\s*(==|!=|in)\s[^%}}]*?['"]{re.escape(role)}['"]""", template))


def _is_read(key: str, template: str) -> bool:
    """Whether ``template`` reads ``message['key']``, ``message.key`` or ``messages[0].get('key')``."""
    return bool(re.search(rf"""message\w*(\[\w+\])?(\.get\(|\[|\.)['"]?{re.escape(key)}\b""", template))


def _check_content(where: str, message: Mapping[str, Any]) -> None:
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else ()
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _MEDIA:
            raise ConfigError(
                f"{where}: {kind} parts are not read by this version, which packs no vision or audio",
                hint="send text only",
            )
    # a model's turn may be tool calls alone, and a tool's result any JSON
    must_say = message["role"] in _ASKING and "tool_responses" not in message
    may_say = message["role"] in _ANSWERING and content is not None and content != []
    if must_say or may_say:
        _check_text(where, content, parts)


def _check_text(where: str, content: Any, parts: Sequence[Any]) -> None:
    if not isinstance(content, str) and not parts:
        raise ConfigError(f"{where}: content is {content!r:.60}, expected text or a list of parts", hint=_HINT)
    for index, part in enumerate(parts):
        is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            raise ConfigError(f"{where}: part {index} is {part!r:.60}, expected a text part", hint=_HINT)


def _check_schema(where: str, schema: Any, depth: int) -> None:
    """What templates look at in a schema; they skip the rest, and what lies too deep the renderer refuses."""
    if depth > MAX_DEPTH:
        return
    _expect(where, schema, isinstance(schema, Mapping), "a JSON schema, a mapping")
    kind, required = schema.get("type"), schema.get("required")
    _expect(
        f"{where}.type", kind, kind is None or isinstance(kind, str) or _are_strings(kind), "a name or a list of them"
    )
    _expect(f"{where}.required", required, required is None or _are_strings(required), "a list of names")
    properties = schema.get("properties")
    _expect(f"{where}.properties", properties, properties is None or isinstance(properties, Mapping), "a mapping")
    for name, value in (properties or {}).items():
        _check_schema(f"{where}.properties.{name}", value, depth + 1)
    if isinstance(schema.get("items"), Mapping):
        _check_schema(f"{where}.items", schema["items"], depth + 1)


def _are_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _expect(where: str, value: Any, is_right: Any, words: str) -> None:
    if not is_right:
        raise ConfigError(f"{where}: expected {words}, found {value!r:.60}", hint=_TOOL_HINT)
