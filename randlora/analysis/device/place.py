"""What checks of a device share: where they are done, the methods, errors, and processes of their own."""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.analysis.device.report import Figures, NotHere
from randlora.methods import (
    DoRA,
    EDoRA,
    FlatLoRA,
    FullFineTuning,
    IncreLoRA,
    LoRA,
    LoRAMini,
    LoRTA,
    MELoRA,
    Method,
    MoRA,
    NoLA,
    RandLoRA,
    RandLoRAa,
    SoRA,
    VeRA,
)


class Place(NamedTuple):
    """Where checks are done.

    Args:
        device: That they are about.
        tiny: Whether to do with two methods, and without what takes more than a second or two.
    """

    device: torch.device
    tiny: bool = False

    @property
    def methods(self) -> Mapping[str, Method]:
        return {name: METHODS[name] for name in ("lora", "randlora")} if self.tiny else METHODS

    def needs_cuda(self) -> None:
        """Raises NotHere on a CPU."""
        if self.device.type != "cuda":
            raise NotHere("needs a CUDA device")

    def needs_time(self) -> None:
        """Raises NotHere at tiny size."""
        if self.tiny:
            raise NotHere("left out at tiny size")


Check = Callable[[Place], Figures]
METHODS: Mapping[str, Method] = {
    "lora": LoRA(rank=4),
    "dora": DoRA(rank=4),
    "vera": VeRA(rank=16),
    "nola": NoLA(num_bases=32, rank=2),
    "randlora": RandLoRA(rank=6),
    "randlora_kronecker": RandLoRA(rank=6, basis="kronecker"),
    "randlora_ternary": RandLoRA(rank=6, basis="ternary"),
    "randlora_a": RandLoRAa(rank=6),
    "full": FullFineTuning(train="targets"),
    "edora": EDoRA(rank=4),
    "mora": MoRA(rank=4),
    "melora": MELoRA(rank=2, parts=4),
    "loramini": LoRAMini(rank=3, inner_in=8, inner_out=6),
    "lorta": LoRTA(rank=4),
    "flatlora": FlatLoRA(rank=4),
    "sora": SoRA(rank=4),
    "increlora": IncreLoRA(rank=4, start=3),
}


def error(found: Tensor | None, expected: Tensor | None) -> float:
    """‖found − expected‖ / ‖expected‖; of a zero, the norm of what was found; infinite where one of two is missing."""
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    expected = expected.detach().cpu().double()
    return float((found.detach().cpu().double() - expected).norm() / (expected.norm() or 1.0))


def largest(errors: Sequence[float]) -> float:
    """Of errors; no number where one of them is none, which max() may pass over."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def in_processes(
    work: Callable[..., None], arguments: Sequence[tuple[Any, ...]], environments: Sequence[Mapping[str, str]] = ()
) -> list[int | None]:
    """Does `work` in new processes at once, with more in their environment; returns their exit codes."""
    started = []
    for given, more in zip(arguments, environments or [{}] * len(arguments), strict=True):
        process = multiprocessing.get_context("spawn").Process(target=work, args=given)
        with environment(more):
            process.start()
        started.append(process)
    for process in started:
        process.join(300)
        process.kill()  # does nothing where it has ended
        process.join()
    return [process.exitcode for process in started]


@contextmanager
def environment(more: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def own_compiler_cache() -> Iterator[None]:
    """What is compiled inside is compiled here and now, and not found half-written by another process."""
    with tempfile.TemporaryDirectory() as folder, environment({"TORCHINDUCTOR_CACHE_DIR": folder}):
        yield
