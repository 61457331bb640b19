"""Whether updates are exact on a device: in every precision, form and execution, and beside PEFT."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from randlora.adapters import adapt, cached, load_adapter, merge, merged, save_adapter
from randlora.adapters.core import adapted_layers, require_adaptation
from randlora.adapters.interface import Step
from randlora.adapters.quantization import dense, quantise, quantised_maps
from randlora.analysis.device.place import METHODS, Check, Place, error, largest, own_compiler_cache
from randlora.analysis.device.report import Figures, NotHere, within
from randlora.analysis.workloads import Block
from randlora.errors import SettingsError
from randlora.methods import LoRTA, Method
from randlora.training.compilation import CompiledBlocks

WIDTH = 128  # int4 has groups of 128 weights
ATTENTION = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"]


def model(device: torch.device) -> nn.Sequential:
    """Two blocks with square, tall and wide maps, the same whenever it is asked for."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH, heads=4, mlp=2 * WIDTH) for _ in range(2))).to(device)


def adapted(device: torch.device, method: Method) -> nn.Sequential:
    """That model under a method, with what is trained moved away from its start, where most updates are zero."""
    net = model(device)
    adapt(net, method, targets(method))
    _move(net)
    return net


def targets(method: Method) -> list[str]:
    return ATTENTION if isinstance(method, LoRTA) else [*ATTENTION, "*.up", "*.down"]


@torch.no_grad()
def _move(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)


def layers(device: torch.device, method: Method, precision: AbstractContextManager[object]) -> float:
    """The largest error of adapted layers: outputs, gradients of the input and of every trained tensor.

    Oracle: F.linear with W0 + ΔW in float64 on the CPU, and autograd.
    """
    net, errors = adapted(device, method), []
    exact = copy.deepcopy(net).cpu().double()
    for layer, oracle in zip(adapted_layers(net).values(), adapted_layers(exact).values(), strict=True):
        for rows, update, true_rows, true in zip(layer.rows, layer.updates, oracle.rows, oracle.updates, strict=True):
            x_true = torch.randn(64, layer.in_features, dtype=torch.float64, requires_grad=True)
            x = x_true.detach().to(device, torch.float32).requires_grad_()
            with precision:
                y = update(x, layer.frozen(rows))
            base = oracle.frozen(true_rows)
            y_true = F.linear(x_true, base.weight + true.delta(base.weight), base.bias)
            g = torch.randn_like(y_true)
            ours = torch.autograd.grad(y, [x, *update.parameters()], g.to(y), allow_unused=True)
            theirs = torch.autograd.grad(y_true, [x_true, *true.parameters()], g, allow_unused=True)
            pairs = list(zip(ours, theirs, strict=True))
            # A single number may be a sum that nearly cancels, so those of a layer (IncreLoRA's) are one vector.
            single = [(a, b) for a, b in pairs if a is not None and b is not None and a.numel() == 1]
            pairs = [(a, b) for a, b in pairs if a is None or a.numel() > 1]
            if single:
                pairs.append((torch.cat([a.flatten() for a, _ in single]), torch.cat([b.flatten() for _, b in single])))
            errors += [error(y, y_true), *(error(a, b) for a, b in pairs)]
    return largest(errors)


def in_float32(place: Place) -> Figures:
    """Outputs, and gradients of inputs and trained tensors, beside float64 on the CPU; 1e-4: large sums lose digits."""
    return within({name: layers(place.device, method, nullcontext()) for name, method in place.methods.items()}, 1e-4)


def in_tf32(place: Place) -> Figures:
    """The same with tf32, whose products have ten bits; 5e-3."""
    place.needs_cuda()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = {name: layers(place.device, method, nullcontext()) for name, method in place.methods.items()}
    finally:
        torch.set_float32_matmul_precision(before)
    return within(found, 5e-3)


def in_bfloat16(place: Place) -> Figures:
    """The same under bfloat16 autocast, with eight bits; 5e-2."""
    precision = torch.autocast(place.device.type, torch.bfloat16)
    return within({name: layers(place.device, method, precision) for name, method in place.methods.items()}, 5e-2)


@torch.no_grad()
def one_output(place: Place) -> Figures:
    """A start that changes nothing, and one output whether merged, saved and loaded, or written in; 1e-4."""

    def errors(method: Method) -> Iterator[float]:
        net, x = model(place.device).eval(), torch.randn(2, 7, WIDTH, device=place.device)
        plain = net(x)
        adapt(net, method, targets(method))
        yield error(net(x), plain)
        _move(net)
        y = net(x)
        with merged(net):
            yield error(net(x), y)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(net, folder)
            loaded = model(place.device).eval()
            load_adapter(loaded, folder)
        yield error(loaded(x), y)
        yield error(merge(net)(x), y)

    return within({name: largest([*errors(method)]) for name, method in place.methods.items()}, 1e-4)


