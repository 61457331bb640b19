"""EDoRA: DoRA on a small matrix between the singular vectors of W0 (Nasiri and Garraghan, 2025, arXiv 2501.12067)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from randlora.adapters.interface import Context, Method, Site, Update
from randlora.adapters.quantization import dense
from randlora.bases import draw
from randlora.bounds import Count, NotNegative, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.common import relative_scale
from randlora.methods.dora import MagnitudeUpdate


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


class EDoRAUpdate(MagnitudeUpdate):
    """The update of one site."""

    detach_norm = True
    U: Tensor  # (out, rank)
    A: Tensor  # Σ Vᵀ (rank, in)

    def __init__(self, method: EDoRA, site: Site, context: Context):
        super().__init__()
        rank, device, weight = method.rank, context.device, context.weights[site.name]
        if rank > site.small:
            raise SettingsError(
                f"EDoRA.rank={rank}: {site.name} has {site.small} singular vectors; choose a rank of at most as many"
            )
        self.scale, self.dropout = relative_scale(rank, method.alpha), method.dropout
        start = torch.zeros(rank, rank, device=device)
        if device.type == "meta":
            factors = start.new_empty(site.out_features, rank), start.new_empty(rank, site.in_features)
        else:
            factors = truncated_svd(dense(weight, torch.float32), rank)
            if method.start:
                start += method.start * draw(rank, rank, "edora.R", site.name, context.seed, distribution="normal")
        self.register_buffer("U", factors[0])
        self.register_buffer("A", factors[1])
        self.R = nn.Parameter(start)
        self.start_magnitude(weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.U @ self.R


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, rank) and Σ Vᵀ (rank, in) of the `rank` largest singular values of `weight`."""
    U, values, V = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :rank].contiguous(), values[:rank, None] * V[:rank]
