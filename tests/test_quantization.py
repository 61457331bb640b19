"""Frozen weights in 8 bits: every update computes on them what it computes on the numbers they stand for."""

import copy

import pytest
import torch
from torch import nn

import randlora
from conftest import settings
from randlora.adapters.core import relative_norms
from randlora.adapters.layer import AdaptedLinear
from randlora.adapters.quantization import dense, is_quantised, quantise
from randlora.config import build
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.methods import (
    DoRA,
    EDoRA,
    FlatLoRA,
    FullFineTuning,
    LoRA,
    LoRAMini,
    MELoRA,
    Method,
    MoRA,
    NoLA,
    RandLoRA,
    RandLoRAa,
    VeRA,
)
from randlora.plan import memory_plan

torchao = pytest.importorskip("torchao", reason="torchao is not installed: pip install 'randlora[quant]'")

METHODS = [
    LoRA(rank=4), DoRA(rank=4), VeRA(rank=16), VeRA(rank=16, basis="kronecker"), NoLA(num_bases=32), RandLoRA(rank=5),
    RandLoRA(rank=5, basis="kronecker"), RandLoRA(rank=5, dropout=0.5), RandLoRAa(rank=4),
    EDoRA(rank=4), EDoRA(rank=4, dropout=0.5), MoRA(rank=4), MELoRA(rank=2, parts=4), LoRAMini(rank=4),
]  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def pair() -> tuple[Net, Net]:
    """A quantised net, and a plain one with the numbers that its weights stand for."""
    quantised, plain = Net(), Net()
    quantise(quantised, "int8")
    for one, other in zip(quantised.block[::2], plain.block[::2], strict=True):
        assert is_quantised(one.weight)
        other.weight = nn.Parameter(dense(one.weight).detach().clone())
    return quantised, plain


def disturb(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_updates_on_quantised_weights(method: Method) -> None:
    """Oracle: the same update on the dequantised weights."""
    nets = pair()
    x = torch.randn(50, 32)
    results = []
    for net in nets:
        randlora.adapt(net, method, ["block.0", "block.2"])
        disturb(net)
        inputs = x.clone().requires_grad_()
        torch.manual_seed(2)
        y = net.train()(inputs)
        y.square().sum().backward()
        trained = [p.grad for p in net.parameters() if p.requires_grad]
        results.append((y.detach(), inputs.grad, *trained))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_noise_on_quantised_weights() -> None:
    """Flat-LoRA's, of one step and level. Oracle: the same noise on the dequantised weights."""
    outputs = []
    for net in pair():
        randlora.adapt(net, FlatLoRA(rank=4), ["block.0"])
        disturb(net)
        for level in (0.0, 2.0):
            net.block[0].updates[0].draw_noise(step=3, level=level)
            outputs.append(net.train()(torch.ones(5, 32)))
    torch.testing.assert_close(outputs[:2], outputs[2:], rtol=1e-4, atol=1e-4)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_norms_and_slices_of_quantised_weights(method: Method) -> None:
    """Oracle: the same on the dequantised weights."""
    found = []
    for net in pair():
        net.block = nn.ModuleDict({"gate_up_proj": net.block[0]})
        randlora.adapt(net, method, ["*.gate_up_proj[up]"])
        disturb(net)
        with torch.no_grad():
            (norm,) = relative_norms(net).values()
            found.append((torch.tensor(norm), net.eval().block["gate_up_proj"](torch.ones(2, 32))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_evaluation_keeps_the_bits_and_merging_gives_plain_weights() -> None:
    net, _ = pair()
    randlora.adapt(net, RandLoRA(rank=5, zero="gamma"), ["block.0"])
    with torch.no_grad():
        net.block[0].updates[0].gamma.normal_(std=0.1)
    x = torch.randn(3, 32)
    expected = net.eval()(x)
    with randlora.merged(net):
        assert net.block[0]._merged is None
        torch.testing.assert_close(net(x), expected)
    layer = net.block[0]
    assert isinstance(layer, AdaptedLinear)
    assert is_quantised(layer.weight)
    randlora.merge(net)
    assert type(net.block[0].weight) is nn.Parameter
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_work_is_one_sentence() -> None:
    net, _ = pair()
    with pytest.raises(SettingsError, match=r"those of block\.0 are quantised"):
        randlora.adapt(net, FullFineTuning(train="targets"), ["block.0"])
    randlora.adapt(copy.deepcopy(net), LoRA(), ["block.0"])
    with pytest.raises(SettingsError, match="quantization='int3'"):
        build(settings("model=smollm2_135m", "model.quantization=int3")["model"])
    with pytest.raises(SettingsError, match=r"int4 does not work here.*"):
        quantise(Net(), "int4")  # too narrow for its groups
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match=r"int4 does not work here \(.*\): use int8, or null"):
            quantise(nn.Sequential(nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16))), "int4")


def test_a_model_without_linear_maps_is_refused_before_it_is_loaded() -> None:
    overrides = ("dry_run=true", "model=gpt2_medium", "task=e2e_nlg", "model.quantization=int8")
    with pytest.raises(SettingsError, match="model has no linear maps in its blocks"):
        memory_plan(Experiment.from_config(settings(*overrides)))


def test_the_memory_plan_counts_the_bits() -> None:
    plans = {}
    for kind in ("int8", "int4"):
        overrides = (f"model.quantization={kind}", "task=arc_easy", "method=lora", "trainer.batch_size=1")
        one = Experiment.from_config(settings("dry_run=true", "model=llama3_8b", *overrides))
        plans[kind] = memory_plan(one)["weights"] / 2**30
    # 8.03 billion weights, of which 1.05 billion, in the embedding and the output head, stay at two bytes.
    assert plans["int8"] == pytest.approx((2 * 2 * 0.525e9 + 6.98e9) / 2**30, abs=0.1)
    assert plans["int4"] == pytest.approx((2 * 2 * 0.525e9 + 6.98e9 * (1 / 2 + 4 / 128)) / 2**30, abs=0.1)
