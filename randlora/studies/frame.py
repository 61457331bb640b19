"""Runs as a tidy table, a row each, for pandas, R or a spreadsheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from randlora.records import Result
from randlora.records.signature import EXCLUDED_FROM_HASH
from randlora.studies.arms import Part, flat_settings, text, varying

if TYPE_CHECKING:
    import pandas

NAMES = ("task", "model", "method", "shots", "fraction", "seed", "signature", "status", "metric")
COUNTS = ("trainable_parameters", "head_parameters", "total_parameters", "adapter_bytes", "steps", "selected_step")
COST = ("train_seconds", "seconds_per_step", "peak_memory_bytes")  # these differ when a run is done again
ORIGIN = ("device", "commit", "error")
_WHOLE = ("shots", "seed", *COUNTS, "peak_memory_bytes")
_COLUMNS_OF_THEIR_OWN = ("seed", "shots", "fraction", *EXCLUDED_FROM_HASH)


def tidy(parts: Sequence[Part], cost: bool = True) -> pandas.DataFrame:
    """A row per run: names, score, parameters and costs, every metric, and the settings in which runs differ.

    Scores and metrics are in the units of the results, 0.617 rather than 61.7 %. Columns of metrics are named
    ``test/accuracy``, those of settings ``trainer.learning_rate``; what a run does not have is missing.

    Args:
        parts: Of studies, or of folders of runs.
        cost: Whether to give times and memory.
    """
    import pandas

    runs = [(part.name, result) for part in parts for result in part.results]
    results = [result for _, result in runs]
    columns: dict[str, pandas.Series] = {"part": pandas.Series([part for part, _ in runs], dtype="str")}
    for name in (*NAMES, "score", "before", *COUNTS, *(COST if cost else ()), *ORIGIN):
        values = [result.headline.value if name == "score" else getattr(result, name) for result in results]
        kind = "Int64" if name in _WHOLE else "float64" if name in ("score", "before", "fraction", *COST) else "str"
        columns[name] = pandas.Series(values, dtype=kind)
    for name in sorted({name for result in results for name in result.metrics}):
        columns[name] = pandas.Series([result.metrics.get(name) for result in results], dtype="float64")
    settings = [flat_settings(result) for result in results]
    for key in differing(results, settings):
        columns[key] = _series([of_run.get(key) for of_run in settings])
    return pandas.DataFrame(columns)


def differing(results: Sequence[Result], settings: Sequence[Mapping[str, object]]) -> list[str]:
    """The settings in which runs differ, in order; those of a task or a model where runs of it differ among them."""
    keys: dict[str, None] = {}
    for section in ("task", "model", ""):
        groups: dict[str, list[dict[str, object]]] = {}
        for result, of_run in zip(results, settings, strict=True):
            place = of_run.get("data_root")
            part = {
                key: value
                for key, value in of_run.items()
                if (key.split(".")[0] if key.split(".")[0] in ("task", "model") else "") == section
                and not key.endswith("_target_")
                and (place is None or value != place)
            }
            groups.setdefault(getattr(result, section, ""), []).append(part)
        keys |= dict.fromkeys(key for members in groups.values() for key in varying(members))
    return sorted(key for key in keys if key not in _COLUMNS_OF_THEIR_OWN)


def _series(values: Sequence[object]) -> pandas.Series:
    """Numbers where all that is given is a number, and text elsewhere."""
    import pandas

    given = [value for value in values if value is not None]
    if given and all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        whole = all(isinstance(value, int) for value in given)
        return pandas.Series(values, dtype="Int64" if whole else "float64")
    return pandas.Series([None if value is None else text(value) for value in values], dtype="str")
