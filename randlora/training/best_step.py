"""The step of the lowest validation loss, and the trained parameters that it had: ``trainer.select=best``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from randlora.errors import SettingsError
from randlora.integrity import write

FILE = "best.safetensors"


class BestStep:
    """Keeps the parameters of the best step so far in a file beside the checkpoints, where a resumed run finds them.

    Args:
        folder: of the checkpoints.
        trained: all that is trained, by name.
    """

    def __init__(self, folder: Path, trained: Mapping[str, Tensor]):
        self.path, self.trained = folder / FILE, trained

    def consider(self, step: int, scores: Mapping[str, float]) -> None:
        """Keeps the present parameters if their validation loss is the lowest so far; the file appears whole.

        Raises SettingsError where the scores of the validation set have no `loss`.
        """
        if "loss" not in scores:
            raise SettingsError(
                f"trainer.select=best: the validation set is scored by {', '.join(scores)} and has no loss; return one "
                "as `loss` from the task's score, or use last"
            )
        if scores["loss"] < self._known()[1]:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.trained.items()}
            write(self.path, save(tensors, {"step": str(step), "loss": repr(scores["loss"])}))

    def forget(self) -> None:
        """Removes what an attempt without a checkpoint has left."""
        self.path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Of the best parameters so far. FileNotFoundError if no loss was finite."""
        with safe_open(self.path, "pt") as file:
            return list(file.keys())

    @torch.no_grad()
    def restore(self) -> tuple[int, float]:
        """Gives the model its best parameters; returns their step and loss. FileNotFoundError if no loss was finite."""
        step, loss = self._known()
        tensors = load_file(self.path)
        for name, tensor in self.trained.items():
            tensor.copy_(tensors[name])
        return step, loss

    def _known(self) -> tuple[int, float]:
        """The best step so far and its loss; infinity where there is none."""
        if not self.path.is_file():
            return 0, math.inf
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
        return int(metadata["step"]), float(metadata["loss"])
