"""Which examples are used: a validation split out of the training split, few-shot and fractional subsamples."""

from __future__ import annotations

import numpy as np

from randlora.errors import SettingsError
from randlora.rng import permutation


def split_validation(count: int, size: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Splits a training split in two, the same way for every seed and method.

    Args:
        count: its rows.
        size: how many of them become validation.
        name: the task's, which seeds the draw.

    Returns:
        Sorted int64 indices: training (count - size,) and validation (size,).
    """
    order = permutation(count, "validation", name)
    return np.sort(order[size:]), np.sort(order[:size])


def validation_size_of(count: int, limit: int) -> int:
    """A tenth of a training split of `count` rows, no more than `limit` (aTLAS's rule, which the paper follows)."""
    return min(count // 10, limit)


def few_shot(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """`shots` examples of every class; those of fewer shots are among those of more.

    Args:
        labels: (N,), whole numbers.
        shots: how many of every class.
        seed: of the draw.

    Returns:
        Sorted int64 indices (classes · shots,).

    Raises:
        SettingsError: a class has fewer examples than that.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise SettingsError(f"shots={shots}: class {label} has only {len(members)} training examples")
        chosen.append(members[permutation(len(members), "few-shot", seed, int(label))[:shots]])
    return np.sort(np.concatenate(chosen))


def fractional(count: int, fraction: float, seed: int) -> np.ndarray:
    """Sorted int64 indices of `fraction` of `count` rows, one row or more; a smaller part is within a larger one."""
    return np.sort(permutation(count, "fraction", seed)[: max(1, round(count * fraction))])


def subsample(count: int, size: int | None, name: str) -> np.ndarray:
    """Sorted int64 indices of `count` rows, all of them or a random `size` that `name` seeds."""
    if size is None or size >= count:
        return np.arange(count)
    return np.sort(permutation(count, "subset", name)[:size])
