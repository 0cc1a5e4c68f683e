"""Score a checkpoint on question sets through transformers: ``python -m demo.evaluate demo/checkpoints/tiny-e``.

Greedy decoding in fp32. Prompts come from the checkpoint's own template and tokenizer, pictures and sounds go through
transformers' own processors. Prints one line per set and, with --json, writes the figures.
"""

from __future__ import annotations

import argparse
import json
import time
import wave
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gemma4_export.runtime import Reply, Tokenizer, parse_reply
from gemma4_export.runtime.questions import Question, is_right, read_questions, wilson

DATA = Path(__file__).parent / "data"
# set -> what to vary: thinking as the questions say (None), or forced; the image budget
RUNS: tuple[tuple[str, bool | None, int], ...] = (
    ("sum_thinking", None, 280),
    ("sum_thinking", False, 280),
    ("sum_long", True, 280),
    ("sum_long", False, 280),
    ("tool_call", None, 280),
    ("tool_answer", None, 280),
    ("recall", None, 280),
    *(("picture_digits", None, budget) for budget in (70, 140, 280)),
    *(("picture_words", None, budget) for budget in (70, 280)),
    ("picture_new_words", None, 280),
    ("picture_letters", None, 280),
    *(("picture_small", None, budget) for budget in (70, 140, 280)),
    ("speech", None, 280),
)


class Judge:
    """A checkpoint loaded through transformers, ready to answer questions."""

    max_new_tokens = 300  # the longest thought, about nine digits, takes two thirds of it

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, Gemma4ForConditionalGeneration
        from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.control = Tokenizer.load(folder)
        self.model: Any = Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        processor = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        self.images = Gemma4ImageProcessorPil(**processor["image_processor"])
        self.hears = self.model.config.audio_config is not None
        self.mel = Gemma4AudioFeatureExtractor(**processor["feature_extractor"]) if self.hears else None
        self.stops = [self.tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "<turn|>", "<|tool_response>")]

    def answer(self, questions: Sequence[Question], *, thinking: bool | None = None, budget: int = 280) -> list[Reply]:
        """Greedy replies to a batch of questions (all with media of one kind, or all without)."""
        prompts, images, sounds = [], [], []
        for question in questions:
            on = question.enable_thinking if thinking is None else thinking
            text = self.tokenizer.apply_chat_template(
                question.messages,
                tools=question.tools,
                enable_thinking=on,
                add_generation_prompt=True,
                tokenize=False,
            )
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            for kind, file in _media(question):
                if kind == "image":
                    images.append(self.images(Image.open(file), max_soft_tokens=budget, return_tensors="np"))
                    number = int(images[-1]["num_soft_tokens_per_image"][0])
                    ids = self._expand(ids, "<|image>", "<|image|>", "<image|>", number)
                else:
                    if self.mel is None:
                        raise ValueError(f"{file}: this checkpoint has no audio tower")
                    sounds.append(read_wave(Path(file)))
                    frames = len(self.mel([sounds[-1]])["input_features"][0])
                    ids = self._expand(ids, "<|audio>", "<|audio|>", "<audio|>", ceil(ceil(frames / 2) / 2))
            prompts.append(ids)
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        image_id, audio_id = self.tokenizer.convert_tokens_to_ids(["<|image|>", "<|audio|>"])
        kinds = (input_ids == image_id).long() + 3 * (input_ids == audio_id).long()
        inputs: dict[str, Any] = {"mm_token_type_ids": kinds}
        if images:
            for key in ("pixel_values", "image_position_ids"):
                inputs[key] = torch.tensor(np.concatenate([image[key] for image in images]))
        if sounds:
            assert self.mel is not None
            features = self.mel(sounds)
            inputs["input_features"] = torch.tensor(np.stack(features["input_features"]))
            inputs["input_features_mask"] = torch.tensor(np.stack(features["input_features_mask"]))
        moved = {key: value.to(self.device) for key, value in inputs.items()}
        with torch.no_grad():
            out = self.model.generate(
                input_ids=input_ids.to(self.device),
                attention_mask=mask.to(self.device),
                **moved,
                do_sample=False,
                top_k=None,
                top_p=None,
                temperature=None,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self.stops,
                pad_token_id=pad,
            )
        rows = [self._until_stop(row) for row in out[:, longest:].tolist()]
        return [
            parse_reply(row, prompt_ids=ids, tokenizer=self.control) for row, ids in zip(rows, prompts, strict=True)
        ]

    def _until_stop(self, ids: list[int]) -> list[int]:
        """A row of a batch without the padding behind its stop token."""
        stop = next((at for at, index in enumerate(ids) if index in self.stops), len(ids))
        return ids[: stop + 1]

    def _expand(self, ids: list[int], begin: str, placeholder: str, end: str, number: int) -> list[int]:
        first, soft, last = self.tokenizer.convert_tokens_to_ids([begin, placeholder, end])
        at = ids.index(soft)
        return [*ids[:at], first, *[soft] * number, last, *ids[at + 1 :]]


