"""A training loop of its own, in plain torch: what the project's loop must agree with, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


def rate_at(step: int, steps: int, rate: float, schedule: str, warmup: int, final: float) -> float:
    """Linear warm-up over `warmup` steps, then a decay to `final` times the rate."""
    if step < warmup:
        return rate * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    if schedule == "cosine":
        return rate * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
    return rate * (final + (1 - final) * (1 - progress)) if schedule == "linear" else rate


def train(
    parameters: Parameters,
    loss: Callable[[Parameters, Tensor, Tensor], Tensor],
    steps: Sequence[Sequence[tuple[Tensor, Tensor]]],
    *,
    rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    max_norm: float = math.inf,
    schedule: str = "constant",
    warmup: int = 0,
    final: float = 0.0,
) -> Parameters:
    """AdamW (Loshchilov and Hutter, 2019, algorithm 2) on the gradient of each step's mean loss, clipped by its norm.

    `steps` has the micro-batches (inputs, targets) of each step; every example counts once.
    """
    parameters = {name: value.clone() for name, value in parameters.items()}
    first = {name: torch.zeros_like(value) for name, value in parameters.items()}
    second = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for step, batches in enumerate(steps):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        examples = sum(len(inputs) for inputs, _ in batches)
        mean = sum(loss(leaves, inputs, targets) * len(inputs) / examples for inputs, targets in batches)
        gradients = dict(zip(leaves, torch.autograd.grad(mean, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        lr = rate_at(step, len(steps), rate, schedule, warmup, final)
        for name, value in parameters.items():
            gradient = gradients[name] * min(1.0, max_norm / (norm + 1e-6))  # torch's clipping adds 1e-6, too
            first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
            second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient.square()
            direction = first[name] / (1 - betas[0] ** (step + 1))
            size = (second[name] / (1 - betas[1] ** (step + 1))).sqrt() + epsilon
            parameters[name] = value - lr * (direction / size + weight_decay * value)
    return parameters
