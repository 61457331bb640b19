"""Dense matrices of independent entries with mean 0 and variance 1, a pure function of their name.

Distributions (RandLoRA, arXiv 2502.00987, sections 5 and 6.4):

* ``uniform``: U(-sqrt(3), sqrt(3)), the paper's choice.
* ``normal``: N(0, 1).
* ``ternary``: -1, 0, +1 with probabilities 1/s, 1 - 2/s, 1/s, times sqrt(s / 2); ``sparsity`` is s,
  2 or more (2 has no zeros, 6 has two thirds).

The published code divides each drawn tensor by its own standard deviation; here the variance is 1 by
construction, so that an entry does not depend on the size of the matrix around it.

The mapping from integers uses only operations that IEEE 754 rounds correctly (+ - * / sqrt), so the
bits are the same on every machine, for every NumPy and torch.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn

from randlora.errors import SettingsError, check_choice
from randlora.streams import unit_interval, words

DISTRIBUTIONS = ("uniform", "normal", "ternary")
LAYOUT = 1  # part of every key: raise it when the mapping from names to numbers changes


def check_distribution(distribution: str, sparsity: float | None) -> None:
    """Raises SettingsError for an unknown distribution or a sparsity that does not go with it."""
    check_choice("basis", distribution, DISTRIBUTIONS)
    if distribution != "ternary" and sparsity is not None:
        raise SettingsError(f"sparsity={sparsity!r} goes with basis=ternary, not with basis={distribution}")
    if distribution == "ternary" and sparsity is not None and not sparsity >= 2:
        raise SettingsError(f"sparsity={sparsity!r}: must be 2 (no zeros) or more")


def draw(
    rows: int, columns: int, *key: str | int, distribution: str = "uniform", sparsity: float | None = None
) -> Tensor:
    """A float32 (rows, columns) matrix; entry (i, j) depends on the key, the distribution, i and j alone."""
    integers = np.stack([words(columns, LAYOUT, *key, row=row) for row in range(rows)])
    if distribution == "uniform":
        values = (unit_interval(integers) - 0.5) * (2.0 * math.sqrt(3.0))
    elif distribution == "normal":
        values = _normal_quantile(unit_interval(integers))
    else:
        s = 3.0 if sparsity is None else sparsity
        edge = 2.0**32 / s
        values = ((integers >= 2.0**32 - edge).astype(np.float64) - (integers < edge)) * math.sqrt(s / 2.0)
    return torch.from_numpy(values.astype(np.float32))


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
        sparsity: float | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.name = name
        if torch.device(device).type == "meta":
            matrix = torch.empty(rows, columns, device="meta")
        else:
            matrix = draw(rows, columns, name, seed, distribution=distribution, sparsity=sparsity).to(device)
        self.register_buffer("matrix", matrix, persistent=False)
        self._cast: Tensor | None = None

    def forward(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The leading (rows, columns) block, a view; the last lower precision asked for is kept."""
        matrix = self.matrix
        if dtype != matrix.dtype:
            if self._cast is None or self._cast.dtype != dtype or self._cast.device != matrix.device:
                self._cast = matrix.to(dtype)
            matrix = self._cast
        return matrix[:rows, :columns]

    def _apply(self, fn, recurse=True):
        # model.half() must not round the bases: the stored numbers stay float32, only the device follows.
        device = fn(torch.empty(0, device=self.matrix.device)).device
        self.matrix, self._cast = self.matrix.to(device), None
        return self

    def sha256(self) -> str:
        """Of the float32 numbers, little-endian, row by row."""
        return hashlib.sha256(self.matrix.cpu().numpy().astype("<f4").tobytes()).hexdigest()


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
