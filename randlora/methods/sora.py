"""SoRA: a LoRA whose ranks are closed by gates in training (Ding et al., EMNLP 2023, arXiv 2311.11696)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from randlora.adapters.interface import Context, Method, Site, Step, Update
from randlora.bases import draw
from randlora.bounds import Count, NotNegative, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.common import relative_scale
from randlora.methods.lora import LoRAUpdate
from randlora.methods.ranked_lora import RankedLoRA


@dataclass(frozen=True)
class SoRA(Method):
    """ΔW = (alpha / rank) · B diag(g) A: rank·(in + out + 1) trained parameters a site, fewer in the end.

    A and B start as LoRA's and g, the gates (rank), at N(0, 1). After the optimiser's step, which is without weight
    decay for g, g becomes T(g), with the soft threshold T(z) = sign(z) · max(|z| - τ, 0) and τ = `sparsity` times the
    step's learning rate. Ranks whose gate is zero in the end are left out, and the adapter's file is that of a LoRA.

    The authors' code has a τ that no learning rate scales, 3e-4 at a rate of 8e-4, whose ratio is the default here.
    After shrinking it also sets to zero what is below τ, so that gates jump from 2τ to 0: `hard_gap`.

    With `final_sparsity` the sparsity rises to it from `sparsity` in `stages` that are equally far apart and equally
    long, as in the paper's schedule, which trains on for some epochs in each. `alpha` None means 2·rank.
    """

    rank: Count = 8
    alpha: Positive | None = 16.0
    dropout: Share = 0.0
    sparsity: NotNegative = 0.375
    final_sparsity: NotNegative | None = None
    stages: Annotated[int, Ge(2)] = 7
    hard_gap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_sparsity is not None and self.final_sparsity < self.sparsity:
            raise SettingsError(
                f"SoRA.final_sparsity={self.final_sparsity}: must be at least sparsity, {self.sparsity}"
            )

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        return {site.name: SoRAUpdate(self, site, context) for site in sites}

    def parameter_groups(self, trained: Mapping[str, nn.Parameter], rate: float, decay: float) -> list[dict[str, Any]]:
        gates = [tensor for name, tensor in trained.items() if name.endswith(":gates")]
        others = [tensor for name, tensor in trained.items() if not name.endswith(":gates")]
        return [
            {"params": others, "lr": rate, "weight_decay": decay},
            {"params": gates, "lr": rate, "weight_decay": 0.0},
        ]

    def sparsity_at(self, step: Step) -> float:
        """`sparsity`, or what the schedule makes of it at a step."""
        if self.final_sparsity is None:
            return self.sparsity
        stage = step.number * self.stages // step.total
        return self.sparsity + (self.final_sparsity - self.sparsity) * stage / (self.stages - 1)

    @torch.no_grad()
    def after_step(self, updates: Iterable[Update], step: Step) -> None:
        threshold = step.rate * self.sparsity_at(step)
        for update in updates:
            gates = update.gates
            assert isinstance(gates, Tensor)
            gates.copy_(soft_threshold(gates, threshold, self.hard_gap))

    def finish(self, updates: Mapping[str, Update]) -> Method:
        ranks = {name: update.fold() for name, update in updates.items() if isinstance(update, SoRAUpdate)}
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return RankedLoRA(ranks, alpha, self.dropout)


def soft_threshold(values: Tensor, threshold: float, hard_gap: bool = False) -> Tensor:
    """sign(z) · max(|z| - τ, 0); with `hard_gap` zero where |z| < 2τ, too."""
    shrunk = values.sign() * (values.abs() - threshold).clamp_min(0)
    return shrunk.where(shrunk.abs() >= threshold, 0.0) if hard_gap else shrunk


class SoRAUpdate(LoRAUpdate):
    """The update of one site: LoRA's with gates between its factors, and without them when it is folded."""

    gates: nn.Parameter | None

    def __init__(self, method: SoRA, site: Site, context: Context):
        scale = relative_scale(method.rank, method.alpha)
        super().__init__(site, method.rank, scale, method.dropout, context)
        start = self.A.new_empty(1, method.rank)
        if context.device.type != "meta":
            key = "sora.gates", site.name, context.seed
            start = draw(1, method.rank, *key, distribution="normal").to(context.device)
        self.gates = nn.Parameter(start[0].clone())

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B if self.gates is None else self.B * self.gates

    @torch.no_grad()
    def fold(self) -> int:
        """Leaves the ranks whose gate is open, with gate and scale in B, as LoRA of that rank has them; their number.

        The scale alpha / rank becomes alpha / ρ for ρ open gates.
        """
        assert self.gates is not None
        (A, B), is_open = self.low_rank(), self.gates.detach() != 0
        rank, largest = int(is_open.sum()), len(is_open)
        share = max(rank, 1) / largest
        self.A, self.B = nn.Parameter(A[is_open]), nn.Parameter(B[:, is_open] * share)
        self.scale, self.gates = self.scale / share, None
        return rank
