"""The bases that a method can be given by name."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Protocol

import torch
from annotated_types import Ge
from torch import Tensor

from randlora.bases.dense import DenseBasis
from randlora.bases.kronecker import KroneckerBasis
from randlora.errors import SettingsError

# The names of ternary bases and their s: binary has no zeros, PEFT calls 3 sparse, very_sparse follows the site's size.
TERNARY = {"ternary": 3.0, "sparse": 3.0, "binary": 2.0, "very_sparse": None}
BasisName = Literal["uniform", "normal", "ternary", "sparse", "binary", "very_sparse", "kronecker"]
Sparsity = Annotated[float, Ge(2)]  # s: a share 1 / s of the entries is not zero; 2 has no zeros
PEFT = "peft"  # of the two methods whose matrices PEFT draws; see randlora.bases.peft

Basis = DenseBasis | KroneckerBasis


class Map(Protocol):
    """A fixed matrix B (rows, columns) as what can be done with it, in the operand's dtype."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    def up(self, h: Tensor, onto: Tensor | None = None) -> Tensor:
        """h Bᵀ for h (T, columns), added to `onto` (T, rows) in place where given."""

    def down(self, x: Tensor) -> Tensor:
        """x B for x (T, rows)."""

    def times(self, M: Tensor) -> Tensor:
        """B M for M (columns, m)."""

    def transposed_times(self, G: Tensor) -> Tensor:
        """Bᵀ G for G (rows, m)."""

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """B itself."""

    def multiplications(self) -> int:
        """Of a product with one vector."""


def check_sparsity(basis: str, sparsity: float | None) -> None:
    """Raises SettingsError for a sparsity that does not go with the basis."""
    if sparsity is not None and basis not in ("ternary", "sparse"):
        raise SettingsError(f"sparsity={sparsity!r} goes with basis=ternary or sparse, not with basis={basis}")


def depends_on_size(basis: str) -> bool:
    """Whether the entries depend on the size of the site, so that only sites of one size can share a matrix."""
    return basis in ("very_sparse", "kronecker")


def draw_basis(
    basis: str,
    name: str,
    rows: int,
    columns: int,
    sparsity: float | None = None,
    size: int | None = None,
    *,
    seed: int,
    device: torch.device,
) -> Basis:
    """A fixed (rows, columns) matrix.

    Args:
        basis: a `BasisName`.
        name: what the matrix is drawn from, beside the seed.
        rows, columns: enough for the largest of the sites that share it.
        sparsity: s of ternary and sparse; None for their default.
        size: the smaller side of the sites, whose root is the s of very_sparse; None for that of the matrix.
        seed: the run's.
        device: where the matrix lies; on meta it has no entries.
    """
    if basis == "kronecker":
        return KroneckerBasis(name, rows, columns, seed=seed, device=device)
    if basis not in TERNARY:
        return DenseBasis.drawn(name, rows, columns, seed=seed, distribution=basis, device=device)
    s = sparsity or TERNARY[basis] or max(2.0, math.sqrt(min(rows, columns) if size is None else size))
    return DenseBasis.drawn(name, rows, columns, seed=seed, distribution="ternary", sparsity=s, device=device)
