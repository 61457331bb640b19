"""nn.MultiheadAttention replaced by a module of linear maps (unfused), and put back (fused).

The original hides its projections in a parameter and in a module whose forward is never called, so no update
can be put on them. The unfused module computes the same function from two linear maps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def can_unfuse(module: nn.Module) -> bool:
    """Whether the attention has one fused projection and no extra key or value rows."""
    return (
        type(module) is nn.MultiheadAttention
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
    )


class UnfusedAttention(nn.Module):
    """The function of an nn.MultiheadAttention over width e, from in_proj (3e × e) and out_proj (e × e)."""

    def __init__(self, original: nn.MultiheadAttention):
        super().__init__()
        self.embed_dim = original.embed_dim
        self.num_heads = original.num_heads
        self.dropout = original.dropout
        self.batch_first = original.batch_first
        self.train(original.training)
        # Built on meta and given the original's own parameters: nothing is copied.
        self.in_proj = nn.Linear(self.embed_dim, 3 * self.embed_dim, original.in_proj_bias is not None, device="meta")
        self.in_proj.weight = original.in_proj_weight
        if original.in_proj_bias is not None:
            self.in_proj.bias = original.in_proj_bias
        self.out_proj: nn.Module = original.out_proj

    def fused(self) -> nn.MultiheadAttention:
        """The plain nn.MultiheadAttention again, around the present weights."""
        bias: Tensor | None = self.in_proj.bias
        fused = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=bias is not None,
            batch_first=self.batch_first,
            device="meta",
        )
        fused.in_proj_weight, fused.in_proj_bias = self.in_proj.weight, bias  # type: ignore[assignment]
        fused.out_proj = self.out_proj  # type: ignore[assignment]
        return fused.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward, whose arguments, shapes and masks these are.

        Args:
            query: (L, e), or (B, L, e) where `batch_first` and (L, B, e) elsewhere.
            key, value: Likewise, of S positions.
            key_padding_mask: (S) or (B, S); True hides a position, floats are added to its scores.
            need_weights: Whether the attention's weights are returned, too.
            attn_mask: (L, S) or (B·heads, L, S), as the other mask.
            average_attn_weights: Whether the weights are the mean over heads, or those of each.
            is_causal: That `attn_mask` is the causal one; it must be given all the same.

        Returns:
            The output, of the query's shape, and the weights (B, L, S) or (B, heads, L, S), or None.
        """
        unbatched = query.dim() == 2
        first = 0 if unbatched or self.batch_first else 1
        q, k, v = (
            tensor.transpose(0, first) if not unbatched else tensor.unsqueeze(0)
            for tensor in self._project(query, key, value)
        )
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, L, e / heads)
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            context = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if unbatched else weights
        else:
            weights = None
            # is_causal is a hint that needs attn_mask beside it, so the mask alone decides.
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(context.transpose(1, 2).flatten(-2))
        return (output.squeeze(0) if unbatched else output.transpose(0, first)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return self.in_proj(query).chunk(3, dim=-1)
        # Different inputs: the fused map runs on each, and each gives the third that is wanted.
        return tuple(self.in_proj(x).chunk(3, dim=-1)[i] for i, x in enumerate((query, key, value)))

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one to add to the scores, broadcastable to (B, heads, L, S), or None."""
        total = None
        for mask, is_padding in ((attn_mask, False), (padding, True)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
            mask = mask.to(q.dtype)
            if is_padding:
                mask = mask.reshape(-1, 1, 1, k.shape[-2])
            elif mask.dim() == 3:
                mask = mask.unflatten(0, (-1, self.num_heads))
            total = mask if total is None else total + mask
        return total


def unfuse_attention(model: nn.Module) -> None:
    """Replaces every nn.MultiheadAttention inside `model` by its unfused form, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if can_unfuse(child):
                setattr(parent, name, UnfusedAttention(child))  # type: ignore[arg-type]


def fuse_attention(model: nn.Module) -> None:
    """Replaces every unfused attention whose projections are plain linears by nn.MultiheadAttention, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, UnfusedAttention):
                setattr(parent, name, child.fused())
