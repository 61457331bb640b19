"""Hydra's launcher ``hydra/launcher=local``: the runs of a sweep, each in a process of its own. And its searches."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from randlora.bounds import Count, check
from randlora.config import LAUNCHER, SEARCHER

if TYPE_CHECKING:
    from randlora.sweeps.sweep import Sweep


class Runs(Protocol):
    """What is called with the settings of each run: `randlora.cli.Runs`."""

    codes: list[int]
    conclude: Callable[[], None]

    def __call__(self, config: DictConfig) -> float | None:
        """Runs it; returns what a sweeper may optimise."""


class Local(BasicLauncher):
    """Runs a sweep's jobs on this machine, so many at a time; see `randlora.sweeps.making`.

    Under torchrun all processes make each run together: there they run in these processes, one after the other.

    Args:
        workers: How many at a time, each with a GPU of its own as long as there are enough.
    """

    __module__ = LAUNCHER.rpartition(".")[0]  # Hydra takes plugins of its own packages alone

    def __init__(self, workers: int = 1) -> None:
        super().__init__()
        self.workers = workers
        self.sweep: Sweep | None = None  # which grows where a sweeper gives its jobs a few at a time
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's call before `launch`; SettingsError for settings that cannot be."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        check("hydra.launcher", {"workers": Count}, {"workers": self.workers})
        loader: Any = hydra_context.config_loader
        self._compose, loader.load_sweep_config = loader.load_sweep_config, self._keep

    @property
    def runs(self) -> Runs:
        """The task function, with its exit codes."""
        assert self.task_function is not None
        return cast(Runs, self.task_function)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's call with jobs, each as its overrides."""
        assert self.hydra_context is not None
        loader: Any = self.hydra_context.config_loader
        loader.load_sweep_config = self._take
        try:
            return self._launch(job_overrides, initial_job_idx)
        finally:
            loader.load_sweep_config = self._keep

    def _launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return super().launch(job_overrides, initial_job_idx)
        # Else torch asks CUDA itself, and of a process that has done so no child can use a GPU.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        from randlora.sweeps.making import make

        return make(self, job_overrides, initial_job_idx)

    def _keep(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """What a sweeper composes only to see whether it can, which takes a tenth of a second for each job."""
        composed = self._composed[tuple(sweep_overrides)] = self._compose(master_config, sweep_overrides)
        return composed

    def _take(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The settings of one job, which no other job has: composed by now, or else composed here."""
        kept = self._composed.pop(tuple(sweep_overrides), None)
        return self._compose(master_config, sweep_overrides) if kept is None else kept


class Searcher(Sweeper):
    """Hydra's sweeper that ``search=…`` chooses; see `randlora.sweeps.searching`.

    Args:
        params: Overrides by key, as those of Hydra's own sweeper.
    """

    __module__ = SEARCHER.rpartition(".")[0]

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's call before `sweep`."""
        self.hydra_context, self.config, self.runs = hydra_context, config, cast(Runs, task_function)
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Hydra's call with the overrides of the command line."""
        from randlora.sweeps.searching import search

        search(self, arguments)


def register() -> None:
    """Makes both known to Hydra, which takes plugins from modules of a package `hydra_plugins` alone."""
    Plugins.instance().register(Local)
    Plugins.instance().register(Searcher)
    package, _, _ = Local.__module__.partition(".")
    with suppress(ImportError):
        importlib.import_module(package)  # of other plugins
    sys.modules.setdefault(package, ModuleType(package))
    sys.modules[Local.__module__] = sys.modules[__name__]
