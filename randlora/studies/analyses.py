"""What analyses of a study's runs have found, from the tables that the commands have left beside its records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from randlora.errors import SettingsError

Rows = Sequence[Mapping[str, Any]]


class Summary(NamedTuple):
    """How an analysis is shown.

    Args:
        caption: Of the table, and of the figure where there is one.
        keys: The columns by which rows are grouped.
        means: The columns of which a group's mean is given.
        only: The rows that count, as (column, value).
        drawn: A column that only the figure needs.
    """

    caption: str
    keys: tuple[str, ...]
    means: tuple[str, ...]
    only: tuple[str, str] | None = None
    drawn: tuple[str, ...] = ()


class Analysis(NamedTuple):
    """A table that one of the commands has written.

    Args:
        name: Of the file: the command's, or that and more after a ``_``.
        rows: As in the file.
    """

    name: str
    rows: Rows

    @property
    def command(self) -> str:
        """The command that has written it."""
        return self.name.partition("_")[0]

    @property
    def summary(self) -> Summary:
        """How it is shown."""
        return AT_SCORES if any("at_score" in row for row in self.rows) else SUMMARIES[self.command]

    def columns(self) -> list[str]:
        """The names of the table's columns."""
        return [name.replace("_", " ") for name in (*self.summary.keys, *self.summary.means)]

    def lines(self) -> list[list[str]]:
        """The table's cells: a line for each group of rows, in the order of the first of each."""
        summary, groups = self.summary, {}  # type: ignore[var-annotated]
        for row in self.rows:
            if summary.only is None or row[summary.only[0]] == summary.only[1]:
                groups.setdefault(tuple(row[key] for key in summary.keys), []).append(row)
        return [
            [
                *("" if name is None else str(name) for name in names),
                *(_mean([row[name] for row in group]) for name in summary.means),
            ]
            for names, group in groups.items()
        ]


SUMMARIES = {  # by command
    "cka": Summary("Linear CKA of features, mean over layers", ("model", "task", "run", "against"), ("cka",)),
    "landscape": Summary(
        "Loss of the models in the landscape", ("model", "task", "run"), ("loss",), only=("part", "model")
    ),
    "approximate": Summary(
        "Error of the nearest update, as a share of its norm, mean over sites",
        ("model", "task", "of", "budget", "method"), ("error",),
    ),
    "forgetting": Summary(
        "Scores on what was not trained on, before and after",
        ("model", "task", "run", "on", "metric"), ("before", "after", "change", "relative_norm"),
    ),
    "spectra": Summary(
        "Updates, means over sites", ("model", "run", "sites"),
        ("rank", "full", "stable_rank", "effective_rank", "energy", "relative_norm", "alignment", "intruders"),
        drawn=("values",),
    ),
}  # fmt: skip
AT_SCORES = Summary(
    "Scores on what was not trained on, where the arms first reached a validation score, or at their end",
    ("model", "task", "on", "metric", "at_score", "arm"), ("step", "validation", "change", "relative_norm"),
)  # fmt: skip
_AT_THE_END = {"at_score": None, "step": None, "validation": None}


def _mean(values: Sequence[float | None]) -> str:
    """Of those that are known; blank where none is."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.4g}" if known else ""


def analyses(folder: Path) -> list[Analysis]:
    """The analyses in a study's folder, or in one of runs: ``cka.jsonl``, ``cka_early.jsonl`` and so on.

    Raises:
        SettingsError: A file cannot be read, or is not what its command writes.
    """
    found = []
    for command in SUMMARIES:
        for path in [folder / f"{command}.jsonl", *sorted(folder.glob(f"{command}_*.jsonl"))]:
            if not path.is_file() or not (rows := read_rows(path)):
                continue
            if any("at_score" in row for row in rows):
                rows = [_AT_THE_END | row for row in rows]
            analysis = Analysis(path.stem, rows)
            summary = analysis.summary
            needed = {*summary.keys, *summary.means, *summary.drawn, *(summary.only or ())[:1]}
            if missing := [column for column in sorted(needed) if any(column not in row for row in rows)]:
                raise SettingsError(
                    f"{path} has rows without {missing[0]}: give what `randlora {command} … --into {path.name}` has "
                    "written, or give the file another name"
                )
            found.append(analysis)
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A table that a command such as `randlora cka` has kept; SettingsError where it cannot be read."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}; give what `--into` has written") from error
    if not all(isinstance(row, dict) for row in rows):
        raise SettingsError(f"{path} cannot be read: a line is no JSON object; give what `--into` has written")
    return rows
