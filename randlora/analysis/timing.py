"""Seconds of calls that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def seconds_of(call: Callable[[], object], times: int = 1) -> float:
    """The seconds that a call takes, the mean of so many `times`."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def device_seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of CPU time that a call takes; of the device's with CUDA."""
    if device.type != "cuda":
        began = time.process_time()
        call()
        return time.process_time() - began

    def finished() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return seconds_of(finished)


def interleaved(calls: Mapping[str, Callable[[], float]], rounds: int, warm_up: int) -> dict[str, list[float]]:
    """What each call returns in each round, such as its seconds, after `warm_up` rounds that do not count.

    All of them have their turn in every round: what disturbs the machine then disturbs all of them alike.
    """
    results = [{name: call() for name, call in calls.items()} for _ in range(warm_up + rounds)]
    return {name: [result[name] for result in results[warm_up:]] for name in calls}
