"""What only some tasks can do: a task that can takes the mix-in, and whoever asks looks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

from torch import Tensor, nn

from randlora.models.base import Backbone
from randlora.tasks.base import Batch


class KnownShapes(ABC):
    """The shapes of its batches are known without data, so that a dry run can plan the memory of a step."""

    @abstractmethod
    def sample(self, backbone: Backbone, size: int) -> Batch:
        """A batch of `size` examples, as long as they can be, of zeros: only its shapes matter."""

    def planned(self, size: int) -> Self:
        """The task with shapes that do not depend on what is in a batch of `size` examples."""
        return self


class UnequalExamples(ABC):
    """Its loss is a mean over something else than examples, such as tokens, of which batches have more or fewer."""

    @abstractmethod
    def terms(self, batch: Batch) -> int:
        """How many terms the mean is over: a micro-batch's weight in its step."""


class FrozenFeatures(ABC):
    """Its models may begin with a part that does not change, whose outputs are cached."""

    @abstractmethod
    def frozen_part(self, model: nn.Module) -> Callable[[Batch], dict[str, Tensor]] | None:
        """From a batch to one that starts behind the frozen part of the bound model; None where no such part is first.

        `loss` and `predict` take both kinds of batch.
        """


class Classifies(ABC):
    """Its models give a score to each class of every example or, where there are none, a real number."""

    @property
    def classifies(self) -> bool:
        """Whether there are classes."""
        return True

    @abstractmethod
    def names(self) -> Sequence[str]:
        """The class names in the order of the outputs."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, classes), or numbers (B, 1), in float32; labels are not read."""
