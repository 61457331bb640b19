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

PRODUCTS, ATTENTION, REST, COUNT = "matrix products", "attention", "the rest", "products"
MATRIX = {f"aten::{name}{end}" for name in ("mm", "addmm", "bmm", "baddbmm") for end in ("", "_")}


def profiled(workload: Workload, names: Sequence[str], steps: int) -> dict[str, dict[str, float]]:
    """Seconds of a step of these variants by group, and COUNT, each a mean of so many steps; three come before."""
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
        found[name] = dict.fromkeys((PRODUCTS, ATTENTION, REST, COUNT), 0.0)
        for event in seen.key_averages():
            group = _group(event.key)
            found[name][group] += event.self_cpu_time_total / 1e6 / steps
            if group == PRODUCTS:
                found[name][COUNT] += event.count / steps
    return found


def _group(operation: str) -> str:
    if operation in MATRIX:
        return PRODUCTS
    return ATTENTION if "scaled_dot_product" in operation else REST


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A variant a row, as Markdown: ms of a step and its shares, and the gain if nothing but products were left."""
    rows = []
    for name, seconds in found.items():
        total = sum(seconds[group] for group in (PRODUCTS, ATTENTION, REST))
        shares = [f"{100 * seconds[group] / total:.1f} %" for group in (PRODUCTS, ATTENTION, REST)]
        gain = total / (seconds[PRODUCTS] + seconds[ATTENTION])
        rows.append([name, f"{1e3 * total:.0f}", f"{seconds[COUNT]:.0f}", *shares, f"{gain:.2f}"])
    return markdown(["step", "ms", COUNT, PRODUCTS, ATTENTION, REST, "gain without the rest"], rows)
