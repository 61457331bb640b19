"""What methods and adapters say to each other: a site, the update on it, what builds updates, and how files name it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bases import Basis, draw_basis
from randlora.bounds import Bounded
from randlora.errors import SettingsError


@dataclass(frozen=True)
class Site:
    """An adapted weight matrix: a linear module of the model, or a named slice of a fused one."""

    name: str
    out_features: int
    in_features: int
    trainable_parameters: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def small(self) -> int:
        """The smaller side, the rank of a full-rank update."""
        return min(self.shape)

    @property
    def large(self) -> int:
        """The larger side."""
        return max(self.shape)


class Frozen(NamedTuple):
    """The linear map under an update: weight (out, in), bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Update(nn.Module):
    """What a method adds to one site: its parameters are trained and counted, its buffers are fixed.

    A subclass gives `delta`; it overrides `forward` where an exact form is cheaper than forming W'. Fixed tensors that
    no seed gives again are persistent buffers: they go into the adapter's file. All others are not persistent.
    """

    replaces_base = False  # True when the trained parameters stand in for W0 instead of beside it
    caching = False  # True inside `cached`
    _kept: tuple[Hashable, Tensor] | None = None

    def delta(self, weight: Tensor) -> Tensor:
        """W' - W0, float32 (out, in), given the frozen weight; most methods read only its shape."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        """x W'ᵀ + b for x (..., in)."""
        return F.linear(x, (base.weight + self.delta(base.weight)).to(base.weight.dtype), base.bias)

    def resume(self, names: Collection[str]) -> bool:
        """Takes the tensors that it had in a training, by name; their values come afterwards.

        For updates that grow. Without names it takes those of the start, with their values. Returns whether its
        tensors are others than before.
        """
        return False

    def keep(self, caching: bool) -> None:
        """Starts or ends keeping; see `randlora.adapters.core.cached`."""
        self.caching, self._kept = caching, None

    def kept(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor | None:
        """Inside `cached`, `make()`, made again only when `key` or a trained tensor has changed; None elsewhere."""
        if not self.caching or torch.compiler.is_compiling():
            return None
        state = (key, *((p.data_ptr(), p._version) for p in self.parameters()))
        if self._kept is None or self._kept[0] != state:
            self._kept = None  # so that the old tensor is gone before the new one comes
            with torch.no_grad():
                self._kept = (state, make())
        return self._kept[1]


@dataclass(frozen=True)
class Context:
    """What a method may know when it builds its updates."""

    seed: int
    device: torch.device
    weights: Mapping[str, Tensor]  # the frozen W0 of every site, (out, in), to be read only
    heads: Mapping[str, int] = field(default_factory=dict)  # of the attention around a site, where they are known

    def draw(
        self, basis: str, name: str, rows: int, columns: int, sparsity: float | None = None, size: int | None = None
    ) -> Basis:
        """A fixed random matrix for sites to share, drawn from the run's seed; see `randlora.bases.draw_basis`."""
        return draw_basis(basis, name, rows, columns, sparsity, size, seed=self.seed, device=self.device)


class Step(NamedTuple):
    """Where a training is.

    Args:
        number: Of the optimiser's step, from 0.
        total: How many there are.
        rate: The learning rate of the updates in this step.
        seed: Of the run.
    """

    number: int
    total: int
    rate: float
    seed: int


class Method(Bounded):
    """Builds updates from settings; a subclass is a frozen dataclass whose fields are its YAML's keys.

    Only `updates` must be given. The other calls are for methods that ask more of a trainer; the trainer knows
    these names and no method's name.
    """

    budget_setting: ClassVar[str | None] = "rank"  # what chooses how many parameters are trained; None: nothing does
    implied: ClassVar[Mapping[str, Any]] = {}  # what adapter files older than a field meant by its absence

    @property
    def name(self) -> str:
        """What records call the method."""
        return type(self).__name__.lower()

    @property
    def calibration_examples(self) -> int:
        """How many training examples `calibrated` is to see before updates are built; 0 for none."""
        return 0

    def calibrated(self, model: nn.Module, sites: Sequence[str], passes: Iterable[object]) -> Method:
        """The method with what it chooses from training data, which its fields then hold, as adapter files need them.

        Args:
            model: in evaluation mode, not adapted yet.
            sites: the names of those to come.
            passes: getting an item runs the model over a batch of training examples, without gradients.
        """
        return self

    @property
    def remark(self) -> str | None:
        """A sentence for a plan whose counts may not be those of the run, as it has no data; None: they are."""
        return None

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        """One update for each site by name; all sites are seen at once, so bases and factors can be shared."""
        raise NotImplementedError

    def unfreezes(self, names: Sequence[str]) -> Sequence[str]:
        """Which of the model's own parameters, of those `names`, are trained too, beside the updates."""
        return []

    def trains_rest(self, name: str) -> bool:
        """Whether slices that no target names become sites too, beside one that is, of the fused matrix `name`."""
        return False

    def grown(self) -> Method:
        """The method whose updates start as large as these become in a training, for what a run takes; itself here."""
        return self

    def parameter_groups(self, trained: Mapping[str, nn.Parameter], rate: float, decay: float) -> list[dict[str, Any]]:
        """The optimiser's groups, as torch.optim takes them; a group's schedule, warm-up and all, begins at `born`.

        Args:
            trained: every trained tensor by name, as `Adaptation.trained` gives them.
            rate: the run's learning rate.
            decay: the run's weight decay.

        Returns:
            Groups, each with a `born` where its parameters came later than step 0: the first step that changes them.
        """
        return [{"params": list(trained.values()), "lr": rate, "weight_decay": decay}]

    def before_step(self, updates: Iterable[Update], step: Step) -> None:
        """Called before the first forward pass of a step."""

    def penalty(self, updates: Iterable[Update]) -> Tensor | None:
        """A term to add to the loss of each step, or None."""
        return None

    def after_backward(self, updates: Iterable[Update], step: Step) -> bool:
        """Called when the gradients of a step are complete and clipped, before the optimiser's step.

        Returns whether it has added or removed trained tensors. The optimiser then takes these as they are, with the
        state that it has of those it knew. Every process must decide the same.
        """
        return False

    def after_step(self, updates: Iterable[Update], step: Step) -> None:
        """Called after the optimiser's step."""

    def finish(self, updates: Mapping[str, Update]) -> Method:
        """Called once, after the last step and before the final evaluation.

        Returns the method that builds updates as these are now, by site, which the adapter's file names: itself here.
        """
        return self


def describe(method: Method) -> dict[str, Any]:
    """A method as plain data: its class's import path and its fields."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    return {"class": _path(type(method)), **fields}


def method_from(description: Mapping[str, Any]) -> Method:
    """The method that `describe` described.

    Only subclasses of Method are built. Those of this package are imported by their path; another class must be
    imported by its user beforehand. Raises SettingsError for a class that is not known then.
    """
    settings = dict(description)
    path = settings.pop("class", "")
    module = path.partition(":")[0]
    if module.startswith("randlora.methods."):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise SettingsError(f"unknown method {path}: {error}") from error
    known = {_path(subclass): subclass for subclass in _subclasses(Method)}
    if path not in known:
        raise SettingsError(f"unknown method {path}: import the module that defines it first")
    return known[path](**(known[path].implied | settings))


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _subclasses(cls: type[Method]) -> list[type[Method]]:
    return [each for direct in cls.__subclasses__() for each in (direct, *_subclasses(direct))]
