"""NoLA: low-rank factors as combinations of fixed random matrices (Koohpayegani et al., 2023, arXiv 2310.02556)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.bases import Basis, BasisName, Sparsity, check_sparsity
from randlora.bounds import Count, Positive, Share
from randlora.methods.common import low_rank_linear, relative_scale, sharing


@dataclass(frozen=True)
class NoLA(Method):
    """ΔW = (alpha / rank) · (Σ_j β_j B_j)(A_0 + Σ_j α_j A_j) with A_0, A_j (rank × in) and B_j (out × rank) fixed.

    The 2·num_bases coefficients are trained, whatever the site's shape. One bank of A_j and one of B_j serve all sites,
    which take leading columns of it.

    Args:
        rank: of ΔW.
        num_bases: how many A_j and how many B_j.
        alpha: None for 2·rank. Published: 1 for each rank on CLIP (RandLoRA, Table 8); in NoLA's scripts rank for
            GPT-2 medium, a quarter of it for GPT-2 large and LLaMA-2.
        dropout: of the update's input.
        basis, sparsity: see `randlora.bases`. With ``kronecker`` the bank of a site's size is a Kronecker product that
            is never formed: kilobytes instead of megabytes.
        start: ``authors`` as in NoLA's code (github.com/UCDvision/NOLA): A_0 is uniform in ±1/√in like LoRA's A, all
            coefficients start at zero, and the banks have the variance of U(-1, 1)/√num_bases. ``ones``: no A_0, α
            starts at one, and the banks are scaled so that A starts with LoRA's variance; a step of the optimiser then
            moves A √in times less far. ``reciprocal`` as in the RandLoRA authors' code: no A_0, banks of variance 1, α
            and β at 1/num_bases, so that ΔW does *not* start at zero.
    """

    budget_setting = "num_bases"
    implied: ClassVar[Mapping[str, Any]] = {"start": "ones"}

    rank: Count = 1
    num_bases: Count = 1024
    alpha: Positive | None = None
    dropout: Share = 0.0
    basis: BasisName = "uniform"
    sparsity: Sparsity | None = None
    start: Literal["authors", "ones", "reciprocal"] = "authors"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.basis, self.sparsity)

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        updates: dict[str, Update] = {}
        for group in sharing(sites, self.basis, lambda site: site.shape):
            widest, tallest = max(site.in_features for site in group), max(site.out_features for site in group)
            small = min(widest, tallest)
            A = context.draw(self.basis, "nola.A", self.num_bases, self.rank * widest, self.sparsity, small)
            B = context.draw(self.basis, "nola.B", self.num_bases, self.rank * tallest, self.sparsity, small)
            updates |= {site.name: NoLAUpdate(self, site, A, B, context) for site in group}
        return {site.name: updates[site.name] for site in sites}


class NoLAUpdate(Update):
    """The update of one site."""

    def __init__(self, method: NoLA, site: Site, A: Basis, B: Basis, context: Context):
        super().__init__()
        self.rank, self.dropout = method.rank, method.dropout
        self.bank_A, self.bank_B, self.fixed_A = A, B, None
        n, width = method.num_bases, site.in_features
        lora = 1 / math.sqrt(3 * width)  # the deviation of U(±1/√in)
        if method.start == "authors":
            self.fixed_A = context.draw("uniform", f"nola.A0.{site.name}", method.rank, width)
            self.scale_A0, self.scale_A, self.scale_B = lora, 1 / math.sqrt(3 * n), 1 / math.sqrt(3 * n)
            alpha, beta = 0.0, 0.0
        elif method.start == "ones":
            self.scale_A, self.scale_B = lora / math.sqrt(n), 1 / math.sqrt(n)
            alpha, beta = 1.0, 0.0
        else:
            self.scale_A, self.scale_B = 1.0, 1.0
            alpha = beta = 1 / n
        self.scale = relative_scale(method.rank, method.alpha)
        self.alpha = nn.Parameter(torch.full((n,), alpha, device=context.device))
        self.beta = nn.Parameter(torch.full((n,), beta, device=context.device))

    def factors(self, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """A (rank × in), and B (out × rank) with all scales but A's own in it."""
        r, n = self.rank, self.alpha.shape[0]
        A = self.bank_A(n, r * in_features).down(self.scale_A * self.alpha[None]).view(r, in_features)
        if self.fixed_A is not None:
            A = A + self.scale_A0 * self.fixed_A(r, in_features).matrix(A.dtype)
        B = self.bank_B(n, r * out_features).down(self.scale * self.scale_B * self.beta[None])
        return A, B.view(out_features, r)

    def delta(self, weight: Tensor) -> Tensor:
        A, B = self.factors(*weight.shape)
        return B @ A

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        A, B = self.factors(*base.weight.shape)
        return low_rank_linear(x, base, F.dropout(x, self.dropout, self.training), A, B)
