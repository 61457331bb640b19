"""VeRA: trained vectors between two frozen matrices that all sites share (Kopiczko et al., 2023, arXiv 2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.seat import Frozen, Site, Update
from randlora.bases import DenseBasis, check_distribution
from randlora.errors import check_positive
from randlora.methods.base import Method, check_low_rank

if TYPE_CHECKING:
    from randlora.adapters.core import Context


@dataclass(frozen=True)
class VeRA(Method):
    """ΔW = diag(b) B diag(d) A with A (rank × in) and B (out × rank) fixed: rank + out trained numbers a site.

    A and B are leading blocks of one pair that all sites share, with the variance of the authors' Kaiming
    initialisation (2 / in and 2 / rank) for the site's own width. d starts at `d_initial`, b at zero.
    The published RandLoRA code puts b on the input side of some layers; here it is on the output, as in VeRA.
    """

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    basis: str = "uniform"
    sparsity: float | None = None

    def __post_init__(self) -> None:
        check_low_rank(self)
        check_positive("VeRA.d_initial", self.d_initial)
        check_distribution(self.basis, self.sparsity)

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        widest, tallest = max(site.in_features for site in sites), max(site.out_features for site in sites)
        A = context.basis("vera.A", self.rank, widest, self.basis, self.sparsity)
        B = context.basis("vera.B", tallest, self.rank, self.basis, self.sparsity)
        return {site.name: VeRAUpdate(self, site, A, B, context.device) for site in sites}


class VeRAUpdate(Update):
    """The update of one site."""

    def __init__(self, method: VeRA, site: Site, A: DenseBasis, B: DenseBasis, device: torch.device):
        super().__init__()
        self.rank, self.dropout = method.rank, method.dropout
        self.basis_A, self.basis_B = A, B
        self.scale = math.sqrt(2 / site.in_features) * math.sqrt(2 / method.rank)
        self.d = nn.Parameter(torch.full((method.rank,), method.d_initial, device=device))
        self.b = nn.Parameter(torch.zeros(site.out_features, device=device))

    def delta(self, weight: Tensor) -> Tensor:
        A = self.basis_A(self.rank, weight.shape[1], self.d.dtype)
        B = self.basis_B(weight.shape[0], self.rank, self.d.dtype)
        return self.b[:, None] * (B @ (A * (self.scale * self.d)[:, None]))

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        A = self.basis_A(self.rank, x.shape[-1], x.dtype)
        B = self.basis_B(self.b.shape[0], self.rank, x.dtype)
        low = F.linear(F.dropout(x, self.dropout, self.training), A)
        return base(x) + F.linear(low * (self.scale * self.d).to(low.dtype), B) * self.b.to(low.dtype)
