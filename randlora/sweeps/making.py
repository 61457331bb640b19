"""Makes a sweep, or continues it: what has finished is left, what was interrupted or killed goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, run_job
from rich.console import Console as Terminal
from rich.table import Table

from randlora.errors import BUSY, FAILED, FINISHED, INTERRUPTED, WRONG_SETTINGS, SettingsError
from randlora.experiment import Experiment
from randlora.integrity import Damaged
from randlora.records import Result
from randlora.records.console import Console
from randlora.records.lock import living
from randlora.records.logger import Membership
from randlora.records.record import Record
from randlora.run import summary
from randlora.signals import STOP
from randlora.studies import tables
from randlora.sweeps.planning import (
    Planned,
    complaints,
    compose,
    dry_table,
    seconds_per_step,
    training_seconds,
    without_hydra,
)
from randlora.sweeps.progress import Display, duration
from randlora.sweeps.sweep import FAILURES, NAME, ORDER, TO_DO, Job, Standing, Sweep, standing

if TYPE_CHECKING:
    from randlora.sweeps.launcher import Local, Task

CODES = (FINISHED, FAILED, WRONG_SETTINGS, BUSY, INTERRUPTED)
_SECONDS_BETWEEN_LOOKS = 0.2


def make(launcher: Local, overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Runs the jobs of a sweep, or those of them that a sweeper gives at a time; all are checked before one starts.

    The exit codes of the runs are added to those of the launcher's task function.

    Args:
        launcher: With Hydra's settings of the sweep.
        overrides: Of each job.
        first: The number of the first job.

    Returns:
        What each job came to, in their order: its validation score, which a sweeper may optimise, or None.
    """
    assert launcher.hydra_context is not None
    assert launcher.config is not None
    jobs = compose(launcher.hydra_context, launcher.config, overrides, first)
    for sentence in complaints(jobs):
        print(f"error: {sentence}", file=sys.stderr)
    right = {job.number: job for job in jobs if job.experiment is not None}
    launcher.runs.codes += [WRONG_SETTINGS] * (len(jobs) - len(right))
    dry = {_experiment(job).config["dry_run"] for job in right.values()} - {False}
    if "json" in dry:
        return [_run_here(launcher, job) for job in right.values()]
    if dry:
        _print(dry_table(jobs))
    if dry or not right:
        return [_returned(job, None) for job in jobs]
    making = _Making(launcher, right)
    making.run()
    if STOP.came and max(making.codes, default=FINISHED) == INTERRUPTED:
        sys.exit(INTERRUPTED)  # a sweeper that gives its jobs a few at a time stops, too
    return [_returned(job, making.objective(_experiment(job)) if job.experiment else None) for job in jobs]


