"""LoRA with a rank for each site, what methods that choose ranks end as; and DoRA with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from randlora.adapters.interface import Context, Method, Site, Update
from randlora.bounds import CountOrZero, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.common import relative_scale
from randlora.methods.dora import DoRAUpdate
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
                    where = f"{type(self).__name__}.{name}"
                    raise SettingsError(f"{where} has no {site.name}: name every site that the targets match")
            updates[site.name] = self.update(site, self.ranks[site.name], alphas[site.name], context)
        return updates

    def update(self, site: Site, rank: int, alpha: float | None, context: Context) -> Update:
        """The update of one site."""
        return LoRAUpdate(site, rank, relative_scale(max(rank, 1), alpha), self.dropout, context)


@dataclass(frozen=True)
class RankedDoRA(RankedLoRA):
    """DoRA, of `detach_norm`, with a rank of each site's own: Σ ρ·(in + out) + out trained parameters.

    At rank 0 a site keeps its directions, and its magnitudes alone are trained.
    """

    def update(self, site: Site, rank: int, alpha: float | None, context: Context) -> Update:
        scale = relative_scale(max(rank, 1), alpha)
        return DoRAUpdate(site, rank, scale, self.dropout, detach_norm=True, context=context)
