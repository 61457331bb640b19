"""Weights & Biases as a mirror of the record."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from randlora.bounds import Bounded
from randlora.errors import SettingsError
from randlora.records.logger import Membership
from randlora.records.metrics import Row
from randlora.records.result import Result

NAMED = ("method", "model", "task", "seed")  # what every name has


@dataclass
class Wandb(Bounded):
    """Each run is a W&B run, grouped by sweep, or else by task and model; an interrupted one is preempted, not failed.

    Args:
        project: Where it appears.
        mode: online, offline or disabled; offline needs no account, and `wandb sync` uploads it later.
        entity: The account or team; None for the default.
        artifact: Whether the adapter of a finished run is uploaded, too.
    """

    section: ClassVar[str] = "logger.wandb"

    project: str = "randlora"
    mode: Literal["online", "offline", "disabled"] = "online"
    entity: str | None = None
    artifact: bool = False
    _run: Any = field(default=None, init=False, repr=False)
    _folder: Path = field(default=Path(), init=False, repr=False)

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        import wandb
        from wandb.errors import Error

        task, model, method, signature = name.split("/")
        member = Membership.of_this_process()
        swept = [part for part in member.label.split() if part.partition("=")[0] not in NAMED]
        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,
                name=" ".join([method, model, task, f"seed={config['seed']}", *swept]),
                group=f"sweep {member.sweep}" if member.sweep else f"{task}/{model}",
                job_type="fine-tuning",
                id=signature,
                resume="allow",
                config=dict(config) | {"signature": signature},
                dir=str(folder),
                tags=list(config["tags"]),
                reinit="finish_previous",
                settings=wandb.Settings(quiet=True),
            )
        except Error as error:
            raise SettingsError(
                f"W&B: {str(error).splitlines()[0]}; logger.wandb.mode=offline needs no account"
            ) from error

        self._folder = folder
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
        if result.status in (
            "interrupted",
            "paused",
        ):  # W&B calls preempted what says so and then ends with another code than 0
            self._run.mark_preempting()
        if result.status == "finished" and self.artifact:
            import wandb

            adapter = wandb.Artifact(f"adapter-{result.signature}", type="adapter", metadata=dict(result.metrics))
            adapter.add_dir(str(self._folder / "adapter"))
            self._run.log_artifact(adapter)
        self._run.finish(exit_code=0 if result.status == "finished" else 1)
