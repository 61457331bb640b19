"""Several adapters on one model, for inference: named, switched, weighted, mixed within a batch, merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from randlora.adapters.attention import UnfusedAttention, fuse_attention, unfuse_attention
from randlora.adapters.core import adaptation_of, adapted_layers, replace, unload
from randlora.adapters.files import load_adapter
from randlora.adapters.identity import method_of, read_settings
from randlora.adapters.layer import AdaptedLinear
from randlora.adapters.quantization import dense
from randlora.adapters.ties import shared
from randlora.adapters.transaction import unchanged_on_failure
from randlora.errors import SettingsError


class Selection:
    """Which adapters the layers of a model use now; one is shared by all of them.

    Either `weights` of the adapters in use, or for each example of a batch the name of its adapter, or None.
    """

    def __init__(self) -> None:
        self.weights: Mapping[str, float] = {}
        self.examples: Sequence[str | None] | None = None

    @property
    def alone(self) -> str | None:
        """The adapter that is used alone and as it is."""
        return next(iter(self.weights)) if [*self.weights.values()] == [1] else None


class SwitchedLinear(AdaptedLinear):
    """A linear module and what each of several adapters makes of it; those that leave it alone are not among them.

    Args:
        base: The module that all of them were put on.
        adapted: By the adapter's name, the same module with its updates.
        selection: Which of them are in use.
        batch: The dimension of the inputs that counts examples.
    """

    def __init__(self, base: nn.Module, adapted: Mapping[str, AdaptedLinear], selection: Selection, batch: int):
        super().__init__(base, [])
        # The layers are views of `base`; that they are moved with the model, their updates are modules of this one.
        self._adapted, self.selection, self.batch = dict(adapted), selection, batch
        self.updates = nn.ModuleList(update for layer in adapted.values() for update in layer.updates)

    def forward(self, x: Tensor) -> Tensor:
        if self._merged is not None:
            return super().forward(x)
        if self.selection.examples is not None:
            return self._each(x, self.selection.examples)
        if (layer := self._adapted.get(self.selection.alone or "")) is not None:
            return layer(x)
        y: Tensor = self.base(x)
        terms = [weight * (self._adapted[name](x) - y) for name, weight in self._used()]
        return y + sum(terms) if terms else y

    def _used(self) -> list[tuple[str, float]]:
        return [(name, weight) for name, weight in self.selection.weights.items() if name in self._adapted]

    def _each(self, x: Tensor, names: Sequence[str | None]) -> Tensor:
        """Each example by its own adapter: as many calls as there are adapters in the batch."""
        if x.dim() <= self.batch or x.shape[self.batch] != len(names):
            raise SettingsError(
                f"adapters are given for {len(names)} examples, and a layer has inputs of shape {tuple(x.shape)}: give "
                f"one name for each example of the batch"
            )
        y: Tensor | None = None
        for name in dict.fromkeys(names):
            chosen = torch.tensor([index for index, other in enumerate(names) if other == name], device=x.device)
            part = self._adapted.get(name or "", self.base)(x.index_select(self.batch, chosen))
            if y is None:
                y = part.new_empty((*x.shape[:-1], self.out_features))
            y = y.index_copy(self.batch, chosen, part)
        assert y is not None
        return y

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        if self.selection.examples is not None:
            raise SettingsError("what differs between examples cannot be merged: use one of the adapters, or weights")
        weight = dense(self.weight)
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name, factor in self._used():
            layer = self._adapted[name]
            for rows, update in zip(layer.rows, layer.updates, strict=True):
                merged[rows] += factor * update.delta(weight[rows])
        return merged.to(weight.dtype)


class Adapters:
    """Several adapters of one model, of which none is in use at first.

    One that is used alone gives the outputs that it gives on a model of its own, to the bit. Adapters are read, not
    trained, here: ΔW of those in use are added, times their weights, and the model is in evaluation mode as always.

    Args:
        model: Not adapted. What it gives while no adapter is in use does not change.
        modules: Heads and other modules of which each adapter may have tensors of its own, by name, as for
            `load_adapter`. Their present values are those of no adapter.

    Raises:
        SettingsError: (a ValueError) The model is adapted.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module] | None = None):
        if adaptation_of(model) is not None:
            raise SettingsError("the model is adapted already: merge it, or load it anew")
        self.model, self.modules = model, dict(modules or {})
        self._layers: dict[str, dict[str, AdaptedLinear]] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}  # of `modules`, that an adapter has changed
        self._base = {name: tensor.clone() for name, tensor in self._own().items()}
        self._selection = Selection()

    @property
    def names(self) -> list[str]:
        """Of the adapters, in the order in which they came."""
        return [*self._layers]

    @property
    def weights(self) -> dict[str, float]:
        """Of those in use."""
        return dict(self._selection.weights)

    def load(self, name: str, folder: str | Path, reader: Callable[[nn.Module, Path], object] | None = None) -> None:
        """Reads an adapter and keeps it under a name; what is in use stays in use.

        Args:
            name: One that no adapter has yet.
            folder: Of the adapter's files.
            reader: What puts the adapter on the plain model: None for `load_adapter`, or `randlora.from_peft`, or a
                function of yours, which may write to its updates and to `modules` alone.

        Raises:
            SettingsError: The name is taken, or what the reader raises, or the adapter brings parameters beside the
                matrices and `modules`. What was there before is unchanged.
        """
        if name in self._layers or not name:
            taken = ", ".join(self._layers) or "none"
            raise SettingsError(f"an adapter cannot be named {name!r}; names taken: {taken}")
        folder = Path(folder)
        if reader is None:
            reader = self._reader(folder)
        with self._plain(), unchanged_on_failure(self.model):
            tied, parameters = self._tied(), dict(self.model.named_parameters(remove_duplicate=False))
            reader(self.model, folder)
            layers = adapted_layers(self.model)
            unload(self.model)
            self._check_written(folder, parameters, tied - self._tied())
            self._layers[name] = layers
            self._tensors[name] = {
                key: tensor.clone() for key, tensor in self._own().items() if not tensor.equal(self._base[key])
            }

    def remove(self, name: str) -> None:
        """Forgets an adapter; SettingsError while it is in use."""
        self._known([name])
        if name in self.weights:
            raise SettingsError(f"{name} is in use: use another, or none, before it is removed")
        with self._plain():
            del self._layers[name], self._tensors[name]

    def use(self, weights: str | Mapping[str, float] | None) -> None:
        """Has the model use an adapter, or several with weights, or none.

        Args:
            weights: A name, or names with factors of their ΔW; None for the model without an adapter. Tensors of
                `modules` t become t + Σ factor · (those of the adapter - t).
        """
        weights = {weights: 1.0} if isinstance(weights, str) else dict(weights or {})
        self._known(weights)
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise SettingsError(f"the weight of {name} is {weight}: give a finite number")
        self._selection.weights, self._selection.examples = weights, None
        alone = self._selection.alone
        with torch.no_grad():
            for key, tensor in self._own().items():
                base = self._base[key]
                own = {name: tensors[key] for name in weights if key in (tensors := self._tensors[name])}
                if alone is not None or not own:
                    tensor.copy_(own.get(alone or "", base))
                else:
                    tensor.copy_(base + sum(weights[name] * (value - base) for name, value in own.items()))

    @contextmanager
    def using(self, weights: str | Mapping[str, float] | None) -> Iterator[nn.Module]:
        """As `use`, inside; afterwards what was in use before."""
        before = self.weights
        self.use(weights)
        try:
            yield self.model
        finally:
            self.use(before)

    @contextmanager
    def each(self, names: Sequence[str | None]) -> Iterator[nn.Module]:
        """Inside, every example of a batch has its own adapter; a batch has as many examples as there are `names`.

        Args:
            names: For each example the adapter, or None for none.

        Raises:
            SettingsError: One of them has tensors of `modules`, which all examples share.
        """
        self._known(name for name in names if name is not None)
        if own := [name for name in names if name is not None and self._tensors[name]]:
            raise SettingsError(f"{own[0]} has {min(self._tensors[own[0]])} of its own, which a batch cannot mix")
        before = self.weights
        self.use(None)
        self._selection.examples = [*names]
        try:
            yield self.model
        finally:
            self.use(before)

    def merge(self) -> nn.Module:
        """Makes a plain model for good, with the adapters in use in its weights; the others are lost."""
        for name, layer in adapted_layers(self.model).items():
            replace(self.model, name, layer.plain())
        fuse_attention(self.model)
        self._layers, self._tensors = {}, {}
        return self.model

    def _reader(self, folder: Path) -> Callable[[nn.Module, Path], object]:
        """`load_adapter`, where it writes to the updates and to `modules` alone."""
        settings = read_settings(folder)
        saved = settings.get("modules", [])
        if missing := [module for module in saved if module not in self.modules]:
            raise SettingsError(f"{folder} has {missing[0]}, too: name it among the `modules` of Adapters")
        if settings.get("unfrozen") or method_of(settings, folder).unfreezes(
            [name for name, _ in self.model.named_parameters()]
        ):
            raise SettingsError(f"{folder} has more of the model than matrices: load it into a model of its own")
        return partial(load_adapter, modules={module: self.modules[module] for module in saved})

    def _check_written(self, folder: Path, before: Mapping[str, nn.Parameter], untied: set[str]) -> None:
        """SettingsError where a reader has given the model other parameters, but for those of `modules`.

        Nor can it take modules out of a tie with which an adapter here was trained.
        """
        allowed = {parameter for module in self.modules.values() for parameter in module.parameters()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if before.get(name) is not parameter and parameter not in allowed:
                raise SettingsError(
                    f"{folder} has {name}, too: name its module among the `modules` of Adapters, or load it into a "
                    "model of its own"
                )
        for module in untied:
            for name, own in self._tensors.items():
                if any(key.startswith(f"{module}.") for key in own):
                    raise SettingsError(
                        f"{folder} has {module} in parameters of its own, and {name} was trained with it tied to "
                        "another module: load them into models of their own"
                    )

    def _tied(self) -> set[str]:
        """Those of `modules` that share parameters with the rest of the model."""
        return {name for name, module in self.modules.items() if shared(self.model, module)}

    def _known(self, names: Iterator[str] | Sequence[str] | Mapping[str, float]) -> None:
        for name in names:
            if name not in self._layers:
                raise SettingsError(f"no adapter is named {name!r}; there are {', '.join(self._layers) or 'none'}")

    def _own(self) -> dict[str, Tensor]:
        """The tensors of `modules`, by name."""
        return {
            f"{name}.{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in module.state_dict(keep_vars=True).items()
        }

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Inside, the model is the plain one; afterwards it has the adapters that there are then."""
        before = self.weights
        self.use(None)
        for name, layer in adapted_layers(self.model).items():
            replace(self.model, name, layer.base)
        fuse_attention(self.model)
        try:
            yield
        finally:
            self._put_on()
            self.use(before)

    def _put_on(self) -> None:
        if not self._layers:
            return
        unfuse_attention(self.model)
        for module in {module: None for layers in self._layers.values() for module in layers}:
            base = self.model.get_submodule(module)
            adapted = {name: layers[module] for name, layers in self._layers.items() if module in layers}
            for layer in adapted.values():
                layer.base = base
            parent = self.model.get_submodule(module.rpartition(".")[0])
            batch = int(isinstance(parent, UnfusedAttention) and not parent.batch_first)
            replace(self.model, module, SwitchedLinear(base, adapted, self._selection, batch))
