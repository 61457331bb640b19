"""The optimiser of a run: any of torch.optim, by the name of its class."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from randlora.bounds import check
from randlora.errors import SettingsError


class Optimizer:
    """A class of torch.optim with its settings; the learning rates and the weight decay are the trainer's.

    Args:
        algorithm: The name of the class, such as AdamW.
        settings: What the class takes beside the parameters, the rate and the weight decay; a list is a tuple there.

    Raises:
        SettingsError: For a class or a setting that torch does not have, or a value of another type; `check` sees the
            ranges.
    """

    def __init__(self, algorithm: str = "AdamW", **settings: Any):
        self.algorithm = algorithm
        self.settings = {name: tuple(s) if isinstance(s, list) else s for name, s in settings.items()}
        self._class = getattr(torch.optim, algorithm, None) if isinstance(algorithm, str) else None
        if not (isinstance(self._class, type) and issubclass(self._class, torch.optim.Optimizer)):
            raise SettingsError(f"optimizer.algorithm={algorithm!r}: not a class of torch.optim, such as AdamW")
        known = [name for name in inspect.signature(self._class).parameters if name not in ("params", *_TRAINERS)]
        for name in self.settings:
            if name not in known:
                raise SettingsError(f"optimizer.{name}: torch.optim.{algorithm} has {', '.join(known)}")
        check("optimizer", get_type_hints(self._class.__init__), self.settings)

    def describe(self) -> dict[str, Any]:
        """The class's name and its settings, as plain data."""
        return {"algorithm": self.algorithm, **self.settings}

    def check(self, weight_decay: float) -> None:
        """Takes a step with a small matrix; SettingsError where torch refuses it.

        Not in the constructor, since torch loads its compiler, for a second or two, with the first optimiser.
        """
        self.state_bytes([torch.empty(2, 2)], weight_decay)

    def over(self, groups: Iterable[Mapping[str, Any]]) -> torch.optim.Optimizer:
        """torch's optimiser over parameter groups: `params`, `lr`, `weight_decay`, and what a method adds to them.

        Raises SettingsError where the class refuses the settings or the parameters, or has no weight decay to give.
        """
        own = [dict(group) for group in groups]
        if "weight_decay" not in inspect.signature(self._class).parameters:  # type: ignore[arg-type]
            decays = [group.pop("weight_decay", 0) for group in own]
            if any(decays):
                raise SettingsError(f"trainer.weight_decay={max(decays)}: torch.optim.{self.algorithm} has none; use 0")
        try:
            return self._class(own, **self.settings)  # type: ignore[misc]
        except (TypeError, ValueError) as error:
            raise SettingsError(f"optimizer={self.algorithm}: {error}") from error

    def state_bytes(self, parameters: Iterable[Tensor], weight_decay: float = 0.0) -> int:
        """Bytes of what the optimiser keeps beside float32 parameters of these shapes, after a step on the meta device.

        What is counted for a whole parameter, such as the number of steps, is left out.
        """
        copies = [nn.Parameter(torch.empty(p.shape, dtype=torch.float32, device="meta")) for p in parameters]
        for copy in copies:
            copy.grad = torch.empty_like(copy)
        optimizer = self.over([{"params": copies, "lr": 1e-3, "weight_decay": weight_decay}])
        try:
            with _AnyScalar():
                optimizer.step()
        except (TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise SettingsError(
                f"optimizer={self.algorithm}: cannot take a step on dense gradients alone ({reason})"
            ) from error
        return sum(
            value.numel() * value.element_size()
            for parameter, state in optimizer.state.items()
            for value in state.values()
            if isinstance(value, Tensor) and value.is_meta and value.dim() >= min(1, parameter.dim())
        )


_TRAINERS = ("lr", "weight_decay")  # arguments that come from the trainer


class _AnyScalar(TorchDispatchMode):
    """Inside, the value of a tensor without values is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        return func(*args, **(kwargs or {}))
