"""DoRA: LoRA's direction under a trained magnitude (Liu et al., ICML 2024, arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.adapters.quantization import dense
from randlora.bounds import Count, Positive, Share
from randlora.methods.common import relative_scale
from randlora.methods.lora import LoRAUpdate


@dataclass(frozen=True)
class DoRA(Method):
    """W' = diag(m / ‖V‖) V with V = W0 + (alpha / rank) · B A and ‖V‖ the norms of V's rows.

    A and B are LoRA's; m (out) starts at the norms of W0's rows, so that W' starts at W0. The norm is taken of every
    output's row, as the authors confirmed. With `detach_norm`, it counts as a constant in backward: their way, which
    saves memory and is another gradient. `dropout` acts on the input of all that differs from W0. `alpha` defaults to
    2·rank.
    """

    rank: Count = 8
    alpha: Positive | None = None
    dropout: Share = 0.0
    detach_norm: bool = True

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        scale = relative_scale(self.rank, self.alpha)
        return {
            site.name: DoRAUpdate(site, self.rank, scale, self.dropout, self.detach_norm, context) for site in sites
        }


class MagnitudeUpdate(Update):
    """W' = diag(m / ‖V‖) V with V = W0 + s B A: a trained magnitude m of each row over a low-rank change.

    A subclass sets the fields below and gives `factors`.
    """

    scale: float  # s
    dropout: float
    detach_norm: bool
    squares: Tensor  # ‖W0‖² by row
    magnitude: nn.Parameter

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank)."""
        raise NotImplementedError

    def start_magnitude(self, weight: Tensor) -> None:
        """Sets m to the norms of W0's rows, so that W' starts at W0 where B A is zero."""
        self.register_buffer("squares", dense(weight, torch.float32).square().sum(1), persistent=False)
        self.magnitude = nn.Parameter(self.squares.sqrt())

    def row_scale(self, weight: Tensor) -> Tensor:
        """m / ‖V‖ (out,), without forming V: ‖w + s b A‖² = ‖w‖² + 2 s b·(A w) + s² b·(A Aᵀ b), row by row."""
        # In float32 whatever the autocast: what is added up here is small beside ‖w‖².
        with torch.autocast(weight.device.type, enabled=False):
            A, B = (matrix.detach() if self.detach_norm else matrix for matrix in self.factors())
            crossed = F.linear(dense(weight, A.dtype), A)  # (out, rank)
            moved = B * (2 * crossed + self.scale * F.linear(B, A @ A.T))
            return self.magnitude / (self.squares.to(A.dtype) + self.scale * moved.sum(1)).sqrt()

    def delta(self, weight: Tensor) -> Tensor:
        A, B = self.factors()
        rows = self.row_scale(weight)[:, None]
        return (rows - 1) * weight.to(rows.dtype) + rows * (self.scale * (B @ A))

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        A, B = self.factors()
        y = base(x)
        dropping = self.training and self.dropout > 0
        dropped = F.dropout(x, self.dropout) if dropping else x
        held = base(dropped) if dropping else y
        if base.bias is not None:
            held = held - base.bias.to(y.dtype)
        low = F.linear(F.linear(dropped, A.to(dropped.dtype)), (self.scale * B).to(dropped.dtype))
        # Written as a change of the base's output, so that half precision does not round what has not changed.
        rows = self.row_scale(base.weight)
        return y + (rows - 1).to(y.dtype) * held + rows.to(y.dtype) * low


class DoRAUpdate(MagnitudeUpdate):
    """The update of one site."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, detach_norm: bool, context: Context):
        super().__init__()
        self.scale, self.dropout, self.detach_norm = scale, dropout, detach_norm
        self.low_rank = LoRAUpdate(site, rank, scale, 0.0, context)
        self.start_magnitude(context.weights[site.name])

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.low_rank.low_rank()
