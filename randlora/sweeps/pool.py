"""Processes forked from one that has imported all libraries: what ends one, in whatever way, ends no other.

No pool of a library does: `concurrent.futures` gives up all its work where a worker is killed, and pebble keeps its
workers' ids to itself, so that no signal can be passed on to one.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

from randlora.signals import SIGNALS, STOP

_AT_ONCE_SECONDS = 10.0  # that a process may take to end at once
_NOT_SHARED = "torch._inductor"  # which starts processes of its own where it is imported


def gpus() -> Sequence[str]:
    """The names of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [name.strip() for name in visible.split(",") if name.strip()]


@dataclass(frozen=True)
class _Child:
    process: ForkProcess
    imported: Connection  # tells the modules that it has imported
    slot: int


class Pool:
    """Up to so many processes at a time; each has a GPU, if there are any, and its share of the CPU's threads.

    A process hears no terminal's signals, only `signal`, and is asked to stop when this one is killed. What the first
    processes import, this one imports after them, for all that come later; not where there are GPUs, since importing
    transformers' models touches one, and of a process that has done so no child can use any.

    Args:
        workers: How many processes at a time.
    """

    def __init__(self, workers: int):
        self.workers, self._gpus, self._threads = workers, gpus(), torch.get_num_threads()
        self._context = multiprocessing.get_context("fork")
        self._children: dict[int, _Child] = {}
        self._alive = os.pipe()  # whose second end closes with this process

    @property
    def free(self) -> bool:
        """Whether another process may be started."""
        return len(self._children) < self.workers

    @property
    def running(self) -> Sequence[int]:
        """The keys of the processes that run."""
        return [*self._children]

    def start(self, key: int, act: Callable[[], int], log: Path) -> None:
        """Starts a process that ends with the exit code that `act` returns.

        Args:
            key: What it is called here.
            act: What it does.
            log: The file to which its stdout and stderr are added.
        """
        slot = min({*range(self.workers)} - {child.slot for child in self._children.values()})
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=self._live, args=(act, log, slot, sender))
        # Until the child has made them its own, signals wait for it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            process.start()
            self._children[key] = _Child(process, receiver, slot)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sender.close()

    def ended(self, seconds: float) -> list[tuple[int, int]]:
        """Waits up to so many seconds until a process ends; the keys and exit codes of those that have.

        A code is less than 0 for that of a signal.
        """
        children = [*self._children.values()]
        wait([child.process.sentinel for child in children] + [child.imported for child in children], seconds)
        codes: list[tuple[int, int]] = []
        for key, child in [*self._children.items()]:
            with suppress(EOFError, OSError):
                if child.imported.poll():
                    _import(child.imported.recv())
            code = child.process.exitcode
            if code is None:
                continue
            child.imported.close()
            del self._children[key]
            if code < 0:  # it left its own children, which read data
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid or 0, signal.SIGKILL)
            codes.append((key, code))
        return codes

    def signal(self, number: int) -> None:
        """Passes a signal on to all processes."""
        for child in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(child.process.pid or 0, number)

    def end_at_once(self) -> None:
        """Ends all processes with a second SIGINT, and kills those that it does not end."""
        self.signal(signal.SIGINT)
        for child in self._children.values():
            child.process.join(_AT_ONCE_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid or 0, signal.SIGKILL)

    def close(self) -> None:
        """Kills what still runs, and gives back what the pool holds."""
        for child in self._children.values():
            child.process.kill()
            child.process.join()
        for end in self._alive:
            os.close(end)

    def _live(self, act: Callable[[], int], log: Path, slot: int, sender: Connection) -> None:
        """The child's whole life."""
        os.setsid()
        STOP.adopt()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(self._alive[1])
        threading.Thread(target=self._stop_with_parent, daemon=True).start()
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(number, 1)
        os.dup2(number, 2)
        os.close(number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - they live as long as the process
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        gc.freeze()  # what was imported before is not looked through again
        if self._gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        if self.workers > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, self._threads // self.workers))
        inherited = {*sys.modules}
        code = act()
        if not self._gpus:
            new = (name for name in [*sys.modules] if name not in inherited)
            sender.send([name for name in new if not name.startswith(_NOT_SHARED)])
        sys.exit(code)

    def _stop_with_parent(self) -> None:
        os.read(self._alive[0], 1)
        os.kill(os.getpid(), signal.SIGTERM)


def _import(names: Sequence[str]) -> None:
    """Imports these modules, in the order in which another process began to; one that cannot be is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            if name not in sys.modules:
                with suppress(Exception):
                    importlib.import_module(name)
