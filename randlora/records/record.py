"""The record of one run: a folder named by what was run, written so that a killed run leaves no half file."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from randlora.errors import SettingsError
from randlora.integrity import write
from randlora.records import predictions
from randlora.records.console import Console
from randlora.records.result import Result, finite


@runtime_checkable
class Logger(Protocol):
    """A mirror of the record, such as a dashboard; nothing is read back from it."""

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        """The run ``task/model/method/signature`` begins, with these settings and this folder."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """What is known after `step` steps."""

    def finish(self, result: Result) -> None:
        """The run has ended, whether or not `start` was reached."""


class Record:
    """``root/task/model/method/signature``: config.yaml, status.json, metrics.jsonl, train.log, result.json.

    Beside them is predictions.json.gz, if that is wished for: see `randlora.records.predictions`.

    `writes` is False on every process but the first, and then nothing is written or mirrored, and printed only what
    is to be heard of every process.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], loggers: Iterable[Logger], console: Console, writes: bool = True
    ):
        self.folder, self.config, self.console, self.writes = folder, config, console, writes
        self.loggers = list(loggers) if writes else []

    @property
    def checkpoints(self) -> Path:
        """Where the trainer keeps its own."""
        return self.folder / "checkpoints"

    def result(self) -> Result | None:
        """The result of the run, if it has ended before; SettingsError where its file is damaged."""
        path = self.folder / "result.json"
        return Result.read(path) if path.is_file() else None

    def clear(self) -> None:
        """Forgets an earlier attempt."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)

    def open(self, config_yaml: str) -> None:
        """Makes the folder, or readies one that an attempt has left; SettingsError if it cannot be written."""
        if not self.writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "result.json").unlink(missing_ok=True)
            if not any(self.checkpoints.glob("step_*")):
                (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            write(self.folder / "config.yaml", config_yaml)
            self._status("running")
        except OSError as error:
            raise SettingsError(
                f"run_root={self.config['run_root']}: {self.folder} cannot be written ({error.strerror}); give another"
            ) from error

    def start_loggers(self) -> None:
        """Tells the mirrors that the run begins."""
        for logger in self.loggers:
            logger.start("/".join(self.folder.parts[-4:]), self.config, self.folder)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Adds a line to metrics.jsonl."""
        if not self.writes:
            return
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite(metrics)})
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
        for logger in self.loggers:
            logger.log(metrics, step)

    def say(self, text: str, everywhere: bool = False) -> None:
        """Prints a sentence, on every process where it matters `everywhere`, and adds it to train.log."""
        if self.writes or everywhere:
            self.console.say(text)
        if not self.writes:
            return
        with (self.folder / "train.log").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def progress(self, step: int, steps: int, text: str) -> None:
        """Shows how far the run is."""
        if self.writes:
            self.console.progress(step, steps, text)

    def keep_predictions(self, columns: Mapping[str, list]) -> None:
        """Writes what was predicted of every test example, by column."""
        if self.writes:
            predictions.write_columns(self.folder, columns)

    def finish(self, result: Result) -> None:
        """Writes result.json and tells the mirrors."""
        if not self.writes:
            return
        self.console.close()
        result.write(self.folder / "result.json")
        self._status(result.status)
        for logger in self.loggers:
            logger.finish(result)

    def _status(self, status: str) -> None:
        state = {"status": status, "time": round(time.time(), 3), "pid": os.getpid(), "host": platform.node()}
        write(self.folder / "status.json", json.dumps(state) + "\n")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    known = {"python": platform.python_version()}
    for name in ("randlora", "torch", "transformers", "open_clip_torch", "accelerate", "datasets", "numpy"):
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def commit() -> str | None:
    """The commit of this code, with ``+`` when the work tree has changes; None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != Path(__file__).resolve().parents[2]:
            return None  # installed inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
