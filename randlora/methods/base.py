"""What every method offers, and the numbers they share."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bases import depends_on_size
from randlora.errors import SettingsError, check_count, check_positive, check_range

if TYPE_CHECKING:
    from randlora.adapters.core import Context
    from randlora.adapters.layer import Frozen, Site, Update


class Method:
    """Builds updates from settings; a subclass is a frozen dataclass whose fields are its YAML's keys.

    Only `updates` must be given. The other calls are for methods that ask more of a trainer; the trainer knows
    these names and no method's name.
    """

    @property
    def name(self) -> str:
        """What records call the method."""
        return type(self).__name__.lower()

    def updates(self, sites: Sequence[Site], context: Context) -> Mapping[str, Update]:
        """One update for each site by name; all sites are seen at once, so bases and factors can be shared."""
        raise NotImplementedError

    def unfreezes(self, names: Sequence[str]) -> Sequence[str]:
        """Which of the model's own parameters, of those `names`, are trained too, beside the updates."""
        return []

    def parameter_groups(self, trained: Mapping[str, nn.Parameter], rate: float, decay: float) -> list[dict[str, Any]]:
        """The optimiser's groups for the trained tensors (by name), given the run's learning rate and weight decay."""
        return [{"params": list(trained.values()), "lr": rate, "weight_decay": decay}]

    def penalty(self, updates: Iterable[Update]) -> Tensor | None:
        """A term to add to the loss of each step, or None."""
        return None

    def after_backward(self, updates: Iterable[Update], step: int) -> None:
        """Called when the gradients of a step are complete and clipped, before the optimiser's step."""

    def after_step(self, updates: Iterable[Update], step: int) -> None:
        """Called after the optimiser's step."""

    def finish(self, updates: Iterable[Update]) -> None:
        """Called once, after the last step and before the final evaluation."""


def check_low_rank(method: Any) -> None:
    """Checks the fields that low-rank methods share: rank, dropout, and alpha where there is one."""
    name = type(method).__name__
    check_count(f"{name}.rank", method.rank)
    check_range(f"{name}.dropout", method.dropout, 0, 1)
    if getattr(method, "alpha", None) is not None:
        check_positive(f"{name}.alpha", method.alpha)


def relative_scale(rank: int, alpha: float | None) -> float:
    """alpha / rank, where alpha None means 2·rank."""
    return 2.0 if alpha is None else alpha / rank


def sharing(sites: Sequence[Site], kind: str, size: Callable[[Site], Any]) -> list[list[Site]]:
    """The sites in groups that can have the same fixed matrices: all, or those of one `size` where `kind` needs it."""
    if not depends_on_size(kind):
        return [list(sites)]
    sizes = sorted({size(site) for site in sites})
    return [[site for site in sites if size(site) == one] for one in sizes]


def describe(method: Method) -> dict[str, Any]:
    """A method as plain data: its class's import path and its fields."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    return {"class": f"{type(method).__module__}:{type(method).__qualname__}", **fields}


def method_from(description: Mapping[str, Any]) -> Method:
    """The method that `describe` described. A class outside randlora must be imported by its user beforehand."""
    settings = dict(description)
    module, _, name = settings.pop("class", "").partition(":")
    known = {cls.__module__ + ":" + cls.__qualname__: cls for cls in _subclasses(Method)}
    if module.startswith("randlora.methods."):
        importlib.import_module(module)
        known = {cls.__module__ + ":" + cls.__qualname__: cls for cls in _subclasses(Method)}
    if f"{module}:{name}" not in known:
        raise SettingsError(f"unknown method {module}:{name}: import the module that defines it first")
    return known[f"{module}:{name}"](**settings)


def _subclasses(cls: type) -> list[type]:
    direct: list[type] = cls.__subclasses__()
    return direct + [sub for one in direct for sub in _subclasses(one)]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matrix product with x runs in: autocast's where it is on, x's own elsewhere."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def low_rank_linear(x: Tensor, base: Frozen, dropped: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """base(x) + scale · dropped Aᵀ Bᵀ for x and dropped (..., in), A (r, in), B (out, r); no temporary of y's size."""
    y = base(x)
    low = F.linear(dropped, A.to(dropped.dtype)).flatten(0, -2)
    y.view(-1, y.shape[-1]).addmm_(low.to(y.dtype), B.to(y.dtype).T, alpha=scale)
    return y
