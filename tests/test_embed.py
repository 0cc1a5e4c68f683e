"""docs/embed.md, run block by block with the demo's artifact: what the page says is what happens."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import artifacts
import pytest

from gemma4_export.configs.errors import ContractError
from gemma4_export.runtime import Gemma4

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "embed.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the page's code leaves behind."""
    out = tmp_path_factory.mktemp("embed") / "tiny-e"
    names: dict[str, Any] = {
        "FOLDER": artifacts.build_artifact(ROOT / "demo" / "checkpoints" / "tiny-e", out, recipe="bf16", context=2048)
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 8
    for block in blocks:
        with pytest.MonkeyPatch.context() as patch:
            if "stream.cancel" in block:
                slow_down(names["model"], patch)
            exec(compile(block, "docs/embed.md", "exec"), names)
        names.setdefault("first_text", names["reply"].text)  # a later block asks something else
    return names


def slow_down(model: Gemma4, patch: pytest.MonkeyPatch) -> None:
    """The page's timer of 50 ms goes off long before the answer's 60 tokens and more are there, on any machine."""
    forward = model.decoder.forward

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.03)
        return forward(*arguments, **options)

    patch.setattr(model.decoder, "forward", slow)


def test_going_on_computes_new_tokens_only(after: dict[str, Any]) -> None:
    assert after["first_text"] == "I am a tiny Gemma 4 model, made for a demo."
    usage = after["second"].usage
    assert 0 < usage.num_cached_tokens < usage.num_prompt_tokens


def test_streaming_takes_thought_and_text_apart(after: dict[str, Any]) -> None:
    assert after["text"] == after["reply"].text == "141992"
    assert after["thought"] == after["reply"].thought
    assert after["thought"].startswith("48213+93779")


def test_a_budget_shortens_the_thought(after: dict[str, Any]) -> None:
    assert 8 <= after["brief"].usage.num_thought_tokens <= 11
    assert after["reply"].usage.num_thought_tokens > 50


def test_cancelling_from_a_thread_ends_the_stream(after: dict[str, Any]) -> None:
    stopped = after["stopped"]
    assert stopped.finish_reason == "cancelled"
    assert len(stopped.ids) < len(after["reply"].ids)
    assert stopped.ids == after["reply"].ids[: len(stopped.ids)]


def test_the_tool_loop_uses_the_result(after: dict[str, Any]) -> None:
    assert after["answer"].text == "A bicycle costs 450."
    assert [message["role"] for message in after["messages"]] == ["user", "assistant", "tool"]


def test_errors_have_cause_and_hint(after: dict[str, Any]) -> None:
    assert re.fullmatch(
        r"the prompt has \d+ tokens, the context 2048, and the answer needs one at least", after["too_long"]
    )
    assert after["wrong"].startswith("temperature: expected a finite number of at least 0, found -1 (")


def test_a_closed_model_says_so(after: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match="the model is closed"):
        after["model"].generate([{"role": "user", "content": "Hello!"}])


def test_the_readme_leads_here() -> None:
    assert "docs/embed.md" in (ROOT / "README.md").read_text(encoding="utf-8")
