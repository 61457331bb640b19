"""NoLA: low-rank factors as combinations of fixed random matrices (Koohpayegani et al., 2023, arXiv 2310.02556)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.bases import Basis, check_basis
from randlora.errors import check_count
from randlora.methods.common import check_low_rank, low_rank_linear, relative_scale, sharing


@dataclass(frozen=True)
class NoLA(Method):
    """ΔW = (alpha / rank) · (Σ_j β_j B_j)(Σ_j α_j A_j) with fixed A_j (rank × in), B_j (out × rank).

    The 2·num_bases coefficients are trained, whatever the site's shape. β starts at zero, so that ΔW does; α at one.
    Each basis is divided by √num_bases, as in NoLA's code: then Σ_j α_j A_j starts as a random matrix of LoRA's
    initial size, and a step of the optimiser moves both factors as far as it would LoRA's. (NoLA's authors reach the
    same by a fixed A_0 with α = 0; the RandLoRA authors' code starts both at 1/num_bases, away from zero.) One bank
    of A_j and one of B_j serve all sites, which take leading columns of it. `alpha` defaults to 2·rank. With
    ``basis=kronecker`` the bank of a site's size is a Kronecker product that is never formed: kilobytes instead of
    megabytes, and a product with α costs next to nothing.
    """

    rank: int = 1
    num_bases: int = 1024
    alpha: float | None = None
    dropout: float = 0.0
    basis: str = "uniform"
    sparsity: float | None = None

    def __post_init__(self) -> None:
        check_low_rank(self)
        check_count("NoLA.num_bases", self.num_bases)
        check_basis(self.basis, self.sparsity)

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        updates: dict[str, Update] = {}
        for group in sharing(sites, self.basis, lambda site: site.shape):
            widest, tallest = max(site.in_features for site in group), max(site.out_features for site in group)
            small = min(widest, tallest)
            A = context.draw(self.basis, "nola.A", self.num_bases, self.rank * widest, self.sparsity, small)
            B = context.draw(self.basis, "nola.B", self.num_bases, self.rank * tallest, self.sparsity, small)
            updates |= {site.name: NoLAUpdate(self, site, A, B, context.device) for site in group}
        return {site.name: updates[site.name] for site in sites}


class NoLAUpdate(Update):
    """The update of one site."""

    def __init__(self, method: NoLA, site: Site, A: Basis, B: Basis, device: torch.device):
        super().__init__()
        self.rank, self.dropout = method.rank, method.dropout
        self.bank_A, self.bank_B = A, B
        n = method.num_bases
        # With both 1/√n in the scale, A has the variance of LoRA's U(±1/√in) at the start.
        self.scale = relative_scale(method.rank, method.alpha) / (n * math.sqrt(3 * site.in_features))
        self.alpha = nn.Parameter(torch.ones(n, device=device))
        self.beta = nn.Parameter(torch.zeros(n, device=device))

    def factors(self, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """A (rank × in) and B (out × rank), the scale in A."""
        r, n = self.rank, self.alpha.shape[0]
        A = self.bank_A(n, r * in_features).down(self.scale * self.alpha[None])
        B = self.bank_B(n, r * out_features).down(self.beta[None])
        return A.view(r, in_features), B.view(out_features, r)

    def delta(self, weight: Tensor) -> Tensor:
        A, B = self.factors(*weight.shape)
        return B @ A

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        A, B = self.factors(*base.weight.shape)
        return low_rank_linear(x, base, F.dropout(x, self.dropout, self.training), A, B)
