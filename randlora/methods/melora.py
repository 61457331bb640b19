"""MELoRA: small LoRAs side by side, each on a part of the features (Ren et al., ACL 2024, arXiv 2402.17263)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.bounds import Count, Positive, Share
from randlora.errors import SettingsError
from randlora.methods.common import LowRankUpdate, relative_scale, uniform_start
from randlora.rng import permutation


@dataclass(frozen=True)
class MELoRA(Method):
    """ΔW = (alpha / rank) · blockdiag(B_1 A_1, …, B_n A_n): rank·(in + out) trained parameters, of rank n·rank.

    A_i (rank × in/n) and B_i (out/n × rank) join the i-th part of the inputs to the i-th part of the outputs, n being
    `parts`. A_i starts uniform in ±1/√(in/n) (Kaiming with a = √5), B_i at zero. `dropout` acts on the input of the
    update. `alpha` defaults to 2·rank. Widths that n does not divide are refused.

    The parts are neighbours by index, so ΔW depends on the features' order. Ours: with `permuted` each site draws its
    own order of the inputs and of the outputs, by name from the run's seed.
    """

    rank: Count = 8
    parts: Count = 2
    alpha: Positive | None = None
    dropout: Share = 0.0
    permuted: bool = False

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        for site in sites:
            if site.in_features % self.parts or site.out_features % self.parts:
                raise SettingsError(
                    f"MELoRA.parts={self.parts} does not divide the widths {site.out_features} × {site.in_features} of "
                    f"{site.name}: choose a divisor of {math.gcd(site.out_features, site.in_features)}"
                )
        return {site.name: MELoRAUpdate(self, site, context.seed, context.device) for site in sites}


class MELoRAUpdate(LowRankUpdate):
    """The update of one site."""

    inputs: Tensor | None  # the order of the inputs, (in,)
    outputs: Tensor | None  # where each output stands in the parts' order, (out,)

    def __init__(self, method: MELoRA, site: Site, seed: int, device: torch.device):
        super().__init__()
        n, r, width = method.parts, method.rank, site.in_features // method.parts
        self.scale, self.dropout = relative_scale(r, method.alpha), method.dropout
        start = uniform_start(n * r, width, "melora.A", site.name, seed, device=device)
        self.A = nn.Parameter((start / math.sqrt(3 * width)).view(n, r, width))
        self.B = nn.Parameter(torch.zeros(n, site.out_features // n, r, device=device))
        orders = {"inputs": site.in_features, "outputs": site.out_features}
        for name, size in orders.items():
            order = torch.from_numpy(permutation(size, f"melora.{name}", site.name, seed)) if method.permuted else None
            self.register_buffer(name, order if order is None else order.to(device), persistent=False)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        A, B = torch.block_diag(*self.A), torch.block_diag(*self.B)
        if self.inputs is None or self.outputs is None:
            return A, B
        return A[:, self.inputs.argsort()], B[self.outputs]

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        y = base(x)
        dropped = F.dropout(x, self.dropout, self.training).flatten(0, -2)
        if self.inputs is not None:
            dropped = dropped.index_select(1, self.inputs)
        parts = dropped.unflatten(1, (self.A.shape[0], -1)).transpose(0, 1)  # (n, T, in/n)
        low = parts @ self.A.to(dropped.dtype).mT
        high = (self.scale * low).to(y.dtype) @ self.B.to(y.dtype).mT  # (n, T, out/n)
        moved = high.transpose(0, 1).flatten(1)
        return y + (moved if self.outputs is None else moved.index_select(1, self.outputs)).view_as(y)