class _Making:
    """One call of a sweep's command, from its plan to its end.

    Args:
        launcher: With Hydra's settings of the sweep.
        jobs: Those whose settings are right, by number.
    """

    def __init__(self, launcher: Local, jobs: Mapping[int, Planned]):
        self.launcher, self.codes = launcher, launcher.runs.codes
        first: dict[Path, int] = {}
        for number, job in jobs.items():
            folder = _experiment(job).folder
            if first.setdefault(folder, number) != number:
                _say(f"job {number} ({job.label}) is the same run as job {first[folder]}")
        self.folders = {number: folder for folder, number in first.items()}
        self.jobs = {number: jobs[number] for number in self.folders}
        self.sweep = launcher.sweep = self._opened()
        self.said: dict[int, str] = {}  # how a process ended that left no result
        self.waiting = self._to_do()
        self.display = Display(len(self.waiting), sum(jobs[number].steps for number in self.waiting))

    def run(self) -> None:
        """Runs what is to do, several at a time, and says what came of the sweep."""
        began, pool, passed_on = time.monotonic(), self.launcher.pool(self.sweep.folder), False
        STOP.at_once = pool.end_at_once
        started = 0
        try:
            while self.waiting or pool.running:
                # Asked to stop before anything was begun, the first run says so in its record.
                while self.waiting and pool.free and not (STOP.came and started):
                    number, started = self.waiting.pop(0), started + 1
                    pool.start(number, self._task(number), self._log(number))
                if STOP.came and not passed_on:
                    passed_on = True
                    pool.signal(signal.Signals[STOP.reason])
                if STOP.came and not pool.running:
                    self.codes.append(INTERRUPTED)
                    break
                for number, code in pool.ended(_SECONDS_BETWEEN_LOOKS):
                    self._ended(number, code)
                self.display.show({self.jobs[number].label: self.folders[number] for number in pool.running})
        finally:
            STOP.at_once = lambda: None
            pool.close()
            self.display.close()
        self._conclude(time.monotonic() - began)

    def objective(self, experiment: Experiment) -> float | None:
        """The validation score of a job that has finished or paused."""
        result = _result(experiment.folder)
        return result.validation if result is not None and result.status in ("finished", "paused") else None

    def _opened(self) -> Sweep:
        """The sweep with these jobs, written; says what has changed since it was last made."""
        new = Sweep.asked(self.launcher.config)
        root, before = new.root, self.launcher.sweep
        jobs = [
            Job(job.label, os.path.relpath(self.folders[number], root), job.steps) for number, job in self.jobs.items()
        ]
        if before is None:
            with suppress(Damaged):
                before = Sweep.read(new.folder / NAME)
                for sentence in before.changes(new.with_jobs(jobs)):
                    _say(sentence)
        sweep = new.with_jobs([*(before.jobs if before else ()), *jobs])
        try:
            sweep.write()
        except OSError as error:
            raise SettingsError(f"run_root={root}: {sweep.folder} cannot be written ({error.strerror})") from error
        return sweep

    def _to_do(self) -> list[int]:
        """The jobs that are to run, those last that another process runs now; says what is left, and the plan."""
        waiting: list[int] = []
        done = failed = 0
        for number, folder in self.folders.items():
            settings = _experiment(self.jobs[number]).config
            if settings["resume"] and (result := _finished(folder, settings)):
                done += 1
                self.codes.append(FINISHED)
                other = f", of commit {result.commit}" if result.commit != self.sweep.commit else ""
                _say(f"{self.jobs[number].label}: already {result.status}{other}: {folder}  {summary(result)}")
            elif settings["resume"] and not settings["retry"] and standing(folder).state in FAILURES:
                failed += 1
                self.codes.append(FAILED)
            else:
                waiting.append(number)
        waiting.sort(key=lambda number: living(self.folders[number]) is not None)
        parts = [f"sweep {self.sweep.id}: {len(self.jobs)} jobs", f"{done} have finished"]
        parts += [f"{failed} have failed, which retry=true runs again"] if failed else []
        _say(", ".join(parts) + f"; {self._plan([self.jobs[number] for number in waiting])}")
        return waiting

    def _plan(self, jobs: Sequence[Planned]) -> str:
        """How much there is to do, and for how long."""
        if not jobs:
            return "nothing is to do"
        seconds, unknown = training_seconds(jobs, seconds_per_step(self.sweep.root))
        workers = min(self.launcher.workers, len(jobs))
        at_a_time = f", {workers} at a time" if workers > 1 else ""
        plan = f"{len(jobs)} to run{at_a_time}, {sum(job.left for job in jobs):,} steps"
        if unknown == len(jobs):
            return f"{plan}; no finished run in {self.sweep.root} is like these, to tell how long they take"
        others = f", and {unknown} jobs of which nothing is known" if unknown else ""
        return f"{plan}; by finished runs like these about {duration(seconds / workers)} of training{others}"

    def _log(self, number: int) -> Path:
        """The file with what a job's processes have said."""
        return self.sweep.folder / f"{number:04}.log"

    def _task(self, number: int) -> Task:
        """What a worker does."""
        member = Membership(self.sweep.id, self.jobs[number].label)
        return self.launcher.task(self.jobs[number], member, partial(self._child, number, member))

    def _child(self, number: int, member: Membership) -> int:
        """A run's whole process, where that is a fork of this one."""
        self.codes.clear()
        member.declare()
        _ = _run_here(self.launcher, self.jobs[number]).return_value  # which raises what the run has raised
        return max(self.codes, default=FAILED)

    def _ended(self, number: int, code: int) -> None:
        """Says how a job has ended."""
        job, folder = self.jobs[number], self.folders[number]
        self.display.end(job.steps)
        self.codes.append(code if code in CODES else FAILED)
        result = _result(folder)
        if result is not None and result.status in ("finished", "paused") and code == FINISHED:
            self.display.say(f"{job.label}: {result.status}: {summary(result)}")
            return
        if standing(folder).state in ("dead", TO_DO):
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            self.said[number] = f"its process {how}; {self._log(number)} has what it said"
        self.display.say(f"{job.label}: {self._standing(number)}")

    def _standing(self, number: int) -> Standing:
        """How a job stands, with how its process ended."""
        known = standing(self.folders[number])
        return known._replace(why=known.why or self.said.get(number, ""))

    def _conclude(self, seconds: float) -> None:
        """How many jobs there are in each state, and which have not finished."""
        standings = {number: self._standing(number) for number in self.jobs}
        counts = Counter(state for state, _ in standings.values())
        states = ", ".join(f"{counts[state]} {state}" for state in ORDER if state in counts)
        _say(f"sweep {self.sweep.id}: {states}; {duration(seconds)}")
        for state in ORDER:
            for number, known in standings.items():
                if known.state == state and state not in ("paused", "finished"):
                    _say(f"  {self.jobs[number].label}: {known}")
        if counts.keys() & {"interrupted", "dead", TO_DO, "damaged"}:
            _say("the same command goes on")
        if counts.keys() & {*FAILURES}:
            _say("retry=true runs again what has failed")
        self.launcher.runs.conclude = self._show_results

    def _show_results(self) -> None:
        """The table of the results of all jobs that the sweep has had."""
        results = [result for job in self.sweep.jobs if (result := _result(self.sweep.root / job.folder))]
        if results:
            _print(tables.each(results))


def _run_here(launcher: Local, job: Planned) -> JobReturn:
    """A job in this process, as Hydra runs it."""
    assert launcher.hydra_context is not None
    return run_job(
        task_function=launcher.runs, config=job.config, hydra_context=launcher.hydra_context,
        job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
    )  # fmt: skip


def _returned(job: Planned, objective: float | None) -> JobReturn:
    """What Hydra's sweepers are told of a job."""
    returned = JobReturn(overrides=job.overrides, cfg=without_hydra(job.config), status=JobStatus.COMPLETED)
    returned.return_value = objective
    return returned


def _experiment(job: Planned) -> Experiment:
    assert job.experiment is not None
    return job.experiment


def _finished(folder: Path, settings: Mapping[str, Any]) -> Result | None:
    """The result of a run that has finished, and whose evidence is whole."""
    return Record(folder, settings, (), Console()).finished()


def _result(folder: Path) -> Result | None:
    """The result in a run's folder, however the run ended."""
    try:
        return Result.read(folder / "result.json")
    except SettingsError:
        return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(table: Table) -> None:
    """On stdout, where it is as wide as it has to be unless that is a terminal."""
    Terminal(width=None if sys.stdout.isatty() else 200).print(table)
