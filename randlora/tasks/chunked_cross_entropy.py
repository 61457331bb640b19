"""Cross-entropy of a linear head, with the logits of few tokens at a time.

4,096 tokens over LLaMA-3's 128,256 words make 2 GiB of float32 logits, as much again for their gradient, and several
passes over both. Here a chunk of them is made, turned into its gradient and let go of, so only the gradients of the
hidden states are kept. torch 2.14 has torch.nn.functional.linear_cross_entropy for the same, but in bf16 that sums the
loss in bf16 and takes several times as long on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = {"cpu": 2**23}  # logits at a time: so few that a CPU keeps them in its caches
_LARGE_CHUNK = 2**26  # elsewhere, enough to fill a GPU; with what is made of them, 0.7 GB


def chunked_cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the tokens of cross_entropy(head(hidden), targets, label_smoothing=smoothing).

    `hidden` is (tokens, width), `targets` (tokens,); 0 when there are no tokens. Under autocast the products are taken
    in its type; the rest, and the loss, are in float32 at least.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    with torch.autocast(device, enabled=False):
        weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        return _ChunkedCrossEntropy.apply(hidden.to(dtype), weight, bias, targets, smoothing)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss is one number, so its gradients are known, but for a factor, when it is made."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> Tensor:
        wide, needed = torch.promote_types(hidden.dtype, torch.float32), ctx.needs_input_grad[:3]
        by_hidden = torch.empty_like(hidden) if needed[0] else None
        by_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        by_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None
        tokens, vocabulary = len(hidden), len(weight)
        rows = max(1, _CHUNK.get(hidden.device.type, _LARGE_CHUNK) // vocabulary)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for part in (slice(start, start + rows) for start in range(0, tokens, rows)):
            index = targets[part, None]
            logp = nn.functional.linear(hidden[part], weight, bias).log_softmax(1, dtype=wide)
            loss -= (1 - smoothing) * logp.gather(1, index).sum()
            if smoothing:
                loss -= smoothing / vocabulary * logp.sum()
            if not any(needed):
                continue
            slope = logp.exp_()  # of the loss by the logits, times the tokens: softmax less the target distribution
            if smoothing:
                slope -= smoothing / vocabulary
            slope.scatter_add_(1, index, slope.new_full(index.shape, smoothing - 1))
            slope = slope.div_(tokens).to(hidden.dtype)
            if by_hidden is not None:
                torch.mm(slope, weight, out=by_hidden[part])
            if by_weight is not None:
                by_weight += slope.T @ hidden[part]
            if by_bias is not None:
                by_bias += slope.sum(0, dtype=wide)
        ctx.save_for_backward(by_hidden, by_weight, by_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss / max(tokens, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        kept = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if slope is None else (slope * factor).to(dtype) for slope, dtype in kept), None, None
