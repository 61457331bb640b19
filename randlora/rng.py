"""Random integers that depend on their key alone.

A key (any mix of strings and integers) seeds the counter-based generator Philox-4x64 (Salmon et al.,
SC 2011), whose raw integers NumPy keeps stable. Everything random that has to be the
same on every machine is drawn here: fixed bases, initial factors, few-shot subsets, the order of the
data. Nothing touches torch's or NumPy's global generators.
"""

from __future__ import annotations

import hashlib

import numpy as np

Key = str | int


def _philox_key(key: tuple[Key, ...]) -> np.ndarray:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)


def random_uint32(count: int, *key: Key, row: int = 0) -> np.ndarray:
    """The first `count` random integers of 32 bits of row `row` of `key`, uint32 (count,).

    Rows are far apart in the generator's counter, and a shorter request is a prefix of a longer one:
    a slice of a matrix never depends on how large the whole was made.
    """
    generator = np.random.Philox(key=_philox_key(key), counter=[0, row, 0, 0])
    return generator.random_raw((count + 1) // 2).astype("<u8").view("<u4")[:count]


def unit_interval(integers: np.ndarray) -> np.ndarray:
    """uint32 to float64 strictly inside (0, 1)."""
    return (integers + 0.5) * 2.0**-32


def permutation(count: int, *key: Key) -> np.ndarray:
    """A permutation of range(count), int64 (count,)."""
    generator = np.random.Philox(key=_philox_key(key))
    return np.argsort(generator.random_raw(count), kind="stable")


def draws(count: int, *key: Key) -> np.ndarray:
    """`count` independent draws from range(count), int64 (count,)."""
    return (unit_interval(random_uint32(count, *key)) * count).astype(np.int64)


def integer(*key: Key) -> int:
    """One 63-bit integer, for generators that take a seed."""
    return int(np.random.Philox(key=_philox_key(key)).random_raw(1)[0] >> np.uint64(1))
