"""The losses of a training's steps: read from the device all at once, and watched for what a curve would show."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StepLoss(NamedTuple):
    """Of one step: how many are done with it, its rate, its mean loss and its gradient's norm before clipping."""

    done: int
    rate: float
    loss: float
    norm: float


class Losses:
    """The losses and norms of steps as the device has them.

    To read a number waits for all work of the device before it, so that the next step could not be prepared meanwhile.
    """

    def __init__(self) -> None:
        self._unread: list[tuple[int, float, Tensor | float, Tensor]] = []

    def add(self, done: int, rate: float, loss: Tensor | float, norm: Tensor) -> None:
        """Of a step; see StepLoss."""
        self._unread.append((done, rate, loss, norm))

    def read(self) -> list[StepLoss]:
        """Those of the steps since the last reading, in their order."""
        if not self._unread:
            return []
        done, rates, losses, norms = zip(*self._unread, strict=True)
        self._unread.clear()
        return [*map(StepLoss, done, rates, _numbers(losses), _numbers(norms))]


def _numbers(scalars: tuple[Tensor | float, ...]) -> list[float]:
    """In one copy from the device."""
    return torch.stack([torch.as_tensor(scalar, dtype=torch.float64) for scalar in scalars]).tolist()


class LossWatch:
    """Compares the recent training loss with the first. A scale ten times too large costs points without any NaN."""

    def __init__(self, window: int = 20):
        self.window = window
        self.first: list[float] = []
        self.recent: list[float] = []
        self.warned = False

    def add(self, loss: float) -> str | None:
        """Takes the loss of a step; says so once when the last window's mean is above the first step's by 5 %."""
        if not self.first:
            self.first.append(loss)
        self.recent = [*self.recent[-self.window + 1 :], loss]
        mean = sum(self.recent) / len(self.recent)
        if self.warned or len(self.recent) < self.window or mean <= 1.05 * self.first[0]:
            return None
        self.warned = True
        return (
            f"the training loss, {mean:.3g} over {self.window} steps, is above its start, {self.first[0]:.3g}: "
            "the learning rate or the method's alpha is probably too large"
        )
