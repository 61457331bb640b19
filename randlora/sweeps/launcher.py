"""Hydra's launchers ``local`` and ``slurm``, each run of a sweep in a process or a job of its own; and its searches."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from randlora.bounds import Count, CountOrZero, check
from randlora.config import LAUNCHERS
from randlora.records.logger import Membership
from randlora.sweeps.jobs import Run

if TYPE_CHECKING:
    from randlora.sweeps.planning import Planned
    from randlora.sweeps.sweep import Sweep

PACKAGE = LAUNCHERS["local"].rpartition(".")[0]  # Hydra takes plugins of its own packages alone
Task = Callable[[], int] | Run
PROGRAM = "from randlora.cli import main; raise SystemExit(main())"
OWN_FOLDERS = "command-line"  # Hydra's name of where --config-dir has its folder from


class Workers(Protocol):
    """Where the runs of a sweep are: `randlora.sweeps.pool.Pool` or `randlora.sweeps.jobs.Jobs`."""

    @property
    def free(self) -> bool: ...

    @property
    def running(self) -> Sequence[int]: ...

    def start(self, key: int, act: Any, log: Path) -> None: ...

    def ended(self, seconds: float) -> list[tuple[int, int]]: ...

    def signal(self, number: int) -> None: ...

    def end_at_once(self) -> None: ...

    def close(self) -> None: ...


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

    __module__ = PACKAGE
    bounds: Mapping[str, Any] = {"workers": Count}

    def __init__(self, workers: int = 1) -> None:
        super().__init__()
        self.workers = workers
        self.sweep: Sweep | None = None  # which grows where a sweeper gives its jobs a few at a time
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's call before `launch`; SettingsError for settings that cannot be."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        check("hydra.launcher", self.bounds, {name: getattr(self, name) for name in self.bounds})
        loader: Any = hydra_context.config_loader
        self._compose, loader.load_sweep_config = loader.load_sweep_config, self._keep

    def pool(self, folder: Path) -> Workers:
        """Where the runs of a sweep with this folder are made."""
        from randlora.sweeps.pool import Pool

        return Pool(self.workers)

    def task(self, job: Planned, member: Membership, child: Callable[[], int]) -> Task:
        """What the pool is given for a job: `child`, which makes the run in a fork of this process."""
        return child

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


class Slurm(Local):
    """Runs a sweep's jobs as jobs of SLURM, by submitit, queued again where they are pre-empted; see docs/gpus.md.

    Args:
        workers: How many wait or run at a time.
        cluster: slurm, or local: under submitit on this machine.
        minutes: Of a job, after which it is queued again.
        nodes: Machines of a job.
        gpus: Of each machine, a process each; 0: one process on the CPU.
        partition: SLURM's; None: its default.
    """

    __module__ = PACKAGE
    bounds: Mapping[str, Any] = {
        "workers": Count, "cluster": Literal["slurm", "local"], "minutes": Count, "nodes": Count,
        "gpus": CountOrZero, "partition": str | None,
    }  # fmt: skip

    def __init__(self, workers: int, cluster: str, minutes: int, nodes: int, gpus: int, partition: str | None) -> None:
        super().__init__(workers)
        self.cluster, self.minutes, self.nodes, self.gpus, self.partition = cluster, minutes, nodes, gpus, partition

    def pool(self, folder: Path) -> Workers:
        from randlora.sweeps.jobs import Jobs, executor

        jobs = executor(folder / "jobs", self.cluster, self.minutes, self.nodes, self.gpus, self.partition)
        return Jobs(jobs, self.workers)

    def task(self, job: Planned, member: Membership, child: Callable[[], int]) -> Task:
        """A command line of one run, as if it had been typed alone."""
        sources = job.config.hydra.runtime.config_sources
        folders = [f"--config-dir={source.path}" for source in sources if source.provider == OWN_FOLDERS]
        return Run([sys.executable, "-c", PROGRAM, *folders, *job.overrides], member.environment)


class Searcher(Sweeper):
    """Hydra's sweeper that ``search=…`` chooses; see `randlora.sweeps.searching`.

    Args:
        params: Overrides by key, as those of Hydra's own sweeper.
    """

    __module__ = PACKAGE

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
    """Makes these classes known to Hydra, which takes plugins from modules of a package `hydra_plugins` alone."""
    for plugin in (Local, Slurm, Searcher):
        Plugins.instance().register(plugin)
    package, _, _ = PACKAGE.partition(".")
    with suppress(ImportError):
        importlib.import_module(package)  # of other plugins
    sys.modules.setdefault(package, ModuleType(package))
    sys.modules[PACKAGE] = sys.modules[__name__]
