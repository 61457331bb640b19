"""LoRA: a low-rank update (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.bases import draw
from randlora.methods.common import check_low_rank, low_rank_linear, relative_scale


@dataclass(frozen=True)
class LoRA(Method):
    """ΔW = (alpha / rank) · B A, with A (rank × in) and B (out × rank) trained: rank·(in + out) parameters a site.

    A starts uniform in ±1/√in (Kaiming with a = √5, as the authors' code), B at zero. `dropout` acts on the
    input of the update alone. `alpha` defaults to 2·rank.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_low_rank(self)

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        scale = relative_scale(self.rank, self.alpha)
        return {site.name: LoRAUpdate(site, self.rank, scale, self.dropout, context) for site in sites}


class LoRAUpdate(Update):
    """The update of one site."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, context: Context):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        device = context.device
        if device.type == "meta":
            start = torch.empty(rank, site.in_features, device="meta")
        else:
            start = draw(rank, site.in_features, "lora.A", site.name, context.seed)  # uniform within ±√3
        self.A = nn.Parameter(start.to(device) / math.sqrt(3 * site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank, device=device))

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * (self.B @ self.A)

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        return low_rank_linear(x, base, F.dropout(x, self.dropout, self.training), self.A, self.B, self.scale)
