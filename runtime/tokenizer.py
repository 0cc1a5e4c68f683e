"""Text to token ids and back: the checkpoint's tokenizer.json, control tokens by name, chats without injection."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_export.configs.errors import ConfigError
from gemma4_export.runtime.chat_template import ChatTemplate, Message, read_special_tokens

if TYPE_CHECKING:
    import tokenizers

# Around the caller's control tokens while a chat is rendered; a lone one is a seam where text may not join. They are
# noncharacters of Unicode, which no text for interchange contains; a caller's own are dropped, so none can be forged.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_SEAM = re.compile(f"[{_OPEN}{_CLOSE}]")

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_KNOWN_DECODERS = ("Replace", "ByteFallback", "Fuse")


class Tokenizer:
    """A loaded tokenizer.json.

    Attributes:
        control: name -> id of the tokens that steer the model, such as ``<|turn>``; never look one up by number.
        bos_id: what a prompt starts with. Chat templates write it themselves; raw text needs it once, in front.
        vocab_size: V, added tokens included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos_token: str = "<bos>") -> None:
        self._backend = backend
        self.control: dict[str, int] = {
            token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        if bos_token not in self.control:
            raise ConfigError(
                f"tokenizer.json: {bos_token} is not among its {len(self.control)} control tokens",
                hint="is this a Gemma 4 tokenizer? copy tokenizer.json and tokenizer_config.json from one checkpoint",
            )
        self.bos_id: int = self.control[bos_token]
        self._control_ids = frozenset(self.control.values())
        self.known_texts: dict[int, str] = {}
        """Of the tokens streamed so far, byte tokens left out."""
        _check_decoder(backend)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read ``tokenizer.json`` and, for the name of the BOS token, ``tokenizer_config.json`` from ``folder``.

        Raises:
            ConfigError: the file is missing or not a tokenizer that this runtime understands.
        """
        import tokenizers

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file", hint="copy the checkpoint's tokenizer.json into this folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no narrower class
            raise ConfigError(f"{path}: not a tokenizer: {error}", hint="copy the checkpoint's file again") from error
        return cls(backend, bos_token=read_special_tokens(path.parent)["bos_token"])

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as it is: control-token text becomes control ids, and no BOS is added."""
        _check_text(text)
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], *, keep_control: bool = False) -> str:
        """The text of ``ids``, by default without control tokens; bytes that are no UTF-8 become one � each.

        Raises:
            ConfigError: an id outside the vocabulary.
        """
        ids = [self.check_id(index) for index in ids]
        return str(self._backend.decode(ids, skip_special_tokens=not keep_control))

    def encode_chat(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        enable_thinking: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Ids of a chat in which only the template can write control tokens.

        Control-token text inside messages, tools and variables, mapping keys included, is encoded as the plain text it
        is; also text that would become one where two of the caller's strings meet. Arguments as in
        ``ChatTemplate.render``.
        Source: transformers, ``apply_chat_template(sanitize_control_tokens=True)``, which leaves keys and seams alone.
        """
        text = template.render(
            messages,
            tools,
            add_generation_prompt,
            enable_thinking,
            mark_text=self._mark,
            **variables,
        )
        _check_text(text)
        ids: list[int] = []
        # split with one group: text, marked token, text, ..., text; None in a token's place is a lone seam
        for number, piece in enumerate(self._marked.split(text)):
            if piece:
                ids += self._encode_plain(piece) if number % 2 else self.encode(piece)
        return ids

    @cached_property
    def _any_control(self) -> re.Pattern[str]:
        # longest first, so that no token hides one that contains it
        return re.compile("|".join(re.escape(name) for name in sorted(self.control, key=len, reverse=True)))

    @cached_property
    def _marked(self) -> re.Pattern[str]:
        return re.compile(f"{_OPEN}({self._any_control.pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]")

    @cached_property
    def _unfinished_control(self) -> re.Pattern[str]:
        """A proper beginning of a control token at the end of a text, white space that templates trim aside."""
        beginnings = {name[:length] for name in self.control for length in range(1, len(name))}
        longest_first = sorted(beginnings, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + r")(?=\s*\Z)")

    def _mark(self, text: str) -> str:
        text = self._any_control.sub(rf"{_OPEN}\g<0>{_CLOSE}", _SEAM.sub("", text))
        # "<tu" in one part and "rn|>" in the next would meet in the prompt
        return self._unfinished_control.sub(rf"\g<0>{_CLOSE}", text)

    def _encode_plain(self, name: str) -> list[int]:
        """Ids of a control token's text as ordinary text: the tokenizer's pipeline without its added tokens."""
        backend = self._backend
        text = backend.normalizer.normalize_str(name) if backend.normalizer else name
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        ids = [token.id for word in words for token in backend.model.tokenize(word)]
        if self.control[name] in ids:
            raise ConfigError(
                f"tokenizer.json: {name} cannot be written as plain text, its merges produce id {self.control[name]}",
                hint=f"remove {name} from the messages, or use the checkpoint's own tokenizer.json",
            )
        return ids

    def check_id(self, index: int) -> int:
        """``index`` as a plain int.

        Raises:
            ConfigError: no integer, or outside the vocabulary.
        """
        if type(index) is int and 0 <= index < self.vocab_size:
            return index
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < self.vocab_size:
            raise ConfigError(
                f"token id {index}: outside the tokenizer's vocabulary of {self.vocab_size}",
                hint="the tokenizer and the model come from different checkpoints",
            )
        return int(index)


class TextStream:
    """Token ids in, text out as soon as it is certain; all of it together equals ``Tokenizer.decode`` of all ids.

    A run of byte tokens waits for its end, because its last byte decides whether all of it is UTF-8. Any other token
    stands for itself, so its text is worked out once and kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_control: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset() if keep_control else tokenizer._control_ids
        self._bytes: list[str] = []

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, often "" and never part of a character."""
        index = self._tokenizer.check_id(token_id)
        # a skipped token does not end a run of bytes: decode, too, drops it first (None: a gap in the vocabulary)
        if index in self._skipped:
            return ""
        text = self._tokenizer.known_texts.get(index)
        if text is None:
            token = self._tokenizer._backend.id_to_token(index)
            if token is None:
                return ""
            if _BYTE_TOKEN.fullmatch(token):
                self._bytes.append(token)
                return ""
            text = self._tokenizer.known_texts[index] = self._decode([token])
        return self.flush() + text if self._bytes else text

    def flush(self) -> str:
        """What is still waiting; the stream can be used again afterwards."""
        taken, self._bytes = self._bytes, []
        return self._decode(taken)

    def _decode(self, tokens: list[str]) -> str:
        return str(self._tokenizer._backend.decoder.decode(tokens)) if tokens else ""


def load_stop_ids(folder: Path | str) -> tuple[int, ...]:
    """The ids that end a generation, from generation_config.json (config.json's list lacks ``<|tool_response>``)."""
    path = Path(folder) / "generation_config.json"
    ids = _id_list(path, "eos_token_id")
    if not ids:
        raise ConfigError(f"{path}: eos_token_id is absent or empty", hint="copy the checkpoint's file again")
    return ids


def load_suppressed_ids(folder: Path | str) -> tuple[int, ...]:
    """The ids that must never be generated (``suppress_tokens``), often none."""
    return _id_list(Path(folder) / "generation_config.json", "suppress_tokens")


def _id_list(path: Path, key: str) -> tuple[int, ...]:
    """One id or a list of ids from a JSON file; () where the key is absent or null."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file", hint="copy the checkpoint's generation_config.json into this folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}", hint="copy the checkpoint's file again") from error
    value = config.get(key) if isinstance(config, dict) else None
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for index in ids:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ConfigError(
                f"{path}: {key}: expected token ids, got {index!r}", hint="copy the checkpoint's file again"
            )
    return tuple(ids)


def _check_decoder(backend: tokenizers.Tokenizer) -> None:
    """Streaming decodes token by token, which is right only where no decoder step looks at a token's neighbours."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
    kinds = [step["type"] for step in state.get("decoders", [state])]
    if any(kind not in _KNOWN_DECODERS for kind in kinds):
        raise ConfigError(
            f"tokenizer.json: expected a decoder of {', '.join(_KNOWN_DECODERS)}, got {', '.join(kinds)}",
            hint="use the tokenizer.json of a Gemma 4 checkpoint",
        )


def _check_text(text: str) -> None:
    """Lone surrogates (bytes of a terminal that are no UTF-8) have no encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"text: character {error.start} is half of a surrogate pair, not text", hint="pass valid UTF-8"
        ) from error
