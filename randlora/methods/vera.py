"""VeRA: trained vectors between two frozen matrices that all sites share (Kopiczko et al., 2023, arXiv 2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from randlora.adapters.layer import Frozen, Site, Update
from randlora.adapters.quantization import dense, is_quantised
from randlora.bases import Basis, DenseMap, Map, check_basis
from randlora.bases.peft import PeftBasis, draw_vera
from randlora.errors import check_positive
from randlora.methods.base import Method, check_low_rank, compute_dtype, sharing
from randlora.methods.kernels import COSTS, autocast_off, linear, relative_cost

if TYPE_CHECKING:
    from randlora.adapters.core import Context


@dataclass(frozen=True)
class VeRA(Method):
    """ΔW = diag(b) B diag(d) A with A (rank × in) and B (out × rank) fixed: rank + out trained numbers a site.

    A and B are leading blocks of one pair that all sites share, with the variance of the authors' Kaiming
    initialisation (2 / in and 2 / rank) for the site's own width. d starts at `d_initial`, b at zero.
    With ``basis=peft`` they are PEFT's own, whose variance is that of the widest site. The published RandLoRA code
    puts b on the input side of some layers; here it is on the output, as in VeRA.
    """

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    basis: str = "uniform"
    sparsity: float | None = None

    def __post_init__(self) -> None:
        check_low_rank(self)
        check_positive("VeRA.d_initial", self.d_initial)
        check_basis(self.basis, self.sparsity, and_peft=True)

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        pairs: dict[str, tuple[Basis, Basis]] = {}
        if self.basis == "peft":
            outputs, inputs = max(site.out_features for site in sites), max(site.in_features for site in sites)
            drawn = draw_vera(self.rank, outputs, inputs, context.seed, context.device)
            shared = PeftBasis("peft.A", drawn[0]), PeftBasis("peft.B", drawn[1])
            return {site.name: VeRAUpdate(self, site, *shared, context.device) for site in sites}
        for group in sharing(sites, self.basis, lambda site: (site.out_features, site.in_features)):
            widest, tallest = max(site.in_features for site in group), max(site.out_features for site in group)
            small = min(widest, tallest)
            A = context.basis("vera.A", self.rank, widest, self.basis, self.sparsity, small)
            B = context.basis("vera.B", tallest, self.rank, self.basis, self.sparsity, small)
            pairs |= {site.name: (A, B) for site in group}
        return {site.name: VeRAUpdate(self, site, *pairs[site.name], context.device) for site in sites}


class VeRAUpdate(Update):
    """The update of one site."""

    def __init__(self, method: VeRA, site: Site, A: Basis, B: Basis, device: torch.device):
        super().__init__()
        self.rank, self.dropout = method.rank, method.dropout
        self.basis_A, self.basis_B = A, B
        peft = method.basis == "peft"  # whose matrices have the scale of the widest site in them
        self.scale = 1.0 if peft else math.sqrt(2 / site.in_features) * math.sqrt(2 / method.rank)
        self.d = nn.Parameter(torch.full((method.rank,), method.d_initial, device=device))
        self.b = nn.Parameter(torch.zeros(site.out_features, device=device))

    def maps(self, out_features: int, in_features: int) -> tuple[Map, Map]:
        """A (rank, in) and B (out, rank): this site's blocks of the shared matrices."""
        return self.basis_A(self.rank, in_features), self.basis_B(out_features, self.rank)

    def delta(self, weight: Tensor) -> Tensor:
        return _delta(self.d, self.b, *self.maps(*weight.shape), self.scale)

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        A, B = self.maps(*base.weight.shape)
        compute = compute_dtype(x)
        dropping = self.training and self.dropout > 0
        # A base kept in low precision would round a small ΔW away.
        may = base.weight.dtype.itemsize >= 4 and not is_quantised(base.weight)
        merge = may and merging_pays(x.numel() // x.shape[-1], A, B, compute, x.device.type)
        if not dropping and (merge or not isinstance(A, DenseMap)):
            return VeRALinear.apply(x, self.d, self.b, base.weight, base.bias, A, B, self.scale, compute, merge)
        dropped = F.dropout(x, self.dropout, self.training).reshape(-1, x.shape[-1]).to(compute)
        y = base(x)
        return torch.addcmul(y, _products(dropped, self.d, A, B, self.scale)[1].view_as(y), self.b.to(y.dtype))


def merging_pays(tokens: int, A: Map, B: Map, compute: torch.dtype, device: str) -> bool:
    """Whether forming W' (twice) is cheaper than products with the tokens; see randlora.methods.kernels.choose_form."""
    rate = COSTS.get(device, COSTS["cpu"])
    low = rate["low_precision"] if compute.itemsize < 4 else 1.0
    cost_A, cost_B = (relative_cost(one, rate) * one.multiplications() for one in (A, B))
    out_features, in_features = B.rows, A.columns
    by_token = tokens * low * (2 if isinstance(A, DenseMap) else 3) * (cost_A + cost_B)
    weight = in_features * out_features
    merged = 2 * in_features * cost_B + out_features * cost_A + tokens * weight * low + 8 * weight * rate["elementwise"]
    return merged < by_token


class VeRALinear(torch.autograd.Function):
    """x W'ᵀ + bias with W' = W0 + s diag(b) B diag(d) A, keeping x alone for backward.

    Merged, W' is formed twice. Otherwise the products of the tokens with A and B are taken again in backward, which
    is cheap where these are Kronecker products.
    """

    @staticmethod
    def forward(ctx, x, d, b, weight, bias, A, B, scale, compute, merge):
        with autocast_off(x):
            tokens = x.reshape(-1, x.shape[-1]).to(compute)
            if merge:
                y = linear(tokens, weight + _delta(d, b, A, B, scale), bias)
            else:
                y = linear(tokens, weight, bias).addcmul_(_products(tokens, d, A, B, scale)[1], b.to(compute))
        ctx.save_for_backward(x, d, b, weight)
        ctx.constants = A, B, scale, compute, merge
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, d, b, weight = ctx.saved_tensors
        A, B, scale, compute, merge = ctx.constants
        with autocast_off(gradient):
            g = gradient.reshape(-1, gradient.shape[-1]).to(compute)
            tokens = x.reshape(-1, x.shape[-1]).to(compute)
            if merge:
                dx = g @ (weight + _delta(d, b, A, B, scale)).to(compute) if ctx.needs_input_grad[0] else None
                product = A.up((g.T @ tokens).to(d.dtype)).mul_(B.matrix(d.dtype))  # (out, rank)
                dd, db = scale * (product.T @ b), product @ (scale * d)
            else:
                low, high = _products(tokens, d, A, B, scale)
                back = B.down(g * b.to(compute))
                dd = scale * (low * back).sum(0, dtype=d.dtype)
                db = (g * high).sum(0, dtype=b.dtype)
                dx = A.down(back * (scale * d).to(compute)).addmm_(g, dense(weight, compute))
            dbias = g.sum(0) if ctx.needs_input_grad[4] else None
        return None if dx is None else dx.view_as(x).to(x.dtype), dd, db, None, dbias, None, None, None, None, None


def _delta(d: Tensor, b: Tensor, A: Map, B: Map, scale: float) -> Tensor:
    return B.times(A.matrix(d.dtype) * (scale * d)[:, None]).mul_(b[:, None])


def _products(tokens: Tensor, d: Tensor, A: Map, B: Map, scale: float) -> tuple[Tensor, Tensor]:
    """x Aᵀ (T, rank), and what B makes of it before b, (T, out)."""
    low = A.up(tokens)
    return low, B.up(low * (scale * d).to(low.dtype))
