"""The owner of a run's folder: one process at a time, on whichever machine that sees the folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

OWNER, MUTEX = "owner.json", ".owner.lock"
OWNER_FILES = ("owner.json", ".owner")  # what the names of all files of this module begin with
BEAT_SECONDS, STALE_SECONDS = 30.0, 150.0


class Busy(RuntimeError):
    """Another process is running this run."""


@dataclass(frozen=True)
class Owner:
    """A process.

    Args:
        host: The name of its machine, for a person.
        pid: Its id there.
        started: When it started, as its machine counts: no later process with the same id has it.
        machine: What only processes share that see each other's ids.
    """

    host: str
    pid: int
    started: str
    machine: str

    @classmethod
    def present(cls) -> Owner:
        """This process."""
        return cls(platform.node(), os.getpid(), started(os.getpid()), _machine())

    def alive(self, beat_age: float) -> bool:
        """Whether it still runs: looked up on its own machine, elsewhere told by the seconds since its last beat."""
        if self.machine == _machine():
            return self.started != "" and started(self.pid) == self.started
        return beat_age < STALE_SECONDS


class Lock:
    """``owner.json`` in a run's folder, from `acquire` to `release`; a thread renews its time every BEAT_SECONDS.

    A process that is killed leaves the file. On its own machine that is noticed at once, on another one that sees the
    folder STALE_SECONDS after its last beat. Then another process may take the folder over from one that only slept.
    """

    def __init__(self, folder: Path):
        self.path = folder / OWNER
        self._owner: Owner | None = None
        self._ended = threading.Event()
        self._ended.set()

    def acquire(self) -> None:
        """Makes this process the owner. Raises Busy where another one is, and OSError where nothing can be written."""
        draft = self.path.with_name(f".{OWNER}.{uuid.uuid4().hex}")
        self._owner = None
        draft.write_text(json.dumps(asdict(Owner.present())))
        try:
            with _alone(self.path.with_name(MUTEX)):
                # By the clock of the file system, which other machines go by, too.
                if owner := living(self.path.parent, now=draft.stat().st_mtime):
                    raise Busy(
                        f"another process (pid {owner.pid} on {owner.host}) is running this run: {self.path.parent}"
                    )
                self.path.unlink(missing_ok=True)
                _appear(draft, self.path)  # which fails where there is one, also if the mutex does nothing here
        except FileExistsError as error:
            raise Busy(f"another process has just begun to run this run: {self.path.parent}") from error
        finally:
            draft.unlink(missing_ok=True)
        self._owner = Owner.present()
        self._ended.clear()
        threading.Thread(target=self._beat, daemon=True).start()

    def successor(self) -> Owner | None:
        """The process that has the folder after this one, if any; None before `acquire`."""
        owner = self._owner
        if owner is not None:
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                owner = _read(self.path)
        return None if owner == self._owner else owner

    def release(self) -> None:
        """Gives the folder back; nothing where this process does not own it."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(OSError):
            if self._owner == Owner.present() == living(self.path.parent):
                self.path.unlink()

    def _beat(self) -> None:
        while not (self._ended.wait(BEAT_SECONDS) or self.successor()):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def living(folder: Path, now: float | None = None) -> Owner | None:
    """The process that runs the run of this folder, or None; `now` in seconds as the file system's clock has it."""
    path = folder / OWNER
    try:
        beat_age = (time.time() if now is None else now) - path.stat().st_mtime
        owner = _read(path)
    except FileNotFoundError:
        return None
    return owner if owner.alive(beat_age) else None


def _read(path: Path) -> Owner:
    try:
        return Owner(**json.loads(path.read_text()))
    except (ValueError, TypeError):  # damaged
        return Owner("an unknown host", 0, "", "")


def started(pid: int) -> str:
    """When a process of this machine started, in a text; empty where there is none, or it has ended."""
    try:
        if not Path("/proc/self/stat").exists():
            process = psutil.Process(pid)
            return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, psutil.Error):
        return ""
    return "" if state in "ZX" else fields[18]  # ticks since the machine started: changing the clock does not move it


@cache
def _machine() -> str:
    """Of Linux the start of the system and the space of process ids: containers share a host's name, but no ids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return platform.node()


def _appear(draft: Path, path: Path) -> None:
    """Gives a file its name, whole and only if no file has it: else FileExistsError."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("x") as file:
            file.write(draft.read_text())


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process is inside, where the file system has such locks; the kernel frees those of the killed."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
