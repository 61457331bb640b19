"""Weights & Biases as a mirror of the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from randlora.errors import SettingsError, check_choice


@dataclass
class Wandb:
    """Each run of a sweep is a W&B run of its own; a run that fails ends as failed.

    `mode` offline needs no account; `wandb sync` uploads it later.
    """

    project: str = "randlora"
    mode: str = "online"
    entity: str | None = None
    _run: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_choice("logger.mode", self.mode, ("online", "offline", "disabled"))

    def start(self, name: str, config: Mapping[str, Any], folder: Path, tags: list[str]) -> None:
        import wandb
        from wandb.errors import Error

        task, model, method, signature = name.split("/")
        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,  # type: ignore[arg-type]
                name=f"{method} {model} {task}",
                group=f"{task}/{model}",
                id=signature,
                resume="allow",
                config=dict(config) | {"signature": signature},
                dir=str(folder),
                tags=tags,
                reinit="finish_previous",
            )
        except Error as error:
            raise SettingsError(f"W&B: {str(error).splitlines()[0]}; logger.mode=offline needs no account") from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, result: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        self._run.summary.update({key: result[key] for key in result if key not in ("config", "versions")})
        self._run.finish(exit_code=0 if result["status"] == "finished" else 1)
