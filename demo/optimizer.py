"""Muon for matrices, Adam for everything else, in a few batched kernels.

Muon: the momentum of a matrix is replaced by its nearest orthogonal matrix (five Newton–Schulz steps), scaled by
0.2 sqrt(max(rows, columns)) so that one learning rate fits both optimisers (Jordan et al. 2024; Liu et al. 2025).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

_ADAM_ONLY = ("embed", "norm", "scale", "router", "position", "conv", "input_proj.weight", "bias", "relative_k_proj")


def _is_matrix(name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() >= 2 and not any(part in name for part in _ADAM_ONLY)


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[N, r, c] -> the same with singular values near 1."""
    x = matrices.bfloat16()
    turned = x.shape[-2] > x.shape[-1]
    if turned:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if turned else x


class Optimizer:
    """Holds momenta by parameter name; ``state_dict`` and ``load_state_dict`` move them to disk and back."""

    def __init__(self, model: torch.nn.Module, *, muon_lr: float, adam_lr: float, decay: float) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.groups: dict[tuple[int, ...], list[tuple[str, torch.Tensor]]] = defaultdict(list)
        for name, parameter in named:
            if _is_matrix(name, parameter):
                self.groups[tuple(parameter.shape[-2:])].append((name, parameter))
        self.momenta = {name: torch.zeros_like(p) for group in self.groups.values() for name, p in group}
        rest = [p for name, p in named if not _is_matrix(name, p)]
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=rest[0].is_cuda)
        self.parameters = [p for _, p in named]
        self.muon_lr, self.adam_lr, self.decay = muon_lr, adam_lr, decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at ``rate`` times the base learning rates; gradients are clipped and cleared."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * rate
        self.adam.step()
        for (rows, columns), members in self.groups.items():
            parameters = [p for _, p in members]
            gradients = [p.grad for p in parameters]
            momenta = [self.momenta[name] for name, _ in members]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            looking_ahead = torch._foreach_lerp(gradients, momenta, 0.95)
            stacked = torch.cat([m.reshape(-1, rows, columns) for m in looking_ahead])
            update = _orthogonal(stacked).to(stacked.dtype) * (0.2 * max(rows, columns) ** 0.5)
            pieces = update.split([p.numel() // (rows * columns) for p in parameters])
            torch._foreach_mul_(parameters, 1 - self.muon_lr * rate * self.decay)
            shaped = [piece.reshape(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
            torch._foreach_add_(parameters, shaped, alpha=-self.muon_lr * rate)
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"momenta": self.momenta, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, momentum in state["momenta"].items():
            self.momenta[name].copy_(momentum)
        self.adam.load_state_dict(state["adam"])
