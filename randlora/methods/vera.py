"""VeRA: trained vectors between two frozen matrices that all sites share (Kopiczko et al., 2023, arXiv 2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.adapters.quantization import dense
from randlora.bases import PEFT, Basis, BasisName, DenseMap, Map, Sparsity, check_sparsity
from randlora.bases.peft import vera_bases
from randlora.bounds import Count, Positive, Share
from randlora.methods.common import (
    COSTS,
    autocast_off,
    compute_dtype,
    linear,
    may_form_weight,
    relative_cost,
    sharing,
)


@dataclass(frozen=True)
class VeRA(Method):
    """ΔW = diag(b) B diag(d) A with A (rank × in) and B (out × rank) fixed: rank + out trained parameters a site.

    A and B are leading blocks of one pair that all sites share, with the variance of the authors' Kaiming
    initialisation (2 / in and 2 / rank) for the site's own width. d starts at `d_initial`, b at zero.
    With ``basis=peft`` they are PEFT's own, whose variance is that of the widest site. The published RandLoRA code
    puts b on the input side of some layers; here it is on the output, as in VeRA.
    """

    rank: Count = 256
    d_initial: Positive = 0.1
    dropout: Share = 0.0
    basis: BasisName | Literal["peft"] = "uniform"
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.basis, self.sparsity)

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        pairs = self._bases(sites, context)
        return {site.name: VeRAUpdate(self, site, *pairs[site.name], context.device) for site in sites}

    def _bases(self, sites: Sequence[Site], context: Context) -> Mapping[str, tuple[Basis, Basis]]:
        """A and B by site."""
        if self.basis == PEFT:
            return vera_bases({site.name: site.shape for site in sites}, self.rank, context.seed, context.device)
        pairs: dict[str, tuple[Basis, Basis]] = {}
        for group in sharing(sites, self.basis, lambda site: site.shape):
            widest, tallest = max(site.in_features for site in group), max(site.out_features for site in group)
            small = min(widest, tallest)
            A = context.draw(self.basis, "vera.A", self.rank, widest, self.sparsity, small)
            B = context.draw(self.basis, "vera.B", tallest, self.rank, self.sparsity, small)
            pairs |= {site.name: (A, B) for site in group}
        return pairs


class VeRAUpdate(Update):
    """The update of one site."""

    def __init__(self, method: VeRA, site: Site, A: Basis, B: Basis, device: torch.device):
        super().__init__()
        self.rank, self.dropout = method.rank, method.dropout
        self.basis_A, self.basis_B = A, B
        # PEFT's matrices have the scale of the widest site in them.
        self.scale = 1.0 if method.basis == PEFT else math.sqrt(2 / site.in_features) * math.sqrt(2 / method.rank)
        self.d = nn.Parameter(torch.full((method.rank,), method.d_initial, device=device))
        self.b = nn.Parameter(torch.zeros(site.out_features, device=device))

    def fixed(self, weight: Tensor) -> Fixed:
        """A (rank, in) and B (out, rank): this site's blocks of the shared matrices; and the scale."""
        out_features, in_features = weight.shape
        return Fixed(self.basis_A(self.rank, in_features), self.basis_B(out_features, self.rank), self.scale)

    def delta(self, weight: Tensor) -> Tensor:
        return self.fixed(weight).delta(self.d, self.b)

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        fixed, compute = self.fixed(base.weight), compute_dtype(x)
        dropping = self.training and self.dropout > 0
        tokens = x.numel() // x.shape[-1]
        merge = may_form_weight(base.weight) and merging_pays(tokens, fixed, compute, x.device.type)
        if not dropping and (merge or not isinstance(fixed.A, DenseMap)):
            return VeRALinear.apply(x, self.d, self.b, base.weight, base.bias, fixed, compute, merge)
        dropped = F.dropout(x, self.dropout, self.training).reshape(-1, x.shape[-1]).to(compute)
        y = base(x)
        return torch.addcmul(y, fixed.products(dropped, self.d)[1].view_as(y), self.b.to(y.dtype))


