"""Frozen weights in 8 bits and in NF4: every update computes on them what it computes on the numbers they stand for."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import randlora
from conftest import few_layers, settings
from randlora.adapters.core import relative_norms
from randlora.adapters.layer import AdaptedLinear
from randlora.adapters.nf4 import NF4Weight
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
bitsandbytes = pytest.importorskip("bitsandbytes", reason="it is not installed: pip install 'randlora[nf4]'")

# The 16 numbers, from QLoRA's appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
METHODS = [
    LoRA(rank=4), DoRA(rank=4), VeRA(rank=16), VeRA(rank=16, basis="kronecker"), NoLA(num_bases=32), RandLoRA(rank=5),
    RandLoRA(rank=5, basis="kronecker"), RandLoRA(rank=5, dropout=0.5), RandLoRAa(rank=4),
    EDoRA(rank=4), EDoRA(rank=4, dropout=0.5), MoRA(rank=4), MELoRA(rank=2, parts=4), LoRAMini(rank=4),
]  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


both = pytest.mark.parametrize("bits", ["int8", "nf4"])


def pair(bits: str = "int8") -> tuple[Net, Net]:
    """A quantised net, and a plain one with the numbers that its weights stand for."""
    quantised, plain = Net(), Net()
    quantise(quantised, bits)
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


@both
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_updates_on_quantised_weights(method: Method, bits: str) -> None:
    """Oracle: the same update on the dequantised weights."""
    nets = pair(bits)
    x = torch.randn(50, 64)
    results = []
    for net in nets:
        randlora.adapt(net, method, ["block.0", "block.2"])
        disturb(net)
        inputs = x.clone().requires_grad_()
        torch.manual_seed(2)
        y = net.train()(inputs)
        y.square().mean().backward()
        trained = [p.grad for p in net.parameters() if p.requires_grad]
        results.append((y.detach(), inputs.grad, *trained))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@both
def test_noise_on_quantised_weights(bits: str) -> None:
    """Flat-LoRA's, of one step and level. Oracle: the same noise on the dequantised weights."""
    outputs = []
    for net in pair(bits):
        randlora.adapt(net, FlatLoRA(rank=4), ["block.0"])
        disturb(net)
        for level in (0.0, 2.0):
            net.block[0].updates[0].draw_noise(step=3, level=level)
            outputs.append(net.train()(torch.ones(5, 64)))
    torch.testing.assert_close(outputs[:2], outputs[2:], rtol=1e-4, atol=1e-4)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


@both
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_norms_and_slices_of_quantised_weights(method: Method, bits: str) -> None:
    """Oracle: the same on the dequantised weights."""
    found = []
    for net in pair(bits):
        net.block = nn.ModuleDict({"gate_up_proj": net.block[0]})
        randlora.adapt(net, method, ["*.gate_up_proj[up]"])
        disturb(net)
        with torch.no_grad():
            (norm,) = relative_norms(net).values()
            found.append((torch.tensor(norm), net.eval().block["gate_up_proj"](torch.ones(2, 64))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@both
def test_evaluation_keeps_the_bits_and_merging_gives_plain_weights(bits: str) -> None:
    net, _ = pair(bits)
    randlora.adapt(net, RandLoRA(rank=5, zero="gamma"), ["block.0"])
    with torch.no_grad():
        net.block[0].updates[0].gamma.normal_(std=0.1)
    x = torch.randn(3, 64)
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


def test_what_does_not_work_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = pair()
    with pytest.raises(SettingsError, match=r"those of block\.0 are quantised"):
        randlora.adapt(net, FullFineTuning(train="targets"), ["block.0"])
    randlora.adapt(copy.deepcopy(net), LoRA(), ["block.0"])
    with pytest.raises(SettingsError, match="quantization='int3'"):
        build(settings("model=smollm2_135m", "model.quantization=int3")["model"])
    with monkeypatch.context() as patch:
        patch.setattr("torchao.quantization.quantize_", lambda *about, **named: None)  # as where rows have no groups
        with pytest.raises(SettingsError, match=r"int4 does not work here: block.0 is 128 × 64, in groups of 128$"):
            quantise(Net(), "int4")
    for bits, package, extra in (("nf4", "bitsandbytes", "nf4"), ("int8", "torchao", "quant")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(SettingsError, match=rf"={bits} needs the package {package}: .*'randlora\[{extra}\]'"):
                quantise(Net(), bits)
    with pytest.raises(SettingsError, match=r"nf4 does not work here \(rows of 96 weights have no blocks of 64\): use"):
        quantise(nn.Sequential(nn.Linear(96, 64)), "nf4")
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match=r"int4 does not work here \(.*\): use int8, or null"):
            quantise(nn.Sequential(nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16))), "int4")


