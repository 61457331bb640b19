"""The nearest update of a method to a given one: normal equations where it is linear in each half of its parameters.

Every other method is fitted by L-BFGS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from randlora.adapters.interface import Update
from randlora.bounds import Bounded, Count, CountOrZero, Positive, Seed
from randlora.methods.nola import NoLAUpdate
from randlora.methods.randlora import RandLoRAUpdate
from randlora.methods.randlora_a import RandLoRAaUpdate
from randlora.methods.vera import VeRAUpdate

UNKNOWNS = 5000  # of normal equations; for more of them L-BFGS is used


@dataclass(frozen=True)
class Fit(Bounded):
    """How closely is fitted.

    Args:
        tolerance: A fit has settled when a round lowers its squared error by less than this share of it.
        rounds: The most of them; a round solves for both sets of parameters, or is twenty steps of L-BFGS.
        restarts: Further starts; the best of all counts.
        seed: Of the starts, and of the methods' fixed matrices.
    """

    tolerance: Positive = 1e-5
    rounds: Count = 300
    restarts: CountOrZero = 1
    seed: Seed = 0


class Fitted(NamedTuple):
    """The nearest that was found.

    Args:
        delta: The update, float64 (out, in).
        rounds: It took so many; 0 where the nearest is known.
        settled: Whether it got to the tolerance within the rounds.
    """

    delta: Tensor
    rounds: int
    settled: bool


Solver = Callable[[Fit, torch.Generator], Fitted]


def solver(update: Update, weight: Tensor, target: Tensor) -> Solver:
    """What finds the nearest of an update to `target`, from a random start at every call.

    Args:
        update: Whose parameters are fitted.
        weight: W0, (out, in).
        target: Of norm 1, float64 (out, in).
    """
    pair = _pair(update, target)
    if pair is None or pair.unknowns > UNKNOWNS:
        return _descent(update, weight, target)
    return lambda fit, generator: _alternate(pair, target, fit, generator)


def _pair(update: Update, target: Tensor) -> _Pair | None:
    """The two sets of parameters of an update that is linear in each; None of all others."""
    if isinstance(update, RandLoRAUpdate):
        return _RandLoRA(update, target)
    if isinstance(update, RandLoRAaUpdate):
        return _RandLoRAa(update, target)
    if isinstance(update, NoLAUpdate):
        return _NoLA(update, target)
    if isinstance(update, VeRAUpdate):
        return _VeRA(update, target)
    return None


class _Pair(ABC):
    """An update whose parameters are x and y, linear in each.

    Attributes:
        unknowns: The largest number that is solved for at once.
    """

    unknowns: int

    @abstractmethod
    def start(self, generator: torch.Generator) -> Tensor:
        """A random x."""

    @abstractmethod
    def second(self, x: Tensor) -> Tensor:
        """The best y for an x."""

    @abstractmethod
    def first(self, y: Tensor) -> Tensor:
        """The best x for a y."""

    @abstractmethod
    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """The update, (out, in)."""


def _alternate(pair: _Pair, target: Tensor, fit: Fit, generator: torch.Generator) -> Fitted:
    x = pair.start(generator)
    before = target.square().sum().item()
    for number in range(1, fit.rounds + 1):
        y = pair.second(x)
        x = pair.first(y)
        delta = pair.delta(x, y)
        error = (delta - target).square().sum().item()
        if before - error <= fit.tolerance * error + 1e-14:
            return Fitted(delta, number, True)
        before = error
    return Fitted(delta, number, False)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Normal equations (…, n, n) with (…, n), and a trace on the diagonal for unknowns that are not told apart."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    small = 1e-11 * diagonal.mean(-1, keepdim=True) + 1e-300
    return torch.linalg.solve(matrix + torch.diag_embed(small.expand_as(diagonal)), right)


class _RandLoRA(_Pair):
    """s Σ_j B_j diag(λ_j) A diag(γ_j): x is λ (n, r), y is γ (n, d)."""

    def __init__(self, update: RandLoRAUpdate, target: Tensor):
        fixed = update.fixed()
        self.tall, self.scale = fixed.tall, fixed.scale
        self.T = target if self.tall else target.T
        self.A = fixed.A.double()
        (self.n, self.r), self.d = update.lambda_.shape, update.gamma.shape[1]
        B = fixed.B.matrix(torch.float64)
        self.B = torch.cat([B, B.new_zeros(B.shape[0], self.n * self.r - B.shape[1])], 1)
        self.grams, self.images = self.B.T @ self.B, self.B.T @ self.T
        self.unknowns = self.n * self.r

    def start(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.n, self.r, generator=generator, dtype=torch.float64)

    def second(self, x: Tensor) -> Tensor:
        """Column by column of ΔW: n unknowns each."""
        blocks, columns = self.grams.view(-1, self.n, self.r), []
        size = max(1, 2**24 // self.unknowns // self.n)
        for part, images in zip(self.A.split(size, 1), self.images.split(size, 1), strict=True):
            V = self.scale * x[None] * part.T[:, None]  # (columns, n, r)
            products = torch.einsum("npq,cpq->cnp", blocks, V).unflatten(1, (self.n, self.r))
            matrix = torch.einsum("cjk,cjkp->cjp", V, products)
            right = torch.einsum("cjk,jkc->cj", V, images.unflatten(0, (self.n, self.r)))
            columns.append(_solve(matrix, right))
        return torch.cat(columns).T

    def first(self, y: Tensor) -> Tensor:
        rows = self._rows(y)
        return _solve(self.grams * (rows @ rows.T), (self.images * rows).sum(1)).view(self.n, self.r)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        delta = self.B * x.flatten() @ self._rows(y)
        return delta if self.tall else delta.T

    def _rows(self, y: Tensor) -> Tensor:
        return self.scale * (self.A[None] * y[:, None]).flatten(0, 1)  # (n · r, d)


class _RandLoRAa(_Pair):
    """s (Σ_j B_j diag(λ_j)) (Σ_j A_j diag(γ_j)): x is the left factor's λ (n, r), y the right factor Q (r, d)."""

    def __init__(self, update: RandLoRAaUpdate, target: Tensor):
        self.tall, self.scale = update.tall, update.scale
        self.T = target if self.tall else target.T
        (n, self.r), small = update.lambda_.shape, update.gamma.shape[1]
        self.n = n
        self.A = update.basis_A(small, n * self.r).matrix(torch.float64).view(small, n, self.r)
        self.B = update.basis_B(update.large, n * self.r).matrix(torch.float64).view(update.large, n * self.r)
        self.free = n >= self.r  # then Q is any matrix
        self.grams = self.B.T @ self.B
        self.unknowns = n * self.r

    def start(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.n, self.r, generator=generator, dtype=torch.float64)

    def second(self, x: Tensor) -> Tensor:
        P = self._left(x)
        if self.free:
            return _solve(P.T @ P, P.T @ self.T)
        products = P.T @ P
        matrix = torch.einsum("djk,kl,dml->djm", self.A, products, self.A)
        gamma = _solve(matrix, torch.einsum("djk,kd->dj", self.A, P.T @ self.T))  # (d, n)
        return torch.einsum("dnr,dn->rd", self.A, gamma)

    def first(self, y: Tensor) -> Tensor:
        products = self.scale**2 * (y @ y.T)
        matrix = self.grams * products.repeat(self.n, self.n)
        right = self.scale * torch.einsum("Dnr,Dr->nr", self.B.view(-1, self.n, self.r), self.T @ y.T)
        return _solve(matrix, right.flatten()).view(self.n, self.r)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        delta = self._left(x) @ y
        return delta if self.tall else delta.T

    def _left(self, x: Tensor) -> Tensor:
        return self.scale * (self.B * x.flatten()).view(-1, self.n, self.r).sum(1)


