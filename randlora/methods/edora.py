"""EDoRA: DoRA on a small matrix between the singular vectors of W0 (Nasiri and Garraghan, 2025, arXiv 2501.12067)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.adapters.quantization import dense
from randlora.bases import draw
from randlora.bounds import Count, NotNegative, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.common import relative_scale


@dataclass(frozen=True)
class EDoRA(Method):
    """W' = diag(m / ‖V‖) V with V = W0 + (alpha / rank) · U R A: rank² + out trained parameters a site.

    U (out × rank) are the first left singular vectors of W0, A = Σ Vᵀ (rank × in) the right ones times the singular
    values; both are fixed and go into the adapter's file, since no seed gives a decomposition again. R (rank × rank)
    and m (out), which starts at the norms of W0's rows, are trained. The rows' norms ‖V‖ are a constant in backward,
    as in DoRA with `detach_norm`. `dropout` acts on the input of all that differs from W0. `alpha` is the authors' 16;
    None means 2·rank.

    Ours: R starts at zero, so that W' starts at W0, and receives gradient at once, as U and A are not zero. The authors
    draw it with a standard deviation of 1e-5: `start`.
    """

    rank: Count = 16
    alpha: Positive | None = 16.0
    dropout: Share = 0.0
    start: NotNegative = 0.0

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        return {site.name: EDoRAUpdate(self, site, context) for site in sites}


class EDoRAUpdate(Update):
    """The update of one site."""

    U: Tensor  # (out, rank)
    A: Tensor  # Σ Vᵀ (rank, in)
    squares: Tensor  # ‖W0‖² by row

    def __init__(self, method: EDoRA, site: Site, context: Context):
        super().__init__()
        rank, device = method.rank, context.device
        if rank > site.small:
            raise SettingsError(
                f"EDoRA.rank={rank}: {site.name} has {site.small} singular vectors; choose a rank of at most as many"
            )
        self.scale, self.dropout = relative_scale(rank, method.alpha), method.dropout
        weight = dense(context.weights[site.name], torch.float32)
        start = torch.zeros(rank, rank, device=device)
        if device.type == "meta":
            factors = weight.new_empty(site.out_features, rank), weight.new_empty(rank, site.in_features)
        else:
            factors = truncated_svd(weight, rank)
            if method.start:
                start += method.start * draw(rank, rank, "edora.R", site.name, context.seed, distribution="normal")
        self.register_buffer("U", factors[0])
        self.register_buffer("A", factors[1])
        self.R = nn.Parameter(start)
        self.register_buffer("squares", weight.square().sum(1), persistent=False)
        self.magnitude = nn.Parameter(self.squares.sqrt())

    def factor(self, weight: Tensor) -> Tensor:
        """m / ‖V‖ (out,), without forming V: ‖w + v A‖² = ‖w‖² + v·(2 A w + A Aᵀ v), row by row, with v = s u R."""
        # In float32 whatever the autocast: what is added up here is small beside ‖w‖².
        with torch.autocast(self.U.device.type, enabled=False):
            moved = self.scale * (self.U @ self.R.detach())  # (out, rank)
            crossed = F.linear(dense(weight, moved.dtype), self.A)
            squares = self.squares + (moved * (2 * crossed + moved @ (self.A @ self.A.T))).sum(1)
            return self.magnitude / squares.sqrt()

    def delta(self, weight: Tensor) -> Tensor:
        factor = self.factor(weight)[:, None]
        return (factor - 1) * weight.to(factor.dtype) + factor * (self.scale * (self.U @ self.R) @ self.A)

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        y = base(x)
        dropping = self.training and self.dropout > 0
        dropped = F.dropout(x, self.dropout) if dropping else x
        held = base(dropped) if dropping else y
        if base.bias is not None:
            held = held - base.bias.to(y.dtype)
        low = F.linear(F.linear(dropped, self.A.to(dropped.dtype)), (self.scale * (self.U @ self.R)).to(dropped.dtype))
        # Written as a change of the base's output, so that half precision does not round what has not changed.
        factor = self.factor(base.weight)
        return y + (factor - 1).to(y.dtype) * held + factor.to(y.dtype) * low


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, rank) and Σ Vᵀ (rank, in) of the `rank` largest singular values of `weight`."""
    U, values, V = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :rank].contiguous(), values[:rank, None] * V[:rank]
