"""Random matrices of independent entries with mean 0 and variance 1, a pure function of their name.

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

import math

import numpy as np
import torch
from torch import Tensor

from randlora.rng import random_uint32, unit_interval

LAYOUT = 1  # part of every key: raise it when the mapping from names to entries changes


def draw(rows: int, columns: int, *key: str | int, distribution: str = "uniform", sparsity: float = 3.0) -> Tensor:
    """A float32 (rows, columns) matrix of mean 0 and variance 1.

    Entry (i, j) depends on the key, the distribution, i and j alone. `distribution` is uniform, normal or ternary,
    whose entries are 0 with probability 1 - 2/sparsity and else ±√(sparsity/2).
    """
    if distribution == "ternary":
        return signs(rows, columns, *key, sparsity=sparsity).float() * math.sqrt(sparsity / 2)
    uniform = unit_interval(_integers(rows, columns, key))
    values = (uniform - 0.5) * (2.0 * math.sqrt(3.0)) if distribution == "uniform" else _normal_quantile(uniform)
    return torch.from_numpy(values.astype(np.float32))


def signs(rows: int, columns: int, *key: str | int, sparsity: float) -> Tensor:
    """The int8 (rows, columns) signs of a ternary matrix: -1, 0 or +1, without its factor sqrt(s / 2)."""
    integers, edge = _integers(rows, columns, key), 2.0**32 / sparsity
    return torch.from_numpy((integers >= 2.0**32 - edge).astype(np.int8) - (integers < edge).astype(np.int8))


def _integers(rows: int, columns: int, key: tuple[str | int, ...]) -> np.ndarray:
    return np.stack([random_uint32(columns, LAYOUT, *key, row=row) for row in range(rows)])


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
