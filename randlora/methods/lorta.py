"""LoRTA: one low-rank tensor for the attention of all layers (Hounie et al., 2024, arXiv 2410.04060)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from randlora.adapters.interface import Context, Method, Site, Update
from randlora.adapters.positions import Position, position
from randlora.bounds import Count, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.common import LowRankUpdate, relative_scale, uniform_start


@dataclass(frozen=True)
class LoRTA(Method):
    """ΔW of layer l, role m and head h: (alpha / rank) · A diag(H_h ∘ L_l ∘ M_m) B, in all of rank `rank` at each site.

    A (d × rank), B (rank × d_h), H (heads × rank), L (layers × rank) and M (roles × rank) are trained and shared by
    all sites: rank·(d + d_h + heads + layers + roles) parameters in all, for width d and heads of width d_h. Layers
    and roles are those of the targets. B starts at zero, A uniform in ±1/√rank, H, L and M in ±√(6 / rank), as in the
    authors' code, whose GLUE runs have alpha = 1; None means 2·rank. `dropout` acts on the input of the updates.

    The blocks d × d_h of the heads stand side by side. They belong to the outputs of q, k and v, and to the inputs of
    o. The authors' code puts them to the outputs for all four (LitGPT) or to the inputs for all four (GLUE, DPO):
    ``head_side`` output or input.

    Sites that are no q, k, v or o projection, or of another width, number or width of heads, are refused.
    """

    rank: Count = 8
    alpha: Positive | None = 1.0
    dropout: Share = 0.0
    head_side: Literal["role", "output", "input"] = "role"

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        places = {site.name: _position(site) for site in sites}
        sides = {name: self._heads_are_outputs(place.role) for name, place in places.items()}
        grids = {site.name: _grid(site, context.heads.get(site.name), sides[site.name]) for site in sites}
        first = sites[0].name
        for name, grid in grids.items():
            if grid != grids[first]:
                raise SettingsError(
                    f"LoRTA: {name} has {grid}, but {first} has {grids[first]}: one tensor holds sites of one shape, "
                    "leave one of the two out of the targets"
                )
        if len(set(places.values())) < len(places):
            raise SettingsError(
                "LoRTA: a block has two attentions, and one tensor has place for one: target one of them"
            )
        blocks = list(dict.fromkeys(place.block for place in places.values()))
        roles = list(dict.fromkeys(place.role for place in places.values()))
        tensor = CPTensor(self.rank, grids[first], len(blocks), len(roles), context)
        return {
            name: LoRTAUpdate(self, tensor, blocks.index(place.block), roles.index(place.role), sides[name])
            for name, place in places.items()
        }

    def _heads_are_outputs(self, role: str) -> bool:
        return self.head_side == "output" or (self.head_side == "role" and role != "o")


class Grid(NamedTuple):
    """What sites of one tensor share: the model's width d, the number of heads and their width d_h."""

    width: int
    heads: int
    head_width: int

    def __str__(self) -> str:
        return f"width {self.width} and {self.heads} heads of {self.head_width}"


def _position(site: Site) -> Position:
    place = position(site.name)
    if place is None:
        raise SettingsError(
            f"LoRTA: {site.name} is not the q, k, v or o projection of a numbered block: leave it out of the targets, "
            "or name the slices of a fused projection, as in *.in_proj[q]"
        )
    return place


def _grid(site: Site, heads: int | None, heads_are_outputs: bool) -> Grid:
    held, width = site.out_features, site.in_features
    if not heads_are_outputs:
        held, width = width, held
    if heads is None or held % heads:
        raise SettingsError(f"LoRTA: the {held} features of {site.name} cannot be split in {heads or 'unknown'} heads")
    return Grid(width, heads, held // heads)


class CPTensor(nn.Module):
    """The factors that all sites share."""

    def __init__(self, rank: int, grid: Grid, layers: int, roles: int, context: Context):
        super().__init__()

        def uniform(name: str, rows: int, bound: float) -> nn.Parameter:
            start = uniform_start(rows, rank, f"lorta.{name}", context.seed, device=context.device)
            return nn.Parameter(start * (bound / math.sqrt(3)))

        self.A = uniform("A", grid.width, 1 / math.sqrt(rank))
        self.B = nn.Parameter(torch.zeros(rank, grid.head_width, device=context.device))
        self.H = uniform("H", grid.heads, math.sqrt(6 / rank))
        self.L = uniform("L", layers, math.sqrt(6 / rank))
        self.M = uniform("M", roles, math.sqrt(6 / rank))

    def heads(self) -> Tensor:
        """diag(H_h) B of all heads, transposed and one above the other: (heads · d_h, rank)."""
        return (self.H[:, None] * self.B.T).flatten(0, 1)


class LoRTAUpdate(LowRankUpdate):
    """The update of one site: a slice of the tensor, as LoRA's two factors at LoRA's cost."""

    def __init__(self, method: LoRTA, tensor: CPTensor, layer: int, role: int, heads_are_outputs: bool):
        super().__init__()
        self.tensor, self.layer, self.role, self.heads_are_outputs = tensor, layer, role, heads_are_outputs
        self.scale, self.dropout = relative_scale(method.rank, method.alpha), method.dropout

    def low_rank(self) -> tuple[Tensor, Tensor]:
        width, heads = self.tensor.A, self.tensor.heads()
        inputs, outputs = (width, heads) if self.heads_are_outputs else (heads, width)
        return (inputs * (self.tensor.L[self.layer] * self.tensor.M[self.role])).T, outputs