def _gradients(net: nn.Module, forward: Callable[[Tensor], Tensor], times: int = 1) -> list[Tensor]:
    """The output and the gradients of the input and of what is trained, summed over so many times."""
    torch.manual_seed(2)
    device = next(net.parameters()).device
    x = torch.randn(2, 7, WIDTH).to(device).requires_grad_()
    trained = [x, *(p for p in net.parameters() if p.requires_grad)]
    for _ in range(times):
        y = forward(x)
        y.square().mean().backward()
    found = [y.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in trained)]
    net.zero_grad()
    return found


def kept_or_computed_again(place: Place) -> Figures:
    """Gradients of two passes in `cached` and with blocks computed again in backward, beside plain ones; 1e-5."""

    def again(net: nn.Sequential, x: Tensor) -> Tensor:
        for block in net:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def worst(method: Method) -> float:
        net = adapted(place.device, method)
        expected = _gradients(net, net, 2)
        found = [_gradients(net, partial(again, net), 2)]
        with cached(net):
            found += [_gradients(net, net, 2), _gradients(net, partial(again, net), 2)]
        return largest([error(a, b) for way in found for a, b in zip(way, expected, strict=True)])

    return within({name: worst(method) for name, method in place.methods.items()}, 1e-5)


def compiled(place: Place) -> Figures:
    """Gradients of a training step whose blocks are compiled, beside one without; 1e-4. A third step compiles nothing.

    On a CPU a few methods: the compiler takes many seconds for each there.
    """
    place.needs_time()
    few = ("lora", "randlora", "randlora_kronecker")
    chosen = METHODS if place.device.type == "cuda" else {name: METHODS[name] for name in few}

    def worst(method: Method) -> float:
        torch._dynamo.reset()
        net = adapted(place.device, method)
        method.before_step(require_adaptation(net).updates.values(), Step(1, 9, 1e-4, 0))
        expected = _gradients(net, net)
        with CompiledBlocks(nn.Sequential(net)):
            _gradients(net, net), _gradients(net, net)
            with torch.compiler.set_stance("fail_on_recompile"):
                found = _gradients(net, net)
        return largest([error(a, b) for a, b in zip(found, expected, strict=True)])

    with own_compiler_cache():
        return within({name: worst(method) for name, method in chosen.items()}, 1e-4)


@torch.no_grad()
def beside_peft(place: Place) -> Figures:
    """The output of PEFT's model with the adapter that `to_peft` writes; 1e-4."""
    place.needs_time()
    try:
        from peft import PeftModel
    except ImportError as missing:
        raise NotHere("the package peft is not installed") from missing
    from randlora.peft import to_peft

    figures = {}
    for name in ("lora", "dora", "vera", "randlora"):
        net, x = adapted(place.device, METHODS[name]).eval(), torch.randn(2, 7, WIDTH, device=place.device)
        with tempfile.TemporaryDirectory() as folder:
            to_peft(net, folder, bases=True)
            theirs = PeftModel.from_pretrained(model(place.device), folder).to(place.device).eval()
        figures[name] = error(net(x), theirs(x))
    return within(figures, 1e-4)


def on_quantised(bits: str, dtype: torch.dtype, limit: float) -> Check:
    """The check of a base of so many bits, whose numbers are of this dtype, to this limit."""

    @torch.no_grad()
    def check(place: Place) -> Figures:
        """Outputs on weights in few bits, beside those on the numbers that they stand for; 1e-4, int4 5e-2."""
        place.needs_time()
        figures = {}
        for name in ("lora", "dora", "vera", "randlora", "randlora_kronecker"):
            few, many = (model(place.device).to(dtype).eval() for _ in range(2))
            try:
                quantise(few, bits)
            except SettingsError as refused:
                raise NotHere(str(refused)) from refused
            for path in quantised_maps(few):
                numbers: Any = few.get_submodule(path).weight
                many.get_submodule(path).weight.data = dense(numbers, dtype)
            for net in (few, many):
                adapt(net, METHODS[name], targets(METHODS[name]))
                _move(net)
            x = torch.randn(2, 7, WIDTH, device=place.device, dtype=dtype)
            figures[name] = error(few(x), many(x))
        return within(figures, limit)

    return check
