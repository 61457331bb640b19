"""A finished run's model, as it was when it was scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from randlora.adapters import load_adapter
from randlora.adapters.files import load_modules
from randlora.adapters.identity import MODULES
from randlora.adapters.tensor_files import header
from randlora.config import settings
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.models.base import Backbone
from randlora.records import Result
from randlora.records.signature import modern
from randlora.tasks.base import Bound
from randlora.use.hub import local

KEPT = ("model", "method", "targets", "seed")  # what another task leaves as the run had it

Base = Literal["same", "any"]  # which weights an adapter is put on; see `randlora.load_adapter`


@dataclass(frozen=True)
class Trained:
    """The model of a finished run with its updates and its head."""

    experiment: Experiment
    backbone: Backbone
    bound: Bound

    @classmethod
    def load(
        cls, run: Path | str, base: Base = "same", data: bool = False, overrides: Sequence[str] = (),
        adapter: Path | None = None,
    ) -> Trained:  # fmt: skip
        """From the folder of a run.

        Args:
            run: Its folder, or ``hub:OWNER/NAME``.
            base: ``same`` refuses other weights than the run's; ``any`` takes them.
            data: Whether the task's data are needed, and so looked for before anything is loaded.
            overrides: A task and settings in place of the run's own.
            adapter: One that the run has kept on its way; None for its last.

        Raises:
            SettingsError: There is no finished run there, or the task's head is not the run's.
        """
        run = local(run)
        experiment = experiment_of(run, overrides, data)
        backbone = experiment.model.load()
        adapter = adapter or run / "adapter"
        load_adapter(backbone.module, adapter, base, modules={})
        bound = experiment.bind(backbone)
        _load_head(bound, adapter)
        bound.model.eval()
        return cls(experiment, backbone, bound)

    @classmethod
    def before(cls, run: Path, data: bool = False, overrides: Sequence[str] = ()) -> Trained:
        """The run's model before training, without updates; a head is not trained. Arguments as of `load`."""
        experiment = experiment_of(run, overrides, data)
        backbone = experiment.model.load()
        bound = experiment.task.bind(backbone)
        bound.model.eval()
        return cls(experiment, backbone, bound)


def experiment_of(run: Path | str, overrides: Sequence[str] = (), data: bool = True) -> Experiment:
    """The objects of a finished run, or of another task on its model; see `Trained.load`."""
    config = _composed(_finished(local(run)), overrides)
    experiment = Experiment.from_config(config if data else config | {"dry_run": True})
    torch.manual_seed(experiment.budget.seed)  # as in training: weights that no file gives
    return experiment


def _finished(run: Path) -> dict[str, Any]:
    """The settings of a finished run."""
    try:
        result = Result.read(run / "result.json")
    except SettingsError as error:
        raise SettingsError(f"{run} is not the folder of a run: {error}") from error
    if result.status != "finished":
        raise SettingsError(f"{run}: this run is {result.status}; give its command again to finish it")
    return modern(result.config)


def _composed(of_the_run: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The run's settings, or those of `overrides` with the run's model, method, targets and seed."""
    if not overrides:
        return dict(of_the_run)
    for override in overrides:
        if override.lstrip("+~").partition("=")[0].partition(".")[0] in (*KEPT, "experiment"):
            raise SettingsError(f"{override}: {', '.join(KEPT)} are the run's; give a task and its settings")
    if not any(override.startswith("task=") for override in overrides):
        raise SettingsError(f"{' '.join(overrides)}: name the task too, such as task={of_the_run['task']['name']}")
    return settings(*overrides) | {name: of_the_run[name] for name in KEPT}


def _load_head(bound: Bound, folder: Path) -> None:
    """Gives `bound` the head that was trained with the adapter in `folder`, where the task has one."""
    needed = {name: tuple(parameter.shape) for name, parameter in bound.head_parameters().items()}
    kept = {name: e.shape for name, e in header(folder / MODULES).items()} if (folder / MODULES).is_file() else {}
    if needed != kept:
        raise SettingsError(
            f"this task's head is {needed or 'none'} and the run's {kept or 'none'}: give a task like the run's"
        )
    if needed:
        load_modules(folder, bound.modules())
