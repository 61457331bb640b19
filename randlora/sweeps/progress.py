"""How far a run is, read from its folder by whoever sees it, and a sweep's as a person watches it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from randlora.records.metrics import NAME as METRICS
from randlora.records.metrics import Row

_TAIL_BYTES = 8192  # of metrics.jsonl: enough rows to tell a rate by


class Progress(NamedTuple):
    """`step` of `steps`, as far as they are known, and the steps per second since this attempt began or lately."""

    step: int = 0
    steps: int | None = None
    rate: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, without the final evaluation."""
        return (self.steps - self.step) / self.rate if self.steps and self.rate else None

    def __str__(self) -> str:
        if self.steps is None:
            return "loading"
        parts = [f"step {self.step}/{self.steps}"]
        parts += [f"{self.rate:.3g} steps/s"] if self.rate else []
        parts += [f"{duration(self.seconds_left)} left"] if self.seconds_left is not None else []
        return "  ".join(parts)


def progress(folder: Path) -> Progress:
    """How far the run of a folder is, by its status.json and the last rows of metrics.jsonl."""
    began, steps, rows = 0.0, None, list[Row]()
    with suppress(OSError, ValueError, AttributeError):
        status = json.loads((folder / "status.json").read_text())
        began, steps = status.get("time", 0.0), status.get("steps")
    with suppress(OSError), (folder / METRICS).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        for line in file.read().decode(errors="replace").splitlines():
            with suppress(ValueError):  # cut at the beginning, or being written
                rows.append(Row.of(line))
    if not rows:
        return Progress(0, steps)
    lately = [row for row in rows if row.time >= began]  # not what an earlier attempt logged
    rate = None
    if len(lately) > 1 and lately[-1].time > lately[0].time:
        rate = (lately[-1].step - lately[0].step) / (lately[-1].time - lately[0].time) or None
    return Progress(rows[-1].step, steps, rate)


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``50 s``, ``12 min``, ``3 h 20 min``, ``2 d 3 h``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


class Display:
    """A live line for each running job and one for all, on a terminal; elsewhere one line with both now and then.

    Args:
        jobs: How many there are to run.
        steps: How many these have together.
        seconds_between_lines: Where there is no terminal.
    """

    def __init__(self, jobs: int, steps: int, seconds_between_lines: float = 15.0):
        self.jobs, self.steps, self.seconds_between_lines = jobs, steps, seconds_between_lines
        self.ended = self.steps_ended = 0
        self._began = self._last = time.monotonic()
        terminal = Console(stderr=True)
        # Without a thread that redraws: processes are forked meanwhile.
        self._live = Live(console=terminal, auto_refresh=False, transient=True) if sys.stderr.isatty() else None
        if self._live is not None:
            self._live.start()

    def say(self, text: str) -> None:
        """A line, above the live ones."""
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self, steps: int) -> None:
        """A job of so many steps has ended."""
        self.ended, self.steps_ended = self.ended + 1, self.steps_ended + steps

    def show(self, running: Mapping[str, Path]) -> None:
        """Draws how far the running jobs are: their folders by label."""
        now = time.monotonic()
        if self._live is None and now - self._last < self.seconds_between_lines:
            return
        self._last = now
        each = {label: progress(folder) for label, folder in running.items()}
        done = self.steps_ended + sum(part.step for part in each.values())
        left = (self.steps - done) * (now - self._began) / done if done else None
        total = f"{self.ended} of {self.jobs} jobs, {done:,} of {self.steps:,} steps"
        total += f", {duration(max(0.0, left))} left" if left is not None else ""
        if self._live is None:
            self.say("; ".join([total, *(f"{label}  {part}" for label, part in each.items())]))
            return
        grid = Table.grid(padding=(0, 2))
        for label, part in each.items():
            grid.add_row(label, ProgressBar(part.steps or 1, part.step, width=24), str(part))
        self._live.update(Group(grid, Text(total)), refresh=True)

    def close(self) -> None:
        """Takes the live lines away."""
        if self._live is not None:
            self._live.stop()
