"""Weights & Biases as a mirror of the record."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from randlora.bounds import Bounded
from randlora.errors import SettingsError
from randlora.records.metrics import Row
from randlora.records.result import Result


@dataclass
class Wandb(Bounded):
    """Each run of a sweep is a W&B run of its own; a run that fails ends as failed.

    Args:
        project: Where it appears.
        mode: online, offline or disabled; offline needs no account, and `wandb sync` uploads it later.
        entity: The account or team; None for the default.
    """

    section: ClassVar[str] = "logger.wandb"

    project: str = "randlora"
    mode: Literal["online", "offline", "disabled"] = "online"
    entity: str | None = None
    _run: Any = field(default=None, init=False, repr=False)

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        import wandb
        from wandb.errors import Error

        task, model, method, signature = name.split("/")
        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,
                name=f"{method} {model} {task}",
                group=f"{task}/{model}",
                id=signature,
                resume="allow",
                config=dict(config) | {"signature": signature},
                dir=str(folder),
                tags=list(config["tags"]),
                reinit="finish_previous",
            )
        except Error as error:
            raise SettingsError(
                f"W&B: {str(error).splitlines()[0]}; logger.wandb.mode=offline needs no account"
            ) from error

        if self._run.offline:  # each attempt has a folder, and syncing them all would show their steps twice
            for earlier in (folder / "wandb").glob(f"offline-run-*-{signature}"):
                if not Path(self._run.dir).is_relative_to(earlier.resolve()):
                    shutil.rmtree(earlier, ignore_errors=True)

    def resume(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.log(row.metrics, row.step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step >= self._run.starting_step:
            self._run.log(dict(metrics), step=step)
        else:  # W&B has this step of an earlier attempt, and takes no step again
            known = set(self._run.summary.keys())
            self._run.summary.update({name: value for name, value in metrics.items() if name not in known})

    def finish(self, result: Result) -> None:
        if self._run is None:
            return
        summary = result.to_json()
        self._run.summary.update({key: summary[key] for key in summary if key not in ("config", "versions")})
        self._run.finish(exit_code=0 if result.status == "finished" else 1)
