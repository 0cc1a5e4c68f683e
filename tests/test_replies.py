"""Every published output taken apart as expected, however it is cut; hostile ids never crash it and lose no token."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import small, small_folder  # noqa: F401  (fixtures)

from gemma4_export.configs.errors import ConfigError
from gemma4_export.runtime import MalformedCallPiece, ReplyParser, TextPiece, ThoughtPiece, ToolCallPiece, parse_reply
from gemma4_export.runtime.chat_template import ChatTemplate
from gemma4_export.runtime.reply import Event, Part, Reply
from gemma4_export.runtime.stop_strings import StopMatcher
from gemma4_export.runtime.tokenizer import Tokenizer
from gemma4_export.runtime.tool_syntax import MalformedCallError, parse_call

# Its expected content is "" while its own rule says that the text must reach the client; no channel and no call holds
# the text before and between its two empty thoughts, so it is text.
TEXT_OF_BEGIN_ARG = "call:run_terminal_command:\nBEGIN_ARG:\nls\nEND_ARG\n"

MODEL_TURN = "<|turn>model\n"


@pytest.fixture(scope="module")
def real(real_tokenizer_json: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("real_tokenizer")
    (folder / "tokenizer.json").symlink_to(real_tokenizer_json)
    shutil.copy(shared_data / "hub_configs/google--gemma-4-E2B-it/tokenizer_config.json", folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def cases(shared_data: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((shared_data / "raw_outputs.json").read_text(encoding="utf-8"))["cases"]
    assert len(found) == 28
    return found


def taken_apart(reply: Reply) -> dict[str, Any]:
    calls = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
    return {"thinking": reply.thought, "content": reply.text, "tool_calls": calls}


def parse(tokenizer: Tokenizer, text: str, prompt: str = MODEL_TURN) -> Reply:
    return parse_reply(tokenizer.encode(text), prompt_ids=tokenizer.encode(prompt), tokenizer=tokenizer)


def joined(events: list[Event], kind: type[TextPiece] | type[ThoughtPiece]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def test_published_outputs_parse_as_expected(real: Tokenizer, cases: list[dict[str, Any]]) -> None:
    for case in cases:
        reply = parse_reply(case["ids"], prompt_ids=real.encode(case["prompt_tail"]), tokenizer=real)
        expected = case["expected"]
        if case["id"] == "begin_arg_syntax":
            expected = expected | {"content": TEXT_OF_BEGIN_ARG, "thinking": ""}
        assert taken_apart(reply) == expected, case["id"]
        # Never silent: a call that was mended or could not be read is named.
        is_odd = case["kind"] in ("malformed", "malformed_repairable") or case["id"] == "cut_inside_call"
        assert bool(reply.problems) == is_odd, case["id"]
        assert bool(reply.malformed_calls) == (is_odd and not reply.tool_calls), case["id"]
        assert [call.repair is not None for call in reply.tool_calls] == [is_odd] * len(reply.tool_calls)


def test_a_cut_anywhere_changes_nothing(real: Tokenizer, cases: list[dict[str, Any]]) -> None:
    """Streamed in two pieces, and resumed: what was said before the cut as part of the prompt, the rest parsed anew."""
    for case in cases:
        prompt, ids = real.encode(case["prompt_tail"]), case["ids"]
        whole = parse_reply(ids, prompt_ids=prompt, tokenizer=real)
        for cut in range(len(ids) + 1):
            parser = ReplyParser(prompt, real)
            events = [event for index in ids[:cut] for event in parser.push(index)]
            early = parser.reply("length")
            events += [event for index in ids[cut:] for event in parser.push(index)] + parser.finish()
            reply = parser.reply("length")
            assert taken_apart(reply) == taken_apart(whole), (case["id"], cut)
            assert (joined(events, TextPiece), joined(events, ThoughtPiece)) == (reply.text, reply.thought or "")
            assert reply.text.startswith(early.text)
            assert (reply.thought or "").startswith(early.thought or "")
            rest = parse_reply(ids[cut:], prompt_ids=prompt + ids[:cut], tokenizer=real)
            assert rest.text == whole.text[len(early.text) :], (case["id"], cut)
            assert [*early.tool_calls, *rest.tool_calls] == list(whole.tool_calls), (case["id"], cut)


def test_malformed_calls_come_back_as_text_with_the_reason(small: Tokenizer) -> None:  # noqa: F811
    reply = parse(small, 'A<|tool_call>call:f(arg1: "x", s: <|"|>y<|"|>)<tool_call|>B<turn|>')
    assert (reply.text, reply.tool_calls, reply.finish_reason) == ("AB", (), "stop")
    (call,) = reply.malformed_calls
    assert call.text == 'call:f(arg1: "x", s: <|"|>y<|"|>)'
    assert call.reason == "expected { after the name f, found '(arg1: \"x\", s: '"
    assert reply.problems == (f"a tool call could not be read: {call.reason}",)


CALL = '<|tool_call>call:f{a:<|"|>x<|"|>}'


@pytest.mark.parametrize(
    ("prompt", "raw", "expected"),
    [
        # where an answer begins is the prompt's tail's to say
        (MODEL_TURN + "<|channel>thought\n", "a<channel|>b", ("a", "b", 0)),
        (MODEL_TURN + "<|channel>thought\n<channel|>", "b", (None, "b", 0)),
        (MODEL_TURN + "<|channel>", "thought\na<channel|>b", ("a", "b", 0)),
        ("<|turn>user\n<|channel>thought\nx<turn|>\n" + MODEL_TURN, "b", (None, "b", 0)),
        (MODEL_TURN + CALL, "<tool_call|>b", (None, "b", 1)),
        # a call without its last token counts where it is complete, and stops as other calls do
        (MODEL_TURN, CALL + "<|tool_response>", (None, "", 1)),
        (MODEL_TURN, CALL + "<turn|>", (None, "", 1)),
        (MODEL_TURN, CALL + CALL + "<tool_call|>", (None, "", 2)),
        (MODEL_TURN, "<|channel>thought\na" + CALL + "<tool_call|>b", ("a", "b", 1)),
        # two thoughts are two paragraphs
        (MODEL_TURN, "<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d", ("a\nc", "bd", 0)),
        # a name is a header only where it is one
        (MODEL_TURN, "<|channel>thoughtful<channel|>b", ("thoughtful", "b", 0)),
        (MODEL_TURN, "<|channel>thought", ("", "", 0)),
        # what the prompt wrote of a header that is none stays the prompt's
        ("<|turn>m", "} left", (None, "} left", 0)),
        (MODEL_TURN + "<|channel>thou", "<channel|>b", ("", "b", 0)),
        (MODEL_TURN, "a<turn|>\n<|turn>model\nb", (None, "a\nb", 0)),
        (MODEL_TURN, "<|turn>modelling", (None, "modelling", 0)),
        (MODEL_TURN, '<channel|><tool_call|><|"|>a', (None, "a", 0)),
    ],
)
def test_states(small: Tokenizer, prompt: str, raw: str, expected: tuple[str | None, str, int]) -> None:  # noqa: F811
    reply = parse(small, raw, prompt)
    assert (reply.thought, reply.text, len(reply.tool_calls)) == expected


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("a<turn|>", "stop"),
        ("a", "length"),
        (CALL + "<tool_call|><|tool_response>", "tool_calls"),
        (CALL + "<tool_call|>", "length"),
        ("a<eos>", "stop"),
    ],
)
def test_finish_reasons(small: Tokenizer, raw: str, reason: str) -> None:  # noqa: F811
    assert parse(small, raw).finish_reason == reason


def test_tokens_are_counted_by_part(small: Tokenizer) -> None:  # noqa: F811
    thought, text = small.encode("<|channel>thought\nab<channel|>"), small.encode("xyz<turn|>")
    reply = parse_reply(thought + text, prompt_ids=small.encode(MODEL_TURN), tokenizer=small)
    usage = reply.usage
    assert (usage.num_thought_tokens, usage.num_new_tokens) == (len(thought), len(thought) + len(text))
    assert usage.num_prompt_tokens == len(small.encode(MODEL_TURN))
    assert (usage.num_cached_tokens, reply.timings, reply.logprobs, reply.seed) == (0, None, None, None)


@pytest.mark.parametrize("index", [-1, 10**9, 1.5, "5", True, None])
def test_ids_that_are_none_are_refused(small: Tokenizer, index: Any) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=f"^token id {index}: outside the tokenizer's vocabulary of"):
        parse_reply([index], prompt_ids=[], tokenizer=small)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing lost, nothing crashed


def without_headers(text: str) -> str:
    return re.sub("\n|thought|model|user|system", "", text)


def runs(tokenizer: Tokenizer, ids: list[int], parts: list[Part]) -> Iterator[tuple[Part, list[int]]]:
    """Neighbours of one part; a token that ends a turn or begins one, or a channel, ends a run of bytes as well."""
    cuts = {tokenizer.control[name] for name in ("<|turn>", "<turn|>", "<eos>", "<|tool_response>", "<|channel>")}
    run: list[int] = []
    for number, (index, part) in enumerate(zip(ids, parts, strict=True)):
        if run and (part != parts[number - 1] or index in cuts):
            yield parts[number - 1], run
            run = []
        run.append(index)
    if run:
        yield parts[-1], run


def check_that_nothing_is_lost(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> None:
    """Text, thoughts and calls put together again hold every token of ``ids``, in order."""
    parser = ReplyParser(prompt, tokenizer)
    starts_in_thought = parser.is_in_thought
    events = [event for index in ids for event in parser.push(index)] + parser.finish()
    reply = parser.reply("length")
    assert reply.ids == ids
    assert len(parser.parts) == len(ids)
    said = {"text": "", "thought": "", "tool_call": ""}
    for part, run in runs(tokenizer, ids, parser.parts):
        said[part] += tokenizer.decode(run, keep_control=part == "tool_call")
    # Headers of turns and channels, and the breaks between two thoughts, are no text; all else is where it belongs.
    has_turn = tokenizer.control["<|turn>"] in [*prompt, *ids]
    assert without_headers(reply.text) == without_headers(said["text"])
    assert has_turn or reply.text == said["text"]
    assert without_headers(reply.thought or "") == without_headers(said["thought"])
    assert joined(events, TextPiece) == reply.text
    assert joined(events, ThoughtPiece) == (reply.thought or "")
    calls = [event.call for event in events if isinstance(event, (ToolCallPiece, MalformedCallPiece))]
    num_calls = said["tool_call"].count("<|tool_call>")
    assert len(calls) == len(reply.tool_calls) + len(reply.malformed_calls) >= num_calls
    assert (reply.thought is not None) == (starts_in_thought or tokenizer.control["<|channel>"] in ids)


PIECES = (
    "<|channel> <channel|> <|tool_call> <tool_call|> <|turn> <turn|> <eos> <|tool_response> <tool_response|> <pad> "
    'thought \n thought\n model\n call:f{ call: { } [ ] , : <|"|> \' " a: é 語 🙂 x 1 -1.5e3 true null \\ , '
).split(" ")


def hostile_ids(tokenizer: Tokenizer, choice: random.Random) -> list[int]:
    ids: list[int] = []
    for _ in range(choice.randrange(24)):
        if choice.random() < 0.2:
            ids.append(choice.randrange(tokenizer.vocab_size))
        else:
            ids += tokenizer.encode(choice.choice(PIECES))
    return ids


def check_hostile(tokenizer: Tokenizer, count: int, seed: int) -> None:
    choice = random.Random(seed)
    for _ in range(count):
        ids = hostile_ids(tokenizer, choice)
        cut = choice.randrange(len(ids) + 1)
        check_that_nothing_is_lost(tokenizer, ids[:cut], ids[cut:])


def test_hostile_outputs_lose_no_token(small: Tokenizer) -> None:  # noqa: F811
    check_hostile(small, 3_000, seed=0)


@pytest.mark.full
def test_a_hundred_thousand_hostile_outputs_lose_no_token(small: Tokenizer) -> None:  # noqa: F811
    check_hostile(small, 100_000, seed=1)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_ids_of_the_real_tokenizer_lose_no_token(real: Tokenizer, data: st.DataObject) -> None:
    index = st.integers(0, real.vocab_size - 1) | st.sampled_from(sorted(real.control.values()))
    ids = data.draw(st.lists(index, max_size=30))
    cut = data.draw(st.integers(0, len(ids)))
    check_that_nothing_is_lost(real, ids[:cut], ids[cut:])


# ---------------------------------------------------------------------------------------------------------------------
# The syntax of calls


def read(text: str, *, may_repair: bool = False) -> tuple[str, dict[str, Any], str | None]:
    """``parse_call`` of text in which " is the quote token."""
    call = parse_call(text.split('"'), may_repair=may_repair)
    return call.name, call.arguments, call.repair


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("call:f{}", "f", {}),
        (' call: f { a : "x" , } \n', "f", {"a": "x"}),
        ("call:server.tool-2:x/y{a:1}", "server.tool-2:x/y", {"a": 1}),
        (
            "call:f{a:-0,b:108.,c:1e3,d:true,e:false,g:null}",
            "f",
            {"a": 0, "b": 108.0, "c": 1e3, "d": True, "e": False, "g": None},
        ),
        (
            'call:f{"two words":[1,["a",{}],{x:{y:[]}}],b c:2}',
            "f",
            {"two words": [1, ["a", {}], {"x": {"y": []}}], "b c": 2},
        ),
        ('call:f{a:"",b:"}],{:\\ \'"}', "f", {"a": "", "b": "}],{:\\ '"}),
    ],
)
def test_calls_are_read(text: str, name: str, arguments: dict[str, Any]) -> None:
    found = read(text)
    assert found == (name, arguments, None)
    assert [type(value) for value in found[1].values()] == [type(value) for value in arguments.values()]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected call:NAME{…}, found ''"),
        ("f{}", "expected call:NAME{…}, found 'f{}'"),
        ("call:f", "expected { after the name f, found the end"),
        ("call:f{a:1", "expected , or }, found the end"),
        ("call:f{a:1]", "expected , or }, found ']'"),
        ("call:f{}}", "expected the end after the arguments, found '}'"),
        ('call:f{}"x"', 'expected the end after the arguments, found <|"|>'),
        ("call:f{:1}", "expected a key, found ':1}'"),
        ("call:f{a}", "expected : after the key 'a', found '}'"),
        ("call:f{a:1,a:2}", "key 'a' stands there twice"),
        ('call:f{a:"x', "the string 'x' has no end"),
        ("call:f{a:007}", "expected a string between <|\"|>, a number, true, false, null, { or [, found '007'"),
        ("call:f{a:}", "expected a string between <|\"|>, a number, true, false, null, { or [, found '}'"),
        ("call:f{a:1e999}", "the number '1e999' is too large for a float64"),
        ("call:f{a:" + "9" * 5000 + "}", "a number of 5000 digits"),
        ("call:f{a:" + "[" * 5000, "nested deeper than 64 levels"),
    ],
)
def test_what_is_no_call_says_why(text: str, reason: str) -> None:
    with pytest.raises(MalformedCallError) as caught:
        read(text, may_repair=True)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("text", "arguments", "repair"),
    [
        ('call:f{a:"ls}', {"a": "ls"}, "the string 'ls' had no end"),
        ('call:f{a:{b:"x}}', {"a": {"b": "x"}}, "the string 'x' had no end"),
        ('call:f{a:"if {x}}', {"a": "if {x}"}, "the string 'if {x}' had no end"),
        ('call:f{a:"x,b:"y"}', {"a": "x", "b": "y"}, "the string 'x' had no end"),
        ('call:f{a:["x]}', {"a": ["x"]}, "the string 'x' had no end"),  # [ needs its ], so the string ends before it
        ("call:f{a:'x'\"}", {"a": "x"}, "the string 'x' stood in single quotes"),
    ],
)
def test_a_call_with_one_reading_is_mended_and_says_so(text: str, arguments: dict[str, Any], repair: str) -> None:
    assert read(text, may_repair=True) == ("f", arguments, repair)
    with pytest.raises(MalformedCallError):
        read(text)


