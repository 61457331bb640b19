"""How a training ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class Diverged(RuntimeError):
    """The loss or a gradient is no longer a number."""


@dataclass(frozen=True)
class Fit:
    """What a training took that has finished, or paused; seconds are without evaluation and checkpoints.

    `trainable_parameters` are those of the updates at its end, of a method that grows more than at the start.
    `selected_step` is the step whose parameters the model now has, where the best was to be selected.
    `micro_batch_size` is what `auto_batch` has left of it, where that was allowed to lower it. `paused` has the scores
    of the validation set, by name, of a training that has paused after `steps`, as `stop_at` said.
    """

    steps: int
    train_seconds: float
    seconds_per_step: float
    trainable_parameters: int
    selected_step: int | None = None
    micro_batch_size: int | None = None
    paused: Mapping[str, float] | None = None