def test_nf4_is_bitsandbytes_own() -> None:
    """Oracle: bitsandbytes' Linear4bit, its output and the gradient of its input, in float32 and under autocast.

    And the numbers: of a block of 64 each is one of the 16 of QLoRA's appendix E, times the largest absolute one.
    """
    torch.manual_seed(0)
    plain = nn.Linear(128, 32)
    ours, theirs = nn.Sequential(copy.deepcopy(plain)), bitsandbytes.nn.Linear4bit(128, 32, quant_type="nf4")
    quantise(ours, "nf4")
    theirs.load_state_dict(plain.state_dict())
    theirs.weight = bitsandbytes.nn.Params4bit(
        plain.weight.detach(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    theirs.to("cpu")
    for autocast in (False, True):
        results = []
        for map_ in (ours, theirs):
            x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = map_(x)
            if map_ is ours:  # as nn.Linear's; bitsandbytes gives its input's dtype
                assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
            y.float().square().sum().backward()
            results.append((y.detach().float(), x.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2 if autocast else 1e-5, atol=0.3 if autocast else 1e-5)
    levels = torch.tensor(NF4)
    blocks = plain.weight.detach().view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
    expected = (levels[nearest] * scale).view(32, 128)
    torch.testing.assert_close(dense(ours[0].weight), expected, rtol=1e-5, atol=1e-5)


def test_nf4_in_another_place_or_dtype_and_what_it_refuses() -> None:
    weight = NF4Weight.of(torch.randn(4, 64))
    half = weight.to(torch.bfloat16)
    assert (half.dtype, half.shape) == (torch.bfloat16, (4, 64))
    assert torch.equal(half.dequantize(), weight.dequantize().bfloat16())
    assert torch.equal(weight[1:3].dequantize(), weight.dequantize()[1:3])
    assert torch.equal(copy.deepcopy(weight).dequantize(), weight.dequantize())
    assert torch.equal(F.linear(torch.eye(64), weight).T, weight.dequantize())
    assert weight.packed.numel() + 4 * weight.scales.numel() == 4 * 64 // 2 + 4 * 4  # bytes
    assert weight.to("meta").packed.device.type == "meta"
    names, dtype = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    again = NF4Weight.__tensor_unflatten__(parts, dtype, weight.shape, weight.stride())
    assert torch.equal(again.dequantize(), weight.dequantize())
    with pytest.raises(NotImplementedError, match=r"ask for its numbers by dequantize"):
        weight + 1


def test_a_model_without_linear_maps_is_refused_before_it_is_loaded() -> None:
    overrides = ("dry_run=true", "model=gpt2_medium", "task=e2e_nlg", "model.quantization=int8")
    with pytest.raises(SettingsError, match="model has no linear maps in its blocks"):
        memory_plan(Experiment.from_config(settings(*overrides)))


def test_the_memory_plan_counts_the_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of LLaMA-3-8B with two layers; the embedding and the output head stay at two bytes."""
    few_layers("llama3_8b", 2, tmp_path, monkeypatch)
    plans = {}
    for kind in ("int8", "int4", "nf4"):
        overrides = (
            f"model.quantization={kind}",
            "task=arc_easy",
            "method=lora",
            "method.rank=8",
            "trainer.batch_size=1",
        )
        one = Experiment.from_config(settings("dry_run=true", "model=llama3_8b", *overrides))
        plans[kind] = memory_plan(one)["weights"]
    plain = 2 * 2 * 128_256 * 4096 + 2 * (2 * 2 + 1) * 4096  # with the norms
    plain += 4 * 2 * 8 * (2 * 4096 + 2 * (4096 + 1024) + 2 * (4096 + 14_336))  # LoRA's factors, in float32
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14_336 * 4096
    rows = 4096 + 2 * 1024 + 4096 + 2 * 14_336 + 4096  # a scale of two bytes each in int8
    assert plans["int8"] == pytest.approx(plain + 2 * (layer + 2 * rows), rel=1e-4)
    assert plans["int4"] == pytest.approx(plain + 2 * layer * (1 / 2 + 4 / 128), rel=1e-4)
    assert plans["nf4"] == pytest.approx(plain + 2 * layer * (1 / 2 + 4 / 64), rel=1e-4)
