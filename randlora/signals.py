"""Signals as a request to stop, which a run looks for where it can stop, instead of an end in the middle of a step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from randlora.errors import INTERRUPTED

if TYPE_CHECKING:
    from accelerate import Accelerator

# From a terminal; from a scheduler that ends a job; SLURM's --signal=USR1@120, and what other schedulers warn by.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # left to whoever hears them already, as submitit does
_ECHO_SECONDS = 0.1  # `timeout` sends its signal to the process and to its group: two of them are one


class Interrupted(RuntimeError):
    """The run was asked to stop."""


class StopRequest:
    """Inside this context SIGNALS are requests to stop; the handlers of before come back at the end of the outermost.

    A second SIGINT does not wait: it does `at_once` and ends the process with INTERRUPTED. Only a program's main thread
    hears signals; on another thread the context does nothing. A child forked inside it ignores requests, but SIGTERM,
    unless it adopts them.

    Attributes:
        came: Whether a signal has come, or another process of the run has told of one.
        reason: The first one's name.
        at_once: What is still done before the process ends at a second SIGINT.
    """

    came: bool
    reason: str
    at_once: Callable[[], None]

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._depth, self._process = 0, os.getpid()
        self._forget()

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            mine = [number for number in SIGNALS if number not in _WARNINGS or not callable(signal.getsignal(number))]
            self._before = {number: signal.signal(number, self._note) for number in mine}
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}
            self._forget()

    def adopt(self) -> None:
        """In a child forked inside the context: requests come to it from here on, with those that came before."""
        self._process, self.at_once = os.getpid(), lambda: None

    def check(self, accelerator: Accelerator | None = None) -> None:
        """Raises Interrupted once a signal has come; with an accelerator on every process, to whichever it came."""
        if accelerator is not None and accelerator.num_processes > 1:
            import torch

            total: Any = accelerator.reduce(torch.tensor(float(self.came), device=accelerator.device), "sum")
            self.came = bool(total > 0)
        if self.came:
            raise Interrupted(f"stopped by {self.reason}")

    def _forget(self) -> None:
        self.came, self.reason = False, "a signal to another process"
        self.at_once = lambda: None
        self._first_interrupt: float | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if number == signal.SIGINT and self._first_interrupt is not None:
            if time.monotonic() - self._first_interrupt > _ECHO_SECONDS:
                self._end()
            return
        if number == signal.SIGINT:
            self._first_interrupt = time.monotonic()
        if not self.came:
            self.came, self.reason = True, signal.Signals(number).name
            more = "; a second one ends it at once" if number == signal.SIGINT else ""
            os.write(2, f"{self.reason}: stopping as soon as the run can be gone on with{more}\n".encode())

    def _end(self) -> None:
        try:
            self.at_once()
        finally:
            for child in multiprocessing.active_children():
                child.kill()
            sys.stderr.flush()
            os._exit(INTERRUPTED)


STOP = StopRequest()  # the process's own: signals come to a process, not to one of its objects


def leave_signals_to_parent(worker: int) -> None:
    """For the beginning of a worker process: a terminal and a scheduler signal the whole group, the parent decides.

    Only the parent's own SIGTERM ends the worker, where the system says whose it is.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
