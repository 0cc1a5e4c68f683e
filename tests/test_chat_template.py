"""Chat templates render as transformers renders them: every published revision against goldens, ours against them."""

from __future__ import annotations

import copy
import enum
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_export.configs.errors import ConfigError
from gemma4_export.exporter.small_tokenizer import chat_template, write_small_tokenizer
from gemma4_export.runtime.chat_template import ChatTemplate

PUBLISHED = [
    "diffusiongemma-20260723",
    "hub-large-20260402",
    "hub-large-20260410",
    "hub-large-20260429",
    "hub-large-202606",
    "hub-large-20260709",
    "hub-small-20260413",
    "hub-small-20260429",
    "hub-small-202605",
    "hub-small-20260709",
    "llamacpp-interleaved-20260410",
    "vllm-tool-20260616",
]
USER = {"role": "user", "content": "Hello"}
ENDLESS: dict[str, Any] = {}
ENDLESS["me"] = ENDLESS
ENDLESS_LIST: list[Any] = []
ENDLESS_LIST.append(ENDLESS_LIST)


@pytest.fixture(scope="session")
def goldens(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "chat_templates" / "goldens.json").read_text(encoding="utf-8"))


@pytest.fixture(params=["small", "large"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ChatTemplate]:
    path = tmp_path / "chat_template.jinja"
    path.write_text(chat_template(empty_thought=request.param == "large"), encoding="utf-8")
    return request.param, ChatTemplate(path)


def template_of(tmp_path: Path, text: str, **special: str) -> ChatTemplate:
    path = tmp_path / "chat_template.jinja"
    path.write_text(text, encoding="utf-8")
    return ChatTemplate(path, special_tokens=special or None)


def check_cases(template: ChatTemplate, name: str, goldens: dict[str, Any], *, own_errors: bool = False) -> int:
    """Render every golden case of template ``name``; a case that raises must raise with the template's own words."""
    seen = 0
    for case in goldens["cases"] + goldens["continue_cases"]:
        if name not in case["out"]:
            continue
        seen += 1
        conversation = goldens["conversations"].get(case["conversation"], {})
        arguments = (case.get("messages") or conversation["messages"], conversation.get("tools"))
        expected = case["out"][name]
        label = f"{case['conversation']} {case['kwargs']}"
        if isinstance(expected, int):
            assert template.render(*arguments, **case["kwargs"]) == goldens["texts"][expected], label
            continue
        with pytest.raises(ConfigError) as caught:
            template.render(*arguments, **case["kwargs"])
        assert caught.value.hint, label
        if expected["error"] == "ValueError":  # transformers' own message, about continue_final_message
            assert caught.value.cause.startswith("continue_final_message"), label
        elif not own_errors:
            assert expected["message"] in caught.value.cause, label
    return seen


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_template_renders_as_its_goldens(shared_data: Path, goldens: dict[str, Any], name: str) -> None:
    cases = check_cases(ChatTemplate(shared_data / "chat_templates" / f"{name}.jinja"), name, goldens)
    assert cases >= 80


def test_no_published_template_is_left_out(shared_data: Path, goldens: dict[str, Any]) -> None:
    files = {path.stem for path in (shared_data / "chat_templates").glob("*.jinja")}
    assert files == set(PUBLISHED) == set(goldens["templates"])


def test_own_template_renders_as_the_published_one(own: tuple[str, ChatTemplate], goldens: dict[str, Any]) -> None:
    # Deliberately different, and in no golden text: the wording of errors (tool_result_object, args_json_string), and
    # schemas or responses without a type, whose braces the published template leaves open.
    size, template = own
    assert check_cases(template, f"hub-{size}-20260709", goldens, own_errors=True) >= 90


def test_own_template_is_not_a_copy(shared_data: Path) -> None:
    ours = {line.strip() for line in chat_template().splitlines() if len(line.strip()) > 60}
    for name in PUBLISHED:
        text = (shared_data / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
        assert not ours & {line.strip() for line in text.splitlines()}


def test_empty_thought_is_the_only_difference_between_the_two(own: tuple[str, ChatTemplate]) -> None:
    size, template = own
    prompt = "<bos><|turn>user\nHello<turn|>\n<|turn>model\n"
    assert template.render([USER]) == prompt + ("<|channel>thought\n<channel|>" if size == "large" else "")
    assert template.render([USER], enable_thinking=True) == prompt.replace(
        "<bos>", "<bos><|turn>system\n<|think|>\n<turn|>\n"
    )
    assert template.render([USER], add_generation_prompt=False) == prompt.removesuffix("<|turn>model\n")


def test_a_tool_result_leaves_the_thought_open_when_thinking(own: tuple[str, ChatTemplate]) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC", "n": 2, "b": None}}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    waiting = own[1].render(messages)
    assert waiting.endswith('<|tool_call>call:now{b:null,n:2,zone:<|"|>UTC<|"|>}<tool_call|><|tool_response>')
    messages.append({"role": "tool", "tool_call_id": "1", "content": "12:00"})
    answered = waiting + 'response:now{value:<|"|>12:00<|"|>}<tool_response|>'
    assert own[1].render(messages) == answered
    assert own[1].render(messages, enable_thinking=True).endswith("<tool_response|><|channel>thought\n")


def conversations() -> st.SearchStrategy[list[dict[str, Any]]]:
    text = st.text(st.sampled_from("a b\n<|>{}é"), max_size=8) | st.sampled_from(
        ["<|channel>thought\nx<channel|>y", ""]
    )
    part = st.one_of(
        st.fixed_dictionaries({"type": st.just("text"), "text": text}),
        st.sampled_from([{"type": "image"}, {"type": "input_audio"}, {"type": "video"}]),
    )
    value = st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, width=16) | text,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abC"), inner, max_size=2),
        max_leaves=4,
    )
    call = st.fixed_dictionaries(
        {
            "id": st.sampled_from("12"),
            "function": st.fixed_dictionaries(
                {
                    "name": st.just("f"),
                    "arguments": st.none() | st.dictionaries(st.sampled_from("aBc"), value, max_size=3),
                }
            ),
        }
    )
    content = text | st.lists(part, max_size=3)
    message = st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "developer"]), "content": text}),
        st.fixed_dictionaries({"role": st.just("user"), "content": content}),
        st.fixed_dictionaries(
            {"role": st.sampled_from(["assistant", "model"]), "content": content},
            optional={
                "reasoning": text,
                "reasoning_content": text,
                "thinking": text,
                "tool_calls": st.lists(call, max_size=2),
            },
        ),
        st.fixed_dictionaries({"role": st.just("tool"), "content": content, "tool_call_id": st.sampled_from("12")}),
    )
    return st.lists(message, min_size=1, max_size=5)