class _NoLA(_Pair):
    """(Σ β_i B_i) (A_0 + Σ α_i A_i): x is the right factor (r, in), y the left one (out, r).

    A factor with no more entries than there are matrices in its bank is any matrix.
    """

    def __init__(self, update: NoLAUpdate, target: Tensor):
        self.T, self.r, self.n = target, update.rank, len(update.alpha)
        rows, columns = target.shape
        self.free_A, self.free_B = self.n >= self.r * columns, self.n >= self.r * rows
        if not self.free_A:
            bank = update.bank_A(self.n, self.r * columns).matrix(torch.float64)
            self.bank_A = bank.view(self.n, self.r, columns)
        if not self.free_B:
            self.bank_B = update.bank_B(self.n, self.r * rows).matrix(torch.float64).view(self.n, rows, self.r)
        self.A0 = target.new_zeros(self.r, columns)
        if update.fixed_A is not None:
            self.A0 = update.scale_A0 * update.fixed_A(self.r, columns).matrix(torch.float64)
        self.unknowns = self.n if not (self.free_A and self.free_B) else self.r

    def start(self, generator: torch.Generator) -> Tensor:
        if self.free_A:
            return torch.randn(self.A0.shape, generator=generator, dtype=torch.float64)
        alpha = torch.randn(self.n, generator=generator, dtype=torch.float64)
        return self.A0 + torch.einsum("n,nrc->rc", alpha / self.n**0.5, self.bank_A)

    def second(self, x: Tensor) -> Tensor:
        products = x @ x.T
        if self.free_B:
            return _solve(products, x @ self.T.T).T
        matrix = (self.bank_B.flatten(0, 1) @ products).view(self.n, -1) @ self.bank_B.flatten(1).T
        beta = _solve(matrix, self.bank_B.flatten(1) @ (self.T @ x.T).flatten())
        return torch.einsum("n,ndr->dr", beta, self.bank_B)

    def first(self, y: Tensor) -> Tensor:
        products = y.T @ y
        if self.free_A:
            return _solve(products, y.T @ self.T)
        matrix = (products @ self.bank_A).flatten(1) @ self.bank_A.flatten(1).T
        alpha = _solve(matrix, self.bank_A.flatten(1) @ (y.T @ (self.T - y @ self.A0)).flatten())
        return self.A0 + torch.einsum("n,nrc->rc", alpha, self.bank_A)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        return y @ x


