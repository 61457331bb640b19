"""The paper's scores, for the same cell as a run's: model, method, task and budget."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from randlora.records import Result
from randlora.studies.groups import Cell, cell

# Of a clone; a wheel has none of the paper's tables.
FOLDER = Path(__file__).resolve().parent.parent.parent / "experiments" / "published"
TABLES = ("table11", "table12", "table13", "table14", "table15", "table4")
Scores = Mapping[tuple[str, Cell], list["Score"]]


class Score(NamedTuple):
    """A score as printed, per cent, "" for an empty cell; the table, and the paper's variant of the method."""

    text: str
    table: str
    variant: str

    @property
    def source(self) -> str:
        """Table and variant."""
        return f"{self.table} {self.variant}".strip()


def read_scores(folder: Path = FOLDER) -> Scores:
    """The scores in the folder's TABLES by method and cell; several of a method that the paper has in variants."""
    scores: dict[tuple[str, Cell], list[Score]] = {}
    for path in (folder / f"{name}.csv" for name in TABLES):
        if path.is_file():
            with path.open() as file:
                for row in csv.DictReader(file):
                    shots, fraction = int(row.get("shots") or 0) or None, float(row.get("fraction") or 0) or None
                    fraction = fraction or (None if shots else 1.0)
                    columns = {row["task"]: row["average"]} if "task" in row else row  # of a mixture, its mean
                    for task, text in columns.items():
                        where = Cell(row["model"], task, shots, fraction)
                        scores.setdefault((row["method"], where), []).append(Score(text, path.stem, row["variant"]))
    return scores


def beside(scores: Scores, result: Result) -> Score | None:
    """The paper's score for a run's method and cell, of its rank where there are several; None where there is none."""
    where = cell(result)
    if not where.shots:
        where = where._replace(fraction=where.fraction or 1.0)
    variants = scores.get((result.method, where), [])
    method = result.config.get("method", {})
    rank = f"rank {method.get('rank')}" if isinstance(method, Mapping) else ""
    matching = variants if len(variants) == 1 else [score for score in variants if score.variant == rank]
    return matching[0] if matching else None
