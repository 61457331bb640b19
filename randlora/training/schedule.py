"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def rate_factor(step: int, steps: int, schedule: str, warmup: float, final: float) -> float:
    """What the learning rates are multiplied by at `step` (from 0) of `steps`.

    `warmup` is a part of the steps below 1 and a number of steps from 1 on; the rate rises linearly over it. Then
    cosine or linear decay to `final` times the rate at the end.
    """
    rising = round(warmup * steps) if warmup < 1 else int(warmup)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, steps - rising)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return final + (1 - final) * left
