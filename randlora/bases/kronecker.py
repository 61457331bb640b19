"""Kronecker-orthogonal bases: this project's extension of RandLoRA, for speed, memory and conditioning.

In the paper B (D, N) has independent entries: a square one has a condition number of about D, and a product with B
costs D·N multiplications. Here

    B = √N · (Q1 ⊗ Q2)[:D],   N = n1·n2 with n1 ≤ n2 as equal as N's divisors allow.

Q2 (n2, n2) is orthogonal. Q1 stacks as many square orthogonal blocks O_i (n1, n1) as D needs, so that B stacks the
orthogonal matrices √N (O_i ⊗ Q2) and BᵀB = N·k·I for D = k·N. Where N does not divide D the last block is cut, its rows
stay orthogonal, and the condition number is at most √2. So B has full column rank for every D ≥ N, and entries of mean
square 1 like the dense bases. A product with one vector costs N·n2 + D·n1 multiplications instead of D·N, and the
factors have n2² + n1·D/n2 entries.

A prime N has only n1 = 1: B is then a stack of dense orthogonal matrices, as costly as dense ones and as exact.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bases.distributions import LAYOUT
from randlora.bases.orthogonal import orthogonal


class KroneckerBasis(nn.Module):
    """B for up to `rows` and exactly N = `columns`; a block of it depends on its name, the seed and N alone.

    With rows < columns it is the transpose of such a basis. Like a DenseBasis it is never trained and never saved, and
    stays float32 when the model is cast. On the meta device nothing is drawn.
    """

    left: Tensor
    right: Tensor
    reproducible = True

    def __init__(self, name: str, rows: int, columns: int, *, seed: int, device: torch.device | str = "cpu"):
        super().__init__()
        self.name, self.transposed = name, rows < columns
        large, small = max(rows, columns), min(rows, columns)
        n1, n2 = factor_pair(small)
        blocks = math.ceil(large / small)
        if torch.device(device).type == "meta":
            left, right = torch.empty(blocks * n1, n1, device="meta"), torch.empty(n2, n2, device="meta")
        else:
            key = (LAYOUT, name, seed, "kronecker", small)
            stack = [orthogonal(n1, *key, "left", i) for i in range(blocks)]
            left = (math.sqrt(n1) * torch.cat(stack)).float().to(device)
            right = (math.sqrt(n2) * orthogonal(n2, *key, "right")).float().to(device)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def forward(self, rows: int, columns: int) -> KroneckerMap | TransposedMap:
        """The leading (rows, columns) block as a Map."""
        return (
            TransposedMap(KroneckerMap(self, columns, rows)) if self.transposed else KroneckerMap(self, rows, columns)
        )

    def _apply(self, fn, recurse=True):
        device = fn(torch.empty(0, device=self.left.device)).device
        self.left, self.right = self.left.to(device), self.right.to(device)
        return self

    def sha256(self) -> str:
        """Of the factors' float32 entries, little-endian, row by row, the left one first."""
        entries = [factor.cpu().numpy().astype("<f4").tobytes() for factor in (self.left, self.right)]
        return hashlib.sha256(b"".join(entries)).hexdigest()


class KroneckerMap(NamedTuple):
    """The leading block B (rows, columns) of left (m1, n1) ⊗ right (n2, n2), never formed.

    Products are taken in the operand's dtype.
    """

    basis: KroneckerBasis
    rows: int
    columns: int

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """left, no taller than `rows` needs, and right."""
        left, right = self.basis.left, self.basis.right
        return left[: math.ceil(self.rows / len(right))].to(dtype), right.to(dtype)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """B itself."""
        return torch.kron(*self.factors(dtype))[: self.rows, : self.columns]

    def up(self, h: Tensor, onto: Tensor | None = None) -> Tensor:
        """h Bᵀ for h (T, columns), added to `onto` (T, rows) in place where given."""
        left, right = self.factors(h.dtype)
        (m1, n1), n2 = left.shape, len(right)
        h = (_padded(h, n1 * n2).reshape(-1, n2) @ right.T).view(-1, n1, n2)
        left = left.expand(len(h), m1, n1)
        if onto is not None and onto.dtype == h.dtype and self.rows == m1 * n2:
            onto.view(-1, m1, n2).baddbmm_(left, h)
            return onto
        product = torch.bmm(left, h).view(-1, m1 * n2)[:, : self.rows]
        return product if onto is None else onto.add_(product)

    def down(self, x: Tensor) -> Tensor:
        """x B for x (T, rows)."""
        left, right = self.factors(x.dtype)
        (m1, n1), n2 = left.shape, len(right)
        x = _padded(x, m1 * n2).reshape(-1, m1, n2)
        x = torch.bmm(left.T.expand(len(x), n1, m1), x)
        return (x.view(-1, n2) @ right).view(-1, n1 * n2)[:, : self.columns]

    def times(self, M: Tensor) -> Tensor:
        """B M for M (columns, m)."""
        left, right = self.factors(M.dtype)
        n1, n2, m = left.shape[1], len(right), M.shape[1]
        M = torch.matmul(right, _padded_below(M, n1 * n2).view(n1, n2, m))
        return (left @ M.view(n1, n2 * m)).view(-1, m)[: self.rows]

    def transposed_times(self, G: Tensor) -> Tensor:
        """Bᵀ G for G (rows, m)."""
        left, right = self.factors(G.dtype)
        (m1, n1), n2, m = left.shape, len(right), G.shape[1]
        G = (left.T @ _padded_below(G, m1 * n2).reshape(m1, n2 * m)).view(n1, n2, m)
        return torch.matmul(right.T, G).view(-1, m)[: self.columns]

    def multiplications(self) -> int:
        """Of a product with one vector."""
        (m1, n1), n2 = self.factors(torch.float32)[0].shape, len(self.basis.right)
        return n1 * n2 * n2 + m1 * n1 * n2


class TransposedMap(NamedTuple):
    """The transpose of a map."""

    of: KroneckerMap

    @property
    def rows(self) -> int:
        return self.of.columns

    @property
    def columns(self) -> int:
        return self.of.rows

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """B itself."""
        return self.of.matrix(dtype).T

    def up(self, h: Tensor, onto: Tensor | None = None) -> Tensor:
        """h Bᵀ for h (T, columns), added to `onto` (T, rows) in place where given."""
        product = self.of.down(h)
        return product if onto is None else onto.add_(product)

    def down(self, x: Tensor) -> Tensor:
        """x B for x (T, rows)."""
        return self.of.up(x)

    def times(self, M: Tensor) -> Tensor:
        """B M for M (columns, m)."""
        return self.of.transposed_times(M)

    def transposed_times(self, G: Tensor) -> Tensor:
        """Bᵀ G for G (rows, m)."""
        return self.of.times(G)

    def multiplications(self) -> int:
        """Of a product with one vector."""
        return self.of.multiplications()


def factor_pair(size: int) -> tuple[int, int]:
    """(n1, n2) with n1·n2 = size, n1 ≤ n2, as equal as the divisors allow."""
    n1 = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return n1, size // n1


def _padded(rows: Tensor, width: int) -> Tensor:
    """(T, less) with zeros up to (T, width); itself where nothing is missing."""
    return F.pad(rows, (0, width - rows.shape[1])) if rows.shape[1] < width else rows


def _padded_below(columns: Tensor, height: int) -> Tensor:
    """(less, m) with zeros up to (height, m); itself where nothing is missing."""
    return F.pad(columns, (0, 0, 0, height - len(columns))) if len(columns) < height else columns
