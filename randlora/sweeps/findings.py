"""What a search has found: ``search.json`` beside its sweep's sweep.json, and the scores behind it, from records.

The file says what was decided, for people, for ``randlora status`` and for the next call of the same command. What it
says of scores is read anew from the runs' folders each time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from randlora.errors import SettingsError
from randlora.integrity import Damaged, read_json, write_json
from randlora.records.metrics import NAME as METRICS
from randlora.records.metrics import Row
from randlora.records.result import Result
from randlora.sweeps.strategies import WORST, Course, Values, require_optuna
from randlora.sweeps.sweep import FAILURES

NAME = "search.json"
Known = Mapping[tuple[Path, int], float | None]


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Args:
        values: By key.
        runs: Their folders below the run root, one for each seed.
        scores: The mean validation score over seeds, by the steps after which it was taken; None where a run failed.
        each: The seeds' own scores, in the order of `runs`.
        failed: Which runs failed, and why.
    """

    values: Values
    runs: Sequence[str]
    scores: Mapping[str, float | None] = field(default_factory=dict)
    each: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    failed: Sequence[str] = ()


@dataclass(frozen=True)
class Finding:
    """What is known of one arm.

    Args:
        cell: Its task, model and budget, in words.
        label: The settings that set the arm apart.
        metric: The name of the score, on the validation set.
        seeds: How many each trial has.
        rungs: The steps after which trials are compared.
        trials: In the order in which they were decided.
        steps: What all its trials have done, over all seeds.
        chosen: The number of the best trial.
        edges: By setting the end, ``lower`` or ``upper``, of what was tried at which the chosen value lies.
    """

    cell: str
    label: str
    metric: str
    seeds: int
    rungs: Sequence[int]
    trials: Sequence[Trial]
    steps: int
    chosen: int | None = None
    edges: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, course: Course, cell: str, metric: str, runs: Sequence[Sequence[Path]], root: Path, known: Known
    ) -> Finding:  # fmt: skip
        """What a course has come to.

        Args:
            course: Of one arm.
            cell: In words.
            metric: Of the task.
            runs: The folders of each trial.
            root: The run root.
            known: Each run's score by its folder and the steps.
        """
        trials = [
            Trial(
                values,
                [folder.relative_to(root).as_posix() for folder in folders],
                {str(rung): _plain(value) for rung, value in scores.items()},
                {str(rung): [_plain(known.get((folder, rung))) for folder in folders] for rung in scores},
                [
                    f"{folder.name}: {why}"
                    for folder in folders
                    if WORST in scores.values() and (why := failure(folder))
                ],
            )
            for values, folders, scores in zip(course.trials, runs, course.scores, strict=True)
        ]
        seeds = len(runs[0]) if runs else 0
        steps = seeds * course.steps
        return cls(
            cell, course.arm.label, metric, seeds, course.rungs, trials, steps, course.chosen, course.edges
        )  # fmt: skip

    @property
    def best(self) -> float | None:
        """The score of the chosen trial."""
        return None if self.chosen is None else self.trials[self.chosen].scores[str(self.rungs[-1])]

    @property
    def stands(self) -> str:
        """How many trials each rung has seen, in words."""
        counts = {rung: sum(str(rung) in trial.scores for trial in self.trials) for rung in self.rungs}
        return ", ".join(f"{count} at {rung:,} steps" for rung, count in counts.items())


def write(folder: Path, strategy: str, findings: Sequence[Finding]) -> None:
    """Writes search.json, whole or not at all.

    Args:
        folder: The sweep's.
        strategy: The name of the search's class.
        findings: Of every arm.
    """
    write_json(folder / NAME, {"strategy": strategy, "findings": [asdict(finding) for finding in findings]})


