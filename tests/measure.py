"""``make measure``: figures that README and docs quote, taken on this machine; run it when nothing else runs.

``python -m tests.measure`` builds full-size E2B with random weights and measures it; ``--model 26b-a4b`` another size.
Each command is a process of its own, so peak memory is that of the whole build.
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
    options = parser.parse_args()
    numpy, runtime = import_seconds("numpy"), import_seconds("gemma4_export.runtime")
    print(f"import: numpy {numpy:.3f} s, gemma4_export.runtime {runtime:.3f} s")
    folder = Path(tempfile.mkdtemp(prefix="gemma4-measure-"))
    try:
        artifact = folder / "artifact"
        build = ["gemma4_export.exporter", "build", "--weights", "dummy", "--target", "cpu", "--model", options.model]
        build += ["--recipe", options.recipe, "--out", str(artifact)]
        seconds, peak = run([sys.executable, "-m", *build])
        size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
        print(f"build {options.model} {options.recipe}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, {size / 1e9:.2f} GB")
        bench = [sys.executable, "-m", "gemma4_export.runtime", "bench", str(artifact), "--json"]
        output = subprocess.run([*bench, "--repeats", str(options.repeats)], check=True, capture_output=True, text=True)
        for name, value in json.loads(output.stdout).items():
            print(f"  {name}: {value:.3f}" if isinstance(value, float) else f"  {name}: {value}")
        sliced = [skip_ratio(artifact) for _ in range(3)] if options.model in ("e2b", "e4b") else []
        if sliced:
            ratio = statistics.median(sliced)
            print(f"  prefill of 2048 tokens, every layer and the head for all rows / for the last one: {ratio:.2f}")
    finally:
        shutil.rmtree(folder)


def skip_ratio(artifact: Path) -> float:
    """Time of a prefill whose KV-shared layers run for every row, over one that wants the last row's logits only."""
    code = """
import sys, time
from gemma4_export.runtime import Gemma4
model = Gemma4.load(sys.argv[1])
ids = [300 + i % 1000 for i in range(2048)]
def seconds(rows):
    # Chunk by chunk, so that the logits of all rows are never held together.
    cache, started = model.new_cache(), time.perf_counter()
    for start in range(0, len(ids), 256):
        model.forward(ids[start:start + 256], cache=cache, rows=rows)
    return time.perf_counter() - started
last = seconds([255])
print(seconds(None) / last)
"""
    output = subprocess.run([sys.executable, "-c", code, str(artifact)], check=True, capture_output=True, text=True)
    return float(output.stdout)


if __name__ == "__main__":
    main()
