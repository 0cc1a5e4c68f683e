"""KV caches: a sliding buffer is a full cache seen through a window, whatever the calls; bytes are as promised."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import STRUCTURES, hub_config

from gemma4_export.configs.errors import ContractError
from gemma4_export.configs.manifest import CacheEntry, KVLayout
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.models import load_model
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.configs.target import load_target
from gemma4_export.exporter.build import kv_layout, resolve_options
from gemma4_export.plugins.attention.reference import attention
from gemma4_export.runtime.kv_cache import CallSlots, KVCache, move_slots

properties = settings(max_examples=100, deadline=None)

SHAPES = {0: ("sliding", 2, 3), 1: ("global", 1, 4), 2: ("sliding", 1, 2)}  # layer -> kind, KV heads, head_dim


def make_layout(*, window: int | None, chunk: int, bucket: int = 4) -> KVLayout:
    return KVLayout(
        dtype="float32",
        sliding_window=window,
        sliding_slots=0 if window is None else window - 1 + chunk,
        global_bucket=bucket,
        caches=[
            CacheEntry(layer=layer, kind=kind, num_kv_heads=heads, head_dim=head_dim, num_readers=1)
            for layer, (kind, heads, head_dim) in SHAPES.items()
            if kind == "global" or window is not None
        ],
    )


@st.composite
def sequences(draw: st.DrawFn) -> tuple[KVLayout, int, list[int]]:
    """A layout, a context, and calls of 1 … chunk tokens that fit into it."""
    window = draw(st.none() | st.integers(1, 9))
    chunk = draw(st.integers(1, 12))
    calls = draw(st.lists(st.integers(1, chunk), min_size=1, max_size=12))
    layout = make_layout(window=window, chunk=chunk, bucket=draw(st.integers(1, 16)))
    return layout, sum(calls) + draw(st.integers(0, 3)), calls


def contents(layer: int, part: int, positions: np.ndarray) -> np.ndarray:
    """[1, Hkv, len(positions), D]: values that tell layer, key or value, head, position and channel apart."""
    _, heads, head_dim = SHAPES[layer]
    channels = np.arange(heads * head_dim).reshape(1, heads, 1, head_dim)
    return ((layer * 2 + part) * 100_000 + positions[:, None] * 100 + channels).astype(np.float32)


def write(cache: KVCache, slots: CallSlots, count: int) -> None:
    """What the graph does: this call's keys and values, from the write index on."""
    positions = np.arange(cache.length, cache.length + count)
    for layer, buffers in cache.buffers.items():
        sliding = SHAPES[layer][0] == "sliding"
        first = slots.sliding_write_index if sliding else slots.global_write_index
        for part, buffer in enumerate(buffers):
            assert first + count <= buffer.shape[2]
            buffer[:, :, first : first + count] = contents(layer, part, positions)
    cache.advance(count)


def run(cache: KVCache, calls: list[int]) -> Iterator[tuple[int, CallSlots]]:
    """Yields each call's first position and slots, after it has written."""
    for count in calls:
        position, slots = cache.length, cache.reserve(count)
        write(cache, slots, count)
        yield position, slots


def snapshot(cache: KVCache) -> dict[object, object]:
    state = {name: value for name, value in vars(cache).items() if name != "buffers"}
    return copy.deepcopy(state) | {
        "buffers": {layer: [b.tobytes() for b in pair] for layer, pair in cache.buffers.items()}
    }


# ---------------------------------------------------------------------------------------------------------------------
# What a query sees


@properties
@given(sequences())
def test_every_query_sees_its_window_and_all_of_the_global_caches(sequence):
    layout, context, calls = sequence
    cache, window = KVCache(layout, context), layout.sliding_window
    shapes = {layer: pair[0].shape for layer, pair in cache.buffers.items() if SHAPES[layer][0] == "sliding"}
    for (first, slots), count in zip(run(cache, calls), calls, strict=True):
        for row, position in enumerate(range(first, first + count)):
            for layer, pair in cache.buffers.items():
                sliding = SHAPES[layer][0] == "sliding"
                start = slots.sliding_start[0, row] if sliding else 0
                end = (slots.sliding_end if sliding else slots.global_end)[0, row]
                seen = np.arange(max(0, position - window + 1) if sliding else 0, position + 1)
                for part, buffer in enumerate(pair):
                    assert np.array_equal(buffer[:, :, start:end], contents(layer, part, seen))
    assert cache.length == sum(calls)
    for layer, shape in shapes.items():
        assert cache.buffers[layer][0].shape == shape  # whatever the length, a sliding buffer stays as it is