class _VeRA(_Pair):
    """s diag(b) B diag(d) A: x is d (r), y is b (out)."""

    def __init__(self, update: VeRAUpdate, target: Tensor):
        self.T = target
        fixed = update.fixed(target)
        self.A, self.B = fixed.scale * fixed.A.matrix(torch.float64), fixed.B.matrix(torch.float64)
        self.unknowns = update.rank
        self.products = self.A @ self.A.T if self.unknowns <= UNKNOWNS else None

    def start(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.unknowns, generator=generator, dtype=torch.float64)

    def second(self, x: Tensor) -> Tensor:
        rows = self.B * x @ self.A
        return (rows * self.T).sum(1) / rows.square().sum(1).clamp_min(1e-300)

    def first(self, y: Tensor) -> Tensor:
        assert self.products is not None
        B = self.B * y[:, None]
        return _solve((B.T @ B) * self.products, torch.einsum("or,rc,oc->r", B, self.A, self.T))

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        return y[:, None] * (self.B * x @ self.A)


def _descent(update: Update, weight: Tensor, target: Tensor) -> Solver:
    """L-BFGS from the method's own start with a little noise, in float32 as updates are."""
    parameters = [parameter for parameter in update.parameters() if parameter.requires_grad]
    starts = [parameter.detach().clone() for parameter in parameters]
    weight, goal = weight.float(), target.float()

    def squares() -> Tensor:
        return (update.delta(weight) - goal).square().sum()

    def search(fit: Fit, generator: torch.Generator) -> Fitted:
        with torch.no_grad():
            for parameter, start in zip(parameters, starts, strict=True):
                parameter.copy_(start + 0.01 * torch.randn(start.shape, generator=generator))
        optimiser = torch.optim.LBFGS(
            parameters,
            max_iter=20,
            history_size=30,
            tolerance_grad=0,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = squares()
            loss.backward()
            return loss

        before, number, settled = float("inf"), 0, False
        while number < fit.rounds and not settled:
            number += 1
            optimiser.step(closure)
            error = squares().item()
            settled = before - error <= fit.tolerance * error
            before = error
        return Fitted(update.delta(weight).detach().double(), number, settled)

    return search
