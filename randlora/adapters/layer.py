"""The layer: a frozen linear map with updates on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Frozen, Update
from randlora.adapters.quantization import dense, is_quantised


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of an nn.Linear or of transformers' Conv1D as (out, in), a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if isinstance(module, nn.Linear) else weight.T


class Segment(NamedTuple):
    """Rows of a fused matrix, and the update that sits on them, if any."""

    rows: slice
    update: Update | None


class AdaptedLinear(nn.Module):
    """A linear module, never written to, and its updates: one for the whole matrix or one per slice of rows.

    `base` is an nn.Linear, or transformers' Conv1D, which stores its weight transposed (in, out).
    """

    def __init__(self, base: nn.Module, updates: Sequence[tuple[slice | None, Update]]):
        super().__init__()
        self.base = base
        self.transposed = not isinstance(base, nn.Linear)
        self.updates = nn.ModuleList(update for _, update in updates)
        self.rows = [rows or slice(0, self.out_features) for rows, _ in updates]
        self._merged: Tensor | None = None

    # Code around the model reads these of its linears (open_clip and transformers ask for weight.dtype).
    @property
    def weight(self) -> Tensor:
        """The frozen W0, (out, in)."""
        return linear_weight(self.base)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, (out,), or None."""
        return self.base.bias  # type: ignore[return-value]

    @property
    def quantised(self) -> bool:
        """Whether W0 is kept in fewer bits; then W' is never formed but for good."""
        return is_quantised(self.weight)

    @property
    def out_features(self) -> int:
        """Rows of W0."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of W0."""
        return self.weight.shape[1]

    def segments(self) -> list[Segment]:
        """All rows in order, adapted or not."""
        segments, start = [], 0
        for rows, update in sorted(zip(self.rows, self.updates, strict=True), key=lambda pair: pair[0].start):
            if rows.start > start:
                segments.append(Segment(slice(start, rows.start), None))
            segments.append(Segment(rows, update))  # type: ignore[arg-type]
            start = rows.stop
        if start < self.out_features:
            segments.append(Segment(slice(start, self.out_features), None))
        return segments

    def frozen(self, rows: slice) -> Frozen:
        """The frozen map of these rows."""
        if rows == slice(0, self.out_features):
            return Frozen(self.weight, self.bias)
        return Frozen(self.weight[rows], None if self.bias is None else self.bias[rows])

    def forward(self, x: Tensor) -> Tensor:
        """x W'ᵀ + b, (..., out), for x (..., in)."""
        if self._merged is not None:
            return F.linear(x, self._merged, self.bias)
        outputs = []
        for rows, update in self.segments():
            base = self.frozen(rows)
            outputs.append(base(x) if update is None else update(x, base))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W' in the base's dtype, (out, in); the sum is taken in float32 at least."""
        weight = dense(self.weight)
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for rows, update in zip(self.rows, self.updates, strict=True):
            merged[rows] += update.delta(weight[rows])
        return merged.to(weight.dtype)

    def stash_merged(self) -> None:
        """From here on forward costs what the base costs; the base keeps its weights.

        A quantised base stays apart: W' would take the memory that quantising saves.
        """
        if not self.quantised:
            self._merged = self.merged_weight()

    def drop_merged(self) -> None:
        """Ends what `stash_merged` began."""
        self._merged = None

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """The base module with W' in place of W0, for good."""
        weight = self.merged_weight()
        weight = weight.T.contiguous() if self.transposed else weight
        self.base.weight = nn.Parameter(weight, requires_grad=False)
        return self.base
