"""The exact ways to compute x (W0 + ΔW)ᵀ + b for RandLoRA's ΔW = B M, and the choice between them.

Shapes: T tokens, D and d the larger and smaller side of W0, n bases of rank r, N = n·r. B (D, N) and A (r, d) are
fixed; λ (n, r) and γ (n, d) are trained; the factor M (N, d) stacks s Λ_j A Γ_j, the scale s in it. For out ≥ in (tall)
ΔW = B M; for out < in (wide) ΔW = Mᵀ Bᵀ. B is a Map: a dense matrix, or Kronecker factors.

Each of a step's three products is taken through the weight or through the tokens:

| product | weight | tokens |
|---|---|---|
| output | x W'ᵀ with W' = W0 + ΔW | x W0ᵀ, and x through M and B |
| input gradient | g W' | g W0, and g through B and M |
| gradient of M | Bᵀ (gᵀ x) | (g B)ᵀ x, for wide (x B)ᵀ g |

All tokens is the activation form of the paper and of PEFT, all weight the materialised form; output and input gradient
through the weight and M's through the tokens is the merged-forward form. Autograd would keep M, and W' where it is
formed, for every site. Here x (h = x B where that is smaller), λ and γ are kept, and M is built again in backward by
two elementwise passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from randlora.adapters.quantization import dense
from randlora.bases import Map
from randlora.methods.common import COSTS, autocast_off, linear, relative_cost

WEIGHT, TOKENS = "weight", "tokens"


class ExecutionPlan(NamedTuple):
    """How one call computes: the way of each product, the dtype of tokens, and that of what makes up ΔW."""

    output: str
    input_gradient: str
    gradient: str
    compute: torch.dtype
    delta: torch.dtype

    @property
    def forms_weight(self) -> bool:
        """Whether W' is needed at all."""
        return WEIGHT in (self.output, self.input_gradient)

    @property
    def token(self) -> torch.dtype:
        """The dtype of ΔW's products with tokens: the less precise of the two."""
        return min(self.compute, self.delta, key=lambda dtype: dtype.itemsize)


def choose_plan(
    tokens: int, shape: Sequence[int], B: Map, compute: torch.dtype, delta: torch.dtype, device_type: str, kept: bool
) -> ExecutionPlan:
    """The plan that costs least for this many tokens, forward and backward, beyond the frozen (out, in) layer's own.

    Costs are in multiply-adds of a float32 matrix product. A product of T tokens with M is T·N·d, with B T·c where c
    is B's for one vector; W' takes d·c and passes over its D·d entries. A product that serves twice counts once, and
    so does W' where it is `kept` between forward and backward. The constants of a class of device say how much
    more small products (of Kronecker factors) and sparse ones cost, how much less low precision, and what a pass costs.

    Args:
        tokens: Input vectors of the layer, over the whole batch.
        shape: (out, in) of the frozen matrix.
        B: The fixed (D, N) matrix, as a map.
        compute: The dtype of products with tokens.
        delta: The dtype of the products that make up ΔW.
        device_type: Whose constants are used, such as ``cpu``.
        kept: Whether W' is kept from forward to backward, and over micro-batches.
    """
    rate, tall, small = COSTS.get(device_type, COSTS["cpu"]), shape[0] >= shape[1], min(shape)
    by_weight = rate["low_precision"] if delta.itemsize < 4 else 1.0
    by_token = rate["low_precision"] if min(compute.itemsize, delta.itemsize) < 4 else 1.0
    c = relative_cost(B, rate) * B.multiplications()
    with_M, with_B = tokens * B.columns * small * by_token, tokens * c * by_token
    through_B = small * c * by_weight
    build = through_B + 2 * shape[0] * shape[1] * rate["elementwise"]

    def cost(plan: ExecutionPlan) -> float:
        output, input_gradient, gradient = plan.output, plan.input_gradient, plan.gradient
        # g B (tall) or x B (wide) serves the gradient of M and one of the other products.
        sharing, other = (input_gradient, output) if tall else (output, input_gradient)
        products = ((output, input_gradient, gradient).count(TOKENS)) * with_M
        products += ((TOKENS in (sharing, gradient)) + (other == TOKENS)) * with_B
        if gradient == WEIGHT:
            products += tokens * shape[0] * shape[1] * by_token + through_B
        builds = (output, input_gradient).count(WEIGHT)
        return products + (min(builds, 1) if kept else builds) * build

    best, *others = (
        ExecutionPlan(output, input_gradient, gradient, compute, delta)
        for output, input_gradient, gradient in itertools.product((TOKENS, WEIGHT), repeat=3)
    )
    for plan in others:  # and not min(): torch.compile cannot follow that where the number of tokens varies
        best = plan if cost(plan) < cost(best) else best
    return best


