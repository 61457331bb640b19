"""Where the time of a step goes, by torch's profiler: matrix products, attention, and all the rest.

The rest is what compiling a step can shorten: passes over memory, and Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from randlora.analysis.layer_speed import VARIANTS, Trial
from randlora.analysis.workloads import Workload
from randlora.studies.tables import markdown
from randlora.training.compilation import CompiledBlocks

PRODUCTS, ATTENTION, REST = "matrix products", "attention", "the rest"
MATRIX = {f"aten::{name}{end}" for name in ("mm", "addmm", "bmm", "baddbmm") for end in ("", "_")}


def profiled(workload: Workload, names: Sequence[str], steps: int) -> dict[str, dict[str, float]]:
    """Seconds of CPU time of a step of the variants of these names by group, the mean of so many; three come before."""
    found = {}
    for name in names:
        trial = Trial(workload, VARIANTS[name], torch.device("cpu"))
        compiled = CompiledBlocks(nn.Sequential(trial.model)) if VARIANTS[name].compiled else nullcontext()
        with compiled:
            for _ in range(3):
                trial.step()
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                for _ in range(steps):
                    trial.step()
        found[name] = dict.fromkeys((PRODUCTS, ATTENTION, REST), 0.0)
        for event in seen.key_averages():
            found[name][_group(event.key)] += event.self_cpu_time_total / 1e6 / steps
    return found


def _group(operation: str) -> str:
    if operation in MATRIX:
        return PRODUCTS
    return ATTENTION if "scaled_dot_product" in operation else REST


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A variant a row, as Markdown: ms of a step and its shares, and the gain if nothing but products were left."""
    rows = []
    for name, seconds in found.items():
        total = sum(seconds.values())
        shares = [f"{100 * seconds[group] / total:.1f} %" for group in (PRODUCTS, ATTENTION, REST)]
        rows.append([name, f"{1e3 * total:.0f}", *shares, f"{total / (seconds[PRODUCTS] + seconds[ATTENTION]):.2f}"])
    return markdown(["step", "ms", PRODUCTS, ATTENTION, REST, "gain without the rest"], rows)
