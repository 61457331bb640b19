"""Faults that strike a program while it trains, and its files afterwards; `randlora.analysis.campaign` deals them out.

A program runs as a forked child, so that its libraries are imported once. It is struck from outside, by a signal at a
moment, or from inside, at one of its calls that change files: there it is killed, in the middle of a write too, or the
disk is full. Tensors are written by native code, which no call of Python shows: in the child, safetensors and torch
write the same bytes through Python's files.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import safetensors
import safetensors.torch
import torch

DAMAGES = ("flipped", "truncated", "deleted", "replaced")
HUNG = 1000  # in place of an exit code: the program was still running after its time
_CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync", "write", "utime")
_NEEDS_SPACE = ("open", "write", "mkdir", "fsync")


@dataclass(frozen=True)
class Signals:
    """Signals from outside: each after so many seconds from the one before, to the process or to its whole group."""

    after_seconds: tuple[float, ...]
    numbers: tuple[signal.Signals, ...]
    group: bool = False


@dataclass(frozen=True)
class AtCall:
    """What happens at a call that changes files, the first being 1.

    Args:
        call: Which one.
        full: Whether there is no space left, instead of the process being killed.
        lasting: Whether there is none from then on, instead of once.
        part: Of a write, how much is written before; of other calls, below a half they are not done.
    """

    call: int
    full: bool = False
    lasting: bool = False
    part: float = 0.5


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Args:
        code: Its exit code, less than 0 for a signal's.
        seconds: How long it took.
        calls: How many of its calls changed files.
        said: Its stdout and stderr.
        struck: Whether the strike came before its end.
    """

    code: int
    seconds: float
    calls: int
    said: str
    struck: bool


def attempt(
    program: Callable[[], int], folder: Path, log: Path, strike: Signals | AtCall | None = None, limit: float = 120.0
) -> Ending:
    """Runs `program` in a forked child, and strikes it.

    Args:
        program: Returns its exit code.
        folder: The calls that change files below it count.
        log: What the child says on stdout and stderr.
        strike: None for an undisturbed attempt.
        limit: The seconds after which the child is killed and the code is HUNG.
    """
    counter = mmap.mmap(-1, 8)
    log.touch()  # a child that is killed at once does not come to it
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    process = os.fork()
    if not process:
        _child(program, log, FileCalls(folder, counter, strike if isinstance(strike, AtCall) else None))
    code, struck = None, False
    if isinstance(strike, Signals):
        for seconds, number in zip(strike.after_seconds, strike.numbers, strict=True):
            code = _wait(process, seconds) if code is None else code
            if code is None:
                struck = True
                (os.killpg if strike.group and os.getpgid(process) == process else os.kill)(process, number)
    code = _wait(process, limit) if code is None else code
    if code is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        code = HUNG
    seconds = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # the workers of a killed process
    calls = int.from_bytes(counter[:8], "little")
    struck = calls >= strike.call if isinstance(strike, AtCall) else struck
    return Ending(code, seconds, calls, log.read_text(errors="replace"), struck)


def damage(path: Path, how: str, rng: Random, others: list[Path]) -> str:
    """Damages a file in one of the ways of DAMAGES; returns what was done. It is then different from before.

    Args:
        path: The file.
        how: A bit flipped, cut short, deleted, or another file's content in its place.
        rng: Draws the bit and the length.
        others: Files whose content may take its place; random bytes where all of them are equal to it.
    """
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
        return "deleted"
    if how == "truncated" and content:
        size = rng.randrange(len(content))
        path.write_bytes(content[:size])
        return f"cut to {size} of {len(content)} bytes"
    if how == "flipped" and content:
        bit = rng.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        return f"bit {bit} flipped"
    different = [other for other in others if other.read_bytes() != content]
    replacement = rng.choice(different) if different else None
    path.write_bytes(replacement.read_bytes() if replacement else rng.randbytes(max(1, len(content))))
    return f"replaced by {'/'.join(replacement.parts[-2:]) if replacement else 'random bytes'}"


