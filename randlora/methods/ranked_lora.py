"""LoRA with a rank for each site: what methods that choose ranks end as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from randlora.adapters.interface import Context, Method, Site, Update
from randlora.bounds import CountOrZero, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.common import relative_scale
from randlora.methods.lora import LoRAUpdate


@dataclass(frozen=True)
class RankedLoRA(Method):
    """ΔW = (alpha / ρ) · B A as in LoRA, of a rank ρ of each site's own: Σ ρ·(in + out) trained parameters.

    `ranks` has every site by name; at 0 it stays as it was. `alpha` None means 2·ρ.
    """

    budget_setting = None
    ranks: Mapping[str, CountOrZero]
    alpha: Positive | None = None
    dropout: Share = 0.0

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        for site in sites:
            if site.name not in self.ranks:
                raise SettingsError(f"RankedLoRA.ranks has no {site.name}: name every site that the targets match")
        return {
            site.name: LoRAUpdate(site, rank, relative_scale(max(rank, 1), self.alpha), self.dropout, context)
            for site in sites
            for rank in [self.ranks[site.name]]
        }
