"""Measures the constants by which RandLoRA's planner chooses, and writes them into randlora/methods/costs.json.

python scripts/calibrate.py              the CPU, one thread
python scripts/calibrate.py cuda

All are ratios to one multiply-add of a large float32 matrix product: of bfloat16, of the small products of Kronecker
factors, of sparse ones, and of one number in a pass over memory. The entry of the class of device is replaced, the
others stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark import timed

import randlora.methods
from randlora.bases import DenseBasis, KroneckerBasis

COSTS = Path(randlora.methods.__file__).with_name("costs.json")
SIZES = ((800, 768, 768), (800, 3072, 768), (2048, 896, 896))  # tokens, large, small


def measure(device: torch.device) -> dict[str, float]:
    """The constants, each the median over SIZES."""

    def seconds(function: Callable[..., object], *operands: object) -> float:
        def call() -> None:
            function(*operands)

        return statistics.median([timed(device, call) for _ in range(17)][2:])

    found: dict[str, list[float]] = {
        "low_precision": [],
        "small_products": [],
        "sparse_products": [],
        "elementwise": [],
    }
    for tokens, large, small in SIZES:
        x, W = torch.randn(tokens, small, device=device), torch.randn(large, small, device=device)
        unit = seconds(F.linear, x, W) / (tokens * large * small)
        half = seconds(F.linear, x.bfloat16(), W.bfloat16()) / (tokens * large * small)
        B = KroneckerBasis("calibration", large, small, seed=0, device=device)(large, small)
        M = torch.randn(small, small, device=device)
        by_token = seconds(B.up, x) / (tokens * B.multiplications())
        by_column = seconds(B.times, M) / (small * B.multiplications())
        found["low_precision"].append(half / unit)
        found["small_products"].append((by_token + by_column) / 2 / unit)
        if device.type == "cpu":  # the only place where they are used
            S = DenseBasis.drawn("calibration", large, small, seed=0, distribution="ternary", sparsity=25)(large, small)
            found["sparse_products"].append(seconds(S.times, M) / (small * S.multiplications()) / unit)
        found["elementwise"].append(seconds(torch.add, W, W.clone()) / W.numel() / unit)
    return {name: float(f"{statistics.median(values):.3g}") for name, values in found.items() if values}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="cpu", choices=("cpu", "cuda"))
    device = torch.device(parser.parse_args(arguments).device)
    torch.set_num_threads(1)
    table = json.loads(COSTS.read_text())
    table[device.type] = measure(device)
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    COSTS.write_text(f"{{\n{rows}\n}}\n")
    print(COSTS.read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
