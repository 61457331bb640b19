"""RandLoRA: full-rank updates from fixed random low-rank bases (Albert et al., ICLR 2025, arXiv 2502.00987)."""

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
from randlora.errors import check_choice, check_count, check_positive
from randlora.methods.base import Method, check_low_rank, compute_dtype, relative_scale
from randlora.methods.forms import Activation, Materialised, choose_form, factor

if TYPE_CHECKING:
    from randlora.adapters.core import Context


@dataclass(frozen=True)
class RandLoRA(Method):
    """ΔW = (alpha / rank) · Σ_j B_j Λ_j A Γ_j (equation 4), transposed where out < in.

    With d the smaller and D the larger side of W0 and n = num_bases: B_j (D × rank) and A (rank × d) are fixed,
    Λ_j = diag(λ_j) and Γ_j = diag(γ_j) are trained, λ (n, rank) and γ (n, d): n·(rank + d) numbers a site. So
    a *smaller* rank means more parameters, and the rank of ΔW is min(n·rank, d) whatever the budget.

    * `num_bases`: ``ceil`` (of d / rank: full rank; PEFT's choice), ``floor`` (the paper's counts; a few
      directions are missed where rank does not divide d), or a number for all sites.
    * `alpha` defaults to 2·rank. The paper uses 10 for CLIP (10/rank), PEFT 20·rank.
    * `zero` names the diagonal that starts at zero, so that ΔW does. The other starts at `start`; its default is
      PEFT's 1/max(n, d) for γ and the authors' vision code's 1/max(n, rank) for λ.
    * `basis` and `sparsity`: see randlora.bases. All sites share one A and one B and take leading blocks.
    * `dropout` acts on the input of the update alone.
    """

    rank: int = 6
    alpha: float | None = None
    num_bases: int | str = "ceil"
    basis: str = "uniform"
    sparsity: float | None = None
    zero: str = "lambda"
    start: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_low_rank(self)
        if self.num_bases not in ("ceil", "floor"):
            check_count("RandLoRA.num_bases (ceil, floor or a number)", self.num_bases)  # type: ignore[arg-type]
        check_choice("RandLoRA.zero", self.zero, ("lambda", "gamma"))
        check_distribution(self.basis, self.sparsity)
        if self.start is not None:
            check_positive("RandLoRA.start", self.start)

    def bases_of(self, site: Site) -> int:
        """n, the number of bases at a site."""
        if self.num_bases == "ceil":
            return math.ceil(site.small / self.rank)
        return max(1, site.small // self.rank) if self.num_bases == "floor" else int(self.num_bases)

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        small, large = max(site.small for site in sites), max(site.large for site in sites)
        width = self.rank * max(map(self.bases_of, sites))
        A = context.basis("randlora.A", self.rank, small, self.basis, self.sparsity)
        B = context.basis("randlora.B", large, width, self.basis, self.sparsity)
        return {site.name: RandLoRAUpdate(self, site, A, B, context.device) for site in sites}


class RandLoRAUpdate(Update):
    """The update of one site: ΔW = scale · B M, transposed where out < in; see randlora.methods.forms."""

    def __init__(self, method: RandLoRA, site: Site, A: DenseBasis, B: DenseBasis, device: torch.device):
        super().__init__()
        self.rank, self.scale, self.dropout = method.rank, relative_scale(method.rank, method.alpha), method.dropout
        self.basis_A, self.basis_B = A, B
        n = method.bases_of(site)
        width = max(n, site.small) if method.zero == "lambda" else max(n, method.rank)
        start = 1 / width if method.start is None else method.start
        on_lambda, on_gamma = (0.0, start) if method.zero == "lambda" else (start, 0.0)
        self.lambda_ = nn.Parameter(torch.full((n, method.rank), on_lambda, device=device))
        self.gamma = nn.Parameter(torch.full((n, site.small), on_gamma, device=device))

    def bases(self, large: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (rank, d) as precise as λ, and B (D, n·rank) in `dtype`: this site's blocks of the shared matrices."""
        n, small = self.gamma.shape
        return self.basis_A(self.rank, small, self.gamma.dtype), self.basis_B(large, n * self.rank, dtype)

    def delta(self, weight: Tensor) -> Tensor:
        A, B = self.bases(max(weight.shape), self.lambda_.dtype)
        delta = self.scale * (B @ factor(self.lambda_, self.gamma, A))
        return delta if weight.shape[0] >= weight.shape[1] else delta.T

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        dtype = compute_dtype(x)
        tokens = x.numel() // x.shape[-1]
        large, small = max(base.weight.shape), min(base.weight.shape)
        form = choose_form(tokens, large, small, dtype, dropout=self.training and self.dropout > 0)
        A, B = self.bases(large, dtype)
        if form == "materialised":
            y = Materialised.apply(x, self.lambda_, self.gamma, A, B, self.scale, base.weight)
            return y if base.bias is None else y + base.bias.to(y.dtype)
        dropped = F.dropout(x, self.dropout, self.training)
        return base(x) + Activation.apply(dropped, self.lambda_, self.gamma, A, B, self.scale, base.weight.shape[0])
