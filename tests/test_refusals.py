"""Requests that would have given a wrong answer, a late error or a dead process: refused at once, with the way out."""

from __future__ import annotations

import resource
import shutil
import threading
from pathlib import Path

import artifacts
import numpy as np
import pytest
import tiny

from gemma4_export.configs.errors import ConfigError, ContractError
from gemma4_export.runtime.bench import bench


def build(checkpoint: Path, out: Path) -> Path:
    with artifacts.traces(fresh=False):
        return artifacts.build_artifact(checkpoint, out, context=64)


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "input_audio", "video"])
def test_media_parts_are_refused_until_a_tower_is_packed(kind: str) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": kind, kind: "scan.png"}]}
    ]
    with pytest.raises(ConfigError, match=rf"messages\[0\]: {kind} parts are not read") as caught:
        artifacts.model("31b", fresh_trace=False).generate(messages)
    assert caught.value.hint


def test_a_cache_of_another_artifact_is_refused_and_left_alone() -> None:
    model, other = artifacts.model("31b", fresh_trace=False), artifacts.model("12b", fresh_trace=False)
    cache = other.new_cache()
    with pytest.raises(ContractError, match="made by another artifact"):
        model.forward([5, 6, 7], cache=cache)
    assert cache.length == 0
    assert np.isfinite(other.forward([5, 6, 7], cache=cache)).all()


def test_bench_refuses_what_the_context_cannot_hold_before_it_starts() -> None:
    folder = artifacts.artifact("31b", fresh_trace=False)
    with pytest.raises(ConfigError, match=r"999999999 \+ 1 tokens do not fit") as caught:
        bench(folder, prompt_tokens=999_999_999, new_tokens=1, repeats=1)
    assert "--prompt-tokens" in str(caught.value.hint)


@pytest.mark.parametrize("out", ["", ".", "/"])
def test_out_without_a_name_is_refused(out: str) -> None:
    with pytest.raises(ConfigError, match="names no new folder"):
        build(tiny.checkpoint("31b"), Path(out))


def test_only_an_artifact_is_called_removable(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny.checkpoint("31b"), tmp_path / "mine")
    with pytest.raises(ConfigError) as caught:
        build(checkpoint, checkpoint)
    assert "rm" not in str(caught.value.hint)
    built = build(checkpoint, tmp_path / "artifact")
    with pytest.raises(ConfigError) as caught:
        build(checkpoint, built)
    assert f"rm -r {built}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("chat_template.jinja", "{% if %}", "chat_template.jinja, line 1"),
        ("chat_template.jinja", " \n", "chat_template.jinja: empty"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 1}}}', "tokenizer.json: no tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", '{"bos_token": "<s>"}', "'<s>' is not among its"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id: True is no id"),
        ("generation_config.json", "{}", "no eos_token_id"),
        ("generation_config.json", '{"eos_token_id": 1, "suppress_tokens": [99999999]}', "suppress_tokens: 99999999"),
    ],
)
def test_tokenizer_files_that_would_not_load_do_not_build(name: str, content: str, cause: str, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny.checkpoint("31b"), tmp_path / "checkpoint")
    (checkpoint / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        build(checkpoint, tmp_path / "out")
    assert cause in caught.value.cause
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_file_that_may_not_grow_is_named(tmp_path: Path) -> None:
    """``ulimit -f``: the system refuses a write, and Python does not say of which file."""
    whole, before = build(tiny.checkpoint("31b"), tmp_path / "whole"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for file in ("tokenizer/tokenizer.json", "graphs/decoder.onnx", "graphs/weights/decoder.bin"):
        resource.setrlimit(resource.RLIMIT_FSIZE, ((whole / file).stat().st_size - 1, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as refused:
                build(tiny.checkpoint("31b"), tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert refused.value.filename == str(tmp_path / "out.partial" / file)


def test_threads_with_caches_of_their_own_get_their_own_answers() -> None:
    model = artifacts.model("31b", fresh_trace=False)
    prompts = [artifacts.expected("31b").ids[start : start + 20] for start in range(8)]
    expected = [model.forward(ids) for ids in prompts]
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = model.forward(prompts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[index], right) for index, right in enumerate(expected))
