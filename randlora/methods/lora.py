"""LoRA: a low-rank update (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from randlora.adapters.interface import Context, Method, Site, Update
from randlora.bounds import Count, Positive, Share
from randlora.methods.common import LowRankUpdate, relative_scale, uniform_start


@dataclass(frozen=True)
class LoRA(Method):
    """ΔW = (alpha / rank) · B A, with A (rank × in) and B (out × rank) trained: rank·(in + out) parameters a site.

    A starts uniform in ±1/√in (Kaiming with a = √5, as the authors' code), B at zero. `dropout` acts on the
    input of the update alone. `alpha` defaults to 2·rank.
    """

    rank: Count = 8
    alpha: Positive | None = None
    dropout: Share = 0.0

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        scale = relative_scale(self.rank, self.alpha)
        return {site.name: LoRAUpdate(site, self.rank, scale, self.dropout, context) for site in sites}


class LoRAUpdate(LowRankUpdate):
    """The update of one site."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, context: Context):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        device = context.device
        start = uniform_start(rank, site.in_features, "lora.A", site.name, context.seed, device=device)
        self.A = nn.Parameter(start / math.sqrt(3 * site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank, device=device))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B
