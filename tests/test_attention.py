"""Opened attention computes what nn.MultiheadAttention computes; the oracle is the original module in float64."""

import copy

import pytest
import torch
from torch import nn

from randlora.adapters import fuse_attention, unfuse_attention

WIDTH, HEADS, BATCH, LENGTH = 24, 4, 3, 7


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def pair(**options):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    original = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, **options)).eval().double()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.normal_(std=0.3)
    unfused = copy.deepcopy(original)
    unfuse_attention(unfused)
    assert not isinstance(unfused[0], nn.MultiheadAttention)
    return original[0], unfused[0]


def test_a_mask_takes_the_precision_of_the_model() -> None:
    """Oracle: the same attention without a mask, for one that hides nothing."""
    _, unfused = pair(batch_first=True)
    unfused, x = unfused.bfloat16(), values(BATCH, LENGTH, WIDTH).bfloat16()
    for need in (True, False):
        output, _ = unfused(x, x, x, attn_mask=torch.zeros(LENGTH, LENGTH), need_weights=need)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, unfused(x, x, x, need_weights=need)[0])


def masks() -> dict:
    causal = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
    added = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(causal, float("-inf"))
    per_head = values(BATCH * HEADS, LENGTH, LENGTH)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -2:] = True
    return {
        "none": {},
        "boolean": {"attn_mask": causal},
        "additive": {"attn_mask": added},
        "per head": {"attn_mask": per_head},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "causal hint": {"attn_mask": added, "is_causal": True},
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_equals_the_original(mask: str, need_weights: bool, batch_first: bool) -> None:
    original, unfused = pair(batch_first=batch_first)
    x = values(BATCH, LENGTH, WIDTH) if batch_first else values(LENGTH, BATCH, WIDTH)
    torch.manual_seed(1)
    options = masks()[mask] | {"need_weights": need_weights}
    (expected, weights), (output, ours) = original(x, x, x, **options), unfused(x, x, x, **options)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert (weights is None) == (ours is None)
    if weights is not None:
        torch.testing.assert_close(ours, weights, rtol=0, atol=1e-12)


def test_different_inputs_unbatched_and_without_bias() -> None:
    original, unfused = pair(batch_first=True)
    q, k, v = values(2, 5, WIDTH), values(2, 6, WIDTH), values(2, 6, WIDTH)
    for options in ({}, {"average_attn_weights": False}):
        for ours, expected in zip(unfused(q, k, v, **options), original(q, k, v, **options), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    x = values(5, WIDTH)
    for ours, expected in zip(unfused(x, x, x), original(x, x, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    original, unfused = pair(bias=False)
    torch.testing.assert_close(unfused(q, q, q)[0], original(q, q, q)[0], rtol=0, atol=1e-12)


def test_gradients_reach_the_projections() -> None:
    original, unfused = pair(batch_first=True)
    x = values(BATCH, LENGTH, WIDTH)
    original(x, x, x, need_weights=False)[0].square().sum().backward()
    unfused(x, x, x, need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(unfused.in_proj.weight.grad, original.in_proj_weight.grad, rtol=1e-10, atol=1e-12)


def test_dropout_is_on_in_training_alone() -> None:
    _, unfused = pair(batch_first=True, dropout=0.5)
    x = values(BATCH, LENGTH, WIDTH)
    assert torch.equal(unfused(x, x, x, need_weights=False)[0], unfused(x, x, x, need_weights=False)[0])
    unfused.train()
    assert not torch.equal(unfused(x, x, x, need_weights=False)[0], unfused(x, x, x, need_weights=False)[0])


def test_fused_again_it_is_the_original() -> None:
    model = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dropout=0.1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unfuse_attention(model)
    fuse_attention(model)
    assert type(model[0]) is nn.MultiheadAttention
    assert model[0].dropout == 0.1
    assert model[0].batch_first
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_what_cannot_be_unfused_stays() -> None:
    model = nn.ModuleList(
        [
            nn.MultiheadAttention(WIDTH, HEADS, kdim=10, vdim=10),
            nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True),
            nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True),
        ]
    )
    unfuse_attention(model)
    assert all(isinstance(module, nn.MultiheadAttention) for module in model)
