"""RandLoRA against its definition, against PEFT, and in memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.adapters.core import cached
from randlora.methods import DoRA, LoRA, RandLoRA, VeRA
from randlora.methods.kernels import TOKENS, WEIGHT, ExecutionPlan, choose_plan

SHAPES = {"square": (24, 24), "tall": (60, 24), "wide": (24, 60), "prime": (23, 23)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
BASES = ("uniform", "normal", "binary", "sparse", "very_sparse", "kronecker")
WAYS = list(itertools.product((TOKENS, WEIGHT), repeat=3))


def update_of(shape: tuple[int, int], method, dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    """A single adapted linear with random trained parameters, and its update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    randlora.adapt(model, method, ["0"])
    model.to(dtype)
    update = model[0].updates[0]
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.normal_()
    return model[0], update


def papers_sum(update) -> Tensor:  # type: ignore[no-untyped-def]
    """Equation 4, basis by basis, with explicit diagonal matrices in float64."""
    n, r = update.lambda_.shape
    A, B = update.fixed()[:2]
    total = torch.zeros(B.rows, A.shape[1], dtype=torch.float64)
    for j in range(n):
        block = B.matrix(torch.float64)[:, j * r : (j + 1) * r]
        used = block.shape[1]  # fewer in the last block of a Kronecker basis whose size r does not divide
        total = total + block @ torch.diag(update.lambda_[j, :used]) @ A[:used] @ torch.diag(update.gamma[j])
    return update.scale * (total if update.tall else total.T)


@every_shape
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("num_bases", ["ceil", "floor", 2])
def test_every_way_is_the_papers_sum_in_value_and_gradient(shape: tuple[int, int], basis: str, num_bases) -> None:  # type: ignore[no-untyped-def]
    """Oracle: equation 4 in float64 under autograd, to 1e-12; all eight plans, also with what `cached` keeps."""
    layer, update = update_of(shape, RandLoRA(rank=5, alpha=15, basis=basis, num_bases=num_bases))
    bias = layer.base.bias.requires_grad_(True)
    x = torch.randn(2, 7, shape[1], dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 7, shape[0], dtype=torch.float64)
    inputs = [x, update.lambda_, update.gamma, bias]

    def results(y: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y, inputs, gradient)]

    expected = results(x @ (layer.weight + papers_sum(update)).T + bias)
    torch.testing.assert_close(update.delta(layer.weight), papers_sum(update), rtol=1e-12, atol=1e-12)
    for ways in WAYS:
        update.plan = lambda *_, ways=ways: ExecutionPlan(*ways, torch.float64, torch.float64)
        with cached(layer):
            found = [results(layer(x)), results(layer(x))]
        for one in (results(layer(x)), *found):
            for got, want in zip(one, expected, strict=True):
                assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
