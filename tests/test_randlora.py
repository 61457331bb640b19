"""RandLoRA against its definition, against PEFT, and in memory."""

import pytest
import torch
from torch import nn

import randlora
from randlora.adapters.seat import Frozen
from randlora.methods import LoRA, RandLoRA
from randlora.methods.forms import Activation, Materialised, choose_form

SHAPES = {"square": (24, 24), "tall": (60, 24), "wide": (24, 60)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def update_of(shape: tuple[int, int], method: RandLoRA, dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    """A single adapted linear with random trained numbers, and its update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    randlora.adapt(model, method, ["0"])
    model.to(dtype)
    update = model[0].updates[0]
    with torch.no_grad():
        update.lambda_.normal_()
        update.gamma.normal_()
    return model[0], update


@every_shape
def test_delta_is_the_papers_sum(shape: tuple[int, int]) -> None:
    """Oracle: equation 4, basis by basis, with explicit diagonal matrices in float64."""
    seat, update = update_of(shape, RandLoRA(rank=5, alpha=15))
    n, r = update.lambda_.shape
    A, B = update.bases(max(shape), torch.float64)
    total = torch.zeros(max(shape), min(shape), dtype=torch.float64)
    for j in range(n):
        total += B[:, j * r : (j + 1) * r] @ torch.diag(update.lambda_[j]) @ A @ torch.diag(update.gamma[j])
    expected = 3.0 * (total if shape[0] >= shape[1] else total.T)
    torch.testing.assert_close(update.delta(seat.weight), expected, rtol=1e-12, atol=1e-12)


@every_shape
@pytest.mark.parametrize("form", ["activation", "materialised"])
def test_both_forms_pass_gradcheck(shape: tuple[int, int], form: str) -> None:
    """Oracle: numerical differentiation in float64."""
    seat, update = update_of(shape, RandLoRA(rank=5))
    A, B = update.bases(max(shape), torch.float64)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    arguments = (x, update.lambda_, update.gamma, A, B, update.scale)
    if form == "activation":
        assert torch.autograd.gradcheck(lambda *a: Activation.apply(*a, shape[0]), arguments)
    else:
        assert torch.autograd.gradcheck(lambda *a: Materialised.apply(*a, seat.weight), arguments)


@every_shape
def test_the_forms_agree(shape: tuple[int, int]) -> None:
    seat, update = update_of(shape, RandLoRA(rank=5))
    A, B = update.bases(max(shape), torch.float64)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64)
    arguments = (x, update.lambda_, update.gamma, A, B, update.scale)
    activation = Frozen(seat.weight, None)(x) + Activation.apply(*arguments, shape[0])
    torch.testing.assert_close(activation, Materialised.apply(*arguments, seat.weight), rtol=1e-12, atol=1e-12)


def test_a_second_backward_is_refused() -> None:
    seat, _ = update_of((24, 24), RandLoRA(rank=5))
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(seat(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@every_shape
@pytest.mark.parametrize("tokens", [8, 4096])
def test_backward_keeps_no_matrix_as_large_as_the_weight(shape: tuple[int, int], tokens: int) -> None:
    scale = 8
    shape = (shape[0] * scale, shape[1] * scale)
    seat, update = update_of(shape, RandLoRA(rank=6), torch.float32)
    x = torch.randn(tokens, shape[1], requires_grad=True)
    fixed = {t.untyped_storage().data_ptr() for t in (x, seat.weight, update.basis_A.matrix, update.basis_B.matrix)}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in fixed:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        seat(x)
    trained = 4 * sum(p.numel() for p in update.parameters())
    assert sum(saved.values()) <= trained


def test_few_tokens_use_the_activations_and_many_the_weight() -> None:
    assert choose_form(10, 768, 768, torch.float32, False) == "activation"
    assert choose_form(4000, 768, 768, torch.float32, False) == "materialised"
    assert choose_form(4000, 768, 768, torch.float32, True) == "activation"
    assert choose_form(4000, 768, 768, torch.bfloat16, False) == "activation"


@every_shape
def test_equals_peft_with_its_own_bases(shape: tuple[int, int]) -> None:
    """Oracle: PEFT's RandLora layer; its B and λ are laid out differently (reference, A.6)."""
    peft = pytest.importorskip("peft", reason="PEFT is a development dependency")
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    config = peft.RandLoraConfig(r=5, randlora_alpha=10, target_modules=["0"], projection_prng_key=3)
    theirs = peft.get_peft_model(nn.Sequential(linear), config)
    layer = theirs.base_model.model[0]
    seat, update = update_of(shape, RandLoRA(rank=5, alpha=10), torch.float32)
    large, n = max(shape), update.lambda_.shape[0]
    # Theirs: A (r, 1, d), B (D, n, r), λ (r, n), with factors paired as rows k·n + j.
    peft_A, peft_B = layer.randlora_A["default"].float(), layer.randlora_B["default"].float()
    update.basis_A.matrix = peft_A[:, 0, : min(shape)].contiguous()
    update.basis_B.matrix = peft_B[:large, :n].flatten(1).view(large, 5, n).transpose(1, 2).reshape(large, n * 5)
    with torch.no_grad():
        layer.randlora_lambda["default"].copy_(update.lambda_.T)
        layer.randlora_gamma["default"].copy_(update.gamma)
        seat.base.weight.copy_(layer.base_layer.weight)
        seat.base.bias.copy_(layer.base_layer.bias)
    for tokens in (3, 500):
        x = torch.randn(tokens, shape[1])
        expected = theirs(x).detach()
        torch.testing.assert_close(seat(x), expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def test_lora_equals_peft() -> None:
    """Oracle: PEFT's LoRA layer with our A and B."""
    peft = pytest.importorskip("peft", reason="PEFT is a development dependency")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 60))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(24, 60)), peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"])
    )
    randlora.adapt(model, LoRA(rank=4, alpha=12), ["0"])
    layer, update = theirs.base_model.model[0], model[0].updates[0]
    with torch.no_grad():
        update.B.normal_()
        layer.lora_A["default"].weight.copy_(update.A)
        layer.lora_B["default"].weight.copy_(update.B)
        layer.base_layer.weight.copy_(model[0].base.weight)
        layer.base_layer.bias.copy_(model[0].base.bias)
    x = torch.randn(7, 24)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
