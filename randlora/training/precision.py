"""Autocast to bf16, with attention on CPUs in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def autocast(device: str, precision: str) -> Iterator[None]:
    """For a device type and fp32 or bf16."""
    enabled = precision == "bf16"
    attention = _attention_in_float32() if enabled and device == "cpu" else nullcontext()
    with attention, torch.autocast(device, torch.bfloat16, enabled=enabled):
        yield


@contextmanager
def _attention_in_float32() -> Iterator[None]:
    """Autocast's rule for attention on CPUs: the backward of torch's bf16 kernel takes two to eight times as long.

    The longer, the shorter the texts or the fewer the patches. Measured with torch 2.14; numbers only get better.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _attend, "AutocastCPU")
        yield


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, *args, **kwargs).to(q.dtype)
