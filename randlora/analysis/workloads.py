"""What layers are timed on: single linear maps, and transformer blocks of the sizes of ViT-B and of a small LLaMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer block: x (batch, length, width) to the same; gated MLP and grouped keys as in LLaMA if asked."""

    def __init__(self, width: int, heads: int, mlp: int, kv_width: int = 0, gated: bool = False):
        super().__init__()
        self.num_heads, kv_width = heads, kv_width or width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(width, kv_width), nn.Linear(width, kv_width)
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.gate = nn.Linear(width, mlp) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        h, size = self.norm1(x), x.shape[-1] // self.num_heads
        q, k, v = (p(h).unflatten(-1, (-1, size)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.gelu(self.up(h)) if self.gate is None else F.silu(self.gate(h)) * self.up(h))


class Workload(NamedTuple):
    """What is timed: a model, the modules to adapt in it, and the shape of its input.

    `attention` are those of the targets that one tensor over layers and heads can hold, which is LoRTA's.
    """

    build: Callable[[], nn.Module]
    targets: list[str]
    shape: tuple[int, ...]
    attention: tuple[str, ...] = ()


def _linear(out_features: int, in_features: int, tokens: int) -> Workload:
    return Workload(lambda: nn.Sequential(nn.Linear(in_features, out_features)), ["0"], (tokens, in_features))


def _vit(blocks: int, images: int) -> Workload:
    attention = ("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj")
    build = lambda: nn.Sequential(*(Block(768, heads=12, mlp=3072) for _ in range(blocks)))  # noqa: E731
    return Workload(build, [*attention, "*.up", "*.down"], (images, 50, 768), attention)


def _llama(texts: int) -> Workload:
    targets = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*.up", "*.down", "*.gate"]
    build = lambda: nn.Sequential(Block(896, heads=14, mlp=4864, kv_width=128, gated=True))  # noqa: E731
    return Workload(build, targets, (texts, 512, 896), ("*.q_proj", "*.o_proj"))


WORKLOADS = {
    f"linear_{out}x{into}_t{tokens}": _linear(out, into, tokens)
    for out, into in ((768, 768), (3072, 768), (768, 3072))
    for tokens in (64, 512, 2048)
} | {
    "vit_b16": _vit(blocks=2, images=16),
    "vit_b32": _vit(blocks=2, images=32),
    "vit_12_blocks_b16": _vit(blocks=12, images=16),
    "llama_t512": _llama(texts=1),
    "llama_t2048": _llama(texts=4),
}
