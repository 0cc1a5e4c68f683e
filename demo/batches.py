"""Training batches of one fixed shape: rows of several conversations with their pictures and sounds, made by workers.

Batch number i depends on the seed and i alone, whichever worker makes it. A row holds conversations one after the
other; ``segment`` tells them apart and positions restart in each, so a conversation sees only itself.
"""

from __future__ import annotations

import mmap
import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from demo import pictures, speech
from demo.chat import render, wanted_reply
from demo.tasks import Item, draw_training_item

TASKS = (
    *("sum_thinking", "sum_direct", "tool_call", "tool_answer", "recall", "small_talk"),
    *("picture_digits", "picture_word", "picture_letters", "speech"),
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What every batch of a phase holds.

    ``images`` are (budget, number of pictures); ``text_pixels`` bounds the font size after the resize.
    """

    rows: int = 80
    length: int = 512
    images: tuple[tuple[int, int], ...] = ()
    sounds: int = 0
    text_pixels: tuple[float, float] = (20.0, 120.0)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> shape and dtype of each array of a batch."""
        grid = (self.rows, self.length)
        arrays: dict[str, tuple[tuple[int, ...], type]] = {
            "ids": (grid, np.int32),
            "labels": (grid, np.int32),  # the next token where it is part of a reply, else -100
            "position": (grid, np.int32),
            "segment": (grid, np.int32),  # from 1; 0 is padding
            "block": (grid, np.int32),  # number of the picture a soft token belongs to, else -1
            "source": (grid, np.int32),  # row of the concatenated soft tokens to put here, else -1
            "task": (grid, np.int8),
        }
        for budget, number in self.images:
            arrays[f"levels_{budget}"] = ((number, 9 * budget, 256), np.uint8)  # grey; coloured on the device
            arrays[f"colors_{budget}"] = ((number, 2, 3), np.float32)  # background and text
            arrays[f"places_{budget}"] = ((number, 9 * budget, 2), np.int16)
        if self.sounds:
            arrays["mel"] = ((self.sounds, speech.FRAMES, speech.MELS), np.float16)
            arrays["frames"] = ((self.sounds,), np.int32)
        return arrays


class Encoder:
    """Items to token ids, with the checkpoint's own tokenizer and template."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.template = folder / "chat_template.jinja"
        self.ids = {token: self.tokenizer.token_to_id(token) for token in _MEDIA}

    def encode(self, item: Item, *, soft_tokens: int = 0) -> tuple[list[int], list[int]]:
        """Prompt ids, with one placeholder per soft token, and the ids of the wanted reply."""
        text = render(item.messages, tools=item.tools, enable_thinking=item.enable_thinking, template=self.template)
        prompt = self.tokenizer.encode(text, add_special_tokens=False).ids
        for begin, placeholder, end in (_MEDIA[:3], _MEDIA[3:]):
            if (soft := self.ids[placeholder]) in prompt:
                at = prompt.index(soft)
                prompt[at : at + 1] = [self.ids[begin], *[soft] * soft_tokens, self.ids[end]]
        reply = wanted_reply(item, open_thought=text.endswith("<|channel>thought\n"))
        return prompt, self.tokenizer.encode(reply, add_special_tokens=False).ids


_MEDIA = ("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>")


def fill(batch: dict[str, np.ndarray], shape: Shape, encoder: Encoder, *, seed: int, index: int) -> None:
    """Write batch number ``index`` into the arrays."""
    rng = random.Random(f"{seed}/{index}")
    for name in ("ids", "position", "segment"):
        batch[name].fill(0)
    for name in ("block", "source", "task"):
        batch[name].fill(-1)
    batch["labels"].fill(-100)
    used = [0] * shape.rows
    segments = [0] * shape.rows
    first_soft, number = 0, 0

    def place(item: Item, prompt: list[int], reply: list[int], first: int | None, soft: int | None) -> bool:
        length = len(prompt) + len(reply) - 1
        row = next((row for row in range(shape.rows) if used[row] + length <= shape.length), None)
        if row is None:
            return False
        start = used[row]
        used[row] += length
        segments[row] += 1
        run = slice(start, start + length)
        ids = np.array(prompt + reply, dtype=np.int32)
        batch["ids"][row, run] = ids[:-1]
        batch["labels"][row, start + len(prompt) - 1 : start + length] = reply
        batch["position"][row, run] = np.arange(length)
        batch["segment"][row, run] = segments[row]
        batch["task"][row, run] = TASKS.index(item.task)
        if first is not None:
            slots = start + np.flatnonzero(ids[:-1] == soft)
            batch["source"][row, slots] = first + np.arange(len(slots))
            if soft == encoder.ids["<|image|>"]:
                batch["block"][row, slots] = number
        return True

    for budget, count in shape.images:
        levels, places, colors = (batch[f"{part}_{budget}"] for part in ("levels", "places", "colors"))
        places.fill(-1)
        for at in range(count):
            item, drawing = pictures.make_picture(rng, budget=budget, text_pixels=shape.text_pixels)
            flat, positions = pictures.patches(drawing.levels, budget)
            levels[at, : len(flat)], places[at, : len(flat)] = flat, positions
            colors[at] = drawing.ground, drawing.ink
            place(item, *encoder.encode(item, soft_tokens=len(flat) // 9), first_soft, encoder.ids["<|image|>"])
            first_soft += budget
            number += 1
    for at in range(shape.sounds):
        item, samples = speech.make_speech(rng)
        mel = speech.log_mel(samples)
        batch["mel"][at] = 0
        batch["mel"][at, : len(mel)] = mel
        batch["frames"][at] = len(mel)
        soft = speech.soft_tokens(len(mel))
        place(item, *encoder.encode(item, soft_tokens=soft), first_soft, encoder.ids["<|audio|>"])
        first_soft += speech.soft_tokens(speech.FRAMES)
    misses = 0
    while misses < 12:  # rows are full when so many items in a row found no place
        item = draw_training_item(rng)
        misses = 0 if place(item, *encoder.encode(item), None, None) else misses + 1


def new_batch(shape: Shape) -> dict[str, np.ndarray]:
    return {name: np.zeros(size, dtype) for name, (size, dtype) in shape.arrays().items()}


class Workers:
    """Processes that fill a ring of batches in shared memory, in order.

    Must be started before CUDA is: the processes are forked.
    """

    def __init__(self, shape: Shape, encoder: Encoder, *, seed: int, first: int, processes: int) -> None:
        self.slots = 2 * processes
        self.first = first
        context = multiprocessing.get_context("fork")
        self.memory: list[mmap.mmap] = []
        self.batches: list[dict[str, np.ndarray]] = []
        for _ in range(self.slots):
            arrays, layout = {}, shape.arrays()
            sizes = {name: int(np.prod(size)) * np.dtype(dtype).itemsize + 64 for name, (size, dtype) in layout.items()}
            sizes = {name: size - size % 64 for name, size in sizes.items()}  # every array starts at a multiple of 64
            self.memory.append(mmap.mmap(-1, sum(sizes.values())))
            at = 0
            for name, (size, dtype) in layout.items():
                arrays[name] = np.frombuffer(self.memory[-1], dtype, int(np.prod(size)), offset=at).reshape(size)
                at += sizes[name]
            self.batches.append(arrays)
        self.full = [context.Semaphore(0) for _ in range(self.slots)]
        self.free = [context.Semaphore(1) for _ in range(self.slots)]
        self.processes = [
            context.Process(target=self._work, args=(worker, processes, shape, encoder, seed), daemon=True)
            for worker in range(processes)
        ]
        for process in self.processes:
            process.start()

    def _work(self, worker: int, workers: int, shape: Shape, encoder: Encoder, seed: int) -> None:
        index = self.first + worker
        while True:
            slot = (index - self.first) % self.slots
            self.free[slot].acquire()
            fill(self.batches[slot], shape, encoder, seed=seed, index=index)
            self.full[slot].release()
            index += workers

    def __iter__(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(slot, batch) for ever; give the slot back with ``release`` when its arrays have been copied."""
        index = 0
        while True:
            slot = index % self.slots
            while not self.full[slot].acquire(timeout=60):
                if not all(process.is_alive() for process in self.processes):
                    raise RuntimeError("a worker process ended: see its traceback above")
            yield slot, self.batches[slot]
            index += 1

    def release(self, slot: int) -> None:
        self.free[slot].release()

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()


def describe(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """How full a batch is."""
    segments = int(batch["segment"].max(axis=1).sum())
    return {"filled": float((batch["segment"] > 0).mean()), "conversations": segments}
