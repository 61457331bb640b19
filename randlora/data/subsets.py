"""Which examples are used: a carved validation set, few-shot and fractional training sets. Labels are enough."""

from __future__ import annotations

import numpy as np

from randlora.errors import SettingsError, check_count
from randlora.rng import permutation


def check_budget(shots: int | None, fraction: float | None) -> None:
    """Raises SettingsError unless the training budget makes sense."""
    if shots is not None and fraction is not None:
        raise SettingsError(f"shots={shots} and fraction={fraction}: give one of them")
    if shots is not None:
        check_count("shots", shots)
    if fraction is not None and (isinstance(fraction, bool) or not 0 < fraction <= 1):
        raise SettingsError(f"fraction={fraction!r}: must be above 0 and at most 1")


def split_validation(count: int, size: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation) of a set without a validation split; the same for every seed and method."""
    order = permutation(count, "validation", name)
    return np.sort(order[size:]), np.sort(order[:size])


def validation_size_of(count: int, most: int) -> int:
    """A tenth of the training set, `most` at most (the rule of aTLAS, which the paper follows)."""
    return min(count // 10, most)


def few_shot(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of `shots` examples of every class. A larger number of shots contains a smaller one."""
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise SettingsError(f"shots={shots}: class {label} has only {len(members)} training examples")
        chosen.append(members[permutation(len(members), "few-shot", seed, int(label))[:shots]])
    return np.sort(np.concatenate(chosen))


def fractional(count: int, fraction: float, seed: int) -> np.ndarray:
    """Indices of a part of the training set; a larger part contains a smaller one."""
    return np.sort(permutation(count, "fraction", seed)[: max(1, round(count * fraction))])


def subsample(count: int, size: int | None, name: str) -> np.ndarray:
    """All indices, or a fixed random `size` of them."""
    if size is None or size >= count:
        return np.arange(count)
    return np.sort(permutation(count, "subset", name)[:size])