OPTIONS = st.fixed_dictionaries(
    {"enable_thinking": st.booleans(), "add_generation_prompt": st.booleans()},
    optional={"preserve_thinking": st.booleans()},
)


@pytest.fixture(scope="module")
def ours_and_oracle(tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("small")
    write_small_tokenizer(folder)
    return ChatTemplate(folder / "chat_template.jinja"), AutoTokenizer.from_pretrained(folder)


@settings(max_examples=150, deadline=None)
@given(messages=conversations(), options=OPTIONS)
def test_apply_chat_template_gives_the_same_text(
    ours_and_oracle, messages: list[dict[str, Any]], options: dict
) -> None:
    ours, oracle = ours_and_oracle
    before = copy.deepcopy(messages)
    expected = oracle.apply_chat_template(messages, tokenize=False, **options)
    assert ours.render(messages, **options) == expected
    assert messages == before, "the caller's messages were edited"


@settings(max_examples=150, deadline=None)
@given(messages=conversations(), options=OPTIONS)
def test_own_template_equals_the_published_one_on_random_chats(
    shared_data: Path, messages: list, options: dict
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    published = (shared_data / "chat_templates" / "hub-small-20260709.jinja").read_text(encoding="utf-8")
    texts = [
        render_jinja_template([messages], chat_template=text, bos_token="<bos>", **options)[0][0]
        for text in (chat_template(), published)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages | tojson }}{{ {'é': '<b>', 'a': [1, none]} | tojson(indent=2, sort_keys=true) }}",
        "  {% for m in messages %}\n {% if loop.last %}{% break %}{% endif %}\n {{ m.content }}\n{% endfor %}\nend\n",
        "{% generation %}{{ bos_token }}{{ eos_token }}{% endgeneration %}{{ pad_token }}{{ image_token }}",
        "{{ strftime_now('%Y') }}{{ documents is none }}{{ tools is none }}{{ add_generation_prompt }}{{ style }}",
        "{% set ns = namespace(a=1) %}{% set ns.a = dict(b=2) %}{{ ns.a.b }}{{ x is defined }}{{ range(3) | list }}",
        "{% set m = messages[0] %}{{ m.reasoning }}|{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.extra }}",
    ],
)
def test_environment_equals_transformers(tmp_path: Path, text: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "image_token": "<|image|>"}
    kwargs = {"add_generation_prompt": True, "enable_thinking": False, "style": ["plain", 1.5, None]}
    messages = [{**USER, "reasoning": "why", "extra": (1, True)}, {"role": "user", "content": "<again> & é"}]
    expected = render_jinja_template([messages], chat_template=text, **special, **kwargs)[0][0]
    assert template_of(tmp_path, text, **special).render(messages, **kwargs) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages[0].content }}", {"role": "assistant", "content": "The answer  "}),
        ("{{ messages[0].content | trim }}<turn|>", {"role": "assistant", "content": "The answer  "}),
        (
            "{{ messages[0].content[1].text }}.",
            {"role": "assistant", "content": [{"type": "image"}, {"text": "It is"}]},
        ),
        ("{{ messages[0].reasoning_content }}!", {"role": "assistant", "content": "", "reasoning": "so "}),
    ],
)
def test_continuing_a_message_equals_transformers(tmp_path: Path, text: str, message: dict[str, Any]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    field = "reasoning" if "reasoning" in message else True
    expected = render_jinja_template([copy.deepcopy([message])], chat_template=text, continue_final_message=field)[0][0]
    template = template_of(tmp_path, text)
    assert template.render([message], continue_final_message=field) == expected


def test_special_tokens_come_from_the_config_beside_the_template(tmp_path: Path) -> None:
    text = "{{ bos_token }}{{ eot_token }}"
    assert template_of(tmp_path, text).render([USER]) == "<bos>"
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eot_token": "<turn|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert template_of(tmp_path, text).render([USER]) == "<s><turn|>"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: not JSON"):
        template_of(tmp_path, text)


def test_values_reach_the_template_as_plain_data(tmp_path: Path) -> None:
    class Tone(enum.StrEnum):
        CALM = "calm"

    template = template_of(tmp_path, "{{ messages | tojson }}{{ tone }}{{ n }}")
    image = np.zeros((2, 2))
    part = {"type": "image", "image": image, "n": np.float32(0.5)}
    text = template.render([{"role": "user", "content": [part]}], tone=Tone.CALM, n=np.int64(3))
    assert text == '[{"role": "user", "content": [{"type": "image", "image": "<ndarray>", "n": 0.5}]}]calm3'


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"messages": "Hello"}, "messages: expected a list of mappings, got str"),
        ({"messages": USER}, "messages: expected a list of mappings, got dict"),
        ({"messages": []}, "messages: expected at least one message, got none"),
        ({"messages": [USER, "Hello"]}, r"messages\[1\]: expected a mapping, got str"),
        ({"messages": [{"content": "Hello"}]}, r"messages\[0\]: expected a string 'role', got None"),
        ({"messages": [{"role": 3}]}, r"messages\[0\]: expected a string 'role', got 3"),
        ({"messages": [{**USER, "content": b"Hello"}]}, r"messages\[0\]\.content: expected JSON data .*, got bytes"),
        ({"messages": [USER], "tools": {"name": "f"}}, "tools: expected a list of mappings, got dict"),
        ({"messages": [USER], "tools": [print]}, r"tools\[0\]: expected a mapping, got builtin_function_or_method"),
        ({"messages": [USER], "style": {1j}}, r"style: expected JSON data .*, got set"),
        ({"messages": [USER], "tools": [ENDLESS]}, r"^tools\[0\].me.me.+…: nested deeper than 64 levels, or a part of"),
        ({"messages": [USER], "style": ENDLESS_LIST}, r"^style\[0\]\[0\].+…: nested deeper than 64 levels, or a part"),
        ({"messages": [USER], "add_generation_prompt": True, "continue_final_message": True}, "not both"),
        ({"messages": [USER], "continue_final_message": "summary"}, "'summary' is absent from the last message"),
        (
            {"messages": [{**USER, "mood": "x"}], "continue_final_message": "mood"},
            "'mood' is not a field of the template",
        ),
        ({"messages": [{**USER, "content": [{"type": "image"}]}], "continue_final_message": True}, "no text part"),
    ],
)
def test_bad_input_is_refused_with_a_hint(tmp_path: Path, arguments: dict[str, Any], cause: str) -> None:
    template = template_of(tmp_path, "{{ messages[0].content }}")
    with pytest.raises(ConfigError, match=cause) as caught:
        template.render(**arguments)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + none }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].missing.deeper }}", "has no attribute 'missing'"),
        ("{% macro more() %}{{ more() }}{% endmacro %}{{ more() }}", "maximum recursion depth exceeded"),
    ],
)
def test_the_templates_own_errors_reach_the_reader(tmp_path: Path, text: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        template_of(tmp_path, text).render([USER])
    assert caught.value.cause.startswith("chat_template.jinja refused the messages")


def test_a_missing_or_broken_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base checkpoints ship none and cannot chat") as caught:
        ChatTemplate(tmp_path / "chat_template.jinja")
    assert "--raw" in str(caught.value)
    with pytest.raises(ConfigError, match=r"chat_template\.jinja:2: not a valid template"):
        template_of(tmp_path, "a\n{% if %}")


def test_importing_the_text_side_loads_no_library() -> None:
    code = (
        "import sys, gemma4_export.runtime.chat_template, gemma4_export.runtime.tokenizer\n"
        "print(*{'jinja2', 'tokenizers', 'torch', 'transformers', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
