"""A small tokenizer in the hub's own layout, for tests, the demo and checkpoints with made-up weights.

Same machinery as the published one (BPE over UTF-8, byte fallback, space written as ▁, no BOS for chat models) and
the same 24 control tokens by name. Only the vocabulary is small, so every control id except 0 to 4 differs from the
published one: code that hard-codes an id breaks here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

# ids 0 to 4 are the same in every Gemma vocabulary
BASIC_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
CONTROL_TOKENS = (
    *BASIC_TOKENS,
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *("<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
    *("<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>", "<|video|>"),
)
# tokenizer_config.json's name for each token that transformers looks up by role
NAMED_TOKENS = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
}
STOP_TOKENS = ("<eos>", "<turn|>", "<|tool_response>")
LONGEST_RUN = 8  # newlines or spaces in one token; the published vocabulary has runs up to 31

_BARE_WORDS = "thought user model system call response name value city true false null hello Hello The"
_SPACED_WORDS = """
a about above across act add after again age ago air all almost along also always am among an and animal another
answer any are area around as ask at away back bad ball be bear beautiful because become bed been before began begin
behind being below best better between big bird black blue boat body book both box boy bring brother brown build but
by call came can car care carry cat catch change child children city class clean clear close cloud cold color come
common complete could country course cover cross cry cut dark day deep did different do does dog done door down draw
dream drive dry during each early earth east easy eat end enough even evening ever every example eye face fact fall
family far farm fast father feel feet few field figure fill find fire first fish five floor flower fly follow food
foot for form found four free friend from front full game garden gave get girl give glass go gold gone good got
great green ground group grow had half hand happy hard has have he head hear heart heat heavy hello help her here
high hill him his hold home hope horse hot hour house how hundred I ice idea if important in inside interest into is
island it its job just keep kind king knew know lake land language large last late laugh lay lead learn leave left
less let letter life light like line list listen little live long look lost lot love low machine made make man many
map mark may me mean men might mile milk mind minute model money moon more morning most mother mountain mouth move
much music must my name near need never new next night no north not note nothing now number of off often oh old on
once one only open or order other our out over own page paper part pass people perhaps person picture piece place
plain plan plant play point poor power pretty problem product pull put question quick quiet rain ran reach read
ready real red remember rest right ring river road rock room round run said same sat saw say school sea second see
seem sentence serve set seven several shall she ship short should show side silver simple since sing sister sit six
sky sleep slow small snow so some song soon sound south space speak spring stand star start state stay step still
stone stop story street strong such summer sun sure system table take talk teach tell ten than that the their them
then there these they thing think this those though thought thousand three through time tiny to today together told
too took top toward town travel tree true try turn two under understand until up upon us use user usually very voice
wait walk wall want war warm was watch water way we weather week well went were west what wheel when where which
while white who whole why will wind window winter wish with woman wonder wood word work world would write year
yellow yes yet you young your The This It In He She We You They A I Hello Here There What When Where Why How Yes No
Paris London
"""
DEFAULT_WORDS: tuple[str, ...] = (*_BARE_WORDS.split(), *(f"▁{word}" for word in _SPACED_WORDS.split()))


def write_small_tokenizer(
    folder: Path,
    *,
    words: Sequence[str] = DEFAULT_WORDS,
    empty_thought: bool = False,
    chat: bool = True,
    vocab_size: int | None = None,
) -> int:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and, for chat models, chat_template.jinja.

    Args:
        folder: made if absent; files of these names are replaced.
        words: each becomes reachable as one token; a leading space (or ▁) belongs to the word, as in "▁hello".
        empty_thought: the template of the larger models, which closes an empty thought when thinking is off.
        chat: False writes a base model's files: no template, ``<eos>`` as the only stop, a BOS added by the tokenizer.
        vocab_size: pad to this many entries; None: to a multiple of 8.
    Returns:
        The vocabulary size V.
    """
    vocab, merges = _vocabulary([word.replace(" ", "▁") for word in words], vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "tokenizer.json", _tokenizer(vocab, merges, adds_bos=not chat))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(folder / "generation_config.json", _generation_config(vocab, STOP_TOKENS if chat else STOP_TOKENS[:1]))
    if chat:
        (folder / "chat_template.jinja").write_text(chat_template(empty_thought=empty_thought), encoding="utf-8")
    return len(vocab)


def chat_template(*, empty_thought: bool = False) -> str:
    """The text of the small chat template, in one of the two variants that exist."""
    text = (Path(__file__).parent / "small_chat_template.jinja").read_text(encoding="utf-8")
    switch = "set empty_thought = false"
    assert text.count(switch) == 1, "the template lost the line that this function edits"
    return text.replace(switch, "set empty_thought = true") if empty_thought else text


def _vocabulary(words: Sequence[str], vocab_size: int | None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in order of rank.

    A word is cut by the merges so far and what is left is joined from the left. Later merges rank lower, so they only
    act where the earlier ones are exhausted: a word that has become one token stays one.
    """
    runs = [char * length for char in "\n▁" for length in range(1, LONGEST_RUN + 1)]
    letters = [*map(chr, range(0x21, 0x7F)), *sorted({char for word in words for char in word if ord(char) > 0x7E})]
    merges: dict[tuple[str, str], int] = {}
    for word in [*words, *runs]:
        pieces = _cut(word, merges)
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    merged = [left + right for left, right in merges]
    # dict.fromkeys: two merges may give the same token
    tokens = list(dict.fromkeys([*CONTROL_TOKENS, *runs, *byte_tokens, *letters, *merged]))
    missing = -len(tokens) % 8 if vocab_size is None else vocab_size - len(tokens)
    assert missing >= 0, f"{len(tokens)} tokens do not fit a vocabulary of {vocab_size}"
    tokens += [f"<unused{number}>" for number in range(missing)]
    return {token: index for index, token in enumerate(tokens)}, list(merges)


def _cut(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: join the adjacent pair of the lowest rank until none is left."""
    pieces = list(word)
    while True:
        known = [(merges[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in merges]
        if not known:
            return pieces
        at = min(known)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], *, adds_bos: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    text = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    starts = [{"SpecialToken": {"id": "<bos>", "type_id": number}} for number in range(2)] if adds_bos else []
    bos = {"<bos>": {"id": "<bos>", "ids": [vocab["<bos>"]], "tokens": ["<bos>"]}} if adds_bos else {}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in CONTROL_TOKENS],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        # never finds a space, the normalizer ran first; kept because the published file has it
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*starts[:1], text[0]],
            "pair": [*starts[:1], text[0], *starts[1:], text[1]],
            "special_tokens": bos,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        **NAMED_TOKENS,
        "backend": "tokenizers",
        "extra_special_tokens": ["<|video|>"],
        "model_max_length": 1000000000000000019884624838656,  # transformers' way of saying "no limit"
        "padding_side": "left",
        "processor_class": "Gemma4Processor",
        "tokenizer_class": "GemmaTokenizer",
    }


def _generation_config(vocab: dict[str, int], stops: Sequence[str]) -> dict[str, Any]:
    ids = [vocab[token] for token in stops]
    return {
        "bos_token_id": vocab["<bos>"],
        "do_sample": True,
        "eos_token_id": ids if len(ids) > 1 else ids[0],
        "pad_token_id": vocab["<pad>"],
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")
