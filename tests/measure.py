"""``make measure``: figures that README and docs quote, taken on this machine; run it when nothing else runs.

``python tests/measure.py`` builds full-size E2B with random weights and measures it; ``--model 26b-a4b`` another size.
``--shards`` builds from a sharded bfloat16 checkpoint written for the purpose, ``--build-only`` runs nothing of it.
Each command is a process of its own, so peak memory is that of the whole build. ``measure_llama.py`` puts llama.cpp
beside it where ``--llama-python`` names an interpreter that has llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import onnx_ir as ir
from random_checkpoint import released_hub_config, write_random_checkpoint

from gemma4_export.configs.models import load_model
from gemma4_export.configs.names import LM_HEAD, decoder_tensors
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.exporter.passes.builder import NodeBuilder
from gemma4_export.exporter.weights import place_weights
from gemma4_export.runtime import Gemma4
from gemma4_export.runtime.session_ort import OrtSession

POLL_S = 0.05


def tree_bytes(root: int) -> int:
    """Anonymous memory of a process and all its descendants, from /proc."""
    parents, sizes = {}, {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in path.read_text("utf-8").splitlines() if ":\t" in line)
        except OSError:  # it has just ended
            continue
        process = int(fields["Pid"])
        parents[process], sizes[process] = int(fields["PPid"]), int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
    total, wave = 0, {root}
    while wave:
        total += sum(sizes.get(process, 0) for process in wave)
        wave = {process for process, parent in parents.items() if parent in wave}
    return total


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak memory of a command; its output goes to stderr."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        ended = threading.Event()
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            ended.wait(POLL_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - started, peak


def import_seconds(module: str) -> float:
    """Least of several imports in fresh interpreters, interpreter start included."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="e2b")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shards", action="store_true", help="read the weights from files instead of drawing them")
    parser.add_argument("--build-only", action="store_true", help="where the artifact does not fit the memory")
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python, to be compared with")
    options = parser.parse_args()
    numpy, runtime = import_seconds("numpy"), import_seconds("gemma4_export.runtime")
    print(f"import: numpy {numpy:.3f} s, gemma4_export.runtime {runtime:.3f} s")
    folder = Path(tempfile.mkdtemp(prefix="gemma4-measure-"))
    try:
        artifact = folder / "artifact"
        require_room(folder, options.model, options.recipe, shards=options.shards)
        build_and_report(folder, artifact, options.model, options.recipe, shards=options.shards)
        if options.build_only:
            return
        bench = [sys.executable, "-m", "gemma4_export.runtime", "bench", str(artifact), "--json"]
        output = subprocess.run([*bench, "--repeats", str(options.repeats)], check=True, capture_output=True, text=True)
        for name, value in json.loads(output.stdout).items():
            print(f"  {name}: {value:.3f}" if isinstance(value, float) else f"  {name}: {value}")
        if options.model in ("e2b", "e4b"):
            ratio = statistics.median(skip_ratios(artifact, options.repeats))
            print(
                f"  prefill of 2048 tokens, every layer for all rows / KV-shared layers for the last row: {ratio:.2f}"
            )
    finally:
        shutil.rmtree(folder)
    if options.llama_python is None:
        print("llama.cpp: not compared; pip install llama-cpp-python somewhere and give --llama-python PATH/bin/python")
    else:
        beside = [sys.executable, str(Path(__file__).with_name("measure_llama.py")), "--model", options.model]
        subprocess.run([*beside, "--llama-python", options.llama_python], check=True)


def require_room(folder: Path, model: str, recipe: str, *, shards: bool) -> None:
    """End here, with the numbers, where the disk cannot hold what would be written."""
    config = load_model(model).config
    placed = place_weights(decoder_tensors(config).values(), load_recipe(recipe), wide_scales=frozenset())
    needed = sum(weight.placed.code_bytes + weight.placed.scale_bytes for weight in placed.stored)
    needed += sum(2 * spec.num_elements for spec in decoder_tensors(config).values()) if shards else 0
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(f"skipped: {model} needs {needed / 1e9:.1f} GB of disk, {folder} has {free / 1e9:.1f} GB free")


def build_and_report(folder: Path, artifact: Path, model: str, recipe: str, *, shards: bool) -> None:
    build = ["build", "--target", "cpu", "--recipe", recipe, "--out", str(artifact)]
    if shards:
        checkpoint = folder / "checkpoint"
        source_bytes = write_random_checkpoint(checkpoint, released_hub_config(model))
        build += ["--checkpoint", str(checkpoint)]
    else:
        source_bytes = sum(2 * spec.num_elements for spec in decoder_tensors(load_model(model).config).values())
        build += ["--model", model, "--weights", "dummy"]
    seconds, peak = run([sys.executable, "-m", "gemma4_export.exporter", *build])
    size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    origin = "files" if shards else "random weights"
    print(
        f"build {model} {recipe} from {origin}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, {size / 1e9:.2f} GB; "
        f"{source_bytes / 1e9:.2f} GB of bfloat16 at {source_bytes / 1e6 / seconds:.0f} MB/s"
    )
    if shards:
        shutil.rmtree(checkpoint)


def skip_ratios(artifact: Path, repeats: int) -> list[float]:
    """Time of a prefill whose KV-shared layers run for every row, over one that runs them for the last row only.

    The head runs for one row in both; the two take turns.
    """
    skipping, whole = Gemma4.load(artifact), Gemma4.load(artifact)
    whole.decoder._session = OrtSession(every_row_graph(artifact.joinpath("graphs", "decoder.onnx")))
    return [prefill_seconds(whole) / prefill_seconds(skipping) for _ in range(repeats + 1)][1:]  # the first warms up


def prefill_seconds(model: Gemma4) -> float:
    ids = [300 + i % 1000 for i in range(2048)]
    cache, started = model.new_cache(), time.perf_counter()
    model.forward(ids, cache=cache, rows=[len(ids) - 1])
    return time.perf_counter() - started


def every_row_graph(graph: Path) -> Path:
    """The same decoder, written beside ``graph``, that takes ``output_rows`` before the head, not before KV sharing.

    It reads the same weight files and gives the same logits.
    """
    model = ir.load(graph)
    inputs = {str(value.name): value for value in model.graph.inputs}
    head = next(node for node in model.graph if any(str(v and v.name).startswith(LM_HEAD) for v in node.inputs))
    every, wanted = NodeBuilder(), NodeBuilder()
    length = every("Squeeze", every("Shape", inputs["inputs_embeds"], start=1, end=2), every.ints(0))
    rows = every("Range", every.scalar(0, ir.DataType.INT64), length, every.scalar(1, ir.DataType.INT64))
    ir.convenience.replace_all_uses_with(inputs["output_rows"], rows)
    head.replace_input_with(0, wanted("Gather", head.inputs[0], inputs["output_rows"], axis=0))
    wanted.insert_before(head)
    every.insert_before(next(iter(model.graph)))
    path = graph.with_name("every_row.onnx")
    ir.save(model, path)
    return path


if __name__ == "__main__":
    main()
