"""``make demo``: build the demo artifact for this machine's processor and talk to it, offline."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from gemma4_export.runtime import Gemma4

CHECKPOINT = Path("demo/checkpoints/tiny-e")
ARTIFACT = Path("build/demo/gemma4-tiny-e-cpu")
# Whether the model may think, and what is said. Each is a conversation of its own, as in the model's training.
SCRIPT = (
    (False, "Hello!"),
    (False, "Who are you?"),
    (True, "What is 48213 + 93779?"),
    (True, "What is 345 * 7?"),
    (False, "Thank you!"),
)


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(ARTIFACT, ignore_errors=True)
    ARTIFACT.parent.mkdir(parents=True, exist_ok=True)
    command = ["gemma4-export", "build", "--checkpoint", str(CHECKPOINT), "--target", "cpu", "--out", str(ARTIFACT)]
    print("$", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "gemma4_export.exporter", *command[1:]], check=True)
    model = Gemma4.load(ARTIFACT)
    num_tokens, seconds = 0, 0.0
    for thinks, text in SCRIPT:
        print(f"\nyou     {text}")
        before = time.perf_counter()
        reply = model.generate([{"role": "user", "content": text}], enable_thinking=thinks, temperature=0)
        seconds += time.perf_counter() - before
        num_tokens += len(reply.ids)
        if reply.thought:
            print("thinks  " + reply.thought.strip().replace("\n", "\n        "))
        print("gemma   " + reply.text)
    print(f"\n{num_tokens} tokens in {seconds:.1f} s; {time.perf_counter() - started:.0f} s in all, build included")
    command = Path(sys.executable).with_name("gemma4-run")
    print(f'next: {command} generate {ARTIFACT} --prompt "What is 12 + 30?"  (it knows sums and small talk, no more)')


if __name__ == "__main__":
    main()
