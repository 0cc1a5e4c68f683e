"""The small tokenizer: the hub's layout, all control tokens, every word one token, loadable by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_export.exporter.small_tokenizer import CONTROL_TOKENS, DEFAULT_WORDS, STOP_TOKENS, write_small_tokenizer
from gemma4_export.runtime.tokenizer import Tokenizer, load_stop_ids

# Where the published vocabulary has them; a small id equal to one of these would hide a hard-coded id.
PUBLISHED_CONTROL_IDS = {46, 47, 48, 49, 50, 51, 52, 98, 100, 101, 105, 106, 255999, 256000, *range(258880, 258885)}
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    write_small_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def auto_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_vocabulary_is_small_dense_and_padded_to_eight(tmp_path: Path) -> None:
    for words in (DEFAULT_WORDS, ("▁hello",), ()):
        size = write_small_tokenizer(tmp_path, words=words)
        vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
        assert size % 8 == 0
        assert size < 4096
        assert sorted(vocab.values()) == list(range(size))
    assert len(DEFAULT_WORDS) > 300
    assert {"thought", "user", "model", "system", "call", "response"} <= set(DEFAULT_WORDS)


def test_control_tokens_are_there_by_name_and_not_at_the_published_ids(tokenizer: Tokenizer) -> None:
    assert len(CONTROL_TOKENS) == 24
    assert set(tokenizer.control) == set(CONTROL_TOKENS)
    assert [tokenizer.control[name] for name in CONTROL_TOKENS[:5]] == [0, 1, 2, 3, 4]
    assert not PUBLISHED_CONTROL_IDS & set(tokenizer.control.values())
    for name, index in tokenizer.control.items():
        assert tokenizer.encode(f"a{name}b")[1:-1] == [index]


@pytest.mark.parametrize(
    "words",
    [
        DEFAULT_WORDS,
        # parts of each other, in the order that would hurt if merges were ranked by word length or by alphabet
        (
            "use",
            "he",
            "▁he",
            "the",
            "▁the",
            "house",
            "▁house",
            "hous",
            "ous",
            "▁used",
            "theuse",
            "café",
            "▁naïve",
            "日本語",
        ),
    ],
    ids=["default", "overlapping"],
)
def test_every_word_is_one_token(tmp_path: Path, words: tuple[str, ...]) -> None:
    write_small_tokenizer(tmp_path, words=words)
    tokenizer = Tokenizer.load(tmp_path)
    split = [word for word in words if len(tokenizer.encode(word.replace("▁", " "))) != 1]
    assert not split


def test_words_stay_whole_in_a_sentence(tokenizer: Tokenizer) -> None:
    sentence = " the old house on the hill, where we used to sing together"
    words = [tokenizer.decode([index]) for index in tokenizer.encode(sentence)]
    assert "".join(words) == sentence
    assert words[:7] == [" the", " old", " house", " on", " the", " hill", ","]


def test_runs_of_newlines_and_spaces_are_single_tokens(tokenizer: Tokenizer) -> None:
    for char in "\n ":
        for length in (1, 2, 3, 8):
            assert len(tokenizer.encode(char * length)) == 1


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), keep_control=True) == text


@settings(max_examples=100, deadline=None)
@given(text=TEXTS | st.lists(st.sampled_from([*CONTROL_TOKENS, "\n", " the", "user", "x"])).map("".join))
def test_transformers_loads_it_and_gives_the_same_ids(tokenizer: Tokenizer, auto_tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert auto_tokenizer.encode(text, add_special_tokens=True) == ids  # chat models: no BOS, even when asked
    assert auto_tokenizer.decode(ids) == tokenizer.decode(ids, keep_control=True)


def test_transformers_finds_the_tokens_by_role(auto_tokenizer, tokenizer: Tokenizer) -> None:
    roles = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "image": "<|image|>", "eot": "<turn|>", "boa": "<|audio>"}
    for role, name in roles.items():
        assert getattr(auto_tokenizer, f"{role}_token") == name
        assert getattr(auto_tokenizer, f"{role}_token_id") == tokenizer.control[name]


def test_generation_config_samples_and_stops_as_published(folder: Path, tokenizer: Tokenizer) -> None:
    config = json.loads((folder / "generation_config.json").read_text())
    assert (config["do_sample"], config["temperature"], config["top_k"], config["top_p"]) == (True, 1.0, 64, 0.95)
    assert (config["pad_token_id"], config["bos_token_id"]) == (0, 2)
    assert load_stop_ids(folder) == tuple(tokenizer.control[name] for name in STOP_TOKENS)


def test_a_base_model_has_no_template_one_stop_and_its_file_adds_bos(tmp_path: Path) -> None:
    write_small_tokenizer(tmp_path, chat=False)
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(tmp_path)
    plain = tokenizer.encode("hello")
    assert not (tmp_path / "chat_template.jinja").exists()
    assert load_stop_ids(tmp_path) == (1,)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("hello") == [tokenizer.bos_id, *plain]
    assert tokenizer.bos_id not in plain  # ours adds none, whatever the file says


def test_layout_equals_the_published_file(real_tokenizer_json: Path, folder: Path) -> None:
    real = json.loads(real_tokenizer_json.read_text(encoding="utf-8"))
    small = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for file in (real, small):
        del file["model"]["vocab"], file["model"]["merges"]
    added = [
        {token.pop("content"): (token.pop("id"), token)[1] for token in f.pop("added_tokens")} for f in (real, small)
    ]
    assert small == real
    assert added[1] == added[0]


def test_named_tokens_equal_the_published_config(shared_data: Path, folder: Path) -> None:
    real = json.loads((shared_data / "hub_configs/google--gemma-4-E2B-it/tokenizer_config.json").read_text())
    small = json.loads((folder / "tokenizer_config.json").read_text())
    assert small == {name: value for name, value in real.items() if not name.startswith("response_")}


def test_writing_twice_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    write_small_tokenizer(tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