def _media(question: Question) -> list[tuple[str, str]]:
    contents = [message["content"] for message in question.messages if isinstance(message["content"], list)]
    parts = [part for content in contents for part in content]
    return [(part["type"], part[part["type"]]) for part in parts if part["type"] in ("image", "audio")]


def read_wave(path: Path) -> np.ndarray:
    """Samples of an 8-bit or 16-bit mono WAV at 16 kHz as float32."""
    with wave.open(str(path)) as file:
        if file.getframerate() != 16_000 or file.getnchannels() != 1:
            raise ValueError(f"{path}: expected mono at 16000 Hz, got {file.getnchannels()} x {file.getframerate()} Hz")
        raw, width = file.readframes(file.getnframes()), file.getsampwidth()
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 127
    return np.frombuffer(raw, np.int16).astype(np.float32) / 32768


def run(judge: Judge, name: str, *, thinking: bool | None, budget: int, batch: int, limit: int) -> dict[str, Any]:
    """Accuracy on one question set, with up to five wrong replies."""
    questions = sorted(read_questions(DATA / f"{name}.jsonl")[:limit], key=lambda q: len(str(q.messages)))
    right, wrong = 0, []
    for start in range(0, len(questions), batch):
        chosen = questions[start : start + batch]
        for question, reply in zip(chosen, judge.answer(chosen, thinking=thinking, budget=budget), strict=True):
            if is_right(question, reply):
                right += 1
            else:
                said = {"text": reply.text, "thought": reply.thought, "calls": [asdict(c) for c in reply.tool_calls]}
                wrong.append({"wanted": question.wanted, **said})
    low, high = wilson(right, len(questions))
    return {
        "set": name,
        "thinking": thinking,
        "image_budget": budget,
        "right": right,
        "total": len(questions),
        "accuracy": round(right / len(questions), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "wrong": wrong[:5],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="*", help="only these question sets")
    parser.add_argument("--limit", type=int, default=10_000, help="only so many questions of each")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    judge = Judge(args.folder)
    figures = []
    for name, thinking, budget in RUNS:
        if (args.sets and name not in args.sets) or (name == "speech" and not judge.hears):
            continue
        started = time.time()
        batch = min(args.batch, 10) if name.startswith("picture") else args.batch
        figures.append(run(judge, name, thinking=thinking, budget=budget, batch=batch, limit=args.limit))
        line = figures[-1]
        mode = {None: "as asked", True: "on", False: "off"}[thinking]
        share = f"{line['accuracy']:6.1%} [{line['low']:.1%}, {line['high']:.1%}] of {line['total']}"
        print(f"{name:16} thinking {mode:8} budget {budget:4}  {share}  {time.time() - started:.0f} s", flush=True)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