@pytest.mark.parametrize("text", ['call:f{a:"x,b:"y,c:"z"}', 'call:f{a:x"}'])
def test_a_call_without_exactly_one_reading_stays_malformed(text: str) -> None:
    with pytest.raises(MalformedCallError):
        read(text, may_repair=True)


# ---------------------------------------------------------------------------------------------------------------------
# Stop strings


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 12), max_size=5),
)
def test_stop_strings_are_found_across_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    matcher, said, pushed = StopMatcher(stops), "", ""
    for start, end in zip([0, *ends], ends, strict=False):
        said += matcher.push(text[start:end])
        pushed += text[start:end]
        if matcher.is_hit:
            break
        # Held back only while it could be a stop string: what is missing begins one.
        held = pushed[len(said) :]
        assert any(stop.startswith(held) and stop != held for stop in stops) or not held
    said += matcher.flush()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert matcher.is_hit == bool(found)
    assert said == (text[: min(found)[1]] if found else text)


@pytest.mark.parametrize("stop", ["abc", [""], [5], 5, None])
def test_stop_strings_that_are_none_are_refused(small: Tokenizer, stop: Any) -> None:  # noqa: F811
    with pytest.raises(ConfigError) as caught:
        ReplyParser([], small, stop=stop)
    assert caught.value.cause == f"stop: expected a list of strings of at least one character, found {stop!r}"


