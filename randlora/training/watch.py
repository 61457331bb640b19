"""Says aloud what a curve would show: a loss that stays above where it began."""

from __future__ import annotations


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
