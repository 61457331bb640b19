"""PEFT's fixed matrices, drawn as PEFT draws them, so that its adapters can be exchanged without them.

Facts from PEFT 0.21 (Apache-2.0): one generator seeded with `projection_prng_key` fills A, then B. RandLoRA's are
drawn in bfloat16 and divided by their own standard deviation, so they depend on which sites are adapted and on torch's
generator; nothing else in this package does. A's rows are paired with B's columns in an order that depends on n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from randlora.bases.dense import DenseBasis


class PeftBasis(DenseBasis):
    """A given matrix in a basis's place. `drawn` is False when it came from a file and not from a seed."""

    def __init__(self, name: str, matrix: Tensor, drawn: bool = True):
        nn.Module.__init__(self)
        self.name, self.drawn, self.unit, self.density = name, drawn, 1.0, 1.0
        self._cast, self.compressed = None, {}
        self.register_buffer("matrix", matrix.contiguous(), persistent=False)


def draw_randlora(rank: int, outputs: int, inputs: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A (rank, 1, small) and B (large, n, rank) for sites of at most (outputs, inputs), float32."""
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


def draw_vera(rank: int, outputs: int, inputs: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A (rank, inputs) and B (outputs, rank), float32, with the scale in them."""
    if device.type == "meta":
        return torch.empty(rank, inputs, device="meta"), torch.empty(outputs, rank, device="meta")
    generator = torch.Generator().manual_seed(seed)

    def kaiming(*shape: int) -> Tensor:
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    return kaiming(rank, inputs).to(device), kaiming(outputs, rank).to(device)


def columns_by_basis(B: Tensor, n: int) -> Tensor:
    """(D, n·rank) of B (D, ≥ n, rank) for a site of n bases: column j·rank + k is what PEFT pairs with λ_jk."""
    large, _, rank = B.shape
    return B[:, :n].flatten(1).view(large, rank, n).transpose(1, 2).reshape(large, n * rank)


def columns_as_peft(matrix: Tensor, n: int) -> Tensor:
    """The inverse: (D, n, rank) of a (D, n·rank) matrix."""
    large, rank = len(matrix), matrix.shape[1] // n
    return matrix.view(large, n, rank).transpose(1, 2).reshape(large, n, rank)
