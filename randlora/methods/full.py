"""Full fine-tuning: the peer that every adapter is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.seat import Frozen, Site, Update
from randlora.errors import check_choice
from randlora.methods.base import Method

if TYPE_CHECKING:
    from randlora.adapters.core import Context


@dataclass(frozen=True)
class FullFineTuning(Method):
    """W' itself is trained, from W0, in float32.

    `train` is ``all`` (every parameter of the model: embeddings, norms and biases too, as in the paper) or
    ``targets`` (the targeted matrices alone). Targeted matrices keep W0 beside W', so that the base stays
    untouched and ΔW can be measured: one more copy of them than a bare fine-tuning would hold.
    """

    train: str = "all"

    def __post_init__(self) -> None:
        check_choice("FullFineTuning.train", self.train, ("all", "targets"))

    @property
    def name(self) -> str:
        return "full"

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        return {site.name: FullUpdate(context.weights[site.name]) for site in sites}

    def unfreezes(self, name: str) -> bool:
        return self.train == "all"


class FullUpdate(Update):
    """The trained matrix of one site."""

    replaces_base = True

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True).contiguous())

    def delta(self, weight: Tensor) -> Tensor:
        return self.weight - weight.to(self.weight.dtype)

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), base.bias)
