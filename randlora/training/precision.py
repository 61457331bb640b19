"""Autocast, with attention in float32 where autocast would take it to bf16 on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["fp32", "bf16"]


def autocast(device: str, precision: str) -> torch.autocast:
    """Products in bf16 where `precision` says so, for a device's type and fp32 or bf16."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def attention_rule(device: str, precision: str) -> AbstractContextManager[None]:
    """`attention_in_float32` where it is due, for a device's type and fp32 or bf16; else nothing changes."""
    return attention_in_float32() if device == "cpu" and precision == "bf16" else nullcontext()


@contextmanager
def attention_in_float32() -> Iterator[None]:
    """Changes autocast's rule for attention on CPUs, where torch's bf16 kernel takes long to go backward.

    Two to eight times as long as in float32, most for short texts and few patches; measured with torch 2.14. Backward
    belongs inside too, since gradient checkpointing runs forward again there.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _attend, "AutocastCPU")
        yield


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, *args, **kwargs).to(q.dtype)
