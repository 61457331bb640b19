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

    `ranks` has every site by name; at 0 it stays as it was. `alpha` is one for all sites or, as `ranks`, each site's
    own; None means 2·ρ.
    """

    budget_setting = None
    ranks: Mapping[str, CountOrZero]
    alpha: Positive | Mapping[str, Positive] | None = None
    dropout: Share = 0.0

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        alphas = self.alpha if isinstance(self.alpha, Mapping) else {site.name: self.alpha for site in sites}
        updates = {}
        for site in sites:
            for name, values in (("ranks", self.ranks), ("alpha", alphas)):
                if site.name not in values:
                    raise SettingsError(f"RankedLoRA.{name} has no {site.name}: name every site that the targets match")
            rank = self.ranks[site.name]
            scale = relative_scale(max(rank, 1), alphas[site.name])
            updates[site.name] = LoRAUpdate(site, rank, scale, self.dropout, context)
        return updates
