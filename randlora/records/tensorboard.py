"""TensorBoard as a mirror of the record."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from randlora.bounds import Bounded, FolderName
from randlora.errors import SettingsError
from randlora.records.metrics import Row
from randlora.records.result import Result


@dataclass
class TensorBoard(Bounded):
    """Event files in the run's folder, for ``tensorboard --logdir RUN_ROOT``; SettingsError without the package.

    Args:
        folder: Where they lie inside the run's folder.
    """

    section: ClassVar[str] = "logger.tensorboard"

    folder: FolderName = "tensorboard"
    _writer: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("tensorboard") is None:
            raise SettingsError("logger=tensorboard: the package is not installed: pip install tensorboard")

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / self.folder, ignore_errors=True)  # `resume` writes again what counts of it
        self._writer = SummaryWriter(str(folder / self.folder))

    def resume(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.log(row.metrics, row.step, row.time)

    def log(self, metrics: Mapping[str, float], step: int, time: float | None = None) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step, time)

    def finish(self, result: Result) -> None:
        if self._writer is not None:
            self._writer.add_text("result", f"{result.status}: {result.headline.name} {result.headline.value}")
            self._writer.close()