@pytest.mark.parametrize("tokens", [2, 4000])
def test_transposed_storage(basis: str, shape: tuple[int, int], tokens: int) -> None:
    """Oracle: x (W0 + ΔW)ᵀ + b; transformers' Conv1D stores W0 as (in, out)."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(*shape))
    randlora.adapt(model, RandLoRA(rank=5, basis=basis), ["0"])
    model.double()
    (update,) = model[0].updates
    nn.init.normal_(update.lambda_)
    x = torch.randn(tokens, shape[1], dtype=torch.float64, requires_grad=True)
    y = model(x)
    expected = x @ (model[0].weight + update.delta(model[0].weight)).T + model[0].bias
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    gradient = torch.randn_like(y)
    inputs = [x, update.lambda_, update.gamma]
    found, wanted = (torch.autograd.grad(one, inputs, gradient) for one in (y, expected))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


@every_shape
@pytest.mark.parametrize("basis", ["uniform", "kronecker"])
@pytest.mark.parametrize("tokens", [2, 4000])
def test_vera_is_its_formula_in_value_and_gradient(shape: tuple[int, int], basis: str, tokens: int) -> None:
    """Oracle: diag(b) B diag(d) A in float64 under autograd; few and many tokens take different ways."""
    layer, update = update_of(shape, VeRA(rank=31, basis=basis))
    A, B = (factor.matrix(torch.float64) for factor in update.fixed(layer.weight)[:2])
    bias = layer.base.bias.requires_grad_(True)
    x = torch.randn(tokens, shape[1], dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(tokens, shape[0], dtype=torch.float64)
    delta = update.scale * torch.diag(update.b) @ B @ torch.diag(update.d) @ A
    torch.testing.assert_close(update.delta(layer.weight), delta, rtol=1e-12, atol=1e-12)
    inputs = [x, update.d, update.b, bias]
    expected = torch.autograd.grad(x @ (layer.weight + delta).T + bias, inputs, gradient)
    y = layer(x)
    torch.testing.assert_close(y, x @ (layer.weight + delta).T + bias, rtol=1e-10, atol=1e-10)
    for got, want in zip(torch.autograd.grad(y, inputs, gradient), expected, strict=True):
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


def test_cached_sees_what_an_optimiser_does() -> None:
    layer, update = update_of((24, 24), RandLoRA(rank=5))
    optimiser = torch.optim.AdamW(update.parameters(), lr=0.1)
    x = torch.randn(3, 24, dtype=torch.float64)
    with cached(layer):
        first = layer(x)
        kept = update._kept
        torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
        assert update._kept is kept
        first.square().sum().backward()
        optimiser.step()
        torch.testing.assert_close(layer(x), x @ (layer.weight + update.delta(layer.weight)).T + layer.bias)
    assert update._kept is None


def test_a_second_backward_is_refused() -> None:
    layer, _ = update_of((24, 24), RandLoRA(rank=5))
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@every_shape
@pytest.mark.parametrize("tokens", [8, 4096])
@pytest.mark.parametrize("basis", BASES)
def test_backward_keeps_no_matrix_as_large_as_the_weight(shape: tuple[int, int], tokens: int, basis: str) -> None:
    scale = 8
    shape = (shape[0] * scale, shape[1] * scale)
    layer, update = update_of(shape, RandLoRA(rank=6, basis=basis), torch.float32)
    x = torch.randn(tokens, shape[1], requires_grad=True)
    fixed = {t.untyped_storage().data_ptr() for t in (x, layer.weight, *update.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in fixed:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    trained = 4 * sum(p.numel() for p in update.parameters())
    low = 4 * tokens * update.shape[1] if shape[0] < shape[1] else 0  # x B, smaller than x
    assert sum(saved.values()) <= trained + low


def test_the_planner_knows_when_the_weight_is_cheaper() -> None:
    def ways(tokens: int, basis: str = "uniform", shape: tuple[int, int] = (768, 768)) -> tuple[str, ...]:
        _, update = update_of(shape, RandLoRA(rank=6, basis=basis), torch.float32)
        return choose_plan(tokens, shape, update.fixed().B, torch.float32, torch.float32, "cpu", kept=False)[:3]

    assert ways(10) == (TOKENS, TOKENS, TOKENS)
    assert ways(100_000) == (WEIGHT, WEIGHT, WEIGHT)
    assert ways(500, "kronecker") == (WEIGHT, WEIGHT, TOKENS)
    assert ways(2000, "kronecker", (3072, 768)) == (WEIGHT, WEIGHT, TOKENS)


@pytest.mark.parametrize("delta", ["float32", "bfloat16"])
def test_a_layers_plan(delta: str) -> None:
    """All through the tokens where W0 + ΔW must not be formed; else the planner's."""
    layer, update = update_of((64, 48), RandLoRA(rank=4, delta_dtype=delta), torch.float32)  # type: ignore[arg-type]
    B, dtype = update.fixed().B, getattr(torch, delta)
    x = torch.empty(2, 2500, 48)
    through_tokens = ExecutionPlan(TOKENS, TOKENS, TOKENS, torch.float32, dtype)
    assert update.plan(x, layer.weight, B, dropping=True) == through_tokens
    assert update.plan(x, layer.weight.bfloat16(), B, dropping=False) == through_tokens
    for rows in (x, x[:, :2], x[0, :3]):
        expected = choose_plan(rows.numel() // 48, (64, 48), B, torch.float32, dtype, "cpu", kept=False)
        assert update.plan(rows, layer.weight, B, dropping=False) == expected
    assert expected.output == TOKENS
    assert update.plan(x, layer.weight, B, dropping=False).output == WEIGHT
    with torch.autocast("cpu", torch.bfloat16):
        assert update.plan(x, layer.weight, B, dropping=True).compute == torch.bfloat16


def test_a_base_in_half_precision_is_never_summed_with_the_update() -> None:
    """W0 + ΔW in bfloat16 would lose a small ΔW: oracle, the sum in float64."""
    layer, update = update_of((64, 64), RandLoRA(rank=4), torch.float32)
    layer.base.bfloat16()
    with torch.no_grad():
        update.lambda_.mul_(1e-4)
    x = torch.randn(5000, 64, dtype=torch.bfloat16)
    difference = (layer(x).double() - layer.base(x).double()).mean(0)
    expected = (x.double() @ update.delta(layer.weight).double().T).mean(0)
    merged = (x @ (layer.weight + update.delta(layer.weight)).bfloat16().T).double() - layer.base(x).double()
    assert (difference - expected).norm() < (merged.mean(0) - expected).norm()


@every_shape
def test_equals_peft_with_its_own_bases(shape: tuple[int, int]) -> None:
    """Oracle: PEFT's RandLora layer; its B and λ are laid out differently (reference, A.6)."""
    peft = pytest.importorskip("peft", reason="PEFT is a development dependency")
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    config = peft.RandLoraConfig(r=5, randlora_alpha=10, target_modules=["0"], projection_prng_key=3)
    theirs = peft.get_peft_model(nn.Sequential(linear), config)
    peft_layer = theirs.base_model.model[0]
    layer, update = update_of(shape, RandLoRA(rank=5, alpha=10), torch.float32)
    large, n = max(shape), update.lambda_.shape[0]
    # Theirs: A (r, 1, d), B (D, n, r), λ (r, n), with factors paired as rows k·n + j.
    peft_A, peft_B = peft_layer.randlora_A["default"].float(), peft_layer.randlora_B["default"].float()
    update.basis_A.matrix = peft_A[:, 0, : min(shape)].contiguous()
    update.basis_B.matrix = peft_B[:large, :n].flatten(1).view(large, 5, n).transpose(1, 2).reshape(large, n * 5)
    with torch.no_grad():
        peft_layer.randlora_lambda["default"].copy_(update.lambda_.T)
        peft_layer.randlora_gamma["default"].copy_(update.gamma)
        layer.base.weight.copy_(peft_layer.base_layer.weight)
        layer.base.bias.copy_(peft_layer.base_layer.bias)
    for tokens in (3, 500):
        x = torch.randn(tokens, shape[1])
        expected = theirs(x).detach()
        torch.testing.assert_close(layer(x), expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dora_is_its_formula_in_value_and_gradient(detach: bool, dropout: float) -> None:
    """Oracle: V formed and its rows' norms taken, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 60)).double()
    randlora.adapt(model, DoRA(rank=4, alpha=12, dropout=dropout, detach_norm=detach), ["0"])
    model.double()
    update, base = model[0].updates[0], model[0].base
    with torch.no_grad():
        update.low_rank.B.normal_(std=0.2)
        update.magnitude.mul_(torch.rand(60).double() + 0.5)
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    inputs = x, update.low_rank.A, update.low_rank.B, update.magnitude
    V = base.weight + 3 * update.low_rank.B @ update.low_rank.A
    norm = V.norm(dim=1)
    W = (update.magnitude / (norm.detach() if detach else norm))[:, None] * V
    torch.manual_seed(1)
    dropped = F.dropout(x, dropout)
    expected = F.linear(x, base.weight, base.bias) + F.linear(dropped, W - base.weight)
    torch.manual_seed(1)
    ours = model.train()(x)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # ‖W0‖² was taken in float32
    direction = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(update.delta(base.weight), W - base.weight, rtol=1e-6, atol=1e-6)


def test_dora_equals_peft() -> None:
    """Oracle: PEFT's LoRA layer with use_dora, without dropout."""
    peft = pytest.importorskip("peft", reason="PEFT is a development dependency")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 60))
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(24, 60)), config)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        model[0].load_state_dict(layer.base_layer.state_dict())
    randlora.adapt(model, DoRA(rank=4, alpha=12), ["0"])
    update = model[0].updates[0]
    with torch.no_grad():
        update.low_rank.B.normal_(std=0.3)
        update.magnitude.mul_(1.2)
        layer.lora_A["default"].weight.copy_(update.low_rank.A)
        layer.lora_B["default"].weight.copy_(update.low_rank.B)
        layer.lora_magnitude_vector["default"].weight.copy_(update.magnitude)
    x = torch.randn(7, 24)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    gradients = []
    for net in (model, theirs):
        net(x).square().sum().backward()
    ours = update.low_rank.A.grad, update.low_rank.B.grad, update.magnitude.grad
    gradients = (
        layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad,
        layer.lora_magnitude_vector["default"].weight.grad,
    )  # fmt: skip
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


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
