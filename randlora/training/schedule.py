"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def warmup_steps(warmup: float, steps: int) -> int:
    """Of a training of so many steps: `warmup` is a part of them below 1 and a number of them from 1 on."""
    return round(warmup * steps) if warmup < 1 else int(warmup)


def rate_factor(step: int, steps: int, schedule: str, warmup: float, final: float) -> float:
    """What the learning rates are multiplied by at `step` (from 0) of `steps`.

    The rate rises linearly over the steps of `warmup` (see `warmup_steps`). Then cosine or linear decay to `final`
    times the rate at the end.
    """
    rising = warmup_steps(warmup, steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, steps - rising)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return final + (1 - final) * left
