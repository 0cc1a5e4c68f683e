"""Train one tiny model for some minutes, resuming from its last state: ``python -m demo.train tiny-e --phase 1``.

Reads the tokenizer from demo/.work/NAME, writes NAME.pt (weights in fp32, momenta, step) to --state and the fp32
weights to --out. The learning rate warms up, stays, and falls over the steps of each call. Their number is --steps, or
what --minutes leave room for at the speed seen once it is steady; it is printed, and as --steps repeats the run.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from demo import models
from demo.batches import TASKS, Encoder, Shape, Workers
from demo.forward import dense_experts, forward, loss, whole_replies
from demo.optimizer import Optimizer

WORK = Path(__file__).parent / ".work"
# what the batches of each phase hold; sounds only for the model that hears
PHASES = {
    0: Shape(rows=4, images=((70, 8),), sounds=2, text_pixels=(24, 130)),  # a smoke run
    1: Shape(images=((70, 112),), sounds=40, text_pixels=(24, 130)),
    2: Shape(rows=52, images=((70, 80), (280, 24)), sounds=20, text_pixels=(17, 130)),
}


_WARM = 60  # steps
_STEADY, _MEASURED = 110, 50  # seconds until compilation is over, and for which the speed is then measured


def schedule(step: int, steps: int | None) -> float:
    """Share of the learning rate at a step: up, flat to one half, then down to 2 %; ``steps`` None: not known yet."""
    if step < _WARM or steps is None:
        return min(1.0, (step + 1) / _WARM)
    return min(1.0, max(0.02, 2 * (1 - step / steps)))


def save_state(path: Path, model: torch.nn.Module, optimizer: Optimizer | None, step: int) -> None:
    """Everything a later call needs, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": models.state(model), "step": step, "optimizer": optimizer.state_dict() if optimizer else None}
    torch.save(content, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def load_state(path: Path, model: torch.nn.Module, optimizer: Optimizer) -> int:
    """Weights, momenta if they are there, and the number of the next step."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    missing, unexpected = model.load_state_dict(content["model"], strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{path}: missing {missing}, unexpected {unexpected}")
    if content["optimizer"]:
        optimizer.load_state_dict(content["optimizer"])
    return int(content["step"])


def on_device(workers: Workers, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Batches on the device, copied ahead by a thread so that neither the copy nor its wait holds up the launches."""
    ready: queue.Queue[tuple[dict[str, torch.Tensor], Any]] = queue.Queue(maxsize=2)

    def copy() -> None:
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        for slot, arrays in workers:
            if stream is None:
                batch, event = {name: torch.from_numpy(array).clone() for name, array in arrays.items()}, None
            else:
                with torch.cuda.stream(stream):
                    batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
                    event = stream.record_event()
                event.synchronize()
            workers.release(slot)
            ready.put((batch, event))

    threading.Thread(target=copy, daemon=True).start()
    while True:
        batch, event = ready.get(timeout=120)
        if event is not None:
            for tensor in batch.values():
                tensor.record_stream(torch.cuda.current_stream())
        yield batch


def write_weights(out: Path, name: str, model: torch.nn.Module) -> None:
    """The fp32 weights in two halves of under 16 MiB, to come back from a machine that returns no larger file."""
    tensors = {key: tensor.detach().cpu() for key, tensor in models.state(model).items()}
    sizes, half, seen = [t.numel() for t in tensors.values()], {}, 0
    for key, size in zip(tensors, sizes, strict=True):
        half[key] = int(seen + size / 2 > sum(sizes) / 2)
        seen += size
    for part in (0, 1):
        torch.save({k: t.clone() for k, t in tensors.items() if half[k] == part}, out / f"{name}.{part}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=models.NAMES)
    parser.add_argument("--phase", type=int, default=1, choices=PHASES)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, default=WORK / "state")
    parser.add_argument("--out", type=Path, default=WORK / "out")
    parser.add_argument("--workers", type=int, default=7)
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    started = time.time()
    folder = WORK / args.name
    state_file = args.state / f"{args.name}.pt"
    first = torch.load(state_file, weights_only=True, mmap=True)["step"] if state_file.exists() else 0
    phase = PHASES[args.phase]
    shape = Shape(**{**phase.__dict__, "sounds": phase.sounds if models.has_audio(args.name) else 0})
    encoder = Encoder(folder)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    seed = args.seed + 1000 * args.phase
    workers = Workers(shape, encoder, seed=seed, first=first, processes=args.workers)

    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hub_config = models.config(args.name, encoder.tokenizer)
    if hub_config["text_config"]["enable_moe_block"]:
        from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

        Gemma4TextExperts.forward = dense_experts
    model: Any = models.build(hub_config, seed=args.seed).to(device).train()
    optimizer = Optimizer(model, muon_lr=args.muon_lr, adam_lr=args.adam_lr, decay=0.05)
    if state_file.exists():
        load_state(state_file, model, optimizer)
    models.set_clip_bounds(model)
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64
        torch._dynamo.config.automatic_dynamic_shapes = False  # every batch of a phase has the same shapes
        for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
            layer.compile()
    budgets = [budget for budget, _ in shape.images]
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{args.name}: {models.count(model)['']} weights, step {first}, {shape}", flush=True)

    log, waited, sums = [], 0.0, torch.zeros((), device=device)
    step, last_save = first, time.time()
    steps: int | None = args.steps or None
    end, steady = started + 60 * args.minutes, None
    timer, since = time.time(), first
    feed = on_device(workers, device)
    while True:
        before = time.time()
        batch = next(feed)
        waited += time.time() - before
        now = time.time()
        if steps is None and steady is None and now - started > _STEADY:
            steady = (step, now)
        if steps is None and steady is not None and now - steady[1] > _MEASURED:
            speed = (step - steady[0]) / (now - steady[1])
            steps = step - first + int(0.97 * speed * (end - now))
            print(f"{args.name}: --steps {steps}", flush=True)
        if step - first == steps or (not args.steps and now > end):
            break
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = forward(model, batch, budgets)
        value = loss(out, batch["labels"])
        value.backward()
        optimizer.step(schedule(step - first, steps))
        sums += value.detach()
        step += 1
        if step - first in (5, 20) or step % 200 == 0:
            right = whole_replies(out, batch, TASKS)
            spent = time.time() - timer
            line = {
                "step": step,
                "seconds": round(time.time() - started, 1),
                "ms_per_step": round(1000 * spent / (step - since), 1),
                "waited_share": round(waited / spent, 2),
                "loss": round(float(sums) / (step - since), 4),
                "replies": {task: round(hit / number, 2) for task, (hit, number) in right.items()},
            }
            log.append(line)
            print(json.dumps(line), flush=True)
            timer, since, waited = time.time(), step, 0.0
            sums.zero_()
        if time.time() - last_save > 150:
            write_weights(args.out, args.name, model)
            last_save = time.time()
    workers.stop()
    write_weights(args.out, args.name, model)
    (args.out / f"{args.name}.log.json").write_text(json.dumps(log), encoding="utf-8")
    save_state(state_file, model, optimizer, step)
    print(f"{args.name}: {step - first} steps to step {step} in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
