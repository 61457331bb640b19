"""A table of the records under a folder: python scripts/table.py runs"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from randlora.errors import SettingsError

COLUMNS = (
    "task",
    "model",
    "method",
    "seed",
    "metric",
    "zero-shot",
    "trained",
    "parameters",
    "seconds",
    "MiB",
    "status",
)


def row(folder: Path, result: dict[str, Any]) -> list[str]:
    """One record's cells, as COLUMNS and the run folder."""
    task, model, method = folder.parts[-4:-1]
    metric = result["headline"]["name"]
    before, after = result["metrics"].get(metric.replace("test/", "zero_shot/")), result["headline"]["value"]

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        task,
        model,
        method,
        str(result["seed"]),
        metric,
        number(before, ".4f"),
        number(after, ".4f"),
        number(result["trainable_parameters"], ","),
        number(result["train_seconds"], ".0f"),
        number(result["peak_memory_bytes"] and result["peak_memory_bytes"] / 2**20, ",.0f"),
        result["status"],
        str(folder),
    ]


def main(arguments: list[str]) -> int:
    root = Path(arguments[0] if arguments else "runs")
    records = sorted(root.glob("**/result.json"))
    if not records:
        raise SettingsError(f"no result.json under {root}: run train.py with run_root={root} first")
    table = Table()
    for name in (*COLUMNS, "run folder"):
        table.add_column(name, overflow="fold")
    for path in records:
        table.add_row(*row(path.parent, json.loads(path.read_text())))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SettingsError as error:
        sys.exit(f"error: {error}")
