"""What mirrors of a record are told, such as dashboards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from randlora.records.metrics import Row
from randlora.records.result import Result


@dataclass(frozen=True)
class Membership:
    """The place of a run in a sweep, which the environment of its process carries, for dashboards alone.

    Args:
        sweep: The sweep's id; None for a run on its own.
        label: The overrides by which the run differs from the others.
    """

    sweep: str | None = None
    label: str = ""

    @classmethod
    def of_this_process(cls) -> Self:
        return cls(os.environ.get("RANDLORA_SWEEP"), os.environ.get("RANDLORA_LABEL", ""))

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables that carry it."""
        return {"RANDLORA_SWEEP": self.sweep or "", "RANDLORA_LABEL": self.label}

    def declare(self) -> None:
        """Makes it that of this process and of those which it starts."""
        os.environ |= self.environment


@runtime_checkable
class Logger(Protocol):
    """A mirror of the record, such as a dashboard; nothing is read back from it."""

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        """The run ``task/model/method/signature`` begins, with these settings and this folder."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """What is known after `step` steps."""

    def finish(self, result: Result) -> None:
        """The run has ended, whether or not `start` was reached."""


@runtime_checkable
class ResumableLogger(Logger, Protocol):
    """A mirror that keeps what an earlier attempt of the run has logged."""

    def resume(self, rows: Sequence[Row]) -> None:
        """Training goes on from a checkpoint; until there these rows have been logged, each step once."""
