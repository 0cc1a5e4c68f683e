"""What "equal" means: transformers in float32, eager attention, read from a checkpoint folder."""

import copy
import functools
import math
import random
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tiny import control_ids, ordinary_ids
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

MIN_BOUND = 2e-4  # logits; below it, the order of float32 sums alone decides
MIN_ROUTER_MARGIN = 1e-3  # probability between the last expert taken and the first one left


_UNREAD_WHERE_KV_IS_SHARED = ("k_proj", "v_proj", "k_norm")


class _Float64(TorchFunctionMode):
    """Runs the places where the model asks for float32 (norms, softmax, RoPE) in float64 too."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if function is torch.Tensor.float:
            return arguments[0].double()
        if keywords.get("dtype") is torch.float32:
            keywords["dtype"] = torch.float64
        arguments = tuple(torch.float64 if value is torch.float32 else value for value in arguments)
        return function(*arguments, **keywords)


class Oracle:
    """A checkpoint's text model. Ids are plain text: media placeholders, whose embedding is replaced, are refused.

    Args:
        folder: checkpoint folder, any spelling and storage that `tiny.write_checkpoint` writes.
        weights: "float32" takes the stored values; "bfloat16" rounds each matrix to bfloat16 first, as the bf16
            recipe does (norms and scalars stay). Both compute in float32, so sqrt(hidden_size), which scales
            embeddings, is not rounded in either.
    """

    def __init__(self, folder: Path | str, *, weights: str = "float32") -> None:
        assert weights in ("float32", "bfloat16"), weights
        folder = Path(folder)
        config = AutoConfig.from_pretrained(folder)
        stored = _fuse_experts(_load_tensors(folder))
        stored = {
            name: (tensor.to(getattr(torch, weights)) if tensor.ndim >= 2 else tensor).float()
            for name, tensor in stored.items()
        }
        self.model, report = getattr(transformers, config.architectures[0]).from_pretrained(
            None,
            config=config,
            state_dict=stored,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        # transformers draws a tensor that it does not find at random. Only KV-shared layers may have theirs unread.
        unread = {name for name in report["unexpected_keys"] if name.split(".")[-2] not in _UNREAD_WHERE_KV_IS_SHARED}
        assert not unread | set(report["missing_keys"]) | set(report["mismatched_keys"]), report
        self.model.eval()
        self.model.requires_grad_(False)
        text_config = config.get_text_config()
        self._top_k = text_config.top_k_experts if getattr(text_config, "enable_moe_block", False) else None
        media = ("image_token_id", "audio_token_id", "video_token_id")
        self._refused = {getattr(config, name, None) for name in media} - {None}

    def logits(self, ids: list[int]) -> np.ndarray:
        """One causal pass without cache: float32 [T, V], soft-capped."""
        return self._forward(self.model, ids).numpy()

    def bound(self, ids: list[int]) -> float:
        """How far float32 logits on these ids may be off: max(2e-4, 4 x |this oracle in float32 - in float64|)."""
        with _Float64():
            exact = self._forward(self._double, ids)
        difference = (self._forward(self.model, ids).double() - exact).abs().max().item()
        return max(MIN_BOUND, 4 * difference)

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """The `count` most likely ids one after the other (stop ids included), and the smallest top-2 logit margin."""
        self._check(ids)
        produced: list[int] = []
        margin, cache, step = math.inf, None, list(ids)
        with torch.inference_mode():
            while len(produced) < count:
                output = self.model(torch.tensor([step]), past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                best = output.logits[0, -1].topk(2)
                margin = min(margin, (best.values[0] - best.values[1]).item())
                produced.append(int(best.indices[0]))
                step = produced[-1:]
        return produced, margin

    def router_margin(self, ids: list[int]) -> float:
        """Smallest gap between the k-th and (k+1)-th expert's probability, over layers and tokens; inf without MoE."""
        if self._top_k is None:
            return math.inf
        gaps: list[float] = []

        def record(module: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
            ranked = outputs[0].sort(dim=-1, descending=True).values
            gaps.append((ranked[:, self._top_k - 1] - ranked[:, self._top_k]).min().item())

        routers = [module for name, module in self.model.named_modules() if name.endswith(".router")]
        hooks = [router.register_forward_hook(record) for router in routers]
        try:
            self._forward(self.model, ids)
        finally:
            for hook in hooks:
                hook.remove()
        assert len(gaps) == len(routers) > 0
        return min(gaps)

    @functools.cached_property
    def _double(self) -> torch.nn.Module:
        return copy.deepcopy(self.model).double()

    def _forward(self, model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
        self._check(ids)
        with torch.inference_mode():
            return model(torch.tensor([ids]), use_cache=False).logits[0]

    def _check(self, ids: list[int]) -> None:
        assert ids, "no ids"
        assert not self._refused & set(ids), f"media placeholders {self._refused & set(ids)} among the ids"


@functools.cache
def oracle(folder: Path, *, weights: str = "float32") -> Oracle:
    """The `Oracle` of this folder, made once per process."""
    return Oracle(folder, weights=weights)


def random_prompt(*, length: int, seed: int) -> list[int]:
    """Ids of ordinary text, the same for the same arguments."""
    return random.Random(seed).choices(ordinary_ids(), k=length)


def find_prompt(oracle: Oracle, *, length: int, seed: int = 0) -> list[int]:
    """A random prompt on which no router decision is close to a tie.

    Raises:
        LookupError: none of 200 prompts will do.
    """
    for attempt in range(200):
        ids = random_prompt(length=length, seed=1000 * seed + attempt)
        if oracle.router_margin(ids) > MIN_ROUTER_MARGIN:
            return ids
    raise LookupError(f"no prompt of {length} ids with a router margin above {MIN_ROUTER_MARGIN} in 200 tries")


def find_greedy_prompt(oracle: Oracle, *, length: int, count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """A random prompt and its `count` greedy ids, none of which hangs on rounding.

    Over the whole sequence the router margin holds and every top-2 margin is above twice the bound. No produced id is a
    control token, so that a stop id ends nothing early, and a third of them differ: a model that repeats one id
    for ever would agree with any other that does.

    Raises:
        LookupError: none of 200 prompts will do.
    """
    for attempt in range(200):
        ids = random_prompt(length=length, seed=1000 * seed + attempt)
        produced, margin = oracle.greedy(ids, count)
        if control_ids() & set(produced) or len(set(produced)) < count // 3 or margin <= 2 * MIN_BOUND:
            continue
        sequence = ids + produced[:-1]
        if oracle.router_margin(sequence) > MIN_ROUTER_MARGIN and margin > 2 * oracle.bound(sequence):
            return ids, produced
    raise LookupError(f"no prompt of {length} ids with {count} clear greedy ids in 200 tries")


def _load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _fuse_experts(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers reads fused experts only: join per-expert tensors, expert-major, gate rows before up rows."""
    fused = {name: tensor for name, tensor in stored.items() if ".experts." not in name or "_proj.weight" not in name}
    stems = {name.split(".experts.")[0] for name in stored} if len(fused) < len(stored) else set()
    for stem in sorted(stem for stem in stems if f"{stem}.experts.0.gate_proj.weight" in stored):
        part = {"gate": [], "up": [], "down": []}
        while (expert := f"{stem}.experts.{len(part['gate'])}") + ".gate_proj.weight" in stored:
            for key, tensors in part.items():
                tensors.append(stored[f"{expert}.{key}_proj.weight"])
        gate_up = [torch.cat(pair) for pair in zip(part["gate"], part["up"], strict=True)]
        fused[f"{stem}.experts.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{stem}.experts.down_proj"] = torch.stack(part["down"])
    return fused
