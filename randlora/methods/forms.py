"""The exact ways to compute x (W0 + ΔW)ᵀ for RandLoRA's ΔW = s · B M, and the choice between them.

Shapes: T tokens, D and d the larger and smaller side of W0, n bases of rank r, N = n·r.
B (D, N) and A (r, d) are fixed; λ (n, r) and γ (n, d) are trained; the factor M (N, d) stacks Λ_j A Γ_j. For
out ≥ in, ΔW = s B M; for out < in, ΔW = s Mᵀ Bᵀ.

Autograd would keep M for every site, as large as W0. These functions save x, λ and γ and build M again in
backward: two elementwise passes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def choose_form(tokens: int, large: int, small: int, dtype: torch.dtype, dropout: bool) -> str:
    """``activation`` or ``materialised``, whichever multiplies less for this many tokens; both are exact.

    With N ≈ d, the activation form adds T·N·(4D + 6d) operations to the frozen layer's forward and backward, the
    materialised form 6·D·N·d + 2·T·D·d. Dropout on the update's input needs the first. So does
    a precision below float32: W0 + ΔW rounded to it would lose what is small in ΔW.
    """
    if dropout or dtype not in (torch.float32, torch.float64):
        return "activation"
    return "materialised" if tokens * (2 * large + 6 * small) > 6 * large * small else "activation"


def factor(lambda_: Tensor, gamma: Tensor, A: Tensor) -> Tensor:
    """M (N, d): row j·r + k is λ_jk · A_k ⊙ γ_j."""
    return (lambda_[:, :, None] * A * gamma[:, None, :]).flatten(0, 1)


def _diagonal_gradients(dM: Tensor, lambda_: Tensor, gamma: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """∂λ (n, r) and ∂γ (n, d) from ∂M (N, d)."""
    product = dM.to(lambda_.dtype).view(*lambda_.shape, -1) * A  # (n, r, d)
    return (product @ gamma[:, :, None]).squeeze(2), (lambda_[:, None, :] @ product).squeeze(1)


class Activation(torch.autograd.Function):
    """x ΔWᵀ by products with the activations; for few tokens."""

    @staticmethod
    def forward(ctx, x, lambda_, gamma, A, B, scale, out_features):
        ctx.save_for_backward(x, lambda_, gamma, A, B)
        ctx.scale, ctx.tall = scale, out_features >= x.shape[-1]
        with _autocast_off(x):
            M = (scale * factor(lambda_, gamma, A)).to(B.dtype)
            tokens = x.flatten(0, -2).to(B.dtype)
            y = tokens @ M.T @ B.T if ctx.tall else tokens @ B @ M
        return y.view(*x.shape[:-1], out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, lambda_, gamma, A, B = ctx.saved_tensors
        with _autocast_off(x):
            M = (ctx.scale * factor(lambda_, gamma, A)).to(B.dtype)
            tokens, g = x.flatten(0, -2).to(B.dtype), gradient.flatten(0, -2).to(B.dtype)
            if ctx.tall:
                low = g @ B  # (T, N)
                dx = low @ M
                dM = low.T @ tokens
            else:
                dx = g @ M.T @ B.T
                dM = (tokens @ B).T @ g
            dlambda, dgamma = _diagonal_gradients(dM, lambda_, gamma, A)
        return dx.view_as(x).to(x.dtype), ctx.scale * dlambda, ctx.scale * dgamma, None, None, None, None


class Materialised(torch.autograd.Function):
    """x (W0 + ΔW)ᵀ by forming W' once forward and once backward; for many tokens."""

    @staticmethod
    def forward(ctx, x, lambda_, gamma, A, B, scale, weight):
        ctx.save_for_backward(x, lambda_, gamma, A, B, weight)
        ctx.scale = scale
        return x @ _merged(lambda_, gamma, A, B, scale, weight).T

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, lambda_, gamma, A, B, weight = ctx.saved_tensors
        g = gradient.flatten(0, -2)
        dx = gradient @ _merged(lambda_, gamma, A, B, ctx.scale, weight) if ctx.needs_input_grad[0] else None
        dW = g.T @ x.flatten(0, -2)
        dM = B.T @ (dW if weight.shape[0] >= weight.shape[1] else dW.T)
        dlambda, dgamma = _diagonal_gradients(dM, lambda_, gamma, A)
        return dx, ctx.scale * dlambda, ctx.scale * dgamma, None, None, None, None


def _merged(lambda_: Tensor, gamma: Tensor, A: Tensor, B: Tensor, scale: float, weight: Tensor) -> Tensor:
    M = factor(lambda_, gamma, A)
    if weight.shape[0] >= weight.shape[1]:
        return torch.addmm(weight, B, M, alpha=scale)
    return torch.addmm(weight, M.T, B.T, alpha=scale)


def _autocast_off(x: Tensor) -> torch.autocast:
    """The dtypes are chosen by hand inside: λ, γ and M's entries stay float32 until the products."""
    return torch.autocast(x.device.type, enabled=False)
