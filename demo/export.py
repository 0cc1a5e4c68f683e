"""Trained weights into a checkpoint folder in the hub's layout: ``python -m demo.export tiny-e demo/.work/out``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer

from demo import models
from demo.train import WORK

CHECKPOINTS = Path(__file__).parent / "checkpoints"
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def export(name: str, weights: Path, folder: Path) -> None:
    """Copy the tokenizer files, write the configs and the weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in _TEXT_FILES:
        shutil.copyfile(WORK / name / file, folder / file)
    hub_config = models.config(name, Tokenizer.from_file(str(folder / "tokenizer.json")))
    model = models.build(hub_config, seed=0)
    tensors = {k: v for part in (0, 1) for k, v in torch.load(weights / f"{name}.{part}.pt", weights_only=True).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{weights}: missing {missing}, unexpected {unexpected}")
    models.save(model, folder, hub_config=hub_config, processor=models.processor_config(audio=models.has_audio(name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=models.NAMES)
    parser.add_argument("weights", type=Path, help="folder with NAME.0.pt and NAME.1.pt")
    args = parser.parse_args()
    export(args.name, args.weights, CHECKPOINTS / args.name)


if __name__ == "__main__":
    main()
