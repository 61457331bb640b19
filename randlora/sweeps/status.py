"""How the sweeps and runs below a folder stand.

randlora status RUNS                 tables of sweeps, of searches, and of runs, those that have not finished first
randlora status RUNS --watch 10      anew every ten seconds, until Ctrl-C
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from randlora.bounds import count
from randlora.errors import FINISHED, SettingsError
from randlora.integrity import Damaged
from randlora.records import Result
from randlora.sweeps import findings
from randlora.sweeps.findings import Finding
from randlora.sweeps.progress import Progress, duration, progress
from randlora.sweeps.sweep import NAME, ORDER, SWEEPS, TO_DO, Standing, Sweep, standing


def main(arguments: Sequence[str]) -> int:
    """The command ``randlora status``; SettingsError where nothing was run."""
    parser = argparse.ArgumentParser(
        "randlora status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", nargs="?", default="runs", type=Path, help="a run root, or a folder of several")
    parser.add_argument("--watch", type=count, metavar="SECONDS", help="look again after so many")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if options.watch is None:
        console.print(status(options.root))
        return FINISHED
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(status(options.root), refresh=True)
            time.sleep(options.watch)
    return FINISHED


def status(root: Path) -> Group:
    """Tables of the sweeps and searches below `root`, where there are any, and of runs; SettingsError if none is."""
    runs = {folder.resolve(): Run.of(folder) for folder in _folders(root)}
    files = sorted(root.rglob(f"{SWEEPS}/*/{NAME}"))
    sweeps, searches = [_row(path, runs) for path in files], [*chain.from_iterable(map(_search, files))]
    if not runs and not sweeps:
        raise SettingsError(f"no run below {root}: give the run_root of some")
    of_sweeps = Table("sweep", "jobs", "how they stand", "time left", "command")
    for row in sweeps:
        of_sweeps.add_row(*row)
    of_runs = Table()
    for name in ("state", "task", "model", "method", "run", "how far", "score"):
        of_runs.add_column(name, no_wrap=True)
    of_runs.add_column("why, or where", overflow="fold")
    for run in sorted(runs.values(), key=lambda run: (ORDER.index(run.standing.state), run.folder)):
        state, why = run.standing
        of_runs.add_row(state, *run.folder.resolve().parts[-4:], str(run.progress or ""), run.score, why)
    of_searches = [findings.table(searches)] if searches else []
    return Group(*([of_sweeps] if sweeps else []), *of_searches, *([of_runs] if runs else []))


@dataclass(frozen=True)
class Run:
    """A run's folder, how it stands, how far it is where it has not finished, and what it came to."""

    folder: Path
    standing: Standing
    progress: Progress | None = None
    score: str = ""

    @classmethod
    def of(cls, folder: Path) -> Run:
        """As its folder has it."""
        known = standing(folder)
        if known.state != "finished":
            return cls(folder, known, progress(folder))
        headline = Result.read(folder / "result.json").headline
        return cls(folder, known, score=f"{headline.name} {headline.value:.4f}")


def _folders(root: Path) -> list[Path]:
    """Those of the runs below `root`."""
    return sorted({path.parent for name in ("status.json", "result.json") for path in root.rglob(name)})


def _search(path: Path) -> list[Finding]:
    """What the sweep in a sweep.json has found, of a search as it was when its last round began or ended."""
    try:
        return findings.read(path.with_name(findings.NAME))
    except Damaged:  # it is made again
        return []


def _row(path: Path, runs: Mapping[Path, Run]) -> Sequence[str]:
    """The cells of the sweep in a sweep.json."""
    try:
        sweep = Sweep.read(path)
    except SettingsError as error:
        return path.parent.name, "", str(error), "", ""
    states, steps_left, rate = Counter[str](), 0.0, 0.0
    for job in sweep.jobs:
        run = runs.get((sweep.root / job.folder).resolve())
        states[run.standing.state if run else TO_DO] += 1
        far = run.progress if run and run.progress else Progress()
        if run is None or run.standing.state not in ("paused", "finished"):
            steps_left += job.steps - far.step
        if run and run.standing.state == "running":
            rate += far.rate or 0.0
    stand = ", ".join(f"{states[state]} {state}" for state in ORDER if state in states)
    return sweep.id, str(len(sweep.jobs)), stand, duration(steps_left / rate) if rate else "", " ".join(sweep.command)
