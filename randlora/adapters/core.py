"""adapt, merged, merge: the life of an adapted model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from randlora.adapters.attention import fuse_attention, unfuse_attention
from randlora.adapters.interface import Context, Method, Site, Update
from randlora.adapters.layer import AdaptedLinear, linear_weight
from randlora.adapters.positions import attention_heads
from randlora.adapters.quantization import dense, is_quantised, recognise
from randlora.adapters.targets import Place, completed, places
from randlora.errors import SettingsError


@dataclass(frozen=True)
class Report:
    """What was adapted; `total_parameters` has the trained ones in it.

    `saved_parameters` are those of an adapter's file: the trained ones, and fixed ones that no seed gives again.
    Parameters that sites share are counted at the first of these.
    """

    sites: list[Site]
    trainable_parameters: int
    total_parameters: int
    saved_parameters: int


@dataclass
class Adaptation:
    """How a model was adapted; it hangs on the model that `adapt` was given."""

    method: Method
    targets: list[str]
    seed: int
    sites: list[Site]
    updates: dict[str, Update]
    unfrozen: dict[str, nn.Parameter] = field(default_factory=dict)  # trained as they are, beside the sites
    added: list[str] = field(default_factory=list)  # those of them that the method alone does not train

    def saved(self) -> dict[str, Tensor]:
        """Every tensor that a file of the adapter holds, by name: the trained ones and the updates' persistent buffers.

        ``site:name`` for an update's, under the first site where updates share it; the model's own name otherwise.
        """
        named: dict[int, tuple[str, Tensor]] = {}
        for site, update in self.updates.items():
            for name, tensor in update.state_dict(keep_vars=True).items():
                named.setdefault(id(tensor), (f"{site}:{name}", tensor))
        return dict(named.values()) | self.unfrozen

    def trained(self) -> dict[str, nn.Parameter]:
        """Those of `saved` that are trained."""
        return {name: tensor for name, tensor in self.saved().items() if isinstance(tensor, nn.Parameter)}


def adapt(model: nn.Module, method: Method, targets: Sequence[str], seed: int = 0) -> Report:
    """Puts `method`'s updates on the linear maps that `targets` name, in place, and freezes all else.

    Every nn.MultiheadAttention is replaced by an equal module of linear maps (`UnfusedAttention`).

    Args:
        model: any module with linear maps (nn.Linear, transformers' Conv1D).
        method: what builds the updates, such as `randlora.methods.RandLoRA()`.
        targets: fnmatch patterns on module names; ``name[q]`` is a slice of a fused matrix.
        seed: what fixed bases and initial factors are drawn from.

    Returns:
        The sites with their counts, and the parameters trained and in all.

    Raises:
        SettingsError: (a ValueError) a pattern matches nothing, a weight is shared between modules, or the model
            is adapted already; the model is then as it was.
    """
    if adaptation_of(model) is not None:
        raise SettingsError("the model is adapted already: merge it, or load it anew")
    total = sum(parameter.numel() for parameter in model.parameters())
    unfuse_attention(model)
    try:
        chosen = completed(model, places(model, targets), method.trains_rest)
        modules = {place.module: model.get_submodule(place.module) for place in chosen}
        updates, sites = _build(method, chosen, modules, attention_heads(model, chosen), seed)
        unfrozen = _unfrozen(method, model, {id(module.weight) for module in modules.values()})
    except Exception:
        fuse_attention(model)
        raise

    model.requires_grad_(False)
    for parameter in unfrozen.values():
        parameter.requires_grad_(True)
    for name, module in modules.items():
        here = [(place.rows, updates[place.site]) for place in chosen if place.module == name]
        replace(model, name, AdaptedLinear(module, here))

    adaptation = Adaptation(method, list(targets), seed, sites, updates, unfrozen)
    model.__dict__["_adaptation"] = adaptation
    beside = sum(site.trainable_parameters for site in sites if not updates[site.name].replaces_base)
    trainable = sum(site.trainable_parameters for site in sites) + sum(p.numel() for p in unfrozen.values())
    saved = sum(tensor.numel() for tensor in adaptation.saved().values())
    return Report(sites, trainable, total + beside, saved)


def train_beside(model: nn.Module, parameters: Mapping[str, nn.Parameter], report: Report) -> Report:
    """Has parameters of an adapted model trained as they are, beside what its method trains; the report with them.

    `parameters` have the names that they had before `adapt`.
    """
    adaptation = require_adaptation(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    adaptation.unfrozen |= parameters
    adaptation.added += parameters
    count = sum(parameter.numel() for parameter in parameters.values())
    trainable, saved = report.trainable_parameters + count, report.saved_parameters + count
    return dataclasses.replace(report, trainable_parameters=trainable, saved_parameters=saved)


def _build(
    method: Method, chosen: list[Place], modules: Mapping[str, nn.Module], heads: Mapping[str, int], seed: int
) -> tuple[dict[str, Update], list[Site]]:
    weights = {}
    for place in chosen:
        weight = linear_weight(modules[place.module]).detach()
        recognise(weight)
        weights[place.site] = weight if place.rows is None else weight[place.rows]
    sites = [Site(name, *weight.shape) for name, weight in weights.items()]
    device = next(iter(weights.values())).device
    updates = dict(method.updates(sites, Context(seed, device, weights, heads)))
    if set(updates) != set(weights):
        raise RuntimeError(f"{type(method).__name__}.updates must return one update for each site")
    counted: list[Site] = []
    shared: set[nn.Parameter] = set()
    for site in sites:
        update = updates[site.name]
        if update.replaces_base and is_quantised(weights[site.name]):
            raise SettingsError(f"{method.name} trains the weights themselves, and those of {site.name} are quantised")
        parameters = [p for p in update.parameters() if p not in shared]
        shared.update(parameters)
        counted.append(dataclasses.replace(site, trainable_parameters=sum(p.numel() for p in parameters)))
        if any(p.dtype != torch.float32 for p in parameters):
            raise RuntimeError(f"{type(method).__name__}: trained tensors are float32 whatever the base's dtype")
    return updates, counted


def adaptation_of(model: nn.Module) -> Adaptation | None:
    """The adaptation of `model` or of a module inside it."""
    for module in model.modules():
        if "_adaptation" in module.__dict__:
            return module.__dict__["_adaptation"]
    return None


def require_adaptation(model: nn.Module) -> Adaptation:
    """As adaptation_of; SettingsError when there is none."""
    adaptation = adaptation_of(model)
    if adaptation is None:
        raise SettingsError("the model is not adapted: call randlora.adapt first")
    return adaptation


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def resume(model: nn.Module, names: Collection[str]) -> bool:
    """Gives the updates the tensors that they had in a training, of the `names` in the model; see `Update.resume`."""
    updates = {f"{prefix}.": module for prefix, module in model.named_modules() if isinstance(module, Update)}
    own = {prefix: [name.removeprefix(prefix) for name in names if name.startswith(prefix)] for prefix in updates}
    return any([update.resume(own[prefix]) for prefix, update in updates.items()])


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model gives the same outputs at the base's cost; the price is one copy of the adapted weights.

    The base is not written to, and nothing is subtracted afterwards: the merged copies are dropped.
    Gradients do not reach the updates inside.
    """
    adapted = [layer for layer in adapted_layers(model).values() if layer._merged is None]
    for layer in adapted:
        layer.stash_merged()
    try:
        yield model
    finally:
        for layer in adapted:
            layer.drop_merged()


@contextmanager
def cached(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, what RandLoRA's updates make of their trained parameters is kept until an optimiser's step changes these.

    It saves work where a model is called several times between two steps: accumulation, checkpointed layers,
    passes without gradients. The price is up to one matrix as large as W0 for each site. Changes are seen by the
    tensors' version counters, so writing to ``.data`` inside is not. Updates of other methods compute as outside,
    unless they use `Update.kept`.
    """
    updates: list[Update] = [update for layer in adapted_layers(model).values() for update in layer.updates]  # type: ignore[misc]
    for update in updates:
        update.keep(True)
    try:
        yield model
    finally:
        for update in updates:
            update.keep(False)


def merge(model: nn.Module) -> nn.Module:
    """Makes plain modules again, with the updates in their weights, for good; returns the model."""
    require_adaptation(model)
    for name, layer in adapted_layers(model).items():
        replace(model, name, layer.plain())
    return _restore(model)


def unload(model: nn.Module) -> nn.Module:
    """Takes the updates off again: the model as it was before `adapt`, all of it frozen; returns the model."""
    require_adaptation(model)
    for name, layer in adapted_layers(model).items():
        replace(model, name, layer.base)
    return _restore(model)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the model's module of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _restore(model: nn.Module) -> nn.Module:
    fuse_attention(model)
    for module in model.modules():
        module.__dict__.pop("_adaptation", None)
    return model


def _unfrozen(method: Method, model: nn.Module, adapted: set[int]) -> dict[str, nn.Parameter]:
    """The model's own parameters that are trained too, by name, without the matrices of the sites."""
    own = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in adapted}
    unfrozen = {name: own[name] for name in method.unfreezes(list(own))}
    for name, parameter in unfrozen.items():
        if parameter.dtype != torch.float32:
            raise SettingsError(f"{name} is {parameter.dtype}: load the model in float32 to train all of it")
    return unfrozen


@torch.no_grad()
def relative_norms(model: nn.Module) -> dict[str, float]:
    """‖ΔW‖ / ‖W0‖ (Frobenius) of every adapted module, by name."""
    return {
        name: float(
            torch.stack(
                [u.delta(dense(layer.weight)[rows]).norm() for rows, u in zip(layer.rows, layer.updates, strict=True)]
            ).norm()
            / dense(layer.weight).float().norm().clamp_min(1e-30)
        )
        for name, layer in adapted_layers(model).items()
    }
