"""AdamW with parameter groups, the learning rate as a function of the step, and the moving average of the weights."""

import math

import torch
from torch import Tensor, nn

from latte.config import OptimConfig


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); only matrices decay, biases and tables do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=tuple(cfg.betas), eps=cfg.eps, fused=True)


def lr_at(step: int, cfg: OptimConfig, total_steps: int, rate: float = 0.0) -> float:
    """Learning rate of update `step` (from 0), `rate` or else cfg.learning_rate at its height: linear warm-up, then constant,
    linear to 0, half a cosine to 0, or constant with a linear end (warm-up, stable, decay: Hu et al., arXiv 2404.06395)."""
    rate = rate or cfg.learning_rate
    if step < cfg.warmup_steps:
        return rate * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)),
             "wsd": min(1.0, (1 - step / total_steps) / cfg.decay_share)}
    return rate * max(shape[cfg.schedule], 0.0)


class EMA:
    """Exponential moving average of a model's trained parameters in float32, `weights` by name.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that early averages forget the random start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, done: Tensor) -> None:
        """Takes in the parameters after update `step` (from 0) where `done`, a scalar there, is 1, and nothing where it is 0."""
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * done
        averages = list(self.weights.values())
        change = torch._foreach_sub([p.detach().float() for p in model.parameters() if p.requires_grad], averages)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(averages, change)
