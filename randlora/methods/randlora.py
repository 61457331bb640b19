"""RandLoRA: full-rank updates from fixed random low-rank bases (Albert et al., ICLR 2025, arXiv 2502.00987)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.bases import PEFT, Basis, BasisName, Map, Sparsity, check_sparsity
from randlora.bases.peft import randlora_bases
from randlora.bounds import Count, Part, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.common import compute_dtype, may_form_weight, relative_scale, sharing
from randlora.methods.kernels import TOKENS, ExecutionPlan, Fixed, UpdatedLinear, choose_plan, prepare


@dataclass(frozen=True)
class RandLoRA(Method):
    """ΔW = (alpha / rank) · Σ_j B_j Λ_j A Γ_j (equation 4), transposed where out < in.

    With d the smaller and D the larger side of W0 and n = num_bases: B_j (D × rank) and A (rank × d) are fixed,
    Λ_j = diag(λ_j) and Γ_j = diag(γ_j) are trained, λ (n, rank) and γ (n, d): n·(rank + d) parameters a site. So
    a *smaller* rank means more parameters, and the rank of ΔW is min(n·rank, d) whatever the budget.

    * `num_bases`: ``ceil`` (of d / rank: full rank; PEFT's choice), ``floor`` (the paper's counts; a few
      directions are missed where rank does not divide d), a share of that below 1, or a number for all sites.
    * `alpha` defaults to 2·rank. The paper uses 10 for CLIP (10/rank), PEFT 20·rank. With `divide_by_root`, ΔW is
      also divided by √n, as in the paper's language runs.
    * `zero` names the diagonal that starts at zero, so that ΔW does. The other starts at `start`; its default is
      PEFT's 1/max(n, d) for γ and the authors' vision code's 1/max(n, rank) for λ.
    * `basis` and `sparsity`: see randlora.bases. All sites share one A and one B and take leading blocks; with
      ``very_sparse`` and ``kronecker``, those of one smaller side do. ``kronecker`` makes B of orthogonal factors
      and leaves A dense (uniform); where rank does not divide d, the last block has the rows left to d. A very
      sparse A (as published) has columns of zeros, (1 - 2/√d)^rank of them, where ΔW stays zero: 64 % for d = 768
      and rank 6. ``peft`` gives PEFT's own A and B.
    * `delta_dtype`: the precision of the products that make up ΔW: ``float32``, or ``bfloat16``, which loses
      about 2⁻⁹ of ΔW and of the gradients, and never anything of W0. Under autocast, products with tokens are its.
    * `dropout` acts on the input of the update alone.
    """

    rank: Count = 6
    alpha: Positive | None = None
    divide_by_root: bool = False
    num_bases: Count | Part | Literal["ceil", "floor"] = "ceil"
    basis: BasisName | Literal["peft"] = "uniform"
    sparsity: Sparsity | None = None
    zero: Literal["lambda", "gamma"] = "lambda"
    start: Positive | None = None
    delta_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.basis, self.sparsity)
        if self.basis == PEFT and self.num_bases != "ceil":
            raise SettingsError(f"num_bases={self.num_bases!r}: basis=peft needs ceil, as PEFT rounds")

    def bases_of(self, site: Site) -> int:
        """n, the number of bases at a site."""
        if isinstance(self.num_bases, int):
            return self.num_bases
        if self.num_bases == "ceil":
            return math.ceil(site.small / self.rank)
        share = 1.0 if self.num_bases == "floor" else float(self.num_bases)
        return max(1, int(share * (site.small // self.rank)))

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        pairs = self._bases(sites, context)
        return {site.name: RandLoRAUpdate(self, site, *pairs[site.name], context.device) for site in sites}

    def _bases(self, sites: Sequence[Site], context: Context) -> Mapping[str, tuple[Basis, Basis]]:
        """A and B by site."""
        if self.basis == PEFT:
            return randlora_bases({site.name: site.shape for site in sites}, self.rank, context.seed, context.device)
        pairs: dict[str, tuple[Basis, Basis]] = {}
        for group in sharing(sites, self.basis, lambda site: site.small):
            small, large = max(site.small for site in group), max(site.large for site in group)
            width = self.rank * max(map(self.bases_of, group))
            if self.basis == "kronecker":
                if width >= small + self.rank:
                    raise SettingsError(
                        f"num_bases={self.num_bases} of rank {self.rank} are more than basis=kronecker has room for at "
                        f"a matrix whose smaller side is {small}: use ceil, floor or less"
                    )
                width = small  # N is a property of the site's size, so that B is orthogonal
            basis_A = "uniform" if self.basis == "kronecker" else self.basis
            A = context.draw(basis_A, "randlora.A", self.rank, small, self.sparsity, small)
            B = context.draw(self.basis, "randlora.B", large, width, self.sparsity, small)
            pairs |= {site.name: (A, B) for site in group}
        return pairs


class RandLoRAUpdate(Update):
    """The update of one site: ΔW = scale · B M, transposed where out < in; see randlora.methods.kernels."""

    def __init__(self, method: RandLoRA, site: Site, A: Basis, B: Basis, device: torch.device):
        super().__init__()
        self.dropout = method.dropout
        self.delta_dtype = None if method.delta_dtype == "float32" else getattr(torch, method.delta_dtype)
        self.basis_A, self.basis_B = A, B
        self.tall = site.out_features >= site.in_features
        n = method.bases_of(site)
        self.scale = relative_scale(method.rank, method.alpha) / (math.sqrt(n) if method.divide_by_root else 1)
        width = max(n, site.small) if method.zero == "lambda" else max(n, method.rank)
        start = 1 / width if method.start is None else method.start
        on_lambda, on_gamma = (0.0, start) if method.zero == "lambda" else (start, 0.0)
        self.lambda_ = nn.Parameter(torch.full((n, method.rank), on_lambda, device=device))
        self.gamma = nn.Parameter(torch.full((n, site.small), on_gamma, device=device))
        columns = n * method.rank if method.basis != "kronecker" else min(n * method.rank, site.small)
        self.shape = site.large, columns

    def fixed(self) -> Fixed:
        """A (rank, d), as precise as λ, and B (D, n·rank): this site's blocks of the shared matrices; and the scale."""
        A = self.basis_A(self.lambda_.shape[1], self.gamma.shape[1]).matrix(self.lambda_.dtype)
        return Fixed(A, self.basis_B(*self.shape), self.scale, self.tall)

    def delta(self, weight: Tensor) -> Tensor:
        return self.fixed().delta(self.lambda_, self.gamma)

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        fixed, trained = self.fixed(), (self.lambda_, self.gamma)
        dropping = self.training and self.dropout > 0
        plan = self.plan(x, base.weight, fixed.B, dropping)
        if dropping:  # the update's input differs from the base's
            dropped = F.dropout(x, self.dropout)
            return base(x) + UpdatedLinear.apply(dropped, *trained, None, None, None, fixed, plan)
        ready = self.kept(plan, lambda: prepare(*trained, base.weight, fixed, plan))
        return UpdatedLinear.apply(x, *trained, base.weight, base.bias, ready, fixed, plan)

    def plan(self, x: Tensor, weight: Tensor, B: Map, dropping: bool) -> ExecutionPlan:
        """How to compute for x (..., in): the cheapest way, if W0 + ΔW may be formed at all.

        `weight` is W0, `B` this site's fixed matrix; `dropping` says that the update has an input of its own.
        """
        compute, delta = compute_dtype(x), self.delta_dtype or self.lambda_.dtype
        if dropping or not may_form_weight(weight):
            return ExecutionPlan(TOKENS, TOKENS, TOKENS, compute, delta)
        return choose_plan(x.numel() // x.shape[-1], weight.shape, B, compute, delta, x.device.type, self.caching)
