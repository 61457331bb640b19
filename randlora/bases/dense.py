"""Dense fixed matrices, and products with their leading blocks, by sparse products where signs are few."""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from randlora.bases.distributions import draw, signs

# A sparse product takes about as long as a dense one at a density of 0.2 (scripts/calibrate.py: a multiply-add of it is
# about five of a dense product's); below this it is at least 1.3 times faster.
SPARSE_DENSITY = 0.15


class DenseBasis(nn.Module):
    """One fixed matrix, shared by every update that slices it; never trained, never saved.

    It is a non-persistent buffer: it moves with the model and is drawn anew from its name on load.

    Args:
        name: what the matrix is drawn from, beside the seed; files name its checksum by it.
        matrix: (rows, columns), float32, or the int8 signs of a ternary matrix.
        unit: what the stored entries are multiplied by.
        density: the share of entries that are not zero.
        reproducible: False for a matrix that came from a file, which no seed gives again.
    """

    matrix: Tensor

    def __init__(
        self, name: str, matrix: Tensor, *, unit: float = 1.0, density: float = 1.0, reproducible: bool = True
    ):
        super().__init__()
        self.name, self.unit, self.density, self.reproducible = name, unit, density, reproducible
        self.register_buffer("matrix", matrix.contiguous(), persistent=False)
        self._cast: Tensor | None = None
        self._compressed: dict[tuple[int, int, torch.dtype, bool], Tensor] = {}

    @classmethod
    def drawn(
        cls,
        name: str,
        rows: int,
        columns: int,
        *,
        seed: int,
        distribution: str = "uniform",
        sparsity: float = 3.0,
        device: torch.device | str = "cpu",
    ) -> DenseBasis:
        """The matrix `name` of a seed, rows × columns; see `randlora.bases.distributions`.

        Args:
            name: With the seed, the key of its random numbers.
            rows, columns: Its size; a smaller matrix of the same key is its leading block.
            seed: The run's.
            distribution: ``uniform``, ``normal`` or ``ternary``.
            sparsity: s of ``ternary``: an entry is 0 with probability 1 - 2/s.
            device: Where it is kept; on ``meta`` nothing is drawn.
        """
        ternary, meta = distribution == "ternary", torch.device(device).type == "meta"
        if meta:
            matrix = torch.empty(rows, columns, dtype=torch.int8 if ternary else torch.float32, device="meta")
        elif ternary:
            matrix = signs(rows, columns, name, seed, sparsity=sparsity).to(device)
        else:
            matrix = draw(rows, columns, name, seed, distribution=distribution).to(device)
        unit, density = (math.sqrt(sparsity / 2), 2 / sparsity) if ternary else (1.0, 1.0)
        return cls(name, matrix, unit=unit, density=density)

    def forward(self, rows: int, columns: int) -> DenseMap | SparseMap:
        """The leading (rows, columns) block as a Map."""
        dense = DenseMap(self, rows, columns)
        if self.density > SPARSE_DENSITY or self.matrix.device.type != "cpu" or torch.compiler.is_compiling():
            return dense
        return SparseMap(dense)

    def block(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The leading (rows, columns) block in `dtype`: a view, unless signs are stored.

        Of floating matrices the last precision beside float32 that was asked for is kept.
        """
        matrix = self.matrix
        if matrix.dtype == torch.int8:
            return matrix[:rows, :columns] * torch.tensor(self.unit, dtype=dtype)  # one pass, in dtype
        if dtype != matrix.dtype:
            if self._cast is None or self._cast.dtype != dtype or self._cast.device != matrix.device:
                self._cast = matrix.to(dtype)
            matrix = self._cast
        return matrix[:rows, :columns]

    def compressed(self, rows: int, columns: int, dtype: torch.dtype, transposed: bool) -> Tensor:
        """The leading (rows, columns) block in `dtype`, or its transpose, in compressed rows; built once for each."""
        key = (rows, columns, dtype, transposed)
        if key not in self._compressed:
            block = self.block(rows, columns, dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                self._compressed[key] = (block.T if transposed else block).contiguous().to_sparse_csr()
        return self._compressed[key]

    def _apply(self, fn, recurse=True):
        # model.half() must not round the bases: the stored entries stay float32, only the device follows.
        device = fn(torch.empty(0, device=self.matrix.device)).device
        self.matrix, self._cast, self._compressed = self.matrix.to(device), None, {}
        return self

    def sha256(self) -> str:
        """Of the float32 entries, little-endian, row by row."""
        entries = self.block(*self.matrix.shape).cpu().numpy()
        return hashlib.sha256(entries.astype("<f4").tobytes()).hexdigest()


class DenseMap(NamedTuple):
    """The leading block B (rows, columns) of a basis; products are taken in the operand's dtype."""

    basis: DenseBasis
    rows: int
    columns: int

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """B itself."""
        return self.basis.block(self.rows, self.columns, dtype)

    def up(self, h: Tensor, onto: Tensor | None = None) -> Tensor:
        """h Bᵀ for h (T, columns), added to `onto` (T, rows) in place where given."""
        B = self.matrix(h.dtype)
        if onto is None:
            return h @ B.T
        return onto.addmm_(h, B.T) if onto.dtype == h.dtype else onto.add_(h @ B.T)

    def down(self, x: Tensor) -> Tensor:
        """x B for x (T, rows)."""
        return x @ self.matrix(x.dtype)

    def times(self, M: Tensor) -> Tensor:
        """B M for M (columns, m)."""
        return self.matrix(M.dtype) @ M

    def transposed_times(self, G: Tensor) -> Tensor:
        """Bᵀ G for G (rows, m)."""
        return self.matrix(G.dtype).T @ G

    def multiplications(self) -> int:
        """Of a product with one vector."""
        return self.rows * self.columns


class SparseMap(NamedTuple):
    """The same block by its signs alone, in float32 and float64; lower precisions take the dense product.

    On CPUs only: elsewhere the dense product is faster.
    """

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
        product = self.times(h.T).T
        return product if onto is None else onto.add_(product)

    def down(self, x: Tensor) -> Tensor:
        """x B for x (T, rows)."""
        return self.transposed_times(x.T).T

    def times(self, M: Tensor) -> Tensor:
        """B M for M (columns, m)."""
        return self.dense.times(M) if M.dtype.itemsize < 4 else self._compressed(M.dtype, transposed=False) @ M

    def transposed_times(self, G: Tensor) -> Tensor:
        """Bᵀ G for G (rows, m)."""
        if G.dtype.itemsize < 4:
            return self.dense.transposed_times(G)
        return self._compressed(G.dtype, transposed=True) @ G

    def multiplications(self) -> int:
        """Of a product with one vector."""
        return self._compressed(torch.float32, transposed=False).values().numel()

    def _compressed(self, dtype: torch.dtype, transposed: bool) -> Tensor:
        return self.dense.basis.compressed(self.rows, self.columns, dtype, transposed)
