"""The loss between trained models: along the line through two, and on the plane through three."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from randlora.adapters.attention import unfuse_attention
from randlora.adapters.core import adapted_layers, require_adaptation
from randlora.bounds import Bounded, NotNegative
from randlora.errors import SettingsError
from randlora.tasks.base import Batch, Task
from randlora.training.evaluate import terms
from randlora.use.sample import Sample, asked, batches, named
from randlora.use.trained import Base, Trained

CLAMP = 1.2  # times the largest loss of the three models: what figures show at most, as the authors' code
Points = Annotated[int, Ge(2), Le(1001)]


@dataclass(frozen=True)
class Grid(Bounded):
    """Where the loss is taken.

    Args:
        points: On a side of the plane's grid.
        margin: How far the grid reaches beyond the three models, as a share of the triangle's width and height.
        steps: Points of a line, both ends among them.
    """

    points: Points = 21
    margin: NotNegative = 0.25
    steps: Points = 21


class Plane(NamedTuple):
    """An orthonormal frame of the plane through three vectors a, b and c: a is the origin, b lies on the x axis.

    Args:
        b: The length of b - a.
        c: The place of c, (x, y).
    """

    b: float
    c: tuple[float, float]

    @classmethod
    def through(cls, b: float, c: float, product: float) -> Plane:
        """By Gram and Schmidt, from ‖b - a‖², ‖c - a‖² and their inner product; SettingsError if in line."""
        side = b**0.5
        x = product / side if side else 0.0
        height = c - x * x
        if height <= 1e-12 * max(b, c):
            raise SettingsError("the three models lie on one line: there is no plane through them; give two of them")
        return cls(side, (x, height**0.5))

    @property
    def corners(self) -> list[tuple[float, float]]:
        """The places of the three."""
        return [(0.0, 0.0), (self.b, 0.0), self.c]

    def shares(self, x: float, y: float) -> tuple[float, float, float]:
        """The place as α a + β b + γ c with α + β + γ = 1."""
        gamma = y / self.c[1]
        beta = (x - gamma * self.c[0]) / self.b
        return 1 - beta - gamma, beta, gamma


def landscape(
    folders: Sequence[Path],
    grid: Grid | None = None,
    sample: Sample | None = None,
    base: Base = "same",
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The loss at two or three runs' models, on the lines between them and, of three, on the plane through them.

    What is interpolated are the weights that any of the runs has changed: W' = W0 + ΔW of every site, whatever
    further parameters were trained, and the head. Of the model itself one copy is in memory.

    Args:
        folders: Of two or three finished runs of one model and task.
        grid: Where the loss is taken.
        sample: Which examples it is a mean over.
        base: As `Trained.load` takes it.
        overrides: A task and settings in place of the runs' own.

    Returns:
        Rows with ``model``, ``task``, ``loss`` and ``part``: ``model`` with ``run`` and its place ``x``, ``y``,
        ``line`` with ``run`` (from), ``to`` and ``t`` from 0 to 1, and ``plane`` with ``x`` and ``y``. Places are
        distances between weights, in an orthonormal frame.

    Raises:
        SettingsError: There are not two or three runs, they are of several models or tasks, their base is quantised, or
            three of them lie on a line.
    """
    if len(folders) not in (2, 3):
        raise SettingsError(f"{len(folders)} runs: give two for a line, or three for the plane through them")
    grid, sample = grid or Grid(), sample or Sample("train")
    runs = named(folders, overrides)
    weights = [changed(Trained.load(folder, base, data=True, overrides=overrides)) for folder in runs.values()]
    subject = Trained.before(folders[0], True, overrides)
    unfuse_attention(subject.backbone.module)
    examples, names = batches(subject, sample), list(runs)
    with asked(subject):
        surface, plane = Surface(subject, weights, examples), None
        where = [(0.0, 0.0), (surface.inner(1, 1) ** 0.5, 0.0)]
        if len(names) == 3:
            plane = Plane.through(surface.inner(1, 1), surface.inner(2, 2), surface.inner(1, 2))
            where = plane.corners
        rows: list[dict[str, Any]] = []
        for run, (x, y), shares in zip(names, where, np.eye(len(names)).tolist(), strict=True):
            rows.append({"part": "model", "run": run, "x": x, "y": y, "loss": surface.loss(shares)})
        for start, end in combinations(range(len(names)), 2):
            for t in np.linspace(0, 1, grid.steps).tolist():
                shares = [0.0] * len(names)
                shares[start], shares[end] = 1 - t, t
                of = {"run": names[start], "to": names[end], "t": t}
                rows.append({"part": "line", **of, "loss": surface.loss(shares)})
        if plane is not None:
            for x, y in _grid(plane, grid):
                rows.append({"part": "plane", "x": x, "y": y, "loss": surface.loss(plane.shares(x, y))})
    about = {"model": subject.experiment.model.name, "task": subject.experiment.task.name}
    return [{**about, **row} for row in rows]


