"""PEFT's fixed matrices, drawn as PEFT draws them, so that its adapters can be exchanged without them.

Facts from PEFT 0.21 (Apache-2.0): one generator seeded with `projection_prng_key` fills A, then B. RandLoRA's are
drawn in bfloat16 and divided by their own standard deviation, so they depend on which sites are adapted and on torch's
generator; nothing else in this package does. A's rows are paired with B's columns in an order that depends on n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from randlora.bases.dense import DenseBasis

Pair = tuple[DenseBasis, DenseBasis]


def randlora_bases(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, device: torch.device
) -> dict[str, Pair]:
    """A (rank, small) and B (large, n·rank) of RandLoRA for every site, n its ceil(smaller side / rank).

    `shapes` are the sites' (out, in) by name; small and large are the sides of the smallest matrix that holds all.
    Sites of one n share B, and all share A. PEFT draws them from a torch.Generator of the seed, on the CPU; they are
    moved to `device`, on which, if it is ``meta``, nothing is drawn.
    """
    A, B = _draw_randlora(rank, *_extent(shapes), seed, device)
    count = {site: math.ceil(min(shape) / rank) for site, shape in shapes.items()}
    basis_A = DenseBasis("peft.A", A[:, 0])
    basis_B = {n: DenseBasis("peft.B", columns_by_basis(B, n)) for n in set(count.values())}
    return {site: (basis_A, basis_B[n]) for site, n in count.items()}


def vera_bases(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, device: torch.device) -> dict[str, Pair]:
    """A (rank, in) and B (out, rank) of VeRA, of the widest and the tallest site, for every site: one pair.

    Arguments as of `randlora_bases`.
    """
    outputs, inputs = _extent(shapes)
    generator = torch.Generator().manual_seed(seed)

    def kaiming(rows: int, columns: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(rows, columns, device="meta")
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator).to(device)

    pair = DenseBasis("peft.A", kaiming(rank, inputs)), DenseBasis("peft.B", kaiming(outputs, rank))
    return dict.fromkeys(shapes, pair)


def _extent(shapes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The most outputs and the most inputs of all sites."""
    outputs, inputs = zip(*shapes.values(), strict=True)
    return max(outputs), max(inputs)


def _draw_randlora(rank: int, outputs: int, inputs: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A (rank, 1, small) and B (large, n, rank) as PEFT stores them, float32."""
    small, large = min(outputs, inputs), max(outputs, inputs)
    n = math.ceil(small / rank)
    if device.type == "meta":
        return torch.empty(rank, 1, small, device="meta"), torch.empty(large, n, rank, device="meta")
    generator = torch.Generator().manual_seed(seed)

    def kaiming(*shape: int) -> Tensor:
        return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)

    A = kaiming(rank, 1, small)
    B = torch.cat([kaiming(large, 1, rank) for _ in range(n)], dim=1)
    return (A / A.std()).float().to(device), (B / B.std()).float().to(device)


def columns_by_basis(B: Tensor, n: int) -> Tensor:
    """(D, n·rank) of B (D, ≥ n, rank) for a site of n bases: column j·rank + k is what PEFT pairs with λ_jk."""
    large, _, rank = B.shape
    return B[:, :n].flatten(1).view(large, rank, n).transpose(1, 2).reshape(large, n * rank)


def columns_as_peft(matrix: Tensor, n: int) -> Tensor:
    """The inverse: (D, n, rank) of a (D, n·rank) matrix."""
    large, rank = len(matrix), matrix.shape[1] // n
    return matrix.view(large, n, rank).transpose(1, 2).reshape(large, n, rank)