@properties
@given(st.integers(1, 7), st.integers(1, 9), st.data())
def test_a_sliding_buffer_attends_like_a_full_cache_with_a_window_mask(window, chunk, data):
    calls = data.draw(st.lists(st.integers(1, chunk), min_size=1, max_size=8))
    total, draw = sum(calls), np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    layout = make_layout(window=window, chunk=chunk)
    cache = KVCache(layout, total)
    _, heads, head_dim = SHAPES[0]
    full = [np.zeros((1, heads, total, head_dim), np.float32) for _ in range(2)]
    for count in calls:
        position, slots = cache.length, cache.reserve(count)
        query, key, value = (
            draw.standard_normal((1, count, h, head_dim), dtype=np.float32) for h in (2 * heads, heads, heads)
        )
        index = np.array([slots.sliding_write_index])
        output, *present = attention(
            query, key, value, *cache.buffers[0], index, slots.sliding_start, slots.sliding_end, scale=1.0
        )
        for buffer, written in zip(cache.buffers[0], present, strict=True):
            buffer[:] = written
        cache.advance(count)
        ends = np.arange(position + 1, position + count + 1, dtype=np.int32)[None]
        starts = np.maximum(ends - window, 0)
        wanted, *full = attention(query, key, value, *full, np.array([position]), starts, ends, scale=1.0)
        assert np.array_equal(output, wanted)


@pytest.mark.parametrize(("window", "chunk"), [(4, 1), (4, 7), (4, 16), (1, 1), (1, 5), (512, 256)])
def test_buffers_compact_no_more_often_than_they_must(window, chunk):
    """A buffer is full before its entries move: single tokens use the room of a whole chunk between two compactions."""
    layout = make_layout(window=window, chunk=chunk)
    whole = KVCache(layout, 10_000)
    list(run(whole, [chunk] * 9))
    assert whole.num_compactions == 9 - 1 - (window - 1) // chunk
    single = KVCache(layout, 10_000)
    list(run(single, [1] * (layout.sliding_slots + 2 * chunk)))
    assert single.num_compactions == 2


# ---------------------------------------------------------------------------------------------------------------------
# Moving and growing


@properties
@given(st.integers(1, 3), st.integers(1, 4), st.data())
def test_slots_move_as_if_copied_first(heads, head_dim, data):
    num_slots = data.draw(st.integers(1, 20))
    first = data.draw(st.integers(0, num_slots))
    count = data.draw(st.integers(0, num_slots - first))
    buffer = np.random.default_rng(0).standard_normal((1, heads, num_slots, head_dim)).astype(np.float32)
    before, buffer_address = buffer.copy(), buffer.ctypes.data
    move_slots(buffer, first, count)
    assert np.array_equal(buffer[:, :, :count], before[:, :, first : first + count])
    assert np.array_equal(buffer[:, :, count:], before[:, :, count:])
    assert buffer.ctypes.data == buffer_address


@pytest.mark.parametrize(("first", "count"), [(1, 9), (3, 5), (5, 5), (4, 6), (9, 1)])
def test_slots_move_where_source_and_target_overlap(first, count):
    buffer = np.arange(2 * 10 * 3, dtype=np.float32).reshape(1, 2, 10, 3)
    want = buffer[:, :, first : first + count].copy()
    move_slots(buffer, first, count)
    assert np.array_equal(buffer[:, :, :count], want)