def test_a_stop_string_is_looked_for_in_text_only(small: Tokenizer) -> None:  # noqa: F811
    parser = ReplyParser(small.encode(MODEL_TURN), small, stop=["END"])
    events: list[Event] = []
    for index in small.encode("<|channel>thought\nan END here<channel|>so EN<|channel>x<channel|>D. The END of it"):
        events += parser.push(index)
    events += parser.finish()
    reply = parser.reply("stop")
    assert parser.is_stopped
    # "EN" and "D" stand in two texts with a thought between them
    assert (reply.thought, reply.text) == ("an END here\nx", "so END. The ")
    assert joined(events, TextPiece) == reply.text


# ---------------------------------------------------------------------------------------------------------------------
# The next turn's history


def test_thoughts_do_not_enter_the_next_turn(small: Tokenizer, small_folder: Path) -> None:  # noqa: F811
    template = ChatTemplate(small_folder / "chat_template.jinja")
    ask = {"role": "user", "content": "Hello"}
    plain = parse(small, "<|channel>thought\nsecret<channel|>Hi<turn|>")
    assert plain.message() == {"role": "assistant", "content": "Hi"}
    called = parse(small, "<|channel>thought\nsecret<channel|>Wait." + CALL + "<tool_call|><|tool_response>")
    result = {"role": "tool", "name": "f", "content": "42"}
    # beside a call the thought goes on until the user speaks
    within = template.render([ask, called.message(), result], enable_thinking=True)
    assert within.count("secret") == 1
    assert CALL in within
    for history in ([ask, plain.message()], [ask, called.message(), result, plain.message()]):
        prompt = template.render([*history, ask], enable_thinking=True)
        assert "secret" not in prompt
        assert prompt.endswith(MODEL_TURN)
