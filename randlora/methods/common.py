"""What methods share: groups of sites, and products in the right precision."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.adapters.interface import Frozen, Site, Update
from randlora.adapters.quantization import is_quantised
from randlora.bases import DenseMap, Map, SparseMap, depends_on_size, draw

# The planners' constants by class of device, as scripts/calibrate.py writes them; other devices take the CPU's. Those
# of CUDA are plain counts of multiply-adds: they await a calibration on such a device.
COSTS: dict[str, dict[str, float]] = json.loads((files("randlora.methods") / "costs.json").read_text())


def relative_scale(rank: int, alpha: float | None) -> float:
    """alpha / rank, where alpha None means 2·rank."""
    return 2.0 if alpha is None else alpha / rank


def uniform_start(rows: int, columns: int, *key: str | int, device: torch.device) -> Tensor:
    """Starting values (rows, columns) on the device, uniform within ±√3, drawn by `key`; no values on meta."""
    if device.type == "meta" or not rows:
        return torch.empty(rows, columns, device=device)
    return draw(rows, columns, *key).to(device)


def sharing(sites: Sequence[Site], basis: str, size: Callable[[Site], int | tuple[int, int]]) -> list[list[Site]]:
    """The sites in groups that can have the same fixed matrices: all, or those of one `size` where `basis` needs it."""
    if not depends_on_size(basis):
        return [list(sites)]
    groups: dict[int | tuple[int, int], list[Site]] = {}
    for site in sites:
        groups.setdefault(size(site), []).append(site)
    return [groups[key] for key in sorted(groups)]


def may_form_weight(weight: Tensor) -> bool:
    """Whether W0 + ΔW may be formed in training: a base kept in low precision would round a small ΔW away."""
    return weight.dtype.itemsize >= 4 and not is_quantised(weight)


def relative_cost(B: Map, rate: Mapping[str, float]) -> float:
    """What a multiply-add of a product with B costs, in those of a large dense product."""
    if isinstance(B, DenseMap):
        return 1.0
    return rate["sparse_products" if isinstance(B, SparseMap) else "small_products"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matrix product with x runs in: autocast's where it is on, x's own elsewhere."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def autocast_off(x: Tensor) -> torch.autocast:
    """For code that chooses its dtypes by hand: trained tensors stay float32 until the products."""
    return torch.autocast(x.device.type, enabled=False)


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As F.linear, in the dtype of the tokens."""
    dtype = tokens.dtype
    weight = weight if is_quantised(weight) else weight.to(dtype)
    return F.linear(tokens, weight, None if bias is None else bias.to(dtype))


def low_rank_linear(x: Tensor, base: Frozen, dropped: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """base(x) + scale · dropped Aᵀ Bᵀ for x and dropped (..., in), A (r, in), B (out, r); no temporary of y's size."""
    y = base(x)
    low = F.linear(dropped, A.to(dropped.dtype)).flatten(0, -2)
    y.view(-1, y.shape[-1]).addmm_(low.to(y.dtype), B.to(y.dtype).T, alpha=scale)
    return y


class LowRankUpdate(Update):
    """An update that is LoRA's, ΔW = scale · B A, whatever its factors are made of; PEFT reads it as a LoRA."""

    scale: float
    dropout: float

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r); r is the site's own."""
        raise NotImplementedError

    def delta(self, weight: Tensor) -> Tensor:
        A, B = self.low_rank()
        return self.scale * (B @ A)

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        return low_rank_linear(x, base, dropped, *self.low_rank(), self.scale)
