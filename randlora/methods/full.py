"""Full fine-tuning: the peer that every adapter is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.errors import SettingsError


@dataclass(frozen=True)
class FullFineTuning(Method):
    """W' itself is trained, from W0, in float32.

    `train` is ``all`` (every parameter of the model: embeddings, norms and biases too, as in the paper), ``targets``
    (the targeted matrices alone), or a list of patterns on the names of further parameters, such as ``["visual.*"]``
    for all of CLIP's image tower. Targeted matrices keep W0 beside W', so that the base stays untouched and ΔW can be
    measured: one more copy of them than a bare fine-tuning would hold. Where slices of a fused matrix are targeted, its
    other slices count among the further parameters; they become sites, too.
    """

    budget_setting = None
    train: Literal["all", "targets"] | Sequence[str] = "all"

    @property
    def name(self) -> str:
        return "full"

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        return {site.name: FullUpdate(context.weights[site.name]) for site in sites}

    def unfreezes(self, names: Sequence[str]) -> Sequence[str]:
        if isinstance(self.train, str):
            return names if self.train == "all" else []
        for pattern in self.train:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SettingsError(f"FullFineTuning.train: {pattern!r} matches no parameter; there are {names[0]}, …")
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.train)]

    def trains_rest(self, name: str) -> bool:
        if isinstance(self.train, str):
            return self.train == "all"
        return any(fnmatchcase(name, pattern) for pattern in self.train)


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
