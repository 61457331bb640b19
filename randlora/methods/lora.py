"""LoRA: a low-rank update (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.layer import Frozen, Site, Update
from randlora.bases import draw
from randlora.methods.base import Method, check_low_rank, low_rank_linear, relative_scale

if TYPE_CHECKING:
    from randlora.adapters.core import Context
    from randlora.methods.dora import DoRA


@dataclass(frozen=True)
class LoRA(Method):
    """ΔW = (alpha / rank) · B A, with A (rank × in) and B (out × rank) trained: rank·(in + out) numbers a site.

    A starts uniform in ±1/√in (Kaiming with a = √5, as the authors' code), B at zero. `dropout` acts on the
    input of the update alone. `alpha` defaults to 2·rank.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_low_rank(self)

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        return {site.name: LoRAUpdate(self, site, context.seed, context.device) for site in sites}


class LoRAUpdate(Update):
    """The update of one site."""

    def __init__(self, method: LoRA | DoRA, site: Site, seed: int, device: torch.device):
        super().__init__()
        self.scale, self.dropout = relative_scale(method.rank, method.alpha), method.dropout
        if device.type == "meta":
            start = torch.empty(method.rank, site.in_features, device="meta")
        else:
            start = draw(method.rank, site.in_features, "lora.A", site.name, seed)  # uniform within ±√3
        self.A = nn.Parameter(start.to(device) / math.sqrt(3 * site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, method.rank, device=device))

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * (self.B @ self.A)

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        return low_rank_linear(x, base, F.dropout(x, self.dropout, self.training), self.A, self.B, self.scale)
