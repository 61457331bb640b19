"""Tables of the records under a folder.

python scripts/table.py runs               one row per run
python scripts/table.py runs --seeds       one row per method: mean ± sample deviation and median over seeds, Markdown
python scripts/table.py runs --paired method.basis=kronecker,uniform
    one row per task and model with both: scores under each value of a setting, and their difference by seed with its
    95 % interval (Student's t); --paired method=randlora,lora compares methods
python scripts/table.py runs --best trainer.learning_rate,method.alpha
    of a search: the settings with the best validation score for each task, model, method and budget, and the runner-up
python scripts/table.py runs --metrics     every metric of the test set in its own unit, before and after training
python scripts/table.py runs --published   means over seeds beside the paper's number for that cell, where it has one
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from randlora.errors import SettingsError, exit_code

PUBLISHED = Path(__file__).resolve().parent.parent / "experiments" / "published"


class Run(NamedTuple):
    """One record: where it lies, and what it says."""

    folder: Path
    result: dict[str, Any]

    @property
    def cell(self) -> tuple[str, str, str]:
        """task, model, method"""
        return self.folder.parts[-4], self.folder.parts[-3], self.folder.parts[-2]

    @property
    def budget(self) -> tuple[int | None, float | None]:
        """shots, fraction"""
        return self.result["config"].get("shots"), self.result["config"].get("fraction")

    @property
    def metric(self) -> str:
        return self.result["headline"]["name"].removeprefix("test/")

    @property
    def before(self) -> float | None:
        return self.result["metrics"].get(f"zero_shot/{self.metric}")


def read(root: Path) -> list[Run]:
    """Every record under `root`; SettingsError when there is none."""
    runs = [Run(path.parent, json.loads(path.read_text())) for path in sorted(root.glob("**/result.json"))]
    if not runs:
        raise SettingsError(f"no result.json under {root}: run train.py with run_root={root} first")
    return runs


def finished(runs: Sequence[Run]) -> list[Run]:
    """Those that ended by themselves, the only ones to compare; SettingsError when there is none."""
    kept = [run for run in runs if run.result["status"] == "finished"]
    if not kept:
        raise SettingsError("none of the runs has finished: the same command goes on with an unfinished one")
    return kept


def each(runs: Sequence[Run]) -> Table:
    """One row per run."""
    table = Table()
    for name in ("task", "model", "method", "seed", "metric", "zero-shot", "trained"):
        table.add_column(name, no_wrap=True)
    for name in ("parameters", "seconds", "MiB", "status", "run folder"):
        table.add_column(name, overflow="fold")
    for run in runs:
        result, memory = run.result, run.result["peak_memory_bytes"]
        numbers = (
            (run.before, ".4f"),
            (result["headline"]["value"], ".4f"),
            (result["trainable_parameters"], ","),
            (result["train_seconds"], ".0f"),
            (memory and memory / 2**20, ",.0f"),
        )
        cells = ["" if value is None else format(value, form) for value, form in numbers]
        table.add_row(*run.cell, str(result["seed"]), run.metric, *cells, result["status"], str(run.folder))
    return table


def over_seeds(runs: Sequence[Run]) -> str:
    """Finished runs by task, model and method; runs that differ in more than their seed are not mixed."""
    lines = [
        "| task | model | shots | method | trained parameters | metric | zero-shot | after training | median | seeds | "
        "seconds | MiB |",
        "|---" * 12 + "|",
    ]
    for members in by_settings(runs):
        task, model, method = members[0].cell
        before = "" if members[0].before is None else f"{100 * members[0].before:.1f}"
        seconds = statistics.mean(run.result["train_seconds"] for run in members)
        peaks = [run.result["peak_memory_bytes"] for run in members if run.result["peak_memory_bytes"]]
        memory = f"{statistics.mean(peaks) / 2**20:,.0f}" if peaks else ""
        middle = 100 * statistics.median(run.result["headline"]["value"] for run in members)
        lines.append(
            f"| {task} | {model} | {data_used(*members[0].budget)} | {method} | "
            f"{members[0].result['trainable_parameters']:,} | {members[0].metric}, % | {before} | "
            f"{scores_of(members)} | {middle:.1f} | {len(members)} | {seconds:.0f} | {memory} |"
        )
    return "\n".join(lines)


def by_settings(runs: Sequence[Run]) -> list[list[Run]]:
    """The finished runs in groups that differ in their seed alone; scores of two versions of a task are not mixed."""
    groups: dict[tuple, list[Run]] = {}
    for run in finished(runs):
        settings = {key: value for key, value in run.result["config"].items() if key not in ("seed", "run_root")}
        group = (*run.cell, run.result.get("task_version", 1), json.dumps(settings, sort_keys=True))
        groups.setdefault(group, []).append(run)
    return list(groups.values())


def scores_of(runs: Sequence[Run]) -> str:
    """Mean ± sample deviation of the headline, per cent."""
    return _spread([100 * run.result["headline"]["value"] for run in runs])


def best(runs: Sequence[Run], keys: Sequence[str]) -> str:
    """The settings that a search ends with; the test score takes no part. The mean over seeds counts."""
    cells: dict[tuple, dict[tuple, list[float]]] = {}
    for run in finished(runs):
        setting = tuple(_value(run, key, missing="") for key in keys)
        scores = cells.setdefault((*run.cell, *run.budget), {}).setdefault(setting, [])
        scores.append(100 * run.result["metrics"][f"validation/{run.metric}"])
    lines = [
        f"| task | model | method | shots | tried | {' | '.join(keys)} | validation, % | runner-up, % |",
        "|---|---|---|---|---|" + "---|" * (len(keys) + 2),
    ]
    for (task, model, method, *budget), tried in cells.items():
        ranked = sorted(((statistics.mean(scores), settings) for settings, scores in tried.items()), reverse=True)
        second = f"{ranked[1][0]:.1f}" if len(ranked) > 1 else ""
        lines.append(
            f"| {task} | {model} | {method} | {data_used(*budget)} | {len(ranked)} | {' | '.join(ranked[0][1])} | "
            f"{ranked[0][0]:.1f} | {second} |"
        )
    return "\n".join(lines)


def every_metric(runs: Sequence[Run]) -> str:
    """A table per task: all that its test set measures, in the units of the records, mean ± sample deviation."""
    tasks: dict[str, list[list[Run]]] = {}
    for members in by_settings(runs):
        tasks.setdefault(members[0].cell[0], []).append(members)
    return "\n\n".join(_metrics_of(groups) for groups in tasks.values())


def _metrics_of(groups: Sequence[Sequence[Run]]) -> str:
    """Rows are the methods of one task, after the scores that they start from where there are any."""
    measured = (name for members in groups for name in members[0].result["metrics"] if name.startswith("test/"))
    names = list(dict.fromkeys(name.removeprefix("test/") for name in measured))
    lines = [f"| task | model | shots | method | {' | '.join(names)} | seeds |", "|---" * (len(names) + 5) + "|"]
    for members in groups:
        before = _metrics_row("before", members[:1], "zero_shot", names)
        if members[0].before is not None and before not in lines:  # methods start from the same model
            lines.append(before)
        lines.append(_metrics_row(members[0].cell[2], members, "test", names))
    return "\n".join(lines)


def _metrics_row(label: str, members: Sequence[Run], stage: str, names: Sequence[str]) -> str:
    task, model, _ = members[0].cell
    found = [[run.result["metrics"].get(f"{stage}/{name}") for run in members] for name in names]
    scores = ["" if None in values else _spread(values, ".4g", ".2g") for values in found]
    start = [task, model, data_used(*members[0].budget), label]
    return f"| {' | '.join([*start, *scores])} | {len(members)} |"


def beside_published(runs: Sequence[Run]) -> str:
    """Ours and the paper's, which are of one run each; the paper's variant is named, since a rank may differ."""
    cells: dict[tuple, tuple[str, dict[str, str]]] = {}
    for path in sorted(PUBLISHED.glob("table1[1-4].csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                budget = int(row["shots"] or 0) or None, float(row["fraction"] or 0) or None
                cells[row["model"], row["method"], *budget] = path.stem, row
    lines = [
        "| task | model | method | shots | trained parameters | ours, % | published, % | where |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for members in by_settings(runs):
        task, model, method = members[0].cell
        shots, fraction = members[0].budget
        where, row = cells.get((model, method, shots, fraction or (None if shots else 1.0)), ("", {}))
        source = f"{where} {row.get('variant', '')}".strip() if task in row else "not in the paper"
        lines.append(
            f"| {task} | {model} | {method} | {data_used(shots, fraction)} | "
            f"{members[0].result['trainable_parameters']:,} | {scores_of(members)} | {row.get(task, '')} | {source} |"
        )
    return "\n".join(lines)


def paired(runs: Sequence[Run], key: str, values: Sequence[str]) -> str:
    """Differences between two values of one setting, within pairs of runs that share everything else that is listed."""
    cells: dict[tuple, dict[tuple[str, int], float]] = {}
    for run in finished(runs):
        value = _value(run, key)
        if value in values:
            task, model, method = run.cell
            scores = cells.setdefault((task, model, "" if key == "method" else method, *run.budget), {})
            if (value, run.result["seed"]) in scores:
                raise SettingsError(f"{run.folder}: a second run of {key}={value} with this task, model and seed")
            scores[value, run.result["seed"]] = 100 * run.result["headline"]["value"]
    first, second = values
    lines = [
        f"| task | model | shots | {key}={first} | {key}={second} | difference, points | 95 % interval | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shared = {cell: scores for cell, scores in cells.items() if {value for value, _ in scores} == {first, second}}
    if not shared:
        raise SettingsError(f"--paired {key}={first},{second}: no task and model has finished runs of both")
    for (task, model, _, shots, fraction), scores in shared.items():
        seeds = sorted({seed for value, seed in scores if value == first} & {s for v, s in scores if v == second})
        if len(seeds) < 2:
            raise SettingsError(
                f"{task}, {model}: {len(seeds)} seeds have both {key}={first} and {second}; two are needed"
            )
        columns = [[scores[value, seed] for seed in seeds] for value in values]
        differences = [one - other for one, other in zip(*columns, strict=True)]
        mean, spread = statistics.mean(differences), statistics.stdev(differences)
        half = student.ppf(0.975, len(seeds) - 1) * spread / len(seeds) ** 0.5
        lines.append(
            f"| {task} | {model} | {data_used(shots, fraction)} | {_spread(columns[0])} | {_spread(columns[1])} | "
            f"{round(mean, 2) + 0.0:+.2f} | {mean - half:+.2f} to {mean + half:+.2f} | {len(seeds)} |"
        )
    return "\n".join(lines)


def _spread(scores: Sequence[float], form: str = ".1f", deviation: str = ".1f") -> str:
    return f"{statistics.mean(scores):{form}}" + (
        f" ± {statistics.stdev(scores):{deviation}}" if len(scores) > 1 else ""
    )


def data_used(shots: int | None, fraction: float | None) -> str:
    """Shots, a percentage, or all."""
    return str(shots or (f"{100 * fraction:g} %" if fraction else "all"))


def _value(run: Run, key: str, missing: str | None = None) -> str:
    """A setting of a run as text; `missing` where it has none, SettingsError if that is None."""
    if key == "method":
        return run.cell[2]
    found: Any = run.result["config"]
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            if missing is not None:
                return missing
            raise SettingsError(f"{key!r} is no setting of {run.folder}")
        found = found[part]
    return str(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="runs", type=Path)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--seeds", action="store_true", help="mean and deviation over seeds, as Markdown")
    kinds.add_argument("--paired", metavar="SETTING=A,B", help="differences between two values of a setting")
    kinds.add_argument("--best", metavar="SETTING,SETTING", help="the best settings of a search, by validation")
    kinds.add_argument("--metrics", action="store_true", help="every metric of the test set, as Markdown")
    kinds.add_argument("--published", action="store_true", help="beside the paper's numbers, as Markdown")
    arguments = parser.parse_args()
    runs = read(arguments.root)
    if arguments.paired:
        key, _, values = arguments.paired.partition("=")
        if values.count(",") != 1:
            raise SettingsError(f"--paired {arguments.paired}: give a setting and two values, method.rank=4,8")
        print(paired(runs, key, values.split(",")))
    elif arguments.best:
        print(best(runs, arguments.best.split(",")))
    elif arguments.published:
        print(beside_published(runs))
    elif arguments.metrics:
        print(every_metric(runs))
    elif arguments.seeds:
        print(over_seeds(runs))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(each(runs))


if __name__ == "__main__":
    sys.exit(exit_code(main))
