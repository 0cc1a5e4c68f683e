"""Speed of an artifact on this machine, beside what a plain read of the same bytes reaches in the same minute."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.manifest import Manifest
from gemma4_export.configs.step_bytes import cpu_matrix_bytes, step_bytes
from gemma4_export.runtime.gemma4 import Gemma4
from gemma4_export.runtime.reply import ReplyParser
from gemma4_export.runtime.sampling import Sampler

_READ_BYTES = 1 << 29  # larger than any cache, small beside the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """One measurement; rates are medians over the repeats."""

    model: str
    recipe: str
    load_s: float
    prompt_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    overhead_ms_per_token: float
    """Decode outside the backend's run: tables, RoPE, binding, sampling with the checkpoint's options, the reply."""
    gb_per_token: float
    """Weights and KV that one decode step reads (1e9 bytes)."""
    decode_gb_per_s: float
    plain_read_gb_per_s: float
    share_of_plain_read: float
    resident_gb: float
    num_threads: int


def bench(
    folder: Path, *, prompt_tokens: int, new_tokens: int, repeats: int, say: Callable[[str], None] = lambda _: None
) -> BenchResult:
    """Load ``folder``, prefill ``prompt_tokens`` random ids and decode ``new_tokens``, ``repeats`` times."""
    started = time.perf_counter()
    model = Gemma4.load(folder)
    load_s = time.perf_counter() - started
    say(f"loaded in {load_s:.1f} s")
    if prompt_tokens + new_tokens > model.context:
        raise ConfigError(
            f"{prompt_tokens} + {new_tokens} tokens do not fit the context of {model.context}",
            hint=f"--prompt-tokens {max(1, model.context // 2)} --new-tokens {max(1, model.context // 4)}",
        )
    vocab_size = min(model.tokenizer.vocab_size, model.artifact.manifest.model.vocab_size)
    ids = [int(index) for index in np.random.default_rng(0).integers(vocab_size // 2, vocab_size, prompt_tokens)]
    prefills, decodes, overheads, reads = [], [], [], []
    for _ in range(repeats):
        cache = model.new_cache()
        started = time.perf_counter()
        logits = model.decoder.forward(ids, cache, rows=[prompt_tokens - 1])
        prefills.append(prompt_tokens / (time.perf_counter() - started))
        sampler = Sampler(model.sampling.replace(seed=0), prompt_ids=ids, vocab_size=logits.shape[1])
        parser = ReplyParser(ids, model.tokenizer)
        inside, started = model.decoder.seconds_in_graph, time.perf_counter()
        for _ in range(new_tokens):
            token = sampler.pick(logits[0])
            # Random weights of a released size come with a small tokenizer; the work of a token is the same.
            parser.push(token % model.tokenizer.vocab_size)
            model.decoder.forward([token], cache, rows=[0], out=logits)
        seconds = time.perf_counter() - started
        decodes.append(new_tokens / seconds)
        overheads.append((seconds - (model.decoder.seconds_in_graph - inside)) / new_tokens * 1e3)
        reads.append(plain_read())
        say(f"prefill {prefills[-1]:.1f} tok/s, decode {decodes[-1]:.1f} tok/s, plain read {reads[-1]:.0f} GB/s")
    gigabytes = bytes_per_token(model.artifact.manifest, prompt_tokens + new_tokens // 2) / 1e9
    decode, read = statistics.median(decodes), statistics.median(reads)
    return BenchResult(
        model=model.artifact.manifest.model.name,
        recipe=model.artifact.manifest.recipe,
        load_s=load_s,
        prompt_tokens=prompt_tokens,
        prefill_tokens_per_s=statistics.median(prefills),
        decode_tokens_per_s=decode,
        overhead_ms_per_token=statistics.median(overheads),
        gb_per_token=gigabytes,
        decode_gb_per_s=gigabytes * decode,
        plain_read_gb_per_s=read,
        share_of_plain_read=gigabytes * decode / read,
        resident_gb=resident_bytes() / 1e9,
        num_threads=len(os.sched_getaffinity(0)),
    )


def bytes_per_token(manifest: Manifest, length: int) -> int:
    """Bytes that one decode step of the ``ort-cpu`` graph reads at ``length`` tokens."""
    model = manifest.model
    return step_bytes(
        cpu_matrix_bytes(manifest.census),
        manifest.kv,
        length,
        num_experts=model.num_experts,
        top_k_experts=model.top_k_experts,
        kv_item_bytes=4,
    )


def plain_read() -> float:
    """GB/s at which all threads together read memory once, by a dot product that keeps nothing."""
    threads = len(os.sched_getaffinity(0))
    parts = [np.ones(_READ_BYTES // 4 // threads, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best = 0.0
        for _ in range(3):
            started = time.perf_counter()
            list(pool.map(lambda part: float(np.dot(part, part)), parts))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - started) / 1e9)
    return best


def resident_bytes() -> int:
    """Memory that this process holds and shares with no file (anonymous pages), 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
