"""GeLoRA: LoRA's rank from the intrinsic dimension of hidden states (Ed-dib et al., 2024, arXiv 2412.09250)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor, nn

from randlora.adapters.calibration import hidden_states
from randlora.adapters.interface import Context, Method, Site, Update
from randlora.adapters.positions import block_of
from randlora.bounds import Count, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.lora import LoRAUpdate

ROUNDINGS = {"up": math.ceil, "nearest": round, "down": math.floor}


@dataclass(frozen=True)
class GeLoRA(Method):
    """LoRA of rank max(d' - d, 0) + 1 at all sites of a block, d and d' being the intrinsic dimensions of the hidden
    states that enter and leave it; alpha / rank is `scale` everywhere. Σ rank·(in + out) trained parameters.

    Dimensions are TwoNN's, of `examples` training examples before training. The paper does not say what stands for an
    example (`pooling`: its tokens' mean, or the first token), how a difference is rounded, and which share of largest
    ratios TwoNN leaves out (`discard`). Ours: the rule gives no rank above `largest`; with `mean_rank` its ranks are
    scaled to this mean over the blocks, for comparisons at one count.

    `ranks`, by the block's name, are chosen by `calibrated`, or given; then what chooses them stays unread. Sites
    outside numbered blocks are refused.
    """

    budget_setting = "mean_rank"
    scale: Positive = 32.0
    dropout: Share = 0.0
    examples: Annotated[int, Ge(3)] = 1000
    pooling: Literal["mean", "first"] = "mean"
    rounding: Literal["up", "nearest", "down"] = "up"
    discard: Share = 0.1
    largest: Count = 64
    mean_rank: Annotated[float, Ge(1)] | None = None
    ranks: Mapping[str, Count] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean_rank is not None and self.mean_rank > self.largest:
            raise SettingsError(f"GeLoRA.mean_rank={self.mean_rank}: must be at most largest, {self.largest}")

    @property
    def calibration_examples(self) -> int:
        return self.examples if self.ranks is None else 0

    @property
    def remark(self) -> str | None:
        if self.ranks is not None:
            return None
        planned = f"rank {self.largest} everywhere, the largest"
        if self.mean_rank is not None:
            planned = f"equal ranks of mean {self.mean_rank:g}"
        return f"gelora chooses ranks by the training data; what is said here is for {planned}"

    def calibrated(self, model: nn.Module, sites: Sequence[str], passes: Iterable[object]) -> Method:
        blocks = list(dict.fromkeys(map(_block, sites)))
        pooling = masked_mean if self.pooling == "mean" else lambda hidden, _: hidden[:, 0]
        growth = {
            name: intrinsic_dimension(leaving, self.discard) - intrinsic_dimension(entering, self.discard)
            for name, (entering, leaving) in hidden_states(model, blocks, passes, pooling).items()
        }
        ranks = {name: min(max(ROUNDINGS[self.rounding](d), 0) + 1, self.largest) for name, d in growth.items()}
        return replace(self, ranks=ranks if self.mean_rank is None else apportioned(ranks, self.mean_rank))

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        blocks = {site.name: _block(site.name) for site in sites}
        ranks = self.ranks or self._planned(list(blocks.values()), context.device)
        for site, block in blocks.items():
            if block not in ranks:
                raise SettingsError(f"GeLoRA.ranks has no {block}, the block of {site}; it has {', '.join(ranks)}")
        return {s.name: LoRAUpdate(s, ranks[blocks[s.name]], self.scale, self.dropout, context) for s in sites}

    def _planned(self, blocks: Sequence[str], device: torch.device) -> Mapping[str, int]:
        """Of a model without values, which no data have run through: what `remark` says."""
        if device.type != "meta":
            raise SettingsError("GeLoRA has no ranks yet: give adapt what randlora.calibrate returns, or give ranks")
        ranks = dict.fromkeys(blocks, self.largest)
        return ranks if self.mean_rank is None else apportioned(ranks, self.mean_rank)


def _block(site: str) -> str:
    name = block_of(site)
    if name is None:
        raise SettingsError(f"GeLoRA: {site} is in no numbered block: leave it out of the targets")
    return name


def apportioned(weights: Mapping[str, int], mean: float) -> dict[str, int]:
    """Ranks whose sum is `mean` times their number, rounded: 1 each, and the rest in proportion to `weights`.

    Largest remainders are rounded up, the first of equal ones.
    """
    rest = round(mean * len(weights)) - len(weights)
    quotas = {name: rest * weight / sum(weights.values()) for name, weight in weights.items()}
    ranks = {name: 1 + math.floor(quota) for name, quota in quotas.items()}
    missing = rest + len(weights) - sum(ranks.values())
    for name in sorted(quotas, key=lambda name: math.floor(quotas[name]) - quotas[name])[:missing]:
        ranks[name] += 1
    return ranks


def masked_mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens that are no padding, (B, d), of hidden states (B, L, d) and a mask (B, L) or None."""
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


def intrinsic_dimension(points: Tensor, discard: float = 0.1) -> float:
    """TwoNN's estimate (Facco et al., 2017, arXiv 1803.06992) for points (N, d).

    With μ the ratio of the distances to a point's second and first neighbour, and F its empirical distribution, it is
    the slope through the origin of -log(1 - F(μ)) over log μ, without the largest ratios, a share of `discard`.
    Copies of a point are left out. SettingsError where fewer than three different points remain.
    """
    from sklearn.neighbors import NearestNeighbors

    different = np.unique(points.double().numpy(), axis=0)
    if len(different) < 3:
        raise SettingsError(f"GeLoRA: {len(different)} different examples are too few to choose ranks; give more data")
    distances, _ = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(different).kneighbors(different)
    ratios = np.sort(distances[:, 2] / distances[:, 1])
    kept = min(max(2, int(len(ratios) * (1 - discard))), len(ratios) - 1)  # the largest has F = 1
    x, y = np.log(ratios[:kept]), -np.log1p(-np.arange(1, 1 + kept) / len(ratios))
    return float(x @ y / (x @ x))