@properties
@given(sequences())
def test_growth_keeps_contents_doubles_buckets_and_stops_at_the_context(sequence):
    layout, context, calls = sequence
    cache = KVCache(layout, context)
    sizes = [cache.buffers[1][0].shape[2]]
    assert sizes == [min(layout.global_bucket, context)]
    for _first, _slots in run(cache, calls):
        for part, buffer in enumerate(cache.buffers[1]):
            assert np.array_equal(buffer[:, :, : cache.length], contents(1, part, np.arange(cache.length)))
        size = cache.buffers[1][0].shape[2]
        if size != sizes[-1]:
            sizes.append(size)
        assert cache.num_reallocations == len(sizes) - 1  # a session binds again exactly when buffers were replaced
    doubled = [layout.global_bucket * 2**power for power in range(12)]
    assert all(size == context or size in doubled for size in sizes)
    assert all(size < cache.length for size in sizes[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@properties
@given(sequences(), st.integers(1, 12))
def test_overflow_is_refused_before_anything_changes(sequence, more):
    layout, _, calls = sequence
    cache = KVCache(layout, sum(calls))
    list(run(cache, calls[:-1]))
    before = snapshot(cache)
    with pytest.raises(ContractError, match=f"{sum(calls) + more} tokens do not fit the context of {sum(calls)}"):
        cache.reserve(calls[-1] + more)
    assert snapshot(cache) == before
    list(run(cache, calls[-1:]))  # what fits is still welcome
    assert cache.length == cache.context


@properties
@given(sequences(), st.integers(1, 5))
def test_calls_longer_than_the_chunk_are_refused_before_anything_changes(sequence, more):
    layout, _, calls = sequence
    assume(layout.sliding_window is not None)  # else nothing but the context bounds a call
    chunk = layout.sliding_slots - layout.sliding_window + 1
    cache = KVCache(layout, 1000)
    list(run(cache, calls))
    before = snapshot(cache)
    with pytest.raises(ContractError, match=f"{chunk + more} tokens is longer than the chunk of {chunk}"):
        cache.reserve(chunk + more)
    assert snapshot(cache) == before


# ---------------------------------------------------------------------------------------------------------------------
# Bytes

# Reference §4.1: bytes per token of bf16 keys and values, over all sliding layers that own KV and over all global ones.
BYTES_PER_TOKEN = {
    "e2b": (12_288, 6_144),
    "e4b": (40_960, 16_384),
    "12b": (327_680, 16_384),
    "26b-a4b": (204_800, 20_480),
    "31b": (819_200, 81_920),
}
# Reference §4.1: MiB of one sequence, W slots in sliding layers and the whole context in global ones.
TOTAL_MIB = {
    ("e2b", 8): 54,
    ("e2b", 128): 774,
    ("e4b", 32): 532,
    ("12b", 256): 4416,
    ("26b-a4b", 128): 2760,
    ("31b", 256): 21280,
}
FLOAT32_OVER_BF16 = 2


def layout_of(config: ModelConfig, chunk: int) -> KVLayout:
    """The layout that a build writes into the manifest."""
    target, recipe = load_target("cpu"), load_recipe("fp32")
    options = resolve_options(config, model_name="any", target=target, recipe=recipe, context=None, chunk=chunk)
    return kv_layout(config, options)


@pytest.mark.parametrize("size", BYTES_PER_TOKEN)
@pytest.mark.parametrize("chunk", [1, 256])
def test_layouts_of_released_sizes_hold_what_the_reference_counts(size, chunk):
    config = load_model(size).config
    layout, window = layout_of(config, chunk), config.sliding_window
    sliding, full = BYTES_PER_TOKEN[size]
    for global_slots in (layout.global_bucket, 8192, 131_072):
        bf16 = sliding * (window - 1 + chunk) + full * global_slots
        assert layout.num_bytes(global_slots) == bf16 * FLOAT32_OVER_BF16


@pytest.mark.parametrize(("size", "thousands"), TOTAL_MIB)
def test_layouts_of_released_sizes_have_the_totals_of_the_reference(size, thousands):
    layout = layout_of(load_model(size).config, chunk=1)  # C = W
    assert layout.num_bytes(thousands * 1024) == TOTAL_MIB[size, thousands] * FLOAT32_OVER_BF16 << 20


@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_runtime_reports_these_bytes(structure, chunk):
    """Keys and values of owning layers: C slots where sliding, the bucket's capacity where global, 4 bytes each."""
    config = hub_config(structure)
    text = config["text_config"]
    owners = text["layer_types"][: text["num_hidden_layers"] - text["num_kv_shared_layers"]]
    num_sliding, num_global = (owners.count(kind) for kind in ("sliding_attention", "full_attention"))
    local_heads = text["num_key_value_heads"]
    global_heads = (text["attention_k_eq_v"] and text["num_global_key_value_heads"]) or local_heads
    layout = layout_of(ModelConfig.from_hf(config), chunk)
    cache = KVCache(layout, text["max_position_embeddings"])
    for length, capacity in ((0, 256), (256, 256), (257, 512), (3000, 4096)):
        while cache.length < length:  # the numbers in the buffers do not matter here
            count = min(chunk, length - cache.length)
            cache.reserve(count)
            cache.advance(count)
        sliding = num_sliding * local_heads * text["head_dim"] * (text["sliding_window"] - 1 + chunk)
        full = num_global * global_heads * text["global_head_dim"] * capacity
        assert cache.num_bytes == 2 * 4 * (sliding + full)
        assert cache.num_bytes == layout.num_bytes(capacity)
