"""IncreLoRA: a LoRA that gains ranks in training where they matter most (Zhang et al., 2023, arXiv 2308.12043)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora.adapters.interface import Context, Method, Site, Step, Update
from randlora.bounds import Count, NotNegative, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.growing import GrowingUpdate
from randlora.methods.ranked_lora import RankedLoRA


@dataclass(frozen=True)
class IncreLoRA(Method):
    """ΔW = (alpha / ρ) · Σ_i λ_i b_i a_i over the ρ ranks of a site: Σ ρ·(in + out + 1) trained parameters in the end.

    Every site begins with `start` ranks, a_i and b_i from N(0, 0.02²) and λ_i = 0, and the sites have `rank` on average
    in the end. Beside its ranks a site trains `gain` more in advance (a_i and b_i, with λ_i fixed at 1e-5). Every
    `interval` steps the `top` sites of the highest score take these over, λ_i being trained from then on, and begin
    with as many others, whose learning rates have a warm-up of their own; the last round ends at the target exactly.
    What is left of the advance is dropped then, and in the end the adapter's file is that of a LoRA.

    The score is I · U: the running means of S, the mean of |ΔW ∘ ∂L/∂ΔW| over the entries, and of its distance |S - I|,
    both of weight `memory`. The gradient is that of the whole step, over micro-batches and processes.

    `orthogonality` weighs a term of the loss, the mean over the factors of ‖A Aᵀ - 1‖ and ‖Bᵀ B - 1‖ (Frobenius).
    `gain` None is half of `rank`; `interval` None lets growth take a third of the run, as in the paper's tasks.
    """

    rank: Count = 2
    alpha: Positive = 32.0
    dropout: Share = 0.0
    start: Count = 1
    top: Count = 6
    gain: Count | None = None
    interval: Count | None = None
    memory: Share = 0.85
    orthogonality: NotNegative = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start > self.rank:
            raise SettingsError(f"IncreLoRA.start={self.start}: must be at most the rank in the end, {self.rank}")

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        return {
            site.name: GrowingUpdate(site, self.start, self.alpha, self.dropout, context.seed, context.device)
            for site in sites
        }

    def grown(self) -> Method:
        return dataclasses.replace(self, start=self.rank)

    def parameter_groups(self, trained: Mapping[str, nn.Parameter], rate: float, decay: float) -> list[dict[str, Any]]:
        born: dict[int, list[nn.Parameter]] = {}
        for name, tensor in trained.items():
            born.setdefault(GrowingUpdate.birth(name), []).append(tensor)
        return [{"params": born[step], "lr": rate, "weight_decay": decay, "born": step} for step in sorted(born)]

    def penalty(self, updates: Iterable[Update]) -> Tensor | None:
        if not self.orthogonality:
            return None
        distances = [distance for update in _growing(updates) for distance in update.orthogonality()]
        return self.orthogonality * torch.stack(distances).mean()

    def after_backward(self, updates: Iterable[Update], step: Step) -> bool:
        growing = _growing(updates)
        missing = self.rank * len(growing) - sum(update.rank for update in growing)
        if not missing:
            for update in growing:
                update.stop_growing()
            return False
        interval = self._interval(len(growing), step.total)
        for update in growing:
            update.take_score(self.memory)
        if step.number == 0:
            for update in growing:
                update.advance(self._gain, 1)
            return True
        if step.number <= interval or step.number % interval:
            return False
        ordered = sorted(growing, key=lambda update: -update.score)  # of equal scores the first sites
        for update in ordered[: self.top]:
            gained = min(self._gain, missing)
            update.grow(gained, step.number + 1)
            missing -= gained
            update.advance(self._gain, step.number + 1)
        if not missing:
            for update in growing:
                update.stop_growing()
        return True

    @property
    def _gain(self) -> int:
        return self.gain or max(1, self.rank // 2)

    def _interval(self, sites: int, steps: int) -> int:
        """Steps between rounds; SettingsError where they do not all come to pass in this run."""
        rounds = math.ceil(sites * (self.rank - self.start) / (self._gain * min(self.top, sites)))
        interval = self.interval or max(1, steps // (3 * rounds + 3))
        if (rounds + 1) * interval >= steps:
            raise SettingsError(
                f"IncreLoRA: {sites} sites reach rank {self.rank} on average after {rounds} rounds of {self.top} "
                f"sites, one every {interval} steps after the first {interval}, and the run has {steps}: lower "
                "method.interval, or raise method.top, method.gain or the steps"
            )
        return interval

    def finish(self, updates: Mapping[str, Update]) -> Method:
        ranks = {name: update.fold() for name, update in updates.items() if isinstance(update, GrowingUpdate)}
        return RankedLoRA(ranks, self.alpha, self.dropout)


def _growing(updates: Iterable[Update]) -> list[GrowingUpdate]:
    return [update for update in updates if isinstance(update, GrowingUpdate)]
