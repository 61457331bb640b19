"""RandLoRA-a: RandLoRA's parameters at a low rank, the paper's ablation (Albert et al., ICLR 2025, section 6.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.bases import Basis, BasisName, Sparsity, check_sparsity
from randlora.bounds import Count, Positive, Share
from randlora.methods.common import low_rank_linear, relative_scale, sharing


@dataclass(frozen=True)
class RandLoRAa(Method):
    """ΔW = (alpha / rank) · (Σ_j B_j Λ_j)(Σ_j A_j Γ_j), transposed where out < in: `rank` is that of ΔW.

    With d the smaller and D the larger side of W0: B_j (D × rank) and A_j (rank × d) are fixed, Λ_j = diag(λ_j) and
    Γ_j = diag(γ_j) are trained, n·(rank + d) parameters a site. `num_bases` is n, or None: as many as come nearest,
    from below, to the parameters of RandLoRA with rank `budget_rank` and ``floor``; then the two differ in the rank of
    ΔW alone. λ starts at zero, γ at 1/√(n·d), which gives Σ_j A_j Γ_j the size of LoRA's A. `alpha` defaults to 2·rank.
    """

    budget_setting = "num_bases"
    rank: Count = 32
    num_bases: Count | None = None
    budget_rank: Count = 6
    alpha: Positive | None = None
    dropout: Share = 0.0
    basis: BasisName = "uniform"
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.basis, self.sparsity)

    @property
    def name(self) -> str:
        return "randlora_a"

    def bases_of(self, site: Site) -> int:
        """n, the number of bases at a site."""
        if self.num_bases is not None:
            return self.num_bases
        budget = max(1, site.small // self.budget_rank) * (self.budget_rank + site.small)
        return max(1, budget // (self.rank + site.small))

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        updates: dict[str, Update] = {}
        for group in sharing(sites, self.basis, lambda site: (site.large, site.small)):
            small, large = max(site.small for site in group), max(site.large for site in group)
            width = self.rank * max(map(self.bases_of, group))
            A = context.draw(self.basis, "randlora_a.A", small, width, self.sparsity, small)
            B = context.draw(self.basis, "randlora_a.B", large, width, self.sparsity, small)
            updates |= {site.name: RandLoRAaUpdate(self, site, A, B, context.device) for site in group}
        return {site.name: updates[site.name] for site in sites}


class RandLoRAaUpdate(Update):
    """The update of one site."""

    def __init__(self, method: RandLoRAa, site: Site, A: Basis, B: Basis, device: torch.device):
        super().__init__()
        self.scale, self.dropout = relative_scale(method.rank, method.alpha), method.dropout
        self.basis_A, self.basis_B = A, B
        self.tall = site.out_features >= site.in_features
        self.large, n = site.large, method.bases_of(site)
        self.lambda_ = nn.Parameter(torch.zeros(n, method.rank, device=device))
        self.gamma = nn.Parameter(torch.full((n, site.small), 1 / math.sqrt(n * site.small), device=device))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Σ_j A_j Γ_j (rank × d) and Σ_j B_j Λ_j (D × rank)."""
        (n, rank), small = self.lambda_.shape, self.gamma.shape[1]
        A = self.basis_A(small, n * rank).matrix(self.gamma.dtype).view(small, n, rank)
        B = self.basis_B(self.large, n * rank).matrix(self.lambda_.dtype).view(self.large, n, rank)
        return torch.einsum("dnr,nd->rd", A, self.gamma), torch.einsum("Dnr,nr->Dr", B, self.lambda_)

    def delta(self, weight: Tensor) -> Tensor:
        A, B = self.factors()
        delta = self.scale * (B @ A)
        return delta if self.tall else delta.T

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        A, B = self.factors()
        if not self.tall:
            A, B = B.T, A.T
        return low_rank_linear(x, base, F.dropout(x, self.dropout, self.training), A, B, self.scale)
