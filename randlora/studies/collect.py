"""From folders of runs to the compact evidence of a study: results.jsonl and curves.jsonl.gz."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from randlora.errors import SettingsError
from randlora.integrity import write
from randlora.records import Result, read
from randlora.records.study import compress

RESULTS, CURVES = "results.jsonl", "curves.jsonl.gz"
Key = tuple[str, str]  # collection, signature


def collect(runs: Path, study: Path, collection: str = "records", replace_different: bool = False) -> int:
    """Adds the results and curves of `runs` to a study; those that it has already stay as they are.

    Folders of data become the word FOLDER in the results, since they are of one machine.

    Args:
        runs: A run's folder, or a folder of runs.
        study: The folder that holds results.jsonl, made where there is none.
        collection: The part of the study that these runs are, such as ``records`` or ``scan``.
        replace_different: Take the new result where the study has another of the same collection and signature.

    Returns:
        How many runs the study had not.

    Raises:
        SettingsError: The study has another result of a run, and `replace_different` is not set.
    """
    new = [replace(without_folders(result), collection=collection) for result in read(runs)]
    results = {_key(result): result for result in (read(study) if (study / RESULTS).is_file() else [])}
    curves, before = read_curves(study), len(results)
    for result in new:
        key = _key(result)
        if key in results and results[key].to_json() != result.to_json() and not replace_different:
            raise SettingsError(
                f"{result.path}: {study / RESULTS} has another result of {key[1]} in {collection!r}; "
                "--replace takes this one"
            )
        results[key] = result
        assert result.path is not None
        curve = result.path.with_name("metrics.jsonl")  # a run that failed early has none
        curves[key] = [json.loads(line) for line in curve.read_text().splitlines()] if curve.is_file() else []
    names = {key: (result.task, result.model, result.method) for key, result in results.items()}
    order = sorted(results, key=lambda key: (key[0], *names[key], key[1]))
    study.mkdir(parents=True, exist_ok=True)
    compress([results[key] for key in order], study / RESULTS)
    rows = ({"collection": key[0], "signature": key[1], **row} for key in order for row in curves.get(key, []))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write(study / CURVES, gzip.compress(text.encode(), mtime=0))
    return len(results) - before


def read_curves(study: Path) -> dict[Key, list[dict[str, Any]]]:
    """What was logged while a study's runs trained: the rows of metrics.jsonl by collection and signature."""
    curves: dict[Key, list[dict[str, Any]]] = {}
    if (study / CURVES).is_file():
        for line in gzip.decompress((study / CURVES).read_bytes()).decode().splitlines():
            row = json.loads(line)
            curves.setdefault((row.pop("collection"), row.pop("signature")), []).append(row)
    return curves


def _key(result: Result) -> Key:
    return result.collection, result.signature


def without_folders(result: Result) -> Result:
    """The result with words for the folders of the machine that it was made on."""
    words = {result.config.get("data_root"): "FOLDER", result.config.get("run_root"): "runs"}

    def neutral(value: object) -> Any:
        if isinstance(value, Mapping):
            return {key: neutral(item) for key, item in value.items()}
        return words.get(value, value) if isinstance(value, str) else value

    return replace(result, config=neutral(result.config))
