"""How much slower the execution plan that RandLoRA chooses is than the fastest of its eight, measured.

A plan says of each of a step's three products whether it goes through the weight or through the tokens (see
`randlora.methods.kernels`). All eight of a shape are timed in turns in one process, each forced upon the same layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from randlora.adapters import adapt, cached
from randlora.adapters.core import adapted_layers
from randlora.adapters.targets import match
from randlora.analysis.timing import device_seconds_of, interleaved
from randlora.analysis.workloads import Workload
from randlora.methods import RandLoRA
from randlora.methods.kernels import TOKENS, WEIGHT, ExecutionPlan
from randlora.studies.tables import markdown

PLANS = ["".join(ways) for ways in itertools.product("TW", repeat=3)]  # output, input gradient, gradient of M
WAYS = {"T": TOKENS, "W": WEIGHT}


class Layer(NamedTuple):
    """A linear map under an update, and how many tokens go through it at once."""

    out_features: int
    in_features: int
    tokens: int


class Setting(NamedTuple):
    """How RandLoRA computes: its method, and whether W' is kept from forward to backward."""

    method: RandLoRA
    kept: bool = False


SETTINGS = {
    "dense": Setting(RandLoRA(rank=6)),
    "dense, cached": Setting(RandLoRA(rank=6), kept=True),
    "dense, bfloat16 ΔW": Setting(RandLoRA(rank=6, delta_dtype="bfloat16")),
    "Kronecker": Setting(RandLoRA(rank=6, basis="kronecker")),
    "Kronecker, bfloat16 ΔW": Setting(RandLoRA(rank=6, basis="kronecker", delta_dtype="bfloat16")),
}


class Choice(NamedTuple):
    """What was measured of a layer under a setting.

    Args:
        layer, setting: Which; the setting by its name.
        chosen: The plan that the planner takes, of PLANS.
        seconds: Of forward and backward by plan, the least of the rounds.
    """

    layer: Layer
    setting: str
    chosen: str
    seconds: Mapping[str, float]

    @property
    def best(self) -> str:
        """The fastest plan."""
        return min(self.seconds, key=lambda plan: self.seconds[plan])

    @property
    def regret(self) -> float:
        """The chosen plan's time over the fastest one's, 1 where it is the fastest."""
        return self.seconds[self.chosen] / self.seconds[self.best]


def layers(workloads: Mapping[str, Workload]) -> list[Layer]:
    """The layers that these workloads adapt, each once."""
    found: dict[Layer, None] = {}
    for workload in workloads.values():
        with torch.device("meta"):
            model = workload.build()
        maps = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name, _ in match(list(maps), workload.targets):
            found[Layer(maps[name].out_features, maps[name].in_features, math.prod(workload.shape[:-1]))] = None
    return list(found)


def measured(layer: Layer, setting: str, rounds: int, device: torch.device) -> Choice:
    """Times all plans of a layer under a setting of SETTINGS, in turns; a round before the others is not counted."""
    method, kept = SETTINGS[setting]
    model: nn.Module = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, device=device))
    adapt(model, method, ["0"])
    adapted = adapted_layers(model)["0"]
    update: Any = adapted.updates[0]
    x = torch.randn(layer.tokens, layer.in_features, device=device, requires_grad=True)
    dy = torch.randn(layer.tokens, layer.out_features, device=device)
    with cached(model) if kept else nullcontext():
        automatic: ExecutionPlan = update.plan(x, adapted.weight, update.fixed().B, False)

        def step(plan: str) -> None:
            output, input_gradient, gradient = map(WAYS.__getitem__, plan)
            forced = ExecutionPlan(output, input_gradient, gradient, automatic.compute, automatic.delta)
            update.plan = lambda *given: forced
            with torch.no_grad():  # as an optimiser's step does, so that nothing is kept from the plan before
                update.lambda_.add_(1e-3)
            model(x).backward(dy)
            model.zero_grad()
            x.grad = None

        calls = {plan: partial(device_seconds_of, partial(step, plan), device) for plan in PLANS}
        seconds = interleaved(calls, rounds, warm_up=1)
    chosen = "".join("W" if way == WEIGHT else "T" for way in automatic[:3])
    return Choice(layer, setting, chosen, {plan: min(values) for plan, values in seconds.items()})


def choices(
    workloads: Mapping[str, Workload], rounds: int, device: torch.device, done: Sequence[Choice] = ()
) -> Iterator[Choice]:
    """Of every layer of the workloads under every setting: those `done` as they are, the others measured now."""
    known = {(choice.layer, choice.setting): choice for choice in done}
    for layer, setting in itertools.product(layers(workloads), SETTINGS):
        yield known.get((layer, setting)) or measured(layer, setting, rounds, device)


def as_json(found: Sequence[Choice]) -> list[dict[str, Any]]:
    """For a file; `from_json` reads it."""
    return [choice._asdict() | {"layer": choice.layer._asdict()} for choice in found]


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[Choice]:
    """The choices of a file."""
    return [Choice(**{**row, "layer": Layer(**row["layer"])}) for row in rows]


def table(found: Sequence[Choice]) -> str:
    """A row for each layer: under each setting the plan chosen and its time over the fastest plan's, as Markdown.

    Where they differ the fastest one follows after a slash.
    """
    rows = {choice.layer: [f"{choice.layer.out_features} × {choice.layer.in_features}"] for choice in found}
    for choice in found:
        other = "" if choice.best == choice.chosen else f" / {choice.best}"
        rows[choice.layer].append(f"{choice.regret:.2f} {choice.chosen}{other}")
    names = list(dict.fromkeys(choice.setting for choice in found))
    return markdown(["out × in", "tokens", *names], [[row[0], str(at.tokens), *row[1:]] for at, row in rows.items()])
