"""Arguments of the Python interface that are none: our errors at the call, never Python's own from somewhere inside."""

from __future__ import annotations

from typing import Any

import artifacts
import numpy as np
import pytest
from typer.testing import CliRunner

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ConfigError, ContractError, Gemma4Error
from gemma4_export.exporter.commands import app as exporter_app
from gemma4_export.runtime import Gemma4
from gemma4_export.runtime.commands import app as runtime_app

USER = {"role": "user", "content": "hello"}
CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.fixture(scope="module")
def model() -> Gemma4:
    return artifacts.model("31b", context=64, fresh_trace=False)


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "description": "d", **function}}


def refused(call: Any, kind: type[Gemma4Error]) -> str:
    """The cause, of an error of this class that has a hint."""
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.hint
    return caught.value.cause


@pytest.mark.parametrize("opened", [Gemma4.load, Artifact.open])
def test_what_is_opened_is_a_path_and_checked_in_one_of_two_ways(opened: Any, model: Gemma4) -> None:
    for name, found in ((None, "None"), (b"x", "b'x'"), (5, "5"), ("", "''")):
        cause = refused(lambda name=name: opened(name), ContractError)
        assert cause == f"the artifact: expected the path of a folder, found {found}"
    for check in ("typo", None, ["full"]):
        cause = refused(lambda check=check: opened(model.artifact.folder, check=check), ContractError)
        assert cause == f"check: expected 'small' or 'full', found {check!r}"
    assert opened(str(model.artifact.folder), check="full") is not None


@pytest.mark.parametrize(
    ("ids", "cause"),
    [
        (None, "ids: expected a list of integers, found None"),
        (5, "ids: expected a list of integers, found 5"),
        ("abc", "ids: expected a list of integers, found 'abc'"),
        ({5: 6}, "ids: expected a list of integers, found {5: 6}"),
        ([[1]], "ids: expected a list of integers, found shape [1, 1] of int64"),
        ([1.5], "ids: expected a list of integers, found shape [1] of float64"),
        ([1, None], "ids: expected a list of integers, found shape [2] of object"),
        ([1, 10**6], "ids: 1000000 is outside the vocabulary of 440"),
        ([-1], "ids: -1 is outside the vocabulary of 440"),
    ],
)
def test_ids_that_are_none_are_refused_before_the_first_event(model: Gemma4, ids: Any, cause: str) -> None:
    for call in (model.generate_ids, model.stream_ids):
        assert refused(lambda call=call: call(ids), ContractError) == cause


def test_ids_may_come_as_any_sequence_of_integers(model: Gemma4) -> None:
    expected = model.generate_ids([5, 6, 7], max_new_tokens=3, temperature=0)
    for ids in ((5, 6, 7), range(5, 8), np.array([5, 6, 7], np.uint8), [np.int64(5), 6, 7]):
        assert model.generate_ids(ids, max_new_tokens=3, temperature=0) == expected


@pytest.mark.parametrize(
    ("variables", "cause"),
    [
        (5, "expected a mapping from names to values, found 5"),
        ([], "expected a mapping from names to values, found []"),
        ({5: 6}, "expected a mapping from names to values, found {5: 6}"),
        ({"messages": 5}, "messages is no variable of the caller's"),
        ({"enable_thinking": True}, "enable_thinking is no variable of the caller's"),
        ({"mark_text": str}, "mark_text is no variable of the caller's"),
    ],
)
def test_template_variables_that_are_none_are_refused(model: Gemma4, variables: Any, cause: str) -> None:
    for call in (model.generate, model.stream):
        found = refused(lambda call=call: call([USER], template_variables=variables), ConfigError)
        assert found == f"template_variables: {cause}"
    assert model.generate([USER], template_variables={}, max_new_tokens=1).ids


def test_variables_of_encode_are_held_to_the_same(model: Gemma4) -> None:
    cause = refused(lambda: model.encode([USER], template=5), ConfigError)
    assert cause == "template_variables: template is no variable of the caller's"
    assert model.encode([USER], preserve_thinking=True) == model.encode([USER])


@pytest.mark.parametrize("text", [None, 5, b"x"])
def test_raw_text_is_a_string(model: Gemma4, text: Any) -> None:
    assert refused(lambda: model.encode_raw(text), ConfigError) == f"text: expected a string, found {text!r}"


