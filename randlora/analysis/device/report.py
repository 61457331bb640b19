"""Checks of a device one after another within a budget of seconds, in one JSON, and the page made of such files."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from randlora.records.versions import commit, versions
from randlora.studies.tables import markdown

Figures = Mapping[str, float]
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


class Listed(dict[str, float]):
    """Figures that mean something one by one, such as times: a table shows all of them, and of others the largest."""


class NotHere(Exception):
    """A check that cannot be done here; the text is the reason."""


class Wrong(Exception):
    """Figures that are not what they should be: the first argument is the reason, the second has the figures."""


def run_checks(
    checks: Mapping[str, Callable[[], Figures]], device: torch.device, budget: float, file: Path | None = None
) -> dict[str, Any]:
    """Runs the checks in order and returns what the file has: the machine, and each check's end, reason and figures.

    Args:
        checks: By name; each returns figures, or raises `NotHere` or `Wrong`. Any other error fails it too, and the
            next is done all the same.
        device: Where they compute, for the name of the machine.
        budget: Seconds, after which no further check begins; those left are not run.
        file: Written after every check, so that what is cut off loses at most one.
    """
    began = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    report = {"machine": machine(device), "checks": results}
    for name, check in checks.items():
        started = time.monotonic()
        if started - began > budget:
            result = {"ended": NOT_RUN, "reason": f"the {budget:g} seconds are over", "figures": {}}
        else:
            result = _one(check)
        results[name] = result | {"seconds": round(time.monotonic() - started, 1)}
        if file is not None:
            file.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _one(check: Callable[[], Figures]) -> dict[str, Any]:
    try:
        figures = check()
        return {"ended": PASSED, "reason": "", "figures": dict(figures), "listed": isinstance(figures, Listed)}
    except NotHere as error:
        return {"ended": NOT_RUN, "reason": str(error), "figures": {}}
    except Wrong as error:
        return {"ended": FAILED, "reason": str(error.args[0]), "figures": dict(error.args[1])}
    except torch.OutOfMemoryError as error:
        return {"ended": NOT_RUN, "reason": f"not enough memory: {error}".splitlines()[0][:200], "figures": {}}
    except Exception as error:  # one that breaks must not take the others with it
        return {"ended": FAILED, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300], "figures": {}}


def within(figures: Figures, limit: float) -> Figures:
    """The figures, all of them at most the limit; Wrong, naming the worst, where one is larger or no number."""
    over = {name: value for name, value in figures.items() if not value <= limit}
    if over:
        worst = max(over, key=lambda name: math.inf if math.isnan(over[name]) else over[name])
        raise Wrong(f"{worst}: {over[worst]:.2g}, more than {limit:g}", figures)
    return figures


def machine(device: torch.device) -> dict[str, str | None]:
    """The device's name, the versions of packages, and the commit of this code."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {_processor()}"
    return {"type": device.type, "device": name, "cuda": torch.version.cuda if cuda else None} | {
        "commit": commit(),
        **versions(),
    }


def _processor() -> str:
    """The processor as Linux names it, elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor() or platform.machine()


def failed(report: Mapping[str, Any]) -> list[str]:
    """The names of the checks of a report that failed."""
    return [name for name, result in report["checks"].items() if result["ended"] == FAILED]


def table(report: Mapping[str, Any]) -> str:
    """The checks of a report as Markdown: how each ended, and its figures, the largest of them, or the reason."""
    rows = []
    for name, result in report["checks"].items():
        figures, said = result["figures"], result["reason"]
        if figures and result["ended"] == PASSED:
            worst = max(figures, key=lambda key: figures[key])
            shown = figures if result["listed"] else [worst]
            said = "; ".join(f"{name}: {figures[name]:.3g}" for name in shown)
        rows.append([name, result["ended"], said, f"{result['seconds']:.1f}"])
    return markdown(["check", "", "largest figure, or all, or why not", "seconds"], rows)


def sections(reports: Sequence[Mapping[str, Any]]) -> str:
    """A heading and a table for each report, as Markdown."""
    return "\n\n".join(
        f"## {report['machine']['device']}\n\ntorch {report['machine']['torch']}, "
        f"commit {str(report['machine']['commit'])[:12]}\n\n{table(report)}"
        for report in reports
    )
