"""Hydra's sweeper ``hydra/sweeper=search``: rate and scale of each method, with one budget, as ``search=…`` says.

Runs are launched in rounds: all that every arm wants next, by the scores that are known. A run of a trial is never
finished but paused, at the latest after its last step, so that no test example is scored; only the runs of the chosen
trials are.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, read_write
from rich.console import Console as Terminal

from randlora.config import build
from randlora.errors import FAILED, SettingsError
from randlora.experiment import Experiment
from randlora.integrity import Damaged
from randlora.methods import Method
from randlora.plan import lengths
from randlora.records.result import Result
from randlora.studies import tables
from randlora.studies.groups import Cell
from randlora.sweeps import findings
from randlora.sweeps.findings import Finding
from randlora.sweeps.planning import complaints, compose
from randlora.sweeps.strategies import RATE, Arm, Course, Strategy, Values
from randlora.sweeps.sweep import NAME, Sweep

if TYPE_CHECKING:
    from randlora.sweeps.launcher import Searcher

SCALES = ("alpha", "scale", "d_initial")  # what methods call their scale
STOP_AT = "trainer.stop_at"
TRIES = 3  # how often a call launches a run that comes to no score, since something kills it


def search(searcher: Searcher, arguments: Sequence[str]) -> None:
    """Searches, and finishes the chosen runs; goes on where an earlier call has ended.

    Args:
        searcher: With Hydra's settings, and its launcher.
        arguments: The overrides of the command line.

    Raises:
        SettingsError: What cannot be searched, or settings of any trial that are wrong; nothing has been launched.
    """
    _Search(searcher, arguments).run()


@dataclass(frozen=True)
class _Armed:
    """An arm, and how its runs are made.

    Args:
        arm: What is searched.
        given: The overrides of all its runs.
        cell: What it shares with those that it is compared with.
        metric: Of its task.
    """

    arm: Arm
    given: Sequence[str]
    cell: Cell
    metric: str


class _Search:
    """One call of a search's command.

    Args:
        searcher: See `search`.
        arguments: See `search`.
    """

    def __init__(self, searcher: Searcher, arguments: Sequence[str]):
        assert searcher.config is not None
        assert searcher.hydra_context is not None
        assert searcher.launcher is not None
        self.context, self.launcher, self.runs = searcher.hydra_context, searcher.launcher, searcher.runs
        self.config: DictConfig = searcher.config
        self.strategy = _strategy(self.config)
        self.sweep = Sweep.asked(self.config)
        # Hydra 1.4 wants every job to have the sweep's own sweeper; `search`, which has chosen it, is no setting of a run.
        with read_write(self.config.hydra):
            self.config.hydra.overrides.hydra.append("hydra/sweeper=search")
        swept = self._swept([*(f"{key}={value}" for key, value in searcher.params.items()), *arguments])
        self.seeds = swept.pop("seed", [f"seed={self.config.seed}"])
        self.folders: dict[tuple[str, ...], Path] = {}  # of runs, by their overrides
        self.armed = self._armed(swept)
        self.launched = Counter[tuple[str, ...]]()  # in this call: runs, and runs to a rung
        self.scores: dict[tuple[Path, int], float | None] = {}  # as they were when this round began
        self.before: dict[str, Sequence[Values]] = {
            finding.label: [trial.values for trial in finding.trials] for finding in self._read()
        }
        self.number = 0
        with suppress(Damaged):
            self.number = len(Sweep.read(self.sweep.folder / NAME).jobs)

    def run(self) -> None:
        """See `search`."""
        self._say_plan()
        while True:
            courses = self._courses()
            jobs = [job for armed, course in courses for job in self._wanted(armed, course)]
            if self.config.dry_run:
                self._launch(jobs)
                return
            self._write(courses)
            if not jobs:
                break
            if stuck := sum(self.launched[job] >= TRIES for job in jobs):
                _say(
                    f"search {self.sweep.id}: {stuck} runs came to no score in {TRIES} tries; the same command goes on"
                )
                return
            self.launched.update(jobs)
            self.launched.update({job[:-1] for job in jobs})
            self._launch(jobs)
        # The runs of the trials have come to what they were to come to; what failed is a score.
        self.runs.codes[:] = [FAILED for _, course in courses if course.chosen is None]
        for armed, course in courses:
            if course.chosen is None:
                _say(f"search {self.sweep.id}: {armed.arm.label}: no trial came to a score, and none is chosen")
        final = [
            run for armed, course in courses if course.chosen is not None
            for run in self._runs_of(armed, course.trials[course.chosen])
        ]  # fmt: skip
        if final:
            _say(f"search {self.sweep.id}: chosen; the runs of the chosen settings are finished now")
            self._launch(final)
        self.runs.conclude = lambda: self._show(courses, final)

    def _swept(self, arguments: Sequence[str]) -> dict[str, list[str]]:
        """The overrides for each key, several where it is swept; SettingsError for what a search decides itself."""
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        swept: dict[str, list[str]] = {}
        for override in parser.parse_overrides([*arguments]):
            name, key = override.key_or_group, override.get_key_element()
            if name.partition(".")[0] == "search":
                if override.is_sweep_override():
                    raise SettingsError(f"{name}: a search is one; give one value, and make another search by itself")
                continue
            if name in (RATE, STOP_AT):
                raise SettingsError(f"{name} is given, and the search decides it: leave it out")
            if override.is_sweep_override() and not override.is_discrete_sweep():
                raise SettingsError(f"{name}: a search takes lists of values, such as seed=0,1,2, or range(0,3)")
            if override.is_sweep_override():
                swept[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            else:
                swept[key] = [f"{key}={override.get_value_element_as_str()}"]
        return swept

    def _armed(self, swept: dict[str, list[str]]) -> list[_Armed]:
        """The arms, every combination of what is swept but the seeds."""
        combinations = [*itertools.product(*swept.values())]
        armed = []
        experiments = self._composed([(*given, self.seeds[0]) for given in combinations])
        for given, experiment in zip(combinations, experiments, strict=True):
            own = [override for override, of_key in zip(given, swept.values(), strict=True) if len(of_key) > 1]
            label = " ".join(own) or f"method={experiment.method.name}"
            steps, rate = int(lengths(experiment)["steps"]), experiment.trainer.learning_rate
            key, scale = _scale(experiment.method) if self.strategy.scaled else (None, 1.0)
            if key is not None and any(override.startswith(f"{key}=") for override in given):
                raise SettingsError(
                    f"{key} is given, and the search decides it: leave it out, or search the rate alone "
                    f"({self.strategy.unscaled})"
                )
            budget = experiment.budget
            cell = Cell(experiment.model.name, experiment.task.name, budget.shots, budget.fraction)
            armed.append(_Armed(Arm(label, rate, steps, key, scale), given, cell, experiment.task.headline))
        return armed

    def _composed(self, jobs: Sequence[Sequence[str]]) -> list[Experiment]:
        """What is run for each of these overrides; SettingsError, in one sentence, where any are wrong."""
        assert self.launcher is not None
        planned = compose(self.context, self.config, jobs, 0)
        if wrong := complaints(planned):
            raise SettingsError("; ".join(wrong))
        return [job.experiment for job in planned if job.experiment is not None]

    def _runs_of(self, armed: _Armed, values: Values) -> list[tuple[str, ...]]:
        """The overrides of a trial's runs, one for each seed."""
        settings = [f"{key}={value:g}" for key, value in values.items()]
        return [(*armed.given, seed, *settings) for seed in self.seeds]

    def _folders(self, armed: _Armed, values: Values) -> list[Path]:
        """Those of a trial's runs."""
        runs, rung = self._runs_of(armed, values), self._rungs(armed.arm)[0]
        new = [run for run in runs if run not in self.folders]
        # As they are launched first, so that nothing is composed twice.
        for run, experiment in zip(new, self._composed([(*run, f"{STOP_AT}={rung}") for run in new]), strict=True):
            self.folders[run] = experiment.folder
        return [self.folders[run] for run in runs]

    def _rungs(self, arm: Arm) -> Sequence[int]:
        return self.strategy.rungs(arm.steps)

    def _courses(self) -> list[tuple[_Armed, Course]]:
        """How far each arm is, by the records as they are now."""
        self.scores = {}
        courses: list[tuple[_Armed, Course]] = []
        for cell in dict.fromkeys(armed.cell for armed in self.armed):
            of_cell = [armed for armed in self.armed if armed.cell == cell]
            by_label = {armed.arm.label: armed for armed in of_cell}

            def score(arm: Arm, values: Values, step: int, by_label: dict[str, _Armed] = by_label) -> float | None:
                known = self._scores(by_label[arm.label], values, step)
                return None if None in known else statistics.mean(map(float, known))  # type: ignore[arg-type]

            found = self.strategy.courses([armed.arm for armed in of_cell], score, self.before)
            courses += zip(of_cell, found, strict=True)
        self.before = {course.arm.label: course.trials for _, course in courses}
        return courses

    def _scores(self, armed: _Armed, values: Values, step: int) -> list[float | None]:
        """Of each of a trial's runs."""
        scores = []
        for run, folder in zip(self._runs_of(armed, values), self._folders(armed, values), strict=True):
            if (folder, step) not in self.scores:
                again = self.config.retry and not self.launched[run]
                self.scores[folder, step] = findings.validation_score(folder, armed.metric, step, again)
            scores.append(self.scores[folder, step])
        return scores

    def _wanted(self, armed: _Armed, course: Course) -> list[tuple[str, ...]]:
        """The overrides of the runs that an arm wants next."""
        return [
            (*run, f"{STOP_AT}={rung}")
            for number, rung in course.wanted
            for run, score in zip(
                self._runs_of(armed, course.trials[number]),
                self._scores(armed, course.trials[number], rung),
                strict=True,
            )
            if score is None
        ]

    def _launch(self, jobs: Sequence[Sequence[str]]) -> None:
        for returned in self.launcher.launch([[*job] for job in jobs], initial_job_idx=self.number):
            _ = returned.return_value  # which raises what the run has raised, where it was in this process
        self.number += len(jobs)

    def _found(self, courses: Sequence[tuple[_Armed, Course]]) -> list[Finding]:
        return [
            Finding.of(
                course, f"{armed.cell.task}, {armed.cell.model}, {armed.cell.budget}", armed.metric,
                [self._folders(armed, values) for values in course.trials], self.sweep.root, self.scores,
            )
            for armed, course in courses
        ]  # fmt: skip

    def _read(self) -> list[Finding]:
        try:
            return findings.read(self.sweep.folder / findings.NAME)
        except Damaged as error:
            _say(f"{error}; it is made again")
            return []

    def _write(self, courses: Sequence[tuple[_Armed, Course]]) -> None:
        try:
            self.sweep.folder.mkdir(parents=True, exist_ok=True)
            findings.write(self.sweep.folder, type(self.strategy).__name__, self._found(courses))
        except OSError as error:
            raise SettingsError(
                f"run_root={self.sweep.root}: {self.sweep.folder} cannot be written ({error})"
            ) from error

    def _say_plan(self) -> None:
        """What is searched, and with how many steps."""
        kind = type(self.strategy).__name__.lower()
        _say(f"search {self.sweep.id}: {kind} over {len(self.armed)} arms, {len(self.seeds)} seeds for each trial")
        if len(self.seeds) == 1:
            _say("  one seed: its noise decides, too; seed=0,1,2 takes the mean of three")
        for steps, group in itertools.groupby(self.armed, key=lambda armed: armed.arm.steps):
            labels = ", ".join(armed.arm.label for armed in group)
            most = len(self.seeds) * self.strategy.most_steps(steps)
            rungs = ", ".join(f"{rung:,}" for rung in self.strategy.rungs(steps))
            _say(f"  {labels}: {most:,} steps for each, compared after {rungs}")
        for cell in dict.fromkeys(armed.cell for armed in self.armed):
            if len({armed.arm.steps for armed in self.armed if armed.cell == cell}) > 1:
                _say(f"  runs on {cell.task}, {cell.model} differ in their steps, and so do the budgets of the search")

    def _show(self, courses: Sequence[tuple[_Armed, Course]], final: Sequence[tuple[str, ...]]) -> None:
        """What was chosen, and the results of its runs."""
        found = self._found(courses)
        with suppress(SettingsError):  # without the package
            findings.export(self.sweep.folder / "optuna.log", found)
        terminal = Terminal(width=None if sys.stdout.isatty() else 200)
        terminal.print(findings.table(found))
        for finding in found:
            for trial in finding.trials:
                for sentence in trial.failed:
                    _say(f"  {finding.label} {' '.join(f'{k}={v:g}' for k, v in trial.values.items())}: {sentence}")
        results = []
        for run in final:
            with suppress(SettingsError):
                results.append(Result.read(self.folders[run] / "result.json"))
        if results:
            terminal.print(tables.each(results))


def _strategy(config: DictConfig) -> Strategy:
    """The search's settings; SettingsError for what cannot be searched at all."""
    if "search" not in config:
        raise SettingsError("hydra/sweeper=search: give search=grid, search=halving or search=tpe instead")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SettingsError("search: start it without torchrun; hydra.launcher.workers is how many runs go at a time")
    if config.resume is False:
        raise SettingsError("resume=false: every rung would begin again; give another run_root to search anew")
    strategy = build(OmegaConf.to_container(config.search, resolve=True))
    if not isinstance(strategy, Strategy):
        raise SettingsError(f"search: {config.search.get('_target_')!r} is not a search")
    return strategy


def _scale(method: Method) -> tuple[str | None, float]:
    """The key of a method's scale and the value that it has by itself; no key where it has none."""
    settings = vars(method)
    for name in SCALES:
        if name in settings:
            value = settings[name]
            if value is None and "rank" not in settings:
                raise SettingsError(f"method.{name}=null: the search multiplies it; give the method a number")
            return f"method.{name}", 2.0 * settings["rank"] if value is None else value  # as `relative_scale` has it
    return None, 1.0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