@pytest.mark.parametrize(
    ("app", "command"),
    [(runtime_app, "verify"), (runtime_app, "bench"), (runtime_app, "chat"), (exporter_app, "inspect")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_empty_name_is_not_the_current_folder(app: Any, command: str) -> None:
    result = CliRunner().invoke(app, [command, ""])
    assert isinstance(result.exception, ContractError)
    assert result.exception.cause == "the artifact: expected the path of a folder, found ''"


# ---------------------------------------------------------------------------------------------------------------------
# Messages


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ({"role": "king", "content": "hi"}, "role 'king' is not known"),
        ({"role": "function", "content": "hi"}, "role 'function' is not known"),
        ({"role": "", "content": "hi"}, "role '' is not known"),
        (USER | {"contnet": "hi"}, "unknown key 'contnet'"),
        (USER | {"function": "hi"}, "unknown key 'function'"),
        (USER | {5: "hi"}, "unknown key 5"),
        ({"role": "assistant", "content": 5}, "content is 5, expected text or a list of parts"),
        ({"role": "model", "content": ["hi"]}, "part 0 is 'hi', expected a text part"),
        ({"role": "user"}, "content is None, expected text or a list of parts"),
    ],
)
def test_a_message_that_would_not_be_read_is_refused_by_its_place(
    model: Gemma4, message: dict[Any, Any], cause: str
) -> None:
    found = refused(lambda: model.encode([USER, message, USER]), ConfigError)
    assert found == f"messages[1]: {cause}"


def test_what_the_template_reads_is_let_through(model: Gemma4) -> None:
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "1"}]}
    for message in (
        {"role": "developer", "content": "hi"},
        {"role": "system", "content": [{"type": "text", "text": "hi"}]},
        {"role": "model", "content": "hi"},
        {"role": "assistant", "content": "hi", "reasoning": "so", "thinking": "so", "reasoning_content": "so"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "assistant", "tool_responses": [{"name": "f", "response": {"a": 1}}]},
    ):
        assert model.encode([message, USER])
    assert model.encode([USER, answer, {"role": "tool", "tool_call_id": "1", "name": "f", "content": "5"}])


def test_a_template_of_somebody_elses_may_know_more(model: Gemma4, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.template is not None
    more = "{% if messages[0].mood and message['role'] in ['queen', 'king'] %}{% endif %}"
    monkeypatch.setattr(model.template, "source", model.template.source + more)
    assert model.encode([USER, {"role": "king", "content": "hi"}, USER | {"mood": "merry"}])
    assert refused(lambda: model.encode([{"role": "pope", "content": "hi"}]), ConfigError)


# ---------------------------------------------------------------------------------------------------------------------
# Tools


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"type": "function", "function": None}, "function: expected a mapping, found None"),
        ({"name": "f", "parameters": {}}, "function: expected a mapping, found None"),
        (tool(name=""), "function.name: expected a name, found ''"),
        (tool(name=None), "function.name: expected a name, found None"),
        (tool(parameters=[]), "function.parameters: expected a JSON schema, a mapping, found []"),
        (tool(parameters="x"), "function.parameters: expected a JSON schema, a mapping, found 'x'"),
        (tool(parameters={"properties": ["a"]}), "function.parameters.properties: expected a mapping, found ['a']"),
        (
            tool(parameters={"properties": {"a": "string"}}),
            "function.parameters.properties.a: expected a JSON schema, a mapping, found 'string'",
        ),
        (
            tool(parameters={"properties": {"a": {"items": {"properties": {"b": 5}}}}}),
            "function.parameters.properties.a.items.properties.b: expected a JSON schema, a mapping, found 5",
        ),
        (tool(parameters={"required": "a"}), "function.parameters.required: expected a list of names, found 'a'"),
        (tool(parameters={"type": 5}), "function.parameters.type: expected a name or a list of them, found 5"),
    ],
)
def test_a_tool_that_would_be_declared_wrongly_is_refused_by_its_place(
    model: Gemma4, wrong: dict[str, Any], cause: str
) -> None:
    assert refused(lambda: model.encode([USER], [tool(), wrong]), ConfigError) == f"tools[1].{cause}"


def test_tools_that_templates_declare_are_let_through(model: Gemma4) -> None:
    schema = {"type": "object", "properties": {"a": {"type": ["string", "null"]}, "b": {}}, "required": []}
    for right in (tool(), tool(parameters=None), tool(parameters={}), tool(parameters=schema, strict=True)):
        assert model.encode([USER], [right])


@pytest.mark.parametrize("key", ["properties", "items", "x"])
def test_a_tool_that_holds_itself_is_refused(model: Gemma4, key: str) -> None:
    endless: dict[str, Any] = {"type": "object"}
    endless[key] = {"me": endless} if key == "properties" else endless
    cause = refused(lambda: model.encode([USER], [tool(parameters=endless)]), ConfigError)
    assert cause.endswith("nested deeper than 64 levels, or a part of itself")
