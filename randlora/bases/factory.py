"""The kinds of basis that a method can be given by name."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from randlora.bases.dense import DenseBasis
from randlora.bases.kronecker import KroneckerBasis
from randlora.errors import SettingsError, check_choice

# The names of ternary bases and their s: binary has no zeros, PEFT calls 3 sparse, very_sparse follows the site's size.
TERNARY = {"ternary": 3.0, "sparse": 3.0, "binary": 2.0, "very_sparse": None}
BASES = ("uniform", "normal", *TERNARY, "kronecker")

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


def check_basis(kind: str, sparsity: float | None, and_peft: bool = False) -> None:
    """Raises SettingsError for an unknown kind or a sparsity that does not go with it."""
    check_choice("basis", kind, (*BASES, "peft") if and_peft else BASES)
    if sparsity is None:
        return
    if kind not in ("ternary", "sparse"):
        raise SettingsError(f"sparsity={sparsity!r} goes with basis=ternary or sparse, not with basis={kind}")
    if not sparsity >= 2:
        raise SettingsError(f"sparsity={sparsity!r}: must be 2 (no zeros) or more")


def depends_on_size(kind: str) -> bool:
    """Whether the entries of this kind depend on the size of the site, so that only sites of one size share them."""
    return kind in ("very_sparse", "kronecker")


def basis_of(
    kind: str, sparsity: float | None, name: str, rows: int, columns: int, size: int, seed: int, device: torch.device
) -> Basis:
    """The fixed (rows, columns) matrix `name`; `size` is what very_sparse takes the root of (s = √size)."""
    if kind == "kronecker":
        return KroneckerBasis(name, rows, columns, seed=seed, device=device)
    if kind not in TERNARY:
        return DenseBasis(name, rows, columns, seed=seed, distribution=kind, device=device)
    s = sparsity or TERNARY[kind] or max(2.0, math.sqrt(size))
    return DenseBasis(name, rows, columns, seed=seed, distribution="ternary", sparsity=s, device=device)
