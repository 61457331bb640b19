"""The record of one run: a folder named by what was run, written so that a killed run leaves no half file."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from randlora.errors import SettingsError
from randlora.integrity import MANIFEST, Damaged, remove_drafts, verify, verify_file, write
from randlora.records import predictions
from randlora.records.console import Console
from randlora.records.lock import OWNER_FILES, STALE_SECONDS, Lock, living
from randlora.records.logger import Logger, ResumableLogger
from randlora.records.metrics import NAME as METRICS
from randlora.records.metrics import Row
from randlora.records.result import Result
from randlora.signals import Interrupted

# What a finished run has left and is checked before it is believed; its adapter has a manifest of its own.
SEALED = (METRICS, predictions.NAME, f"adapter/{MANIFEST}")


class Record:
    """``root/task/model/method/signature``: config.yaml, status.json, metrics.jsonl, train.log, result.json.

    Beside them is predictions.json.gz, if that is wished for: see `randlora.records.predictions`. One process owns the
    folder from `open` to `close`: see `randlora.records.lock`. Where another process has taken it over, nothing more is
    written, and what a training logs or asks for a checkpoint raises Interrupted.

    `writes` is False on every process but the first, and then nothing is written or mirrored, and printed only what
    is to be heard of every process.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], loggers: Iterable[Logger], console: Console, writes: bool = True
    ):
        self.folder, self.config, self.console, self.writes = folder, config, console, writes
        self.loggers = list(loggers) if writes else []
        self._lock = Lock(folder)
        self._log: list[str] = []
        self._steps: int | None = None  # of the whole training, once it is known

    @property
    def checkpoints(self) -> Path:
        """Where the trainer keeps its own."""
        return self.folder / "checkpoints"

    def finished(self) -> Result | None:
        """The result of the run, if nothing is to do and what it left is as it was written.

        That is one that has finished, or that has paused at `trainer.stop_at` or beyond.
        """
        stop_at = self.config.get("trainer", {}).get("stop_at")
        try:
            result = Result.read(self.folder / "result.json")
            paused = result.status == "paused" and stop_at is not None and (result.steps or 0) >= stop_at
            if result.status == "finished" or paused:
                _verify(result, self.folder)
                return result
        except SettingsError:
            pass
        return None

    def open(self, config_yaml: str, resume: bool) -> Result | None:
        """Makes the folder this process's own, and readies what an earlier attempt has left in it.

        On one process of a run, for all of them.

        Args:
            config_yaml: The settings as a reader sees them.
            resume: Whether to go on from what there is, instead of removing it.

        Returns:
            The result of a run with nothing to do, see `finished`, of which nothing is touched; else None.

        Raises:
            Busy: Another process owns it; nothing has been touched.
            SettingsError: The folder cannot be written.
        """
        if resume and (done := self.finished()):
            return done
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            if resume:
                if done := self.finished():  # while this process was about to begin
                    self.close()
                    return done
                self._set_aside()
            else:
                self._clear()
            remove_drafts(self.folder)
            (self.folder / "result.json").unlink(missing_ok=True)
            write(self.folder / "config.yaml", config_yaml)
            self._status("running")
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            raise SettingsError(
                f"run_root={self.config['run_root']}: {self.folder} cannot be written ({error.strerror}); give another"
            ) from error
        return None

    def close(self) -> None:
        """Gives the folder back."""
        self._lock.release()

    def start_loggers(self) -> None:
        """Tells the mirrors that the run begins."""
        for logger in self.loggers:
            logger.start("/".join(self.folder.parts[-4:]), self.config, self.folder)

    def begin(self, log: Sequence[str]) -> None:
        """Training begins, or goes on from where these lines were logged: metrics.jsonl has them and no others."""
        self._check()
        if not self.writes:
            return
        self._log = [*log]
        write(self.folder / METRICS, "".join(log))
        for logger in self.loggers if log else []:
            if isinstance(logger, ResumableLogger):
                logger.resume([Row.of(line) for line in log])

    def logged(self) -> Sequence[str]:
        """The lines of metrics.jsonl."""
        self._check()
        return self._log

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Adds a line to metrics.jsonl."""
        self._check()
        if not self.writes:
            return
        row = Row(step, round(time.time(), 3), metrics)
        self._log.append(row.line())
        with (self.folder / METRICS).open("a") as file:
            file.write(row.line())
        for logger in self.loggers:
            logger.log(metrics, step)

    def say(self, text: str, everywhere: bool = False) -> None:
        """Prints a sentence, on every process where it matters `everywhere`, and adds it to train.log."""
        if self.writes or everywhere:
            self.console.say(text)
        if not self._mine():
            return
        # The console has it; what cannot be written and matters is told of where it is written.
        with contextlib.suppress(OSError), (self.folder / "train.log").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def progress(self, step: int, steps: int, text: str) -> None:
        """Shows how far the run is; whoever else looks finds `steps` in status.json, and the step in metrics.jsonl."""
        if self.writes:
            if steps != self._steps:
                self._steps = steps
                with contextlib.suppress(OSError):
                    self._status("running")
            self.console.progress(step, steps, text)

    def keep_predictions(self, columns: Mapping[str, list]) -> None:
        """Writes what was predicted of every test example, by column."""
        self._check()
        if self.writes:
            predictions.write_columns(self.folder, columns)

    def write(self, result: Result) -> None:
        """Writes result.json, with the checksums of what a finished run has left, and status.json."""
        if self._mine():
            rests = result.status in ("finished", "paused")
            left = [name for name in SEALED if rests and (self.folder / name).is_file()]
            result.write(self.folder / "result.json", left)
            self._status(result.status)

    def finish(self, result: Result) -> None:
        """Writes the result and tells the mirrors."""
        self.console.close()
        self.write(result)
        for logger in self.loggers:
            logger.finish(result)

    def end(self, result: Result) -> None:
        """Writes the result and gives the folder back, before the process ends at once; mirrors are not told."""
        self.write(result)
        self.close()

    def _mine(self) -> bool:
        """Whether this process may write."""
        return self.writes and not self._lock.successor()

    def _check(self) -> None:
        """Raises Interrupted where another process has taken the folder over."""
        if owner := self._lock.successor():
            raise Interrupted(
                f"this process was not heard of for {STALE_SECONDS:.0f} s, and another one (pid {owner.pid} on "
                f"{owner.host}) runs this run now"
            )

    def _clear(self) -> None:
        """Forgets an earlier attempt."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif not path.name.startswith(OWNER_FILES):
                path.unlink()

    def _set_aside(self) -> None:
        """Says why a result that is there does not count; keeps one that cannot be read as result.json.damaged."""
        path = self.folder / "result.json"
        if not path.is_file():
            return
        try:
            result = Result.read(path)
        except SettingsError as error:
            path.replace(path.with_name("result.json.damaged"))
            self.say(f"{error}; it is now result.json.damaged, and the run goes on without it")
            return
        try:
            if result.status in ("finished", "paused"):
                _verify(result, self.folder)
        except Damaged as error:
            self.say(f"the run had {result.status}, but {error}: it is done again")

    def _status(self, status: str) -> None:
        content = {"status": status, "time": round(time.time(), 3), "pid": os.getpid(), "host": platform.node()}
        content |= {} if self._steps is None else {"steps": self._steps}
        write(self.folder / "status.json", json.dumps(content) + "\n")


def state(folder: Path) -> str:
    """How the run of a folder stands: its result's status, or else ``running``, or ``dead`` where no process runs it.

    SettingsError where its result cannot be read.
    """
    if (folder / "result.json").is_file():
        return Result.read(folder / "result.json").status
    return "running" if living(folder) else "dead"


def _verify(result: Result, folder: Path) -> None:
    """Raises Damaged unless a run's folder has what it left, as it was written; of old ones less is known."""
    if result.signature != folder.name:
        raise Damaged(f"{folder / 'result.json'} is of the run {result.signature}")
    for name, digest in result.files.items():
        verify_file(folder / name, digest)
    if result.status == "paused":  # whose checkpoint is checked when it is gone on from
        return
    adapter = folder / "adapter"
    if (adapter / MANIFEST).is_file():
        verify(adapter)
    if sum(path.stat().st_size for path in adapter.glob("*")) < (result.adapter_bytes or 1):
        raise Damaged(f"{adapter} is not whole")
