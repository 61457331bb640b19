"""Flat-LoRA: LoRA trained under noise on the whole weight (Li et al., ICML 2025, arXiv 2409.14396)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.adapters.interface import Context, Frozen, Method, Site, Step, Update
from randlora.adapters.quantization import dense, is_quantised
from randlora.bounds import Count, NotNegative, Positive, Share
from randlora.methods.common import compute_dtype, relative_scale
from randlora.methods.lora import LoRAUpdate
from randlora.rng import integer


@dataclass(frozen=True)
class FlatLoRA(Method):
    """LoRA whose training steps see W' + ε, W' = W0 + (alpha / rank) · B A; evaluated and merged without ε.

    ε_ij is normal with standard deviation σ_t · ‖row i of W'‖ / √in, where σ_t = sigma · (1 - cos(π t / steps)) / 2
    grows from 0 to `sigma`. A step of the optimiser has one ε at each site, drawn from the run's seed, the step and the
    site's name: the same for all micro-batches, where a block is computed again, and on all processes. It is never
    written into W0, and its size is a constant in backward. Count, start, `dropout` and `alpha` are LoRA's.
    """

    rank: Count = 8
    alpha: Positive | None = None
    dropout: Share = 0.0
    sigma: NotNegative = 0.05

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        scale = relative_scale(self.rank, self.alpha)
        return {site.name: FlatLoRAUpdate(site, self.rank, scale, self.dropout, context) for site in sites}

    def before_step(self, updates: Iterable[Update], step: Step) -> None:
        level = self.sigma * (1 - math.cos(math.pi * step.number / step.total)) / 2
        for update in updates:
            assert isinstance(update, FlatLoRAUpdate)
            update.draw_noise(step.number, level)

    def finish(self, updates: Mapping[str, Update]) -> Method:
        for update in updates.values():
            assert isinstance(update, FlatLoRAUpdate)
            update.noisy = False
        return self


class FlatLoRAUpdate(LoRAUpdate):
    """The update of one site, and the key of the present step's noise."""

    noisy = False  # True from a training's first step to its end

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, context: Context):
        super().__init__(site, rank, scale, dropout, context)
        self.key = ("flatlora", site.name, context.seed)
        # Tensors, so that a compiled forward reads them; no buffers, so that they stay on the CPU.
        self.seed, self.level = (torch.zeros((), dtype=dtype) for dtype in (torch.int64, torch.float64))

    def draw_noise(self, step: int, level: float) -> None:
        """From here on, training sees the noise of this step, at σ_t = `level`."""
        self.seed.fill_(integer(*self.key, step))
        self.level.fill_(level)
        self.noisy = True

    @torch.no_grad()
    def deviations(self, weight: Tensor) -> Tensor:
        """The standard deviation of every row's noise, (out,), float32 at least."""
        A, B = self.low_rank()
        with torch.autocast(weight.device.type, enabled=False):
            norms = torch.addmm(dense(weight, A.dtype), B, A, alpha=self.scale).norm(dim=1)
            return norms * (self.level / math.sqrt(weight.shape[1]))

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        if not (self.training and self.noisy):
            return super().forward(x, base)
        x = x.to(compute_dtype(x))
        W, bias, deviations = base.weight, base.bias, self.deviations(base.weight)
        if is_quantised(W):  # a dense W0 would take the memory that quantising saves
            y = base(x) + noisy_linear(x, None, None, deviations, self.seed)
        else:
            y = noisy_linear(x, W, bias, deviations, self.seed)
        A, B = (factor.to(y.dtype) for factor in self.low_rank())
        low = F.linear(F.dropout(x, self.dropout), A).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), low, B.T, alpha=self.scale).view_as(y)


def perturbed(weight: Tensor | None, deviations: Tensor, columns: int, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """W0 + ε, or ε alone, (out, in), rounded to `dtype` once; the same ε for the same seed on one kind of device."""
    generator = torch.Generator(deviations.device).manual_seed(int(seed))
    noise = torch.randn(len(deviations), columns, generator=generator, device=deviations.device)
    noise = noise.to(deviations.dtype).mul_(deviations[:, None])
    return (noise if weight is None else noise.add_(weight)).to(dtype)


# An operator of torch, since a compiler cannot follow a generator. Backward draws ε again instead of keeping it.
@torch.library.custom_op("randlora::noisy_linear", mutates_args=())
def noisy_linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, deviations: Tensor, seed: Tensor) -> Tensor:
    """x (W0 + ε)ᵀ + b, (..., out), for x (..., in), W0 (out, in) or None for zero, deviations (out,) and a seed ()."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, perturbed(weight, deviations, x.shape[-1], seed, x.dtype), bias)


@noisy_linear.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, deviations: Tensor, seed: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(deviations))


@torch.library.custom_op("randlora::noisy_linear_backward", mutates_args=())
def noisy_linear_backward(
    gradient: Tensor, weight: Tensor | None, deviations: Tensor, seed: Tensor, columns: int
) -> Tensor:
    """The gradient of x, (..., in), from that of the output, (..., out)."""
    return gradient @ perturbed(weight, deviations, columns, seed, gradient.dtype)


@noisy_linear_backward.register_fake
def _(gradient: Tensor, weight: Tensor | None, deviations: Tensor, seed: Tensor, columns: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], columns)


def _setup(ctx, inputs, output) -> None:
    x, weight, _, deviations, seed = inputs
    ctx.save_for_backward(weight, deviations, seed)
    ctx.columns = x.shape[-1]


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return noisy_linear_backward(gradient, *ctx.saved_tensors, ctx.columns), None, None, None, None


noisy_linear.register_autograd(_backward, setup_context=_setup)
