"""What a run predicted of every test example, as columns in compressed JSON beside its result."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from randlora.errors import SettingsError
from randlora.integrity import write
from randlora.records.result import Result, finite

NAME = "predictions.json.gz"


def write_columns(folder: Path, columns: Mapping[str, list]) -> None:
    """Writes the columns, each with one entry per example, in the order of their rows in the data set."""
    order = np.argsort(columns["row"], kind="stable")
    ordered = {name: [values[i] for i in order] for name, values in columns.items()}
    write(folder / NAME, gzip.compress(json.dumps(finite(ordered)).encode(), mtime=0))


def read_columns(result: Result) -> dict[str, list]:
    """The columns of a result that lies in its run's folder: `row`, which example it is, and the task's own.

    Raises SettingsError where they were not kept, or cannot be read.
    """
    path = (result.path or Path()).with_name(NAME)
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path} cannot be read ({error}): the predictions of single examples are in the folders of runs with "
            "predictions=true"
        ) from error


def example_scores(result: Result) -> dict[int, float]:
    """By row, 1 for a test example that was predicted rightly and 0 for another.

    Raises SettingsError where the predictions are missing, or the headline is not the mean of these.
    """
    columns = read_columns(result)
    pairs = zip(columns.get("predicted", []), columns.get("label", []), strict=True)
    scores = [float(predicted == label) for predicted, label in pairs]
    if not scores or result.headline.value is None or abs(np.mean(scores) - result.headline.value) > 1e-6:
        raise SettingsError(f"{result.path}: {result.headline.name} is not a mean over examples, as accuracy is")
    return dict(zip(columns["row"], scores, strict=True))
