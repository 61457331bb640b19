"""How a training ends."""

from __future__ import annotations

from dataclasses import dataclass


class Diverged(RuntimeError):
    """The loss or a gradient is no longer a number."""


@dataclass(frozen=True)
class Fit:
    """What a finished training took; seconds are without evaluation and checkpoints.

    `trainable_parameters` are those of the updates at its end, of a method that grows more than at the start.
    `selected_step` is the step whose parameters the model now has, where the best was to be selected.
    """

    steps: int
    train_seconds: float
    seconds_per_step: float
    trainable_parameters: int
    selected_step: int | None = None
