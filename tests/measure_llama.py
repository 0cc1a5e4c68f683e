"""Speed of an artifact beside llama.cpp, in turns on one machine: part of ``make measure``.

``python tests/measure_llama.py --llama-python PATH`` builds a model of random weights for both, and takes five rounds
of: ours, theirs, and a plain read of memory, each with the machine to itself. A shared machine's memory has fast and
slow minutes: only ratios within a round say anything.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from random_gguf import write_random_gguf

from gemma4_export.configs.models import load_model
from gemma4_export.runtime import Gemma4
from gemma4_export.runtime.bench import plain_read

PROMPT, CONTEXT, NEW = 512, 128, 48  # tokens: prefilled; before the decoded ones; decoded

Measure = Callable[[list[int], int], dict[str, float]]
"""Seconds of prefilling ids, and of decoding so many more."""
Enter = Callable[[], AbstractContextManager[Measure]]


@contextmanager
def ours(artifact: Path) -> Iterator[Measure]:
    started = time.perf_counter()
    model = Gemma4.load(artifact)
    print(f"  {artifact.name}: loaded in {time.perf_counter() - started:.1f} s", flush=True)

    def measure(prompt: list[int], new: int) -> dict[str, float]:
        cache, started = model.new_cache(), time.perf_counter()
        logits = model.forward(prompt, rows=[len(prompt) - 1], cache=cache)
        middle = time.perf_counter()
        for _ in range(new):
            logits = model.forward([int(logits[0].argmax())], cache=cache)
        return {"prefill_s": middle - started, "decode_s": time.perf_counter() - middle}

    yield measure


@contextmanager
def theirs(python: Path, model: Path) -> Iterator[Measure]:
    script = Path(__file__).with_name("llama_side.py")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([python, script, model], text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def answer() -> dict[str, Any]:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{python} {script} {model} ended; run it by hand to see why")
            return dict(json.loads(line))

        def measure(prompt: list[int], new: int) -> dict[str, float]:
            process.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
            process.stdin.flush()
            return answer()

        hello = answer()
        print(f"  llama-cpp-python {hello['version']}: loaded in {hello['load_s']:.1f} s", flush=True)
        yield measure
        process.stdin.close()


def speeds(measure: Measure) -> tuple[float, float]:
    """Tokens per second of a prefill, and of decoding behind a shorter one."""
    ids = [1000 + 7 * index % 200_000 for index in range(PROMPT)]
    prefill = PROMPT / measure(ids, 0)["prefill_s"]
    return prefill, NEW / measure(ids[:CONTEXT], NEW)["decode_s"]


def together(sides: dict[str, Enter], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Speeds of each side, all loaded, one entry a round, taking turns; a first round warms up and does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    with ExitStack() as stack:
        measures = {name: stack.enter_context(enter()) for name, enter in sides.items()}
        for index in range(repeats + 1):
            line = {name: speeds(measure) for name, measure in measures.items()}
            told = ", ".join(f"{name} {prefill:.0f} / {decode:.1f}" for name, (prefill, decode) in line.items())
            print(f"  {told}, plain read {plain_read():.0f} GB/s", flush=True)
            if index:
                for name, pair in line.items():
                    found[name].append(pair)
    return found


def apart(sides: dict[str, Enter], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """The same with one side in memory at a time, loaded and warmed up for each of its turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for name, enter in list(sides.items()) * repeats:
        prefill, decode = _alone(enter)
        found[name].append((prefill, decode))
        print(f"  {name} {prefill:.1f} / {decode:.2f}, plain read {plain_read():.0f} GB/s", flush=True)
    return found


def _alone(enter: Enter) -> tuple[float, float]:
    with enter() as measure:
        speeds(measure)
        return speeds(measure)  # the model goes with this frame


def summary(found: dict[str, list[tuple[float, float]]]) -> dict[str, list[float]]:
    """Median prefill and decode speed of each side, then the medians of their ratios to llama.cpp within a round."""
    base, result = found["llama.cpp"], {}
    for name, pairs in found.items():
        ratios = [(pair[0] / other[0], pair[1] / other[1]) for pair, other in zip(pairs, base, strict=True)]
        result[name] = [statistics.median(column) for column in (*zip(*pairs, strict=True), *zip(*ratios, strict=True))]
    return result


def recipe_with_block(block: int, folder: Path) -> Path:
    """The recipe ``int4`` with other blocks, but for the per-layer table, which no step reads whole."""
    text = (Path(__file__).parents[1] / "configs/recipes/int4.toml").read_text(encoding="utf-8")
    lines = [
        line if line.startswith('"embeddings.per_layer"') else line.replace("int4/32", f"int4/{block}")
        for line in text.splitlines()
        if not line.startswith("prefers_qat")
    ]
    path = folder / f"int4-{block}.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def build(model: str, recipe: str, out: Path) -> None:
    command = [sys.executable, "-m", "gemma4_export.exporter", "build", "--weights", "dummy", "--target", "cpu"]
    subprocess.run([*command, "--model", model, "--recipe", recipe, "--out", out], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="e2b")
    parser.add_argument("--llama-python", type=Path, required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--one-at-a-time", action="store_true", help="load each side anew: for models too big for two")
    parser.add_argument("--keep", type=Path, help="a folder for the files, used again where they are there")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="gemma4-measure-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sides: dict[str, Enter] = {}
        for block in options.blocks:
            artifact = folder / f"{options.model}-block-{block}"
            if not artifact.exists():
                build(options.model, str(recipe_with_block(block, folder)), artifact)
            sides[f"block {block}"] = functools.partial(ours, artifact)
        model = folder / f"{options.model}.gguf"
        if not model.exists():
            unfinished = model.with_suffix(".partial")
            write_random_gguf(unfinished, load_model(options.model).config)
            unfinished.rename(model)
        sides["llama.cpp"] = functools.partial(theirs, options.llama_python, model)
        print(f"{options.model}, prefill / decode tok/s:", flush=True)
        take = apart if options.one_at_a_time else together
        for name, (prefill, decode, *ratios) in summary(take(sides, options.repeats)).items():
            print(
                f"{name}: prefill of {PROMPT} {prefill:.1f} tok/s ({ratios[0]:.2f}x llama.cpp), "
                f"decode behind {CONTEXT} {decode:.2f} tok/s ({ratios[1]:.2f}x), {options.repeats} rounds"
            )
    finally:
        if options.keep is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
