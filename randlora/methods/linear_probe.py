"""Linear probing: the model frozen, the task's head alone trained. The floor that every update is measured from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from randlora.adapters.interface import Context, Frozen, Method, Site, Update


@dataclass(frozen=True)
class LinearProbe(Method):
    """ΔW = 0, with nothing to train, for models that a task gives a head: image towers, text encoders."""

    budget_setting = None

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        return {site.name: NoUpdate() for site in sites}


class NoUpdate(Update):
    """The base as it is."""

    def delta(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight, dtype=torch.float32)

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        return base(x)
