"""The constants by which execution plans are chosen, measured on this machine (`randlora/methods/costs.json`)."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from randlora.analysis.timing import device_seconds_of
from randlora.bases import DenseBasis, KroneckerBasis

SIZES = ((800, 768, 768), (800, 3072, 768), (2048, 896, 896))  # tokens, large, small


def calibrate(device: torch.device) -> dict[str, float]:
    """Ratios to a multiply-add of a large float32 matrix product, each the median over SIZES.

    `low_precision` and `small_products` (of Kronecker factors) and `sparse_products` (on CPUs, the only place where
    they are used) are of a multiply-add; `elementwise` is of an entry in a pass over memory.
    """

    def seconds(function: Callable[..., object], *operands: object) -> float:
        return statistics.median([device_seconds_of(lambda: function(*operands), device) for _ in range(17)][2:])

    ratios: dict[str, list[float]] = {}
    for tokens, large, small in SIZES:
        x, W = torch.randn(tokens, small, device=device), torch.randn(large, small, device=device)
        unit = seconds(F.linear, x, W) / (tokens * large * small)
        B = KroneckerBasis("calibration", large, small, seed=0, device=device)(large, small)
        M = torch.randn(small, small, device=device)
        by_token = seconds(B.up, x) / (tokens * B.multiplications())
        by_column = seconds(B.times, M) / (small * B.multiplications())
        measured = {
            "low_precision": seconds(F.linear, x.bfloat16(), W.bfloat16()) / (tokens * large * small),
            "small_products": (by_token + by_column) / 2,
        }
        if device.type == "cpu":
            S = DenseBasis.drawn("calibration", large, small, seed=0, distribution="ternary", sparsity=25)(large, small)
            measured["sparse_products"] = seconds(S.times, M) / (small * S.multiplications())
        measured["elementwise"] = seconds(torch.add, W, W.clone()) / W.numel()
        for name, value in measured.items():
            ratios.setdefault(name, []).append(value / unit)
    return {name: float(f"{statistics.median(values):.3g}") for name, values in ratios.items()}
