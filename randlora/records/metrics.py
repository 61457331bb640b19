"""metrics.jsonl: what was logged while a run trained, a row a line, each step of the training that counts once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from randlora.records.result import finite

NAME = "metrics.jsonl"
_NOT_FINITE = ("nan", "inf", "-inf")  # as text: JSON has none of them


class Row(NamedTuple):
    """Metrics that are known after `step` steps, at a time in seconds since 1970."""

    step: int
    time: float
    metrics: Mapping[str, float]

    def line(self) -> str:
        """As the file has it."""
        return json.dumps({"step": self.step, "time": self.time, **finite(self.metrics)}) + "\n"

    @classmethod
    def of(cls, line: str) -> Row:
        """The row that `line` gave; ValueError for any other line."""
        try:
            content = json.loads(line)
            step, time = content.pop("step"), content.pop("time")
            metrics = {name: float(value) if value in _NOT_FINITE else value for name, value in content.items()}
            return cls(int(step), float(time), metrics)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{line!r} is no row of metrics") from error