def barriers(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Of each line, by its ends: the most that the loss rises above the straight line between the losses of the ends.

    0 where it nowhere does (Frankle et al., 2020, arXiv 1912.05671).
    """
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["part"] == "line":
            lines.setdefault((row["run"], row["to"]), []).append((row["t"], row["loss"]))
    return {
        ends: max(loss - ((1 - t) * points[0][1] + t * points[-1][1]) for t, loss in points)
        for ends, points in lines.items()
    }


class Surface:
    """A loss as a function of weights: the sum of several models' weights by their shares.

    Args:
        subject: Its model's weights are overwritten; where a model does not name a weight, it is this one's.
        weights: Of the models, as `changed` gives them.
        examples: The batches that the loss is a mean over.
    """

    def __init__(self, subject: Trained, weights: Sequence[Mapping[str, Tensor]], examples: Sequence[Batch]):
        self.task: Task = subject.experiment.task
        self.model: nn.Module = subject.bound.model
        self.examples = examples
        self.parts = []
        known = places(subject)
        for name in dict.fromkeys(name for own in weights for name in own):
            frozen = known[name].clone()
            self.parts.append((known[name], [own.get(name, frozen) for own in weights]))

    def inner(self, i: int, j: int) -> float:
        """The inner product of models i and j as seen from the first."""
        return sum(
            ((own[i].double() - own[0].double()) * (own[j].double() - own[0].double())).sum().item()
            for _, own in self.parts
        )

    @torch.no_grad()
    def loss(self, shares: Sequence[float]) -> float:
        """At Σ shares[i] · model i; the shares add up to 1. To be called inside `asked`."""
        for place, own in self.parts:
            place.copy_(_combined(own, shares))
        torch.clear_autocast_cache()  # which has the weights of the point before in bfloat16
        self.model.train().eval()  # so that features kept from other weights are made again
        total, count = 0.0, 0
        for batch in self.examples:
            weight = terms(self.task, batch)
            total += float(self.task.loss(self.model, batch)) * weight
            count += weight
        return total / count


def changed(subject: Trained) -> dict[str, Tensor]:
    """What a run has trained, by its name in `places`: W' of the adapted layers, further parameters, and the head."""
    module = subject.backbone.module
    adaptation, layers = require_adaptation(module), adapted_layers(module)
    if any(layer.quantised for layer in layers.values()):
        raise SettingsError(f"model {subject.experiment.model.name}: quantised weights cannot be interpolated")
    weights = {
        f"{name}.weight": layer.merged_weight().T if layer.transposed else layer.merged_weight()
        for name, layer in layers.items()
    }
    rest = adaptation.unfrozen | {_of_head(name): p for name, p in subject.bound.head_parameters().items()}
    return weights | {name: parameter.detach().clone() for name, parameter in rest.items()}


def places(subject: Trained) -> dict[str, Tensor]:
    """The weights of a model without updates, and those of its head, to be written to."""
    head = {_of_head(name): parameter for name, parameter in subject.bound.head_parameters().items()}
    return {
        name: parameter.detach()
        for name, parameter in (dict(subject.backbone.module.named_parameters()) | head).items()
    }


def _of_head(name: str) -> str:
    return f":{name}"  # as no parameter of a model is called


def _combined(own: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ shares[i] · own[i], summed in float32; a model itself where its share is 1 and the others' 0."""
    sum_ = torch.zeros_like(own[0], dtype=torch.float32)
    for tensor, share in zip(own, shares, strict=True):
        if share:
            sum_.add_(tensor, alpha=share)
    return sum_


def _grid(plane: Plane, grid: Grid) -> Iterator[tuple[float, float]]:
    """The places of the grid, row by row."""
    sides = []
    for values in zip(*plane.corners, strict=True):
        low, high = min(values), max(values)
        beyond = grid.margin * (high - low)
        sides.append(np.linspace(low - beyond, high + beyond, grid.points).tolist())
    return ((x, y) for y in sides[1] for x in sides[0])
