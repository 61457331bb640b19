"""What a report compares: parts of studies, and in each the arms, runs of a method that differ in their seed alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from randlora.config import leaves
from randlora.errors import SettingsError
from randlora.records import Result, read
from randlora.records.metrics import NAME as METRICS
from randlora.records.metrics import Row
from randlora.records.result import NO_MODEL
from randlora.records.signature import modern
from randlora.studies.analyses import Analysis, analyses
from randlora.studies.collect import RESULTS, read_curves, without_folders
from randlora.studies.groups import Cell, by_settings, cell, percent, select

# What a search tries for every method. Settings that differ in anything else are arms of their own.
SEARCHED = ("trainer.learning_rate", "trainer.head_learning_rate", "method.alpha", "method.d_initial", "method.scale")
PROBES = ("linearprobe", "features", "centroid")  # a trained head, or scikit-learn's, on the frozen model's features
_OF_A_RUN = ("seed", "run_root", "data_root", "predictions", "tags", "shots", "fraction")


@dataclass(frozen=True)
class Part:
    """The runs of a collection of a study, or of a folder of runs; only these are compared with each other.

    Args:
        name: The study's name, with that of the collection unless it is ``records``; ``runs`` of a folder of runs.
        results: Finished or not.
        curves: What was logged while they trained, by signature.
        analyses: Of runs of the study, with its first part.
    """

    name: str
    results: Sequence[Result]
    curves: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    analyses: Sequence[Analysis] = ()


class Arm(NamedTuple):
    """A method with its settings in one cell.

    Args:
        where: What is held fixed: the model, the task and the budget.
        method: Its name.
        label: The method, and what sets it apart from its other arms in the cell.
        runs: Finished ones, which differ in their seed alone.
        tried: The groups of runs among which these were chosen, which differ in SEARCHED alone; these with them. A
            search leaves those of its other trials paused.
    """

    where: Cell
    method: str
    label: str
    runs: Sequence[Result]
    tried: Sequence[Sequence[Result]]

    @property
    def scores(self) -> dict[int, float]:
        """The headline, per cent, by seed."""
        return {run.seed: percent(run) for run in self.runs}

    @property
    def is_baseline(self) -> bool:
        """Whether nothing of a pretrained model is updated: a linear probe, or what needs no such model."""
        return self.where.model == NO_MODEL or self.method in PROBES

    @property
    def mean(self) -> float:
        """Of the scores, per cent."""
        return statistics.mean(self.scores.values())

    @property
    def deviation(self) -> float | None:
        """Sample deviation of the scores, points; None of a single one."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None


def load(paths: Sequence[Path], only: Sequence[str] = ()) -> list[Part]:
    """The parts of studies and folders of runs, by name.

    Args:
        paths: Each a run's folder, a folder of runs or of studies, or a study's results.jsonl.
        only: Conditions ``KEY=VALUE,VALUE…`` that the runs meet.

    Raises:
        SettingsError: There are no results, one or an analysis cannot be read, or two studies have the same name.
    """
    by_part: dict[tuple[str, str], list[Result]] = {}
    folders: dict[str, Path] = {}
    for path in paths:
        for result in read(path):
            assert result.path is not None
            collected = result.path.name.startswith(RESULTS)
            folder = result.path.parent.resolve() if collected else path
            study = folder.name if collected else "runs" if len(paths) == 1 else str(path)
            if folders.setdefault(study, folder) != folder:
                raise SettingsError(f"{folder} and {folders[study]} are studies of one name: report them one by one")
            by_part.setdefault((study, result.collection), []).append(without_folders(result))
    chosen = {id(result) for result in select([result for part in by_part.values() for result in part], only)}
    parts, shown = [], set()
    for (study, collection), results in sorted(by_part.items()):
        kept = [result for result in results if id(result) in chosen]
        name = study if collection in ("", "records") else f"{study}, {collection}"
        if kept:
            found = [] if study in shown else analyses(folders[study])
            shown.add(study)
            parts.append(Part(name, kept, _curves(folders[study], collection, kept), found))
    return parts


def _curves(folder: Path, collection: str, results: Sequence[Result]) -> dict[str, list[Row]]:
    if collection:
        rows = read_curves(folder)
        lines = {result.signature: map(json.dumps, rows.get((collection, result.signature), [])) for result in results}
        return {signature: [*map(Row.of, of_run)] for signature, of_run in lines.items()}
    files = {result.signature: result.path.with_name(METRICS) for result in results if result.path}
    return {
        signature: [*map(Row.of, file.read_text().splitlines())] for signature, file in files.items() if file.is_file()
    }


def arms(results: Sequence[Result]) -> list[Arm]:
    """The arms of a part, by cell and method; none where no run has finished.

    Of settings that differ in SEARCHED alone, the ones with the most seeds are taken, and of these the one with the
    best mean validation score; the test score chooses nothing, so without a validation score all are arms.
    """
    if not any(result.status == "finished" for result in results):
        return []
    methods: dict[tuple[Cell, str, int], list[list[Result]]] = {}
    for runs in [*by_settings(results), *by_settings(results, paused=True)]:
        runs.sort(key=lambda run: run.seed)
        methods.setdefault((cell(runs[0]), runs[0].method, runs[0].task_version), []).append(runs)
    return [arm for (where, method, _), groups in methods.items() for arm in _of_method(where, method, groups)]


def baselines(where: Cell, of_arms: Sequence[Arm]) -> list[Arm]:
    """Of the arms, the baselines that a cell's methods have to surpass.

    They have its task and budget, and no model, the cell's own, or the image tower of the cell's CLIP.
    """
    cells = [where._replace(model=model) for model in dict.fromkeys((NO_MODEL, where.model, f"{where.model}_vision"))]
    return [arm for arm in of_arms if arm.is_baseline and arm.where in cells]


def _of_method(where: Cell, method: str, groups: Sequence[Sequence[Result]]) -> list[Arm]:
    known = all(run.validation is not None for runs in groups for run in runs)
    settings = [flat_settings(runs[0]) for runs in groups]
    keys = [key for key in varying(settings) if key not in _OF_A_RUN and not (known and key in SEARCHED)]
    variants: dict[str, list[Sequence[Result]]] = {}
    for runs, of_run in zip(groups, settings, strict=True):
        variants.setdefault(label_of(method, of_run, keys), []).append(runs)
    return [
        Arm(where, method, label, max(done, key=_choice), tried)
        for label, tried in variants.items()
        if (done := [runs for runs in tried if runs[0].status == "finished"])
    ]


def _choice(runs: Sequence[Result]) -> tuple[int, float]:
    scores = [run.validation for run in runs if run.validation is not None]
    return len(runs), statistics.mean(scores) if scores else 0.0


def label_of(method: str, settings: Mapping[str, object], keys: Sequence[str]) -> str:
    """An arm's label: its method, and what its settings of the `keys` are."""
    return ", ".join([method, *(f"{key.removeprefix('method.')}={text(settings.get(key))}" for key in keys)])


def flat_settings(result: Result) -> dict[str, object]:
    """The settings of a run as today's, by dotted key; a list is one value."""
    return dict(leaves(modern(result.config)))


def varying(settings: Sequence[Mapping[str, object]]) -> list[str]:
    """The keys that do not have one value in all `settings`, in the order in which they come."""
    keys = dict.fromkeys(key for of_run in settings for key in of_run)
    return [key for key in keys if len({json.dumps(of_run.get(key), sort_keys=True) for of_run in settings}) > 1]


def text(value: Any) -> str:
    """A setting as a reader sees it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
