"""MoRA: one square matrix between maps without parameters (Jiang et al., 2024, arXiv 2405.12130)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.bounds import Count, Share
from randlora.errors import SettingsError


@dataclass(frozen=True)
class MoRA(Method):
    """ΔW x = decompress(M compress(x)) with M (q × q) trained, zero at the start: q² parameters a site.

    q is √(rank·(in + out)), rounded, so that there are as many as in a LoRA of `rank`; for ``rotation`` made even.
    The maps around M are `compression`:

    * ``sharing`` (Eq. 6, for a large rank): compress adds the inputs j of equal j mod q, decompress copies: ΔW_ij =
      M[i mod q, j mod q], of rank q.
    * ``grouped``: the same with groups of neighbours, in / q of them rounded up in the first groups and down after.
    * ``decoupled`` (Eq. 8): the inputs are cut into pieces of q, M is applied to each: ΔW = blockdiag(M, M, …).
    * ``rotation`` (Eq. 9, for a small rank): the same after turning the pairs (j, j + q/2) of piece i, counted from 0,
      by the angle i / 10000^(2j / q).

    Where q does not divide the inputs, the last group or piece is filled with the first inputs once more, and outputs
    are copied or cut to their number, all as in the authors' code. `dropout` acts on the input of the update.

    Ours: where pieces of ``decoupled`` and ``rotation`` reach past the outputs, which the code drops with their inputs,
    they are added to the first again (``surplus=drop``: the code's rule; the other two have no such pieces). A q above
    the site's smaller side is refused.
    """

    rank: Count = 8
    compression: Literal["sharing", "grouped", "decoupled", "rotation"] = "rotation"
    surplus: Literal["add", "drop"] = "add"
    dropout: Share = 0.0

    def size(self, site: Site) -> int:
        """q; SettingsError where the site is too small for it."""
        size = int(math.sqrt(self.rank * (site.in_features + site.out_features)) + 0.5)
        size = size // 2 * 2 if self.compression == "rotation" else size
        if size > site.small:
            raise SettingsError(
                f"MoRA.rank={self.rank} makes a {size} × {size} matrix for {site.name}, whose smaller side is "
                f"{site.small}: choose a lower rank"
            )
        return size

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        return {site.name: MoRAUpdate(self, site, self.size(site), context.device) for site in sites}


class MoRAUpdate(Update):
    """The update of one site."""

    turn: Tensor | None  # cosine and sine of the angle of every piece and pair, (2, pieces, q/2)

    def __init__(self, method: MoRA, site: Site, size: int, device: torch.device):
        super().__init__()
        self.compression, self.dropping, self.dropout = method.compression, method.surplus == "drop", method.dropout
        self.out_features = site.out_features
        self.M = nn.Parameter(torch.zeros(size, size, device=device))
        turn = None
        if method.compression == "rotation":
            pieces, pairs = -(-site.in_features // size), torch.arange(size // 2, device=device)
            angles = torch.arange(pieces, device=device)[:, None] * 10000.0 ** (-2 * pairs.double() / size)
            turn = torch.stack([angles.cos(), angles.sin()]).float()
        self.register_buffer("turn", turn, persistent=False)

    def product(self, x: Tensor) -> Tensor:
        """ΔW x for every row of x (T, in): (T, out)."""
        M, size, out_features = self.M.to(x.dtype), self.M.shape[0], self.out_features
        if self.compression == "grouped":
            return _copied(F.linear(_added(x, size), M), out_features)
        pieces = torch.cat([x, x[:, : -x.shape[1] % size]], 1).unflatten(1, (-1, size))  # (T, n, q)
        if self.compression == "sharing":
            return _repeated(F.linear(pieces.sum(1), M), out_features)
        if self.turn is not None:
            cosine, sine = self.turn.to(x.dtype)
            a, b = pieces.chunk(2, -1)
            pieces = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
        held = -(-out_features // size)
        if not self.dropping and pieces.shape[1] > held:  # M is linear: pieces of one place may be added before it
            pieces = torch.stack([pieces[:, start::held].sum(1) for start in range(held)], 1)
        return _repeated(F.linear(pieces[:, :held], M).flatten(1), out_features)

    def delta(self, weight: Tensor) -> Tensor:
        identity = torch.eye(weight.shape[1], dtype=self.M.dtype, device=self.M.device)
        return self.product(identity).T

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        y = base(x)
        dropped = F.dropout(x, self.dropout, self.training)
        return y + self.product(dropped.flatten(0, -2)).view_as(y).to(y.dtype)


def _repeated(z: Tensor, width: int) -> Tensor:
    """The columns of z again and again, up to `width`."""
    return z.repeat(1, -(-width // z.shape[1]))[:, :width]


def _sizes(width: int, groups: int) -> list[tuple[int, int]]:
    """(groups, size of each) of neighbours: the larger first."""
    small, larger = divmod(width, groups)
    return [(larger, small + 1), (groups - larger, small)]


def _added(x: Tensor, groups: int) -> Tensor:
    """The sums over groups of neighbouring columns."""
    (larger, size), (_, small) = _sizes(x.shape[1], groups)
    head, tail = x.split([larger * size, x.shape[1] - larger * size], 1)
    return torch.cat([head.unflatten(1, (larger, size)).sum(-1), tail.unflatten(1, (-1, small)).sum(-1)], 1)


def _copied(z: Tensor, width: int) -> Tensor:
    """Every column copied to a group of neighbours, `width` in all."""
    (larger, size), (_, small) = _sizes(width, z.shape[1])
    head, tail = z.split([larger, z.shape[1] - larger], 1)
    return torch.cat([head.repeat_interleave(size, 1), tail.repeat_interleave(small, 1)], 1)
