"""Seconds of calls that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def timed(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of CPU time that a call takes; of the device's with CUDA."""
    if device.type != "cuda":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def interleaved(device: torch.device, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each call, all of them once in every round, after two rounds that do not count.

    What disturbs the machine then disturbs all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            taken = timed(device, call)
            if number >= 2:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}
