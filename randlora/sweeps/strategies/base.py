"""What a search asks of its strategy: arms, what has been tried of each, and what comes next."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Gt, Le

from randlora.bounds import Bounded

RATE = "trainer.learning_rate"
WORST = -math.inf  # the score of a trial of which a run has failed

Values = Mapping[str, float]  # of the searched settings
Factor = Annotated[float, Gt(1), Le(1000)]
# The score of an arm's trial after so many steps, a mean over seeds; None while it is not known.
Score = Callable[["Arm", Values, int], float | None]


@dataclass(frozen=True)
class Arm:
    """A method whose rate and scale are searched.

    Args:
        label: The settings that set it apart.
        rate: The learning rate that it has by itself.
        steps: Of its whole run.
        scale_key: Its own name of the scale, such as ``method.alpha``; None where it has none, or it is not searched.
        scale: The one that it has by itself.
    """

    label: str
    rate: float
    steps: int
    scale_key: str | None = None
    scale: float = 1.0

    def values(self, rate: float, scale: float = 1.0) -> Values:
        """The settings for multiples of the arm's own, in three significant digits."""
        values = {RATE: rounded(self.rate * rate)}
        return values if self.scale_key is None else values | {self.scale_key: rounded(self.scale * scale)}


@dataclass(frozen=True)
class Course:
    """How far an arm's search is.

    Args:
        arm: Whose it is.
        rungs: The steps after which trials are compared, the last of them those of a whole run.
        trials: What is tried, in the order in which that was decided.
        scores: Of each trial by rung, as far as they are known.
        wanted: What is to be run next: a trial's number, and the rung.
        chosen: The number of the best trial; None while trials are wanted, and where none has a score.
        edges: The settings whose chosen value is at an end of what was tried, and which: ``lower`` or ``upper``.
    """

    arm: Arm
    rungs: Sequence[int]
    trials: Sequence[Values]
    scores: Sequence[Mapping[int, float]]
    wanted: Sequence[tuple[int, int]] = ()
    chosen: int | None = None
    edges: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many one seed's trials have done, or were to do before they failed."""
        return sum(max(scores, default=0) for scores in self.scores)


class Strategy(Bounded):
    """A search's settings, and what follows from them."""

    section: ClassVar[str] = "search"

    @abstractmethod
    def courses(self, arms: Sequence[Arm], score: Score, before: Mapping[str, Sequence[Values]]) -> list[Course]:
        """Of every arm of a cell.

        Args:
            arms: Of one cell.
            score: What is known of a trial.
            before: The trials that were decided earlier, by the arm's label.
        """

    @property
    @abstractmethod
    def scaled(self) -> bool:
        """Whether scales are searched, too."""

    unscaled: ClassVar[str]  # the setting with which they are not

    @abstractmethod
    def rungs(self, steps: int) -> list[int]:
        """The steps after which the trials of runs with so many are compared; the last is `steps`."""

    @abstractmethod
    def most_steps(self, steps: int) -> int:
        """Those of an arm's whole search, for one seed, where a run has `steps`."""


def rounded(value: float) -> float:
    """In three significant digits: labels are read by people."""
    return float(f"{value:.3g}")
