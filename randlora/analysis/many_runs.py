"""A trial of training K runs at once over one frozen base: their examples side by side in one batch.

Each run has updates, a head, a loss, clipping and a learning rate of its own; what is shared is the base and the calls.
It is a trial, to be measured beside K steps one after another, and no part of the program.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters import adapt
from randlora.adapters.core import adapted_layers, replace
from randlora.adapters.layer import AdaptedLinear, linear_weight
from randlora.analysis.timing import interleaved
from randlora.methods import Method, RandLoRA
from randlora.methods.common import compute_dtype
from randlora.methods.kernels import TOKENS, ExecutionPlan, UpdatedLinear
from randlora.studies.tables import markdown

CLASSES = 10
AFTER, EACH, ONCE = "one after another", "side by side", "side by side, one product with the base"


class Trunk(NamedTuple):
    """What is adapted: a module, its features (B, width) of inputs, the modules to adapt, and inputs for B examples."""

    module: nn.Module
    features: Callable[[nn.Module, Any], Tensor]
    width: int
    targets: Sequence[str]
    inputs: Callable[[int], Any]


class SideBySide(nn.Module):
    """The layers of K runs at one place of the base, for a batch of K equal shares.

    Args:
        layers: One of each run, all over the same frozen matrix.
        once: Whether the product with the frozen matrix is taken of all shares together, and ΔW through the tokens, as
            is possible for RandLoRA's updates; else each layer computes its share as it does alone.
    """

    def __init__(self, layers: Sequence[AdaptedLinear], once: bool):
        super().__init__()
        self.layers, self.once, self.base = nn.ModuleList(layers), once, layers[0].base

    # Code around the model reads these of its linears.
    @property
    def weight(self) -> Tensor:
        return linear_weight(self.base)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(K·b, ..., in) to (K·b, ..., out)."""
        shares = x.chunk(len(self.layers))
        if not self.once:
            return torch.cat([layer(share) for layer, share in zip(self.layers, shares, strict=True)])
        parts = [_alone(layer, share) for layer, share in zip(self.layers, shares, strict=True)]
        return F.linear(x, self.weight, self.bias) + torch.cat(parts)


def _alone(layer: Any, x: Tensor) -> Tensor:
    """x ΔWᵀ of a layer with an update of RandLoRA's."""
    update, dtype = layer.updates[0], compute_dtype(x)
    plan = ExecutionPlan(TOKENS, TOKENS, TOKENS, dtype, update.delta_dtype or update.lambda_.dtype)
    return UpdatedLinear.apply(x, update.lambda_, update.gamma, None, None, None, update.fixed(), plan)


class Run:
    """A run alone: the base's module with its own updates and head, an optimiser, and a batch that stays.

    Args:
        trunk: Its frozen tensors are shared between all runs of it.
        method: Of the updates.
        number: The run's: its seed, and a learning rate of 1e-3 · (number + 1).
        size: Examples of a batch.
    """

    def __init__(self, trunk: Trunk, method: Method, number: int, size: int, dtype: torch.dtype = torch.float32):
        self.trunk, self.module = trunk, _sharing(trunk.module)
        adapt(self.module, method, trunk.targets, seed=number)
        self.module.to(dtype).eval()  # no dropout: it would draw other numbers side by side
        torch.manual_seed(number)
        self.head = nn.Linear(trunk.width, CLASSES).to(dtype)
        self.inputs, self.labels = trunk.inputs(size), torch.randint(CLASSES, (size,))
        if torch.is_tensor(self.inputs):
            self.inputs = self.inputs.to(dtype)
        self.trained = [p for p in [*self.module.parameters(), *self.head.parameters()] if p.requires_grad]
        self.rate = 1e-3 * (number + 1)
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.rate)

    def step(self) -> float:
        """One step; its loss."""
        loss = F.cross_entropy(self.head(self.trunk.features(self.module, self.inputs)), self.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Together:
    """The same runs in one batch; see `SideBySide` for `once`. Their parameters are copies, so that both can train."""

    def __init__(self, runs: Sequence[Run], once: bool):
        modules = [_sharing(run.module, trained=False) for run in runs]
        self.trunk, self.runs, self.module = runs[0].trunk, runs, modules[0]
        places = [adapted_layers(module) for module in modules]
        self.heads = [copy.deepcopy(run.head) for run in runs]
        self.trained = [
            [p for p in [*module.parameters(), *head.parameters()] if p.requires_grad]
            for module, head in zip(modules, self.heads, strict=True)
        ]
        for name in places[0]:
            replace(self.module, name, SideBySide([place[name] for place in places], once))
        groups = [{"params": own, "lr": run.rate} for own, run in zip(self.trained, runs, strict=True)]
        self.optimizer = torch.optim.AdamW(groups)
        self.inputs = _joined([run.inputs for run in runs])

    def step(self) -> list[float]:
        """One step of all; their losses."""
        features = self.trunk.features(self.module, self.inputs).chunk(len(self.runs))
        losses = [
            F.cross_entropy(head(own), run.labels)
            for head, own, run in zip(self.heads, features, self.runs, strict=True)
        ]
        torch.stack(losses).sum().backward()  # no run's loss reaches another's parameters
        for own in self.trained:
            nn.utils.clip_grad_norm_(own, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [loss.item() for loss in losses]


def _sharing(module: nn.Module, trained: bool = True) -> nn.Module:
    """A copy that has the very tensors of a module, but where told its trained ones."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in tensors if trained or not t.requires_grad})


def _joined(inputs: Sequence[Any]) -> Any:
    if torch.is_tensor(inputs[0]):
        return torch.cat(list(inputs))
    return {name: torch.cat([own[name] for own in inputs]) for name in inputs[0]}


def measured(trunk: Trunk, method: Method, size: int, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Seconds of CPU time of K steps by each way, round by round, all in turns; a round before is not counted."""
    runs = [Run(trunk, method, number, size) for number in range(max(counts))]
    ways: dict[str, Callable[[], object]] = {}
    for count in counts:
        own = runs[:count]
        ways[f"{count}: {AFTER}"] = partial(_each, own)
        ways[f"{count}: {EACH}"] = Together(own, once=False).step
        if isinstance(method, RandLoRA):
            ways[f"{count}: {ONCE}"] = Together(own, once=True).step
    return interleaved({name: partial(_seconds, way) for name, way in ways.items()}, rounds, warm_up=1)


def _each(runs: Sequence[Run]) -> None:
    for run in runs:
        run.step()


def _seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def gain(seconds: Mapping[str, Sequence[float]], count: int, way: str) -> float:
    """Steps per second beside those one after another: the median over rounds of the ratio within a round."""
    return statistics.median(
        after / own for after, own in zip(seconds[f"{count}: {AFTER}"], seconds[f"{count}: {way}"], strict=True)
    )


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Of each trial and each K: ms of a step alone, and what either way gains, as Markdown."""
    rows = []
    for name, trial in figures.items():
        seconds = trial["seconds"]
        for count in trial["counts"]:
            alone = statistics.median(seconds[f"{count}: {AFTER}"]) / count
            gains = [f"{gain(seconds, count, way):.2f}" if f"{count}: {way}" in seconds else "" for way in (EACH, ONCE)]
            rows.append([name, str(count), f"{1e3 * alone:.0f}", *gains])
    return markdown(["runs", "K", "ms of a step alone", EACH, ONCE], rows)
