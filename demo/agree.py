"""Whether an artifact answers as transformers does: ``python -m demo.agree ARTIFACT demo/checkpoints/tiny-e``.

Every text question is answered greedily by both, transformers in fp32 from the checkpoint's own weights. Answers agree
where thought, text and calls are the same. Where they part, the gap between the two tokens in transformers' logits is
printed: a gap of rounding size is a tie that either may break.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from demo.evaluate import DATA, Judge
from demo.testsets import TEXT
from gemma4_export.runtime import Gemma4, Reply
from gemma4_export.runtime.questions import Question, read_questions


def gap(judge: Judge, prompt: list[int], ours: list[int], theirs: list[int]) -> tuple[int, float]:
    """Where two answers part, and by how much transformers prefers its own token there (logits)."""
    at = next(at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    with torch.no_grad():
        logits = judge.model(input_ids=torch.tensor([prompt + theirs[:at]])).logits[0, -1]
    return at, float(logits[theirs[at]] - logits[ours[at]])


def same(ours: Reply, theirs: Reply) -> bool:
    return (ours.thought, ours.text, ours.tool_calls) == (theirs.thought, theirs.text, theirs.tool_calls)


def compare(model: Gemma4, judge: Judge, questions: list[Question], *, batch: int = 50) -> list[str]:
    """A line for each question that is answered otherwise."""
    questions = sorted(questions, key=lambda question: len(str(question.messages)))
    lines = []
    for start in range(0, len(questions), batch):
        chosen = questions[start : start + batch]
        for question, theirs in zip(chosen, judge.answer(chosen), strict=True):
            prompt = model.encode(question.messages, question.tools, enable_thinking=question.enable_thinking)
            ours = model.stream_ids(prompt, max_new_tokens=judge.max_new_tokens, temperature=0).wait()
            if not same(ours, theirs):
                at, difference = gap(judge, prompt, ours.ids, theirs.ids)
                said = f"ours {json.dumps(ours.text)}, theirs {json.dumps(theirs.text)}, wanted {question.wanted}"
                lines.append(f"{question.where}: token {at}, logits {difference:.3g} apart; {said}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sets", nargs="*", default=list(TEXT), help="only these question sets")
    args = parser.parse_args()
    judge, total, others = Judge(args.checkpoint), 0, 0
    with Gemma4.load(args.artifact, num_threads=torch.get_num_threads()) as model:
        for name in args.sets:
            questions = read_questions(DATA / f"{name}.jsonl")
            lines = compare(model, judge, questions)
            print(f"{name:16} {len(questions) - len(lines)} of {len(questions)} the same", *lines, sep="\n", flush=True)
            total, others = total + len(questions), others + len(lines)
    print(f"{total - others} of {total} answers are the same: {1 - others / total:.2%}")


if __name__ == "__main__":
    main()
