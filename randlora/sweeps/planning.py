"""All jobs of a sweep before any of them starts: composed, checked, counted, and how long they may take."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.table import Table

from randlora.config import plain
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.plan import counts, lengths
from randlora.records import Result

Kind = tuple[str, str, str]  # task, model, method: runs of one kind take about as long for a step


@dataclass(frozen=True)
class Planned:
    """A job as it was composed.

    Args:
        number: Hydra's.
        overrides: Hydra's, of which the label has what the sweep chose.
        config: All settings, and Hydra's own.
        experiment: What is run; None where the settings are wrong.
        error: The sentence that says what is wrong.
    """

    number: int
    overrides: Sequence[str]
    config: DictConfig
    label: str
    experiment: Experiment | None = None
    error: str = ""

    @property
    def steps(self) -> int:
        """By the published size of the training set, until it pauses."""
        if self.experiment is None:
            return 0
        steps = int(lengths(self.experiment)["steps"])
        return min(steps, self.experiment.trainer.stop_at or steps)

    @property
    def left(self) -> int:
        """Those of the steps that it has not done, of a run that has paused."""
        assert self.experiment is not None
        with suppress(SettingsError):
            result = Result.read(self.experiment.folder / "result.json")
            if result.status == "paused":
                return max(0, self.steps - (result.steps or 0))
        return self.steps

    @property
    def kind(self) -> Kind:
        """Of a job whose settings are not wrong."""
        assert self.experiment is not None
        return self.experiment.task.name, self.experiment.model.name, self.experiment.method.name


def compose(context: HydraContext, master: DictConfig, jobs: Sequence[Sequence[str]], first: int) -> list[Planned]:
    """Composes and checks every job; what is wrong with one is in its `error`.

    Args:
        context: Hydra's.
        master: The settings of the sweep.
        jobs: The overrides of each.
        first: The number of the first.
    """
    setup_globals()
    given = _given(context, master)
    before, planned = HydraConfig.instance().cfg, []
    for number, overrides in enumerate(jobs, first):
        config = context.config_loader.load_sweep_config(master, [*overrides])
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        own = (override for override in overrides if override not in given)
        # Where a run pauses is not what it is.
        label = " ".join(override for override in own if not override.startswith("trainer.stop_at="))
        experiment, error = None, ""
        try:
            experiment = Experiment.from_config(plain(without_hydra(config)))
            label = label or "/".join(experiment.folder.parts[-4:])
        except SettingsError as wrong:
            error = str(wrong)
        planned.append(Planned(number, overrides, config, label or f"job {number}", experiment, error))
    HydraConfig.instance().cfg = before
    return planned


def without_hydra(config: DictConfig) -> DictConfig:
    """All settings but Hydra's own."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _given(context: HydraContext, master: DictConfig) -> list[str]:
    """The overrides of the command line that the sweeper gives to every job, as it writes them."""
    parser = OverridesParser.create(config_loader=context.config_loader)
    overrides = parser.parse_overrides([str(override) for override in master.hydra.overrides.task])
    by_key = {override.get_key_element(): override for override in overrides}
    return [
        f"{key}={override.get_value_element_as_str()}"
        for key, override in by_key.items()
        if not override.is_sweep_override()
    ]


def complaints(jobs: Sequence[Planned]) -> list[str]:
    """What is wrong with settings or data: up to three reasons a sentence each, more of them in one sentence."""
    labels: dict[str, list[str]] = {}
    for job in jobs:
        if job.error:
            labels.setdefault(job.error, []).append(job.label)

    def said(reason: str) -> str:
        count = len(labels[reason])
        return reason if len(jobs) == 1 else f"{reason} ({count} of {len(jobs)} jobs)"

    if len(labels) <= 3:
        return [said(reason) for reason in labels]
    (first, _), *others = labels.items()
    which = "; ".join(of_reason[0] for _, of_reason in others)
    count = sum(len(of_reason) for _, of_reason in others)
    return [f"{said(first)}, and {count} more for {len(others)} other reasons, the first job of each: {which}"]


def seconds_per_step(root: Path) -> dict[Kind, float]:
    """What finished and paused runs below a run root have taken for a step, their median by task, model and method."""
    seconds: dict[Kind, list[float]] = {}
    for path in root.glob("*/*/*/*/result.json"):
        with suppress(SettingsError):
            result = Result.read(path)
            if result.status in ("finished", "paused") and result.seconds_per_step is not None:
                seconds.setdefault((result.task, result.model, result.method), []).append(result.seconds_per_step)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def training_seconds(jobs: Sequence[Planned], known: Mapping[Kind, float]) -> tuple[float, int]:
    """What the training of these jobs takes, one after the other, and of how many of them nothing is known."""
    of_known = [job.left * known[job.kind] for job in jobs if job.kind in known]
    return sum(of_known), len(jobs) - len(of_known)


def dry_table(jobs: Sequence[Planned]) -> Table:
    """A row per job: what is trained, and for how long; counted once for jobs that train the same."""
    table = Table()
    for name in ("job", "task", "model", "method"):
        table.add_column(name, overflow="fold")
    for name in ("trained parameters", "in the head", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    known: dict[str, Mapping[str, Any]] = {}
    for job in jobs:
        if job.experiment is None:
            table.add_row(job.label, "", "", "", "wrong settings", "", "")
            continue
        config = job.experiment.config
        key = json.dumps([config[name] for name in ("model", "method", "task", "targets")], default=str)
        if key not in known:
            known[key] = counts(job.experiment)
        numbers = known[key]["trainable_parameters"], known[key]["head_parameters"], job.steps
        table.add_row(job.label, *job.kind, *(f"{number:,}" for number in numbers))
    return table