def read(path: Path) -> list[Finding]:
    """The findings in a search.json, none where there is no such file; Damaged where it is not what was written."""
    if not path.is_file():
        return []
    try:
        findings = read_json(path)["findings"]
        return [
            Finding(**finding | {"trials": [Trial(**trial) for trial in finding["trials"]]}) for finding in findings
        ]
    except (TypeError, LookupError) as error:
        raise Damaged(f"{path} is no search: {error}") from error


def validation_score(folder: Path, metric: str, step: int, again: bool = False) -> float | None:
    """The validation score of a run after `step` steps, by its records; WORST where it failed before; None if unknown.

    That of a run which was not scored there is the next one that it has.

    Args:
        folder: The run's.
        metric: Such as ``accuracy``.
        step: See above.
        again: Whether a run that failed is to be run again, and so is not known.
    """
    status, rows = _status(folder), list[Row]()
    with suppress(OSError):
        for line in (folder / METRICS).read_text(errors="replace").splitlines():
            with suppress(ValueError):  # torn
                rows.append(Row.of(line))
    # Of a run that was killed where it would have paused, no checkpoint may be left.
    if status in ("finished", "paused", *FAILURES) or (rows and rows[-1].step > step):
        for row in rows:
            if row.step >= step and (score := row.metrics.get(f"validation/{metric}")) is not None:
                return WORST if score != score else score
    return WORST if status in FAILURES and not again else None


def failure(folder: Path) -> str:
    """Why a run has failed; nothing where it has not."""
    with suppress(SettingsError):
        result = Result.read(folder / "result.json")
        if result.status in FAILURES:
            return f"{result.status}, {result.error}"
    return ""


def _plain(score: float | None) -> float | None:
    """As JSON has it."""
    return None if score == WORST else score


def _status(folder: Path) -> str:
    with suppress(SettingsError):
        return Result.read(folder / "result.json").status
    return ""


def table(findings: Sequence[Finding]) -> Table:
    """A row for each arm: what was tried, and what is chosen."""
    rows = Table("cell", "search", "seeds", "trials", "failed", "steps", "chosen", "at an end", "validation score")
    for finding in findings:
        values = {} if finding.chosen is None else finding.trials[finding.chosen].values
        rows.add_row(
            finding.cell, finding.label, str(finding.seeds), finding.stands,
            str(sum(bool(trial.failed) for trial in finding.trials)), f"{finding.steps:,}",
            " ".join(f"{key}={value:g}" for key, value in values.items()),
            ", ".join(f"{end} of {key}" for key, end in finding.edges.items()),
            "" if finding.best is None else f"{finding.metric} {finding.best:.4f}",
        )  # fmt: skip
    return rows


def export(path: Path, findings: Sequence[Finding]) -> None:
    """Writes the trials as studies in Optuna's journal, for its dashboard; the file is whole or not there.

    A study is named by its cell and arm; a trial that was not promoted is pruned. Nothing is read back from it.
    """
    optuna = require_optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    draft = path.with_name(f".draft_{path.name}")
    draft.unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(draft)))
    for finding in findings:
        study = optuna.create_study(
            storage=storage, direction="maximize", study_name=f"{finding.cell}: {finding.label}"
        )
        ends: dict[str, Any] = {}
        for key in finding.trials[0].values if finding.trials else ():
            tried = [trial.values[key] for trial in finding.trials]
            ends[key] = optuna.distributions.FloatDistribution(min(tried), max(tried), log=True)
        for trial in finding.trials:
            scores = {int(rung): WORST if score is None else score for rung, score in trial.scores.items()}
            whole = finding.rungs[-1] in scores
            state = TrialState.COMPLETE if whole else TrialState.PRUNED if scores else TrialState.WAITING
            study.add_trial(
                optuna.trial.create_trial(
                    state=state, params=dict(trial.values), distributions=ends, intermediate_values=scores,
                    value=scores[finding.rungs[-1]] if whole else None, user_attrs={"runs": json.dumps(trial.runs)},
                )
            )  # fmt: skip
    draft.replace(path)