class Fixed(NamedTuple):
    """What a site's update does not train: A (r, d), as precise as λ, B (D, N), and the scale s.

    `tall` is out ≥ in, where ΔW = B M; else ΔW = Mᵀ Bᵀ.
    """

    A: Tensor
    B: Map
    scale: float
    tall: bool

    def factor(self, lambda_: Tensor, gamma: Tensor) -> Tensor:
        """M (N, d): row j·r + k is s · λ_jk · A_k ⊙ γ_j, as far as B has columns."""
        M = gamma[:, None, :] * self.A
        return M.mul_((self.scale * lambda_)[:, :, None]).flatten(0, 1)[: self.B.columns]

    def gradients(self, dM: Tensor, lambda_: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """∂λ (n, r) and ∂γ (n, d) from ∂M, which is overwritten."""
        n, r = lambda_.shape
        dM = dM.to(lambda_.dtype)
        if len(dM) < n * r:  # the rows that B has no columns for
            dM = torch.cat([dM, dM.new_zeros(n * r - len(dM), dM.shape[1])])
        product = dM.view(n, r, -1).mul_(self.scale * self.A)
        return torch.bmm(product, gamma[:, :, None]).squeeze(2), torch.bmm(lambda_[:, None, :], product).squeeze(1)

    def delta(self, lambda_: Tensor, gamma: Tensor) -> Tensor:
        """ΔW (out, in)."""
        delta = self.B.times(self.factor(lambda_, gamma))
        return delta if self.tall else delta.T


def prepare(lambda_: Tensor, gamma: Tensor, weight: Tensor | None, fixed: Fixed, plan: ExecutionPlan) -> Tensor:
    """W' (out, in) in the tokens' dtype where the plan needs it, else M (N, d).

    Args:
        lambda_: λ (n, rank).
        gamma: γ (n, d).
        weight: W0 (out, in); None where the update stands alone, on a dropped input.
        fixed: A, B and the scale.
        plan: How to compute.
    """
    M = fixed.factor(lambda_, gamma)
    if weight is None or not plan.forms_weight:
        return M.to(plan.token)
    M = M.to(plan.delta)
    if fixed.tall:
        return torch.add(weight, fixed.B.times(M)).to(plan.compute)
    return fixed.B.up(M.T, onto=weight.clone(memory_format=torch.contiguous_format)).to(plan.compute)


class UpdatedLinear(torch.autograd.Function):
    """x W'ᵀ + b, with gradients for x, λ, γ and b; A, λ and γ have one dtype.

    Args:
        x: (..., in).
        lambda_, gamma: (n, r) and (n, d).
        weight: W0 (out, in), or None for x ΔWᵀ alone, through the tokens.
        bias: (out,) or None.
        ready: what `prepare` gives for the plan, or None to form it when it is needed.
        fixed, plan: what is not trained, and how to compute.
    """

    @staticmethod
    def forward(ctx, x, lambda_, gamma, weight, bias, ready, fixed: Fixed, plan: ExecutionPlan):
        operands = _Operands(lambda_, gamma, weight, ready, fixed, plan)
        B, tall, low = fixed.B, fixed.tall, None
        with autocast_off(x):
            tokens = x.reshape(-1, x.shape[-1]).to(plan.compute)
            if not tall and TOKENS in (plan.output, plan.gradient):
                low = B.down(tokens.to(plan.token))
            if plan.output == WEIGHT:
                y = linear(tokens, operands.updated_weight(), bias)
            else:
                start = None if weight is None else linear(tokens, weight, bias)
                M = operands.factor()
                y = B.up(tokens.to(plan.token) @ M.T, onto=start) if tall else _plus_product(start, low, M)
        kept = low if plan.gradient == TOKENS and not tall else x
        ctx.save_for_backward(kept, lambda_, gamma, weight, ready)
        ctx.constants = fixed, plan, x.shape, x.dtype
        return y.to(plan.compute).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        kept, lambda_, gamma, weight, ready = ctx.saved_tensors
        fixed, plan, shape, dtype = ctx.constants
        operands = _Operands(lambda_, gamma, weight, ready, fixed, plan)
        B, tall = fixed.B, fixed.tall
        dx = dlambda = dgamma = dbias = low = None
        with autocast_off(gradient):
            g = gradient.reshape(-1, gradient.shape[-1]).to(plan.compute)
            g_token = g.to(plan.token)
            if tall and TOKENS in (plan.input_gradient, plan.gradient):
                low = B.down(g_token)
            if ctx.needs_input_grad[0]:
                if plan.input_gradient == WEIGHT:
                    dx = g @ operands.updated_weight()
                else:
                    start = None if weight is None else g @ dense(weight, g.dtype)
                    M = operands.factor()
                    dx = _plus_product(start, low, M) if tall else B.up(g_token @ M.T, onto=start)
                dx = dx.to(dtype).view(shape)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                kept = kept.reshape(-1, kept.shape[-1]).to(plan.token)
                if plan.gradient == WEIGHT:
                    dM = B.transposed_times(g_token.T @ kept if tall else kept.T @ g_token)
                else:
                    dM = low.T @ kept if tall else kept.T @ g_token
                dlambda, dgamma = fixed.gradients(dM, lambda_, gamma)
            if ctx.needs_input_grad[4]:
                dbias = g.sum(0)
        return dx, dlambda, dgamma, None, dbias, None, None, None


class _Operands(NamedTuple):
    """M and W' as one pass, forward or backward, needs them."""

    lambda_: Tensor
    gamma: Tensor
    base: Tensor | None
    ready: Tensor | None
    fixed: Fixed
    plan: ExecutionPlan

    def updated_weight(self) -> Tensor:
        """W' (out, in)."""
        if self.ready is not None:
            return self.ready
        return prepare(self.lambda_, self.gamma, self.base, self.fixed, self.plan)

    def factor(self) -> Tensor:
        """M (N, d)."""
        if self.ready is not None and not self.plan.forms_weight:
            return self.ready
        return self.fixed.factor(self.lambda_, self.gamma).to(self.plan.token)


def _plus_product(onto: Tensor | None, a: Tensor | None, b: Tensor) -> Tensor:
    """a b, added to `onto` in place where given."""
    assert a is not None  # x B or g B, taken wherever a product goes through the tokens
    if onto is None:
        return a @ b
    return onto.addmm_(a, b) if onto.dtype == b.dtype else onto.add_(a @ b)
