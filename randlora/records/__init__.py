"""What came out of a run: its folder, its result, its mirrors."""

from __future__ import annotations

from pathlib import Path

from randlora.errors import SettingsError
from randlora.records.record import state
from randlora.records.result import Headline, Result
from randlora.records.study import expand

__all__ = ["Headline", "Result", "read", "state"]


def read(path: Path) -> list[Result]:
    """The results of a run's folder, a folder of runs or of studies, or a study's results.jsonl.

    They come in the order of their paths, and in that of a file's lines. SettingsError where there are none, or where
    one cannot be read.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted([*path.rglob("result.json"), *path.rglob("results.jsonl")])
    results = [result for file in files for result in ([Result.read(file)] if file.suffix == ".json" else expand(file))]
    if not results:
        raise SettingsError(f"no result.json or results.jsonl under {path}: run train.py with run_root={path} first")
    return results
