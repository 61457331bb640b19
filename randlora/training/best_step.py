"""The step of the lowest validation loss, and the trained parameters that it had: ``trainer.select=best``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from randlora.errors import SettingsError


@dataclass(frozen=True)
class BestStep:
    """The best step so far: step 0 with a loss of infinity, and no parameters, before the first.

    It is a part of every checkpoint, so that a run resumed from any of them knows the best step of that time.

    Args:
        step: After which the parameters were scored.
        loss: Of the validation set.
        parameters: All that is trained, by name, as copies in main memory.
    """

    step: int = 0
    loss: float = math.inf
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def or_now(self, step: int, scores: Mapping[str, float], trained: Mapping[str, Tensor]) -> BestStep:
        """The present step if its validation loss is the lowest so far, else this one.

        Raises SettingsError where the scores of the validation set have no `loss`.
        """
        if "loss" not in scores:
            raise SettingsError(
                f"trainer.select=best: the validation set is scored by {', '.join(scores)} and has no loss; return one "
                "as `loss` from the task's score, or use last"
            )
        if not scores["loss"] < self.loss:
            return self
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in trained.items()}
        return BestStep(step, scores["loss"], copies)

    @torch.no_grad()
    def give_to(self, trained: Mapping[str, Tensor]) -> None:
        """Copies the best parameters into the model's."""
        for name, tensor in trained.items():
            tensor.copy_(self.parameters[name])