class Fixed(NamedTuple):
    """What a site's update does not train: A (rank, in), B (out, rank), and the scale s."""

    A: Map
    B: Map
    scale: float

    def delta(self, d: Tensor, b: Tensor) -> Tensor:
        """ΔW = s diag(b) B diag(d) A, (out, in)."""
        return self.B.times(self.A.matrix(d.dtype) * (self.scale * d)[:, None]).mul_(b[:, None])

    def products(self, tokens: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """x Aᵀ (T, rank), and what B makes of it before b, (T, out)."""
        low = self.A.up(tokens)
        return low, self.B.up(low * (self.scale * d).to(low.dtype))


def merging_pays(tokens: int, fixed: Fixed, compute: torch.dtype, device_type: str) -> bool:
    """Whether forming W' (twice) is cheaper than products with the tokens, by the counts of `kernels.choose_plan`.

    Args:
        tokens: Input vectors of the layer, over the whole batch.
        fixed: A (rank, in), B (out, rank) and the scale.
        compute: The dtype of products with tokens.
        device_type: Whose constants are used, such as ``cpu``.
    """
    rate = COSTS.get(device_type, COSTS["cpu"])
    low = rate["low_precision"] if compute.itemsize < 4 else 1.0
    A, B = fixed.A, fixed.B
    cost_A, cost_B = relative_cost(A, rate) * A.multiplications(), relative_cost(B, rate) * B.multiplications()
    out_features, in_features = B.rows, A.columns
    by_token = tokens * low * (2 if isinstance(A, DenseMap) else 3) * (cost_A + cost_B)
    weight = in_features * out_features
    merged = 2 * in_features * cost_B + out_features * cost_A + tokens * weight * low + 8 * weight * rate["elementwise"]
    return merged < by_token


class VeRALinear(torch.autograd.Function):
    """x W'ᵀ + bias with W' = W0 + s diag(b) B diag(d) A, keeping x alone for backward.

    With `merge`, W' is formed twice. Otherwise the products of the tokens with A and B are taken again in backward,
    which is cheap where these are Kronecker products. Products with tokens run in `compute`.
    """

    @staticmethod
    def forward(ctx, x, d, b, weight, bias, fixed: Fixed, compute: torch.dtype, merge: bool):
        with autocast_off(x):
            tokens = x.reshape(-1, x.shape[-1]).to(compute)
            if merge:
                y = linear(tokens, weight + fixed.delta(d, b), bias)
            else:
                y = linear(tokens, weight, bias).addcmul_(fixed.products(tokens, d)[1], b.to(compute))
        ctx.save_for_backward(x, d, b, weight)
        ctx.constants = fixed, compute, merge
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, d, b, weight = ctx.saved_tensors
        fixed, compute, merge = ctx.constants
        A, B, scale = fixed
        with autocast_off(gradient):
            g = gradient.reshape(-1, gradient.shape[-1]).to(compute)
            tokens = x.reshape(-1, x.shape[-1]).to(compute)
            if merge:
                dx = g @ (weight + fixed.delta(d, b)).to(compute) if ctx.needs_input_grad[0] else None
                product = A.up((g.T @ tokens).to(d.dtype)).mul_(B.matrix(d.dtype))  # (out, rank)
                dd, db = scale * (product.T @ b), product @ (scale * d)
            else:
                low, high = fixed.products(tokens, d)
                back = B.down(g * b.to(compute))
                dd = scale * (low * back).sum(0, dtype=d.dtype)
                db = (g * high).sum(0, dtype=b.dtype)
                dx = A.down(back * (scale * d).to(compute)).addmm_(g, dense(weight, compute))
            dbias = g.sum(0) if ctx.needs_input_grad[4] else None
        return None if dx is None else dx.view_as(x).to(x.dtype), dd, db, None, dbias, None, None, None
