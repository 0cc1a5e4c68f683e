"""``Gemma4``: an artifact folder as something to talk to."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ConfigError, ContractError
from gemma4_export.runtime.chat_template import ChatTemplate
from gemma4_export.runtime.decoder import Decoder, Float32
from gemma4_export.runtime.generate import generate_ids, pick_greedily
from gemma4_export.runtime.kv_cache import KVCache
from gemma4_export.runtime.tokenizer import TextStream, Tokenizer, load_stop_ids, load_suppressed_ids

_log = logging.getLogger(__name__)

_MEDIA = ("image", "image_url", "audio", "input_audio", "video")

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer: its text without control tokens, its ids (the stop id included), and why it ended."""

    text: str
    ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int


class Gemma4:
    """A loaded artifact. Not for use by several threads at once."""

    def __init__(self, artifact: Artifact) -> None:
        """Load the graph and map the tables of an opened artifact; ``Gemma4.load`` does both."""
        self.artifact = artifact
        if artifact.manifest.has_dummy_weights:
            _log.warning("%s: random weights, for sizes and speed; what it says means nothing", artifact.folder)
        folder = artifact.path("tokenizer")
        self.tokenizer = Tokenizer.load(folder)
        self.stop_ids = load_stop_ids(folder)
        self.suppressed_ids = load_suppressed_ids(folder)
        self.template: ChatTemplate | None = None
        if artifact.manifest.model.is_chat:
            self.template = ChatTemplate(folder / "chat_template.jinja")
        self.decoder = Decoder(artifact)

    @classmethod
    def load(cls, folder: str | Path, *, check: Literal["small", "full"] = "small") -> Gemma4:
        """Load an artifact folder.

        Args:
            folder: what ``gemma4-export build`` wrote.
            check: "full" hashes the weights too (about 2 GB/s), "small" only files up to 64 MiB.
        Raises:
            ArtifactError: no artifact, damaged, of a newer format, or for a backend that cannot run here.
        """
        return cls(Artifact.open(folder, check=check))

    @property
    def context(self) -> int:
        """Longest sequence, prompt and answer together (tokens)."""
        return self.artifact.manifest.context

    def new_cache(self) -> KVCache:
        """An empty KV cache for one sequence."""
        return self.decoder.new_cache()

    def forward(
        self,
        ids: Sequence[int],
        *,
        chunk: int | None = None,
        rows: Sequence[int] | None = None,
        cache: KVCache | None = None,
    ) -> Float32:
        """Logits of ``ids``, float32 [R, V].

        Args:
            ids: [T] token ids.
            chunk: tokens per call of the graph; None: the longest that the artifact allows.
            rows: indices into ``ids`` whose logits are wanted; None: every token's (T x V floats).
            cache: the sequence that ``ids`` continue; None: a fresh one.
        Raises:
            ContractError: ids, rows or chunk out of range, or no room left in the context.
        """
        return self.decoder.forward(ids, self.new_cache() if cache is None else cache, chunk=chunk, rows=rows)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        enable_thinking: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Messages to token ids through the checkpoint's own template; control tokens in user text stay plain text.

        ``add_generation_prompt`` None means yes, unless ``continue_final_message`` is among the variables.

        Raises:
            ConfigError: a base model, whose checkpoint has no template, or the template refuses the messages.
        """
        if self.template is None:
            name = self.artifact.manifest.model.name
            raise ConfigError(
                f"{name} is a base model: its checkpoint has no chat template",
                hint="gemma4-run generate ARTIFACT --raw --prompt TEXT, or build the instruction-tuned checkpoint",
            )
        _refuse_media(messages)
        return self.tokenizer.encode_chat(
            self.template,
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
            **variables,
        )

    def encode_raw(self, text: str) -> list[int]:
        """Plain text to ids with one BOS in front, as base models were trained; control tokens become control ids."""
        ids = self.tokenizer.encode(text)
        return ids if ids[:1] == [self.tokenizer.bos_id] else [self.tokenizer.bos_id, *ids]

    def generate_ids(self, ids: Sequence[int], *, max_new_tokens: int = 256, temperature: float = 0) -> list[int]:
        """The most likely continuation of ``ids``, the stop id included.

        Raises:
            ConfigError: any temperature but 0: this version decodes greedily.
            ContractError: an empty prompt, or one longer than the context.
        """
        _only_greedy(temperature)
        return list(self._stream_ids(ids, max_new_tokens))

    def generate(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0,
        enable_thinking: bool = False,
        **variables: Any,
    ) -> Reply:
        """Answer a conversation."""
        _only_greedy(temperature)
        prompt = self.encode(messages, tools, enable_thinking=enable_thinking, **variables)
        return self.reply(prompt, list(self._stream_ids(prompt, max_new_tokens)))

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0,
        enable_thinking: bool = False,
        **variables: Any,
    ) -> Iterator[str]:
        """Answer a conversation piece by piece; a piece never holds half a character."""
        _only_greedy(temperature)
        prompt = self.encode(messages, tools, enable_thinking=enable_thinking, **variables)
        return self.stream_text(prompt, max_new_tokens=max_new_tokens)

    def stream_text(self, ids: Sequence[int], *, max_new_tokens: int = 256) -> Iterator[str]:
        """The continuation of ``ids`` as text, piece by piece."""
        # Checked here, at the call, and not when the first piece is asked for.
        return self._stream_pieces(self._stream_ids(ids, max_new_tokens))

    def _stream_pieces(self, ids: Iterator[int]) -> Iterator[str]:
        text = TextStream(self.tokenizer)
        for token in ids:
            if piece := text.push(token):
                yield piece
        if piece := text.flush():
            yield piece

    def reply(self, prompt: Sequence[int], ids: list[int]) -> Reply:
        """What a generation from ``prompt`` that produced ``ids`` says."""
        return Reply(
            text=self.tokenizer.decode(ids),
            ids=ids,
            finish_reason="stop" if ids and ids[-1] in self.stop_ids else "length",
            num_prompt_tokens=len(prompt),
        )

    def _stream_ids(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
            raise ContractError(
                f"max_new_tokens: expected an integer of at least 1, found {max_new_tokens}",
                hint="leave it out for 256",
            )
        if len(ids) >= self.context:
            raise ContractError(
                f"the prompt has {len(ids)} tokens, the context {self.context}, and the answer needs one at least",
                hint="shorten the prompt, or build with a larger --context",
            )
        cache = self.new_cache()
        _log.debug("prompt of %d tokens, KV cache of %d bytes", len(ids), cache.num_bytes)
        return generate_ids(
            self.decoder,
            ids,
            cache,
            pick=pick_greedily(self.suppressed_ids),
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
        )


def _refuse_media(messages: Sequence[Mapping[str, Any]]) -> None:
    """A placeholder without its picture would be read as text, and nobody would know."""
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, (list, tuple)) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in _MEDIA:
                raise ConfigError(
                    f"messages[{index}]: {kind} parts are not read by this version, which packs no vision or audio",
                    hint="send text only",
                )


def _only_greedy(temperature: float) -> None:
    if temperature != 0:
        raise ConfigError(
            f"temperature {temperature}: this version decodes greedily, only 0 is known", hint="leave temperature out"
        )
