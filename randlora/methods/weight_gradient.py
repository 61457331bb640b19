"""The gradient of a weight that is never formed, added up over a step's passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AddWeightGradient(torch.autograd.Function):
    """y as it is; backward adds the gradient by a weight that has made y from x to `total`, (out, in)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.total = total
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        rows = gradients[0].flatten(0, -2)
        ctx.total += rows.T @ x.flatten(0, -2).to(rows.dtype)
        return gradients[0], None, None
