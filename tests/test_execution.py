"""The updates inside what a training wraps around them: compilation, autocast, checkpointing, half precision."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.methods import LoRA, Method, NoLA, RandLoRA, VeRA
from randlora.training.compilation import CompiledBlocks, blocks

METHODS = [
    LoRA(rank=4),
    VeRA(rank=40),
    VeRA(rank=40, basis="kronecker"),
    NoLA(num_bases=20, basis="kronecker"),
    RandLoRA(rank=5),
    RandLoRA(rank=5, basis="binary"),
    RandLoRA(rank=5, basis="kronecker"),
    RandLoRA(rank=5, basis="kronecker", delta_dtype="bfloat16"),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)
few_and_many = pytest.mark.parametrize("tokens", [3, 900])


def net(method: Method) -> nn.Module:
    """Square, tall and wide maps, adapted, with trained parameters away from their start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 80), nn.Tanh(), nn.Linear(80, 32))
    randlora.adapt(model, method, ["*"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    return model


def run(model: nn.Module, call, tokens: int) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """The output, and the gradients of the input and of every trained tensor."""
    torch.manual_seed(1)
    x = torch.randn(tokens, 32, requires_grad=True)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), trained)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm()


@every_method
@few_and_many
def test_compiled(method: Method, tokens: int) -> None:
    """Oracle: the same model without compilation. Nothing may break the graph."""
    torch.compiler.reset()
    model = net(method)
    expected = run(model, model, tokens)
    found = run(model, torch.compile(model, backend="aot_eager", fullgraph=True), tokens)
    assert_close(found, expected, 1e-5)


def test_blocks_run_compiled_inside_the_context_alone_each_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a compiler that doubles; torch's own is in test_compilation. A frozen block stays as it is."""
    asked = []

    def doubled(block: nn.Module, **how: object) -> None:
        asked.append((block, how))
        block._compiled_call_impl = lambda x: 2 * block._call_impl(x)  # type: ignore[assignment]

    monkeypatch.setattr(nn.Module, "compile", doubled)
    model = nn.Sequential(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))), nn.Identity())[:1]
    randlora.adapt(model, LoRA(rank=2), ["0.0", "0.2"])
    first, _, last = model[0]
    x, limit = torch.randn(2, 4), torch._dynamo.config.recompile_limit
    plain, context = model(x), CompiledBlocks(model)
    assert asked == [(block, {"fullgraph": True, "backend": "inductor"}) for block in (first, last)]
    assert torch.equal(model(x), plain)
    for _ in range(2):
        with suppress(KeyError), context:
            torch.testing.assert_close(model(x), 4 * plain)
            assert torch._dynamo.config.recompile_limit == torch._dynamo.config.accumulated_recompile_limit == 1000
            raise KeyError
        assert torch.equal(model(x), plain)
        assert torch._dynamo.config.recompile_limit == limit


def test_blocks_are_the_adapted_members_of_the_outermost_lists() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})

    model = nn.ModuleDict({
        "one": nn.ModuleList([block()]),
        "tower": nn.ModuleDict({"layers": nn.ModuleList([block(), block(), nn.Tanh()])}),
        "pair": nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
        "head": nn.Linear(4, 2),
    })  # fmt: skip
    randlora.adapt(model, LoRA(rank=2), ["one*", "tower.layers.1*", "pair*", "head"])
    names = {module: name for name, module in model.named_modules()}
    assert [names[each] for each in blocks(model)] == ["one.0.parts.0", "one.0.parts.1", "tower.layers.1", "pair.0"]


@every_method
@few_and_many
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(method: Method, tokens: int, reentrant: bool) -> None:
    """Oracle: the same model without checkpointing."""
    model = net(method)
    expected = run(model, model, tokens)
    torch.manual_seed(1)
    x = torch.randn(tokens, 32, requires_grad=True)
    y = x
    for layer in model:
        y = checkpoint(layer, y, use_reentrant=reentrant)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert_close(found, expected, 1e-6)


@every_method
@few_and_many
@pytest.mark.parametrize("half_base", [False, True])
def test_in_half_precision(method: Method, tokens: int, half_base: bool) -> None:
    """Oracle: the same model in float32, to what bfloat16 can say; trained tensors and gradients stay float32."""
    model = net(method)
    expected = run(model, model, tokens)
    if half_base:
        for layer in randlora.adapters.core.adapted_layers(model).values():
            layer.base.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, model, tokens)
    assert found[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in found[1:])
    assert_close(found, expected, 0.03)


@few_and_many
@pytest.mark.parametrize("basis", ["uniform", "kronecker", "sparse"])
def test_delta_dtype_touches_the_update_alone(basis: str, tokens: int) -> None:
    exact = net(RandLoRA(rank=5, basis=basis))
    coarse = net(RandLoRA(rank=5, basis=basis, delta_dtype="bfloat16"))
    assert_close(run(coarse, coarse, tokens), run(exact, exact, tokens), 0.01)
    with torch.no_grad():
        for model in (exact, coarse):
            for update in (u for s in randlora.adapters.core.adapted_layers(model).values() for u in s.updates):
                update.lambda_.zero_()
    x = torch.randn(tokens, 32)
    torch.testing.assert_close(coarse(x), exact(x), rtol=0, atol=1e-6)


@every_method
def test_copies_are_independent(method: Method) -> None:
    """A deep copy (as an average of weights takes) computes the same and trains alone."""
    model = net(method)
    other = copy.deepcopy(model)
    x = torch.randn(5, 32)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    before = model(x).detach()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
