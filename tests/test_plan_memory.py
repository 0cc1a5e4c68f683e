"""``plan``'s memory figures against a process that loads: what stays, and the most at any time."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small

from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.models import load_model
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.configs.step_bytes import PROCESS_BYTES, cpu_memory_bytes
from gemma4_export.configs.target import load_target
from gemma4_export.exporter.dummy import DummySource
from gemma4_export.exporter.plan import make_plan, resolve_plan

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: anonymous memory cannot be read"),
]

# Anonymous pages, before a load and behind it, and the most that a thread saw every 2 ms meanwhile.
CHILD = r"""
import json, sys, threading, time
from pathlib import Path
import onnxruntime, tokenizers, jinja2
from gemma4_export.runtime import Gemma4

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

def watch():
    global most
    while not is_loaded:
        most = max(most, anonymous())
        time.sleep(0.002)

before, most, is_loaded = anonymous(), 0, False
thread = threading.Thread(target=watch)
thread.start()
model = Gemma4.load(sys.argv[1], num_threads=1)
after, is_loaded = anonymous(), True
thread.join()
print(json.dumps([after - before, max(most, after) - before]))
"""
WIDE = {"num_layers": 8, "hidden_size": 1024, "intermediate_size": 8192}
WIDE |= {"vocab_size": 32768, "vocab_size_per_layer_input": 32768}
# Beside its weights a session of these small models holds 11 to 17 MB: graph, threads, small tokenizer. The least that
# a wrong formula is off by is the float32 sums of the blocks, a sixth of what int4 weights take: 30 MB.
SESSION = 20e6
"""The most that is not weights (bytes)."""
# What onnxruntime frees while it packs bfloat16, glibc keeps where it is below 32 MiB: 115 to 170 MB beside 447 MB of
# weights in the worst case seen; malloc_trim got 115 of 115 back. With a threshold of its own it keeps next to nothing.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


@pytest.mark.parametrize("recipe", ["int4", "int8", "int8-blocks", "fp32", "bf16"])
def test_a_loaded_model_takes_what_was_planned(recipe, tmp_path):
    model = dataclasses.replace(load_model("e2b"), config=small.model_config("e2b", **WIDE))
    small.build_artifact(DummySource(model.config), tmp_path / "artifact", recipe=recipe, context=64)
    stays, most = _loaded(tmp_path / "artifact")
    options = resolve_plan(
        model, target=load_target("cpu"), recipe=load_recipe(recipe), dummy=True, context=64, chunk=7
    )
    plan = make_plan(model, options)
    assert 0 <= stays - plan.weights_in_memory_bytes <= SESSION
    assert 0 <= most - (plan.load_peak_bytes - PROCESS_BYTES) <= SESSION


def test_float32_activations_leave_the_scales_where_they_are_mapped(tmp_path):
    """Loading counts them, because every step reads them; memory of its own they take none."""
    source = DummySource(small.model_config("e2b", **WIDE))
    manifest = small.build_artifact(source, tmp_path / "artifact", context=64, activations="fp32")
    counted = cpu_memory_bytes(manifest.census, activations="fp32")
    scales = sum(
        size - form.row_bytes(manifest.census[role].parameters)
        for role, size in counted.items()
        if (form := WeightFormat.parse(manifest.census[role].format)).is_quantized
    )
    stays, _ = _loaded(tmp_path / "artifact")
    assert scales > 1.4 * SESSION
    assert 0 <= stays - (sum(counted.values()) - scales) <= SESSION


def _loaded(artifact: Path) -> tuple[int, int]:
    """Bytes that a process holds more of once it has loaded ``artifact``, and at most meanwhile."""
    command, environment = [sys.executable, "-c", CHILD, str(artifact)], os.environ | ALLOCATOR
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    stays, most = json.loads(ran.stdout)
    return stays, most
