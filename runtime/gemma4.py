"""``Gemma4``: an artifact folder as something to talk to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gemma4_export.configs.artifact import Artifact, Check
from gemma4_export.configs.errors import ConfigError, ContractError
from gemma4_export.runtime import checks
from gemma4_export.runtime.chat_template import ChatTemplate
from gemma4_export.runtime.decoder import Decoder, Float32
from gemma4_export.runtime.generate import Pick, generate_ids
from gemma4_export.runtime.kv_cache import KVCache
from gemma4_export.runtime.memory import check_memory
from gemma4_export.runtime.messages import check_messages, check_tools
from gemma4_export.runtime.reply import Reply, ReplyParser
from gemma4_export.runtime.sampling import Sampler, Sampling
from gemma4_export.runtime.stream import Stream
from gemma4_export.runtime.tokenizer import Tokenizer, load_stop_ids

_log = logging.getLogger(__name__)

# Arguments that no template variable may stand for.
_NO_VARIABLES = ("messages", "tools", "enable_thinking", "template", "mark_text", "self")
DEFAULT_MAX_NEW_TOKENS = 1024
MAX_THREADS = 1024
"""More than any machine has cores; onnxruntime did not start 100,000 within a minute, and says nothing meanwhile."""


class Gemma4:
    """A loaded artifact. One thread at a time; only ``Stream.cancel`` may come from another.

    Between requests it keeps the newest sequence's keys and values: a request that goes on from it computes only what
    is new. ``close`` lets go of everything, and so does the end of a ``with`` block.
    """

    def __init__(
        self, artifact: Artifact, *, num_threads: int | None = None, max_memory_bytes: int | None = None
    ) -> None:
        """Load the graph and map the tables of an opened artifact; ``Gemma4.load`` does both."""
        if num_threads is not None:
            checks.integer("num_threads", num_threads, 1, MAX_THREADS, "leave it out for one a core")
        check_memory(artifact.manifest, max_memory_bytes)
        self.artifact = artifact
        if artifact.manifest.has_dummy_weights:
            _log.warning("%s: random weights, for sizes and speed; what it says means nothing", artifact.folder)
        folder = artifact.path("tokenizer")
        self.tokenizer = Tokenizer.load(folder)
        self.stop_ids = load_stop_ids(folder)
        self.sampling = Sampling.from_checkpoint(folder)
        """The checkpoint's own options, for requests that say nothing else."""
        self.template: ChatTemplate | None = None
        if artifact.manifest.model.is_chat:
            self.template = ChatTemplate(folder / "chat_template.jinja")
        self._decoder: Decoder | None = Decoder(artifact, num_threads=num_threads)
        self._kept: tuple[list[int], KVCache] | None = None  # tokens whose keys and values the cache holds

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        check: Check = "small",
        num_threads: int | None = None,
        max_memory_bytes: int | None = None,
    ) -> Gemma4:
        """Load an artifact folder.

        Args:
            folder: what ``gemma4-export build`` wrote.
            check: "full" hashes the weights too (about 2 GB/s), "small" only files up to 64 MiB.
            num_threads: threads that compute; None: one a core.
            max_memory_bytes: refuse to load what needs more, its longest conversation included; None: refuse only what
                passes the memory that the system has left.
        Raises:
            ArtifactError: no artifact, damaged, of a newer format, for a backend that cannot run here, or too large.
            ContractError: ``folder`` is no path, or ``check`` none of its two values.
            ConfigError: ``num_threads`` or ``max_memory_bytes`` is no positive integer.
        """
        artifact = Artifact.open(folder, check=check)
        return cls(artifact, num_threads=num_threads, max_memory_bytes=max_memory_bytes)

    def close(self) -> None:
        """Free weights and caches. Calling it twice is fine; whatever computes raises ContractError afterwards.

        So does a stream that is under way, before its next token (or the next chunk of its prompt).
        """
        self._decoder, self._kept = None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def decoder(self) -> Decoder:
        """The decoder.

        Raises:
            ContractError: the model is closed.
        """
        if self._decoder is None:
            raise ContractError("the model is closed", hint="load it again: Gemma4.load(folder)")
        return self._decoder

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
            ConfigError: a base model, whose checkpoint has no template, messages or tools that nobody would read as
                they are meant, or the template refuses them.
        """
        if self.template is None:
            name = self.artifact.manifest.model.name
            raise ConfigError(
                f"{name} is a base model: its checkpoint has no chat template",
                hint="gemma4-run generate ARTIFACT --raw --prompt TEXT, or build the instruction-tuned checkpoint",
            )
        check_messages(messages, self.template.source)
        check_tools(tools)
        checks.named_values("template_variables", variables, _NO_VARIABLES)
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
        ids = self.tokenizer.encode(checks.text("text", text, 'model.encode_raw("Once upon a time")'))
        return ids if ids[:1] == [self.tokenizer.bos_id] else [self.tokenizer.bos_id, *ids]

    def generate(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> Reply:
        """Answer a conversation; arguments as in ``stream``."""
        return self.stream(messages, tools, **options).wait()

    def generate_ids(self, ids: Sequence[int], **options: Any) -> list[int]:
        """The continuation of ``ids``, the stop id included; options as in ``stream_ids``."""
        return self.stream_ids(ids, **options).wait().ids

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Stream:
        """Answer a conversation piece by piece.

        Args:
            messages: mappings with ``role`` and ``content``; ``Reply.message`` makes the answer's.
            tools: JSON schemas, ``{"type": "function", "function": {...}}``.
            enable_thinking: ask for a thought before the answer.
            template_variables: further variables of the checkpoint's template, such as ``preserve_thinking``.
            options: as in ``stream_ids``.
        Raises:
            ConfigError, ContractError: as in ``encode`` and ``stream_ids``.
        """
        given = {} if template_variables is None else template_variables
        variables = checks.named_values("template_variables", given, _NO_VARIABLES)
        return self.stream_ids(self.encode(messages, tools, enable_thinking=enable_thinking, **variables), **options)

    def stream_ids(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        thinking_budget: int | None = None,
        logprobs: int | None = None,
        **sampling: Any,
    ) -> Stream:
        """Continue ``ids`` piece by piece.

        Args:
            ids: [T] token ids of the prompt.
            max_new_tokens: longest answer, thoughts included; the end of the context ends it as well.
            stop: strings that end the answer where its text (no thought) first holds one; they are left out.
            thinking_budget: a thought is closed after this many tokens; None: when the model closes it.
            logprobs: log probabilities of each token and of so many of the likeliest, before any sampling option.
            sampling: options of ``Sampling`` by name, such as ``temperature=0``; others are the checkpoint's.
        Raises:
            ConfigError: an option of an unknown name, out of range, or in contradiction to another.
            ContractError: as in ``check_prompt``, or the model is closed.
        """
        checks.integer("max_new_tokens", max_new_tokens, 1, None, f"leave it out for {DEFAULT_MAX_NEW_TOKENS}")
        if thinking_budget is not None:
            checks.integer("thinking_budget", thinking_budget, 1, None, "leave it out, or ask for no thought")
        vocab_size = self.decoder.manifest.model.vocab_size
        options, ids = self.sampling.replace(**sampling), self.check_prompt(ids)
        sampler = Sampler(options, prompt_ids=ids, vocab_size=vocab_size, num_logprobs=logprobs)
        parser = ReplyParser(ids, self.tokenizer, stop=stop)
        cache = self._cache_for(ids)
        pick = sampler.pick if thinking_budget is None else self._limited(parser, sampler, thinking_budget)

        def tokens(is_cancelled: Callable[[], bool]) -> Generator[int]:
            return self._run(ids, cache, parser, pick, max_new_tokens, is_cancelled)

        return Stream(tokens, parser, sampler, stop_ids=self.stop_ids, num_cached_tokens=cache.length)

    def check_prompt(self, ids: Sequence[int]) -> list[int]:
        """``ids`` as plain integers, if they are a prompt that an answer fits behind.

        Raises:
            ContractError: no list of ids of the vocabulary, none at all, or as many as the context or more.
        """
        prompt: list[int] = checks.token_ids(ids, self.artifact.manifest.model.vocab_size).tolist()
        if not prompt:
            raise ContractError(
                "the prompt has no tokens", hint="model.encode(messages) or model.encode_raw(text) makes some"
            )
        if len(prompt) >= self.context:
            raise ContractError(
                f"the prompt has {len(prompt)} tokens, the context {self.context}, and the answer needs one at least",
                hint="shorten the prompt, or build with a larger --context",
            )
        return prompt

    def _run(
        self,
        ids: list[int],
        cache: KVCache,
        parser: ReplyParser,
        pick: Pick,
        max_new_tokens: int,
        is_cancelled: Callable[[], bool],
    ) -> Generator[int]:
        """New ids; whatever ends it, the cache is kept for the request that goes on from here."""

        def is_over() -> bool:
            """Raises ContractError: the model was closed since the last step."""
            return is_cancelled() or self.decoder is None

        _log.debug("prompt of %d tokens, %d of them cached", len(ids), cache.length)
        try:
            yield from generate_ids(
                self.decoder,
                ids,
                cache,
                pick=pick,
                max_new_tokens=max_new_tokens,
                stop_ids=self.stop_ids,
                is_cancelled=is_over,
            )
        finally:
            if self._decoder is not None:
                self._kept = ([*ids, *parser.ids][: cache.length], cache)

    def _cache_for(self, ids: list[int]) -> KVCache:
        """The kept cache, rolled back to what it shares with ``ids``, or a new one.

        A stream takes the cache away and brings it back, so two streams at a time never write into one.
        """
        kept, self._kept = self._kept, None
        if kept is not None:
            known, cache = kept
            # The last token of the prompt is always computed: its logits give the first token of the answer.
            most = min(len(known), len(ids) - 1)
            shared = next((at for at in range(most) if known[at] != ids[at]), most)
            if shared and cache.rollback(shared):
                return cache
            del known, cache, kept  # freed before the new one is allocated
        return self.new_cache()

    def _limited(self, parser: ReplyParser, sampler: Sampler, budget: int) -> Pick:
        """Picks as ``sampler`` does, and closes a thought of ``budget`` tokens."""
        close = self.tokenizer.control.get("<channel|>")
        if close is None:
            raise ConfigError(
                "thinking_budget: the tokenizer has no <channel|> to close a thought with", hint="leave it out"
            )

        def pick(logits: Float32) -> int:
            if parser.is_in_thought and parser.num_thought_tokens >= budget:
                return sampler.record(logits, close)
            return sampler.pick(logits)

        return pick
