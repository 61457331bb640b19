"""What a person sees: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Console:
    """Messages and progress on stderr; stdout stays free for results."""

    def __init__(self, seconds_between_lines: float = 15.0):
        self.seconds_between_lines = seconds_between_lines
        self.interactive = sys.stderr.isatty()
        self._bar: Any = None
        self._last = 0.0

    def say(self, text: str) -> None:
        """A line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def progress(self, step: int, steps: int, text: str) -> None:
        """`step` of `steps` are done: moves the bar, or prints a line when the last is old enough."""
        if self.interactive:
            self._show_bar(step, steps, text)
        elif time.monotonic() - self._last >= self.seconds_between_lines:
            self._last = time.monotonic()
            print(f"step {step}/{steps}  {text}", file=sys.stderr, flush=True)

    def _show_bar(self, step: int, steps: int, text: str) -> None:
        if self._bar is None:
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Terminal(stderr=True), transient=True)
            self._bar.add_task(text, total=steps)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step, description=text)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
