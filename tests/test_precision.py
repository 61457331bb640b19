"""Attention under autocast on a CPU, against torch's own in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from randlora.errors import SettingsError
from randlora.training import Trainer
from randlora.training.precision import attention_in_float32, attention_rule, autocast

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
    with attention_in_float32(), torch.autocast("cpu", torch.bfloat16):
        ours = F.scaled_dot_product_attention(*inputs, **options)
    if mask == "added":
        options["attn_mask"] = options["attn_mask"].float()
    theirs = F.scaled_dot_product_attention(*(one.float() for one in inputs), **options).to(torch.bfloat16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_rule_is_autocasts_and_ends_with_the_context() -> None:
    inputs = qkv(torch.float32)
    with attention_in_float32(), torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*inputs).dtype == torch.float32
        assert (inputs[0] @ inputs[1].mT).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*inputs).dtype == torch.bfloat16


def test_checkpointing_runs_the_same_attention_again() -> None:
    """Oracle: the gradients without checkpointing; exact."""
    inputs, gradients = qkv(torch.bfloat16), []
    for again in (False, True):
        with attention_in_float32():
            with torch.autocast("cpu", torch.bfloat16):
                attend = F.scaled_dot_product_attention
                out = checkpoint(attend, *inputs, use_reentrant=False) if again else attend(*inputs)
            gradients.append(torch.autograd.grad(out.sum(), inputs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bf16_is_bfloat16_whatever_the_devices_default() -> None:
    default = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            with autocast("cpu", precision):
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    finally:
        torch.set_autocast_dtype("cpu", default)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=r"trainer\.device=cuda: torch sees no CUDA device here"):
        Trainer(device="cuda").accelerator()
    assert Trainer(device="cpu").accelerator().device.type == "cpu"


@pytest.mark.parametrize(
    ("device", "precision", "due"), [("cpu", "bf16", True), ("cpu", "fp32", False), ("cuda", "bf16", False)]
)
def test_attention_in_float32_is_due_on_cpus_under_autocast(device: str, precision: str, due: bool) -> None:
    with attention_rule(device, precision), torch.autocast("cpu", torch.bfloat16):
        assert (F.scaled_dot_product_attention(*qkv(torch.float32)).dtype == torch.float32) == due
