"""LoRA-Mini: LoRA's factors split, the outer halves fixed (Singh et al., 2024, arXiv 2411.15804)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from randlora.adapters.interface import Context, Method, Site, Update
from randlora.bases import Basis
from randlora.bounds import Count, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.common import LowRankUpdate, relative_scale, uniform_start


@dataclass(frozen=True)
class LoRAMini(Method):
    """ΔW = (alpha / rank) · D B A C with A (rank × a) and B (b × rank) trained: rank·(a + b) parameters a site.

    C (a × in) and D (out × b) are fixed; a is `inner_in`, b `inner_out`. The count is the same whatever the site's
    widths. `dropout` acts on the input of the update. `alpha` defaults to 2·rank.

    The paper leaves open how the matrices start, the scale and the sizes. Ours: every site draws its own C and D,
    uniform, by name from the run's seed, of variance 1/in and 1/b; A starts uniform in ±1/√a, B at zero. Then A C
    starts with the variance of LoRA's A, and a step of the optimiser moves D B as far as it would LoRA's B.
    """

    rank: Count = 8
    inner_in: Count = 64
    inner_out: Count = 64
    alpha: Positive | None = None
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, size in (("inner_in", self.inner_in), ("inner_out", self.inner_out)):
            if size < self.rank:
                raise SettingsError(f"LoRAMini.{name}={size}: must be at least the rank, {self.rank}")

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        updates: dict[str, Update] = {}
        for site in sites:
            C = context.draw("uniform", f"loramini.C {site.name}", self.inner_in, site.in_features)
            D = context.draw("uniform", f"loramini.D {site.name}", site.out_features, self.inner_out)
            updates[site.name] = LoRAMiniUpdate(self, site, C, D, context)
        return updates


class LoRAMiniUpdate(LowRankUpdate):
    """The update of one site."""

    def __init__(self, method: LoRAMini, site: Site, C: Basis, D: Basis, context: Context):
        super().__init__()
        self.scale, self.dropout = relative_scale(method.rank, method.alpha), method.dropout
        self.out_features, self.in_features = site.out_features, site.in_features
        self.basis_C, self.basis_D = C, D
        device, key = context.device, ("loramini.A", site.name, context.seed)
        start = uniform_start(method.rank, method.inner_in, *key, device=device)
        self.A = nn.Parameter(start / math.sqrt(3 * method.inner_in))
        self.B = nn.Parameter(torch.zeros(method.inner_out, method.rank, device=device))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        inner_in, inner_out = self.A.shape[1], self.B.shape[0]
        AC = self.basis_C(inner_in, self.in_features).down(self.A / math.sqrt(self.in_features))
        DB = self.basis_D(self.out_features, inner_out).times(self.B / math.sqrt(inner_out))
        return AC, DB
