"""Products with a ternary basis of few signs as a sparse matrix; on CPUs only, where that is faster."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from randlora.bases.dense import DenseMap

# A sparse product takes about as long as a dense one at a density of 0.2 (scripts/calibrate.py: a multiply-add of it is
# about five of a dense product's); below this it is at least 1.3 times faster.
DENSITY = 0.15


class SparseMap(NamedTuple):
    """The block of a DenseMap by its signs alone, in float32 and float64; lower precisions take the dense product."""

    dense: DenseMap

    @property
    def rows(self) -> int:
        return self.dense.rows

    @property
    def columns(self) -> int:
        return self.dense.columns

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """B itself."""
        return self.dense.matrix(dtype)

    def up(self, h: Tensor, onto: Tensor | None = None) -> Tensor:
        """h Bᵀ for h (T, columns), added to `onto` (T, rows) in place where given."""
        made = self.times(h.T).T
        return made if onto is None else onto.add_(made)

    def down(self, x: Tensor) -> Tensor:
        """x B for x (T, rows)."""
        return self.transposed_times(x.T).T

    def times(self, M: Tensor) -> Tensor:
        """B M for M (columns, m)."""
        return self.dense.times(M) if M.dtype.itemsize < 4 else self._signs(M.dtype, transposed=False) @ M

    def transposed_times(self, G: Tensor) -> Tensor:
        """Bᵀ G for G (rows, m)."""
        return self.dense.transposed_times(G) if G.dtype.itemsize < 4 else self._signs(G.dtype, transposed=True) @ G

    def multiplications(self) -> int:
        """Of a product with one vector."""
        return self._signs(torch.float32, transposed=False).values().numel()

    def _signs(self, dtype: torch.dtype, transposed: bool) -> Tensor:
        """B or Bᵀ in compressed rows; made once for each block of the basis."""
        key = (self.rows, self.columns, dtype, transposed)
        made = self.dense.basis.compressed
        if key not in made:
            block = self.matrix(dtype).T if transposed else self.matrix(dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                made[key] = block.contiguous().to_sparse_csr()
        return made[key]
