"""Dense matrices of independent entries with mean 0 and variance 1, a pure function of their name.

Distributions (RandLoRA, arXiv 2502.00987, sections 5 and 6.4):

* ``uniform``: U(-sqrt(3), sqrt(3)), the paper's choice.
* ``normal``: N(0, 1).
* ``ternary``: -1, 0, +1 with probabilities 1/s, 1 - 2/s, 1/s, times sqrt(s / 2); ``sparsity`` is s,
  2 or more (2 has no zeros, 6 has two thirds). Signs are stored as int8, a quarter of float32.

The published code divides each drawn tensor by its own standard deviation; here the variance is 1 by
construction, so that an entry does not depend on the size of the matrix around it.

The mapping from integers uses only operations that IEEE 754 rounds correctly (+ - * / sqrt), so the
bits are the same on every machine, for every NumPy and torch.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from randlora.rng import random_uint32, unit_interval

if TYPE_CHECKING:
    from randlora.bases.sparse import SparseMap

LAYOUT = 1  # part of every key: raise it when the mapping from names to numbers changes


def draw(rows: int, columns: int, *key: str | int, distribution: str = "uniform", sparsity: float = 3.0) -> Tensor:
    """A float32 (rows, columns) matrix; entry (i, j) depends on the key, the distribution, i and j alone."""
    integers = _integers(rows, columns, key)
    if distribution == "uniform":
        values = (unit_interval(integers) - 0.5) * (2.0 * math.sqrt(3.0))
    elif distribution == "normal":
        values = _normal_quantile(unit_interval(integers))
    else:
        return torch.from_numpy(_signs(integers, sparsity)).float() * math.sqrt(sparsity / 2)
    return torch.from_numpy(values.astype(np.float32))


def _integers(rows: int, columns: int, key: tuple[str | int, ...]) -> np.ndarray:
    return np.stack([random_uint32(columns, LAYOUT, *key, row=row) for row in range(rows)])


def _signs(integers: np.ndarray, sparsity: float) -> np.ndarray:
    edge = 2.0**32 / sparsity
    return (integers >= 2.0**32 - edge).astype(np.int8) - (integers < edge).astype(np.int8)


class DenseBasis(nn.Module):
    """One fixed matrix, shared by every update that slices it; never trained, never saved.

    It is a non-persistent buffer: it moves with the model and is drawn anew from its name on load. On the
    meta device nothing is drawn.
    """

    matrix: Tensor

    def __init__(
        self,
        name: str,
        rows: int,
        columns: int,
        *,
        seed: int,
        distribution: str = "uniform",
        sparsity: float = 3.0,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.name = name
        ternary = distribution == "ternary"
        self.unit, self.density = (math.sqrt(sparsity / 2), 2 / sparsity) if ternary else (1.0, 1.0)
        if torch.device(device).type == "meta":
            matrix = torch.empty(rows, columns, dtype=torch.int8 if ternary else torch.float32, device="meta")
        elif ternary:
            matrix = torch.from_numpy(_signs(_integers(rows, columns, (name, seed)), sparsity)).to(device)
        else:
            matrix = draw(rows, columns, name, seed, distribution=distribution).to(device)
        self.register_buffer("matrix", matrix, persistent=False)
        self._cast: Tensor | None = None
        self.compressed: dict[tuple, Tensor] = {}  # see SparseMap

    def forward(self, rows: int, columns: int) -> DenseMap | SparseMap:
        """The leading (rows, columns) block as a Map."""
        from randlora.bases.sparse import DENSITY, SparseMap

        dense = DenseMap(self, rows, columns)
        if self.density > DENSITY or self.matrix.device.type != "cpu" or torch.compiler.is_compiling():
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

    def _apply(self, fn, recurse=True):
        # model.half() must not round the bases: the stored numbers stay float32, only the device follows.
        device = fn(torch.empty(0, device=self.matrix.device)).device
        self.matrix, self._cast, self.compressed = self.matrix.to(device), None, {}
        return self

    def sha256(self) -> str:
        """Of the float32 numbers, little-endian, row by row."""
        numbers = self.block(*self.matrix.shape).cpu().numpy()
        return hashlib.sha256(numbers.astype("<f4").tobytes()).hexdigest()


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


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm from + - * / alone; libm's last bit differs between machines."""
    mantissa, exponent = np.frexp(x)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = np.zeros_like(ratio)
    for odd in range(41, 0, -2):
        series = series * square + 1.0 / odd
    return 2.0 * ratio * series + exponent * 0.6931471805599453


def _normal_quantile(p: np.ndarray) -> np.ndarray:
    """The standard normal quantile, relative error 1e-7: algorithm AS 241, PPND7 (Wichura, 1988)."""
    q = p - 0.5
    r = 0.180625 - q * q
    central = (
        q
        * (((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179)
        / (((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0)
    )
    t = np.sqrt(-_log(np.minimum(p, 1.0 - p)))
    near, far = t - 1.6, t - 5.0
    middle = (((0.17023821103 * near + 1.3067284816) * near + 2.7568153900) * near + 1.4234372777) / (
        (0.12021132975 * near + 0.73700164250) * near + 1.0
    )
    outer = (((0.017337203997 * far + 0.42868294337) * far + 3.0812263860) * far + 6.6579051150) / (
        (0.012258202635 * far + 0.24197894225) * far + 1.0
    )
    tail = np.copysign(np.where(t <= 5.0, middle, outer), q)
    return np.where(np.abs(q) <= 0.425, central, tail)
