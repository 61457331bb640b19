"""Optimisation: the settings of a training and what trains by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from randlora.tasks.base import Bound, Splits, Task
from randlora.training.loop import Loop
from randlora.training.optimizers import Optimizer
from randlora.training.outcome import Fit
from randlora.training.settings import Observer, Settings

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Trainer(Settings):
    """Trains whatever it is given by its settings; see `Settings` for these."""

    def fit(
        self, task: Task, bound: Bound, splits: Splits, *, seed: int, folder: Path, observer: Observer,
        accelerator: Accelerator, optimizer: Optimizer | None = None, steps: int | None = None, strict: bool = False,
        keep: Callable[[int], None] | None = None,
    ) -> Fit:  # fmt: skip
        """Trains an adapted model with its head; goes on from the newest valid checkpoint in `folder`.

        Args:
            task: Knows the loss.
            bound: What the task made of the adapted model.
            splits: The training split is learned from; the validation split is scored every `evaluate_every` steps.
            seed: Of the order of the data and of dropout.
            folder: Where checkpoints are; the last one is of the last step, so that this returns at once again.
            observer: Hears of losses, scores and progress.
            accelerator: The device and the processes.
            optimizer: None for AdamW.
            steps: How many; None for what the settings make of the training split's length.
            strict: Whether to stop where there are checkpoints and none is valid, instead of starting again.
            keep: Called with the number of steps whenever the validation split has been scored, the model being as it
                was then; None: nothing is kept.

        Raises:
            Diverged: When the loss or the gradient's norm is not finite.
            Interrupted: When a signal asked for it, with a checkpoint to go on from.
            SettingsError: As `strict` says; nothing to train; the best step to select and no validation loss.
        """
        given = task, bound, splits, seed, folder, observer, accelerator, optimizer or Optimizer(), steps, keep
        loop = Loop(self, *given)
        return loop.fit(strict)