class FileCalls:
    """Counts the calls of this process that change files below a folder, and strikes at one of them."""

    def __init__(self, folder: Path, counter: mmap.mmap, strike: AtCall | None):
        self.folder, self.counter, self.strike = f"{folder.resolve()}{os.sep}", counter, strike
        self.process = os.getpid()

    def install(self) -> None:
        """From here on; for a process that is thrown away, since nothing is put back."""
        self.process = os.getpid()
        for name in _CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        real_open = os.open

        def low_open(path: Any, flags: int, *args: Any, **keywords: Any) -> int:
            if flags & (os.O_CREAT | os.O_TRUNC) and self._ours(path):
                return self._call("open", lambda: real_open(path, flags, *args, **keywords))
            return real_open(path, flags, *args, **keywords)

        os.open = low_open
        builtins.open = io.open = self._opener(io.open)
        saved = torch.save

        def save(content: Any, file: Any, *args: Any, **keywords: Any) -> None:
            if not isinstance(file, str | os.PathLike):
                return saved(content, file, *args, **keywords)
            buffer = io.BytesIO()
            saved(content, buffer, *args, **keywords)
            with open(file, "wb") as stream:
                stream.write(buffer.getvalue())

        def serialize_file(tensors: Any, file: Any, metadata: Any = None) -> None:
            try:
                with open(file, "wb") as stream:
                    stream.write(safetensors.serialize(tensors, metadata=metadata))
            except OSError as error:  # as its native code has it
                message = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise safetensors.SafetensorError(message) from error

        torch.save = save  # type: ignore[assignment]
        safetensors.torch.serialize_file = serialize_file  # type: ignore[assignment]

    def _ours(self, path: Any) -> bool:
        """Whether a path, or a file's number, is below the folder."""
        if os.getpid() != self.process:  # a worker that loads data
            return False
        try:
            if isinstance(path, int):
                return os.readlink(f"/proc/self/fd/{path}").startswith(self.folder)
            return os.path.abspath(os.fsdecode(path)).startswith(self.folder)
        except (OSError, TypeError):
            return False

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **keywords: Any) -> Any:
            if not self._ours(keywords["dir_fd"] if keywords.get("dir_fd") is not None else target):
                return real(target, *args, **keywords)
            return self._call(name, lambda: real(target, *args, **keywords))

        return call

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
            newline: str | None = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if not set(mode) & set("wxa") or isinstance(file, int) or not self._ours(file):
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = self._call("open", lambda: _File(self, file, mode.replace("b", "").replace("t", "")))
            stream = io.BufferedWriter(raw) if "+" not in mode else io.BufferedRandom(raw)
            return stream if "b" in mode else io.TextIOWrapper(stream, encoding or "utf-8", errors, newline)

        return opened

    def _call(self, name: str, do: Callable[[], Any], some: Callable[[float], Any] | None = None) -> Any:
        """One call: done, or struck; `some` does a part of it."""
        number = int.from_bytes(self.counter[:8], "little") + 1
        self.counter[:8] = number.to_bytes(8, "little")
        strike = self.strike
        if strike is None or number < strike.call or (number > strike.call and not strike.lasting):
            return do()
        if not strike.full:
            if some is not None:
                some(strike.part)
            elif strike.part >= 0.5:
                do()
            os.kill(os.getpid(), signal.SIGKILL)
        if name in _NEEDS_SPACE:
            if some is not None and number == strike.call:
                some(strike.part)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return do()


class _File(io.FileIO):
    """A file whose writes count."""

    def __init__(self, calls: FileCalls, file: Any, mode: str):
        super().__init__(file, mode)
        self._calls = calls

    def write(self, data: Any) -> Any:
        """The bytes written."""
        content, write = bytes(data), super().write
        return self._calls._call(
            "write", lambda: write(content), lambda part: write(content[: int(part * len(content))])
        )


def _child(program: Callable[[], int], log: Path, calls: FileCalls) -> None:
    """The child's whole life."""
    code = 1
    try:
        os.setsid()
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(number, 1)
        os.dup2(number, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - they live as long as the process
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        for known in signal.Signals:
            if callable(signal.getsignal(known)) and known != signal.SIGINT:
                signal.signal(known, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        calls.install()
        code = program()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _wait(process: int, seconds: float) -> int | None:
    """The exit code of a child that ends within so many seconds, or None."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.003)
