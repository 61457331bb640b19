"""The trainer's autocast, against torch's own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from randlora.training.precision import autocast

SHAPE = (2, 4, 5, 8)


def qkv(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(SHAPE).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("mask", [None, "boolean", "added", "causal"])
def test_attention_under_autocast_is_that_of_float32(mask: str | None) -> None:
    """Oracle: torch's attention of the same bf16 inputs in float32, rounded at the end; exact."""
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    options = {
        None: {},
        "boolean": {"attn_mask": allowed},
        "added": {"attn_mask": torch.where(allowed, 0.0, -1e4).bfloat16()},
        "causal": {"is_causal": True},
    }[mask]
    inputs = qkv(torch.bfloat16)
    with autocast("cpu", "bf16"):
        ours = F.scaled_dot_product_attention(*inputs, **options)
    if mask == "added":
        options["attn_mask"] = options["attn_mask"].float()
    theirs = F.scaled_dot_product_attention(*(one.float() for one in inputs), **options).to(torch.bfloat16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_rule_ends_with_the_autocast() -> None:
    inputs = qkv(torch.float32)
    with autocast("cpu", "bf16"):
        assert F.scaled_dot_product_attention(*inputs).dtype == torch.float32
        assert (inputs[0] @ inputs[1].mT).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*inputs).dtype == torch.bfloat16
    with autocast("cpu", "fp32"):
        assert (inputs[0] @ inputs[1].mT).dtype == torch.float32
