"""Step time and memory of the methods beside their peers, in one process; see randlora.analysis.layer_speed.

python scripts/benchmark.py                                all workloads, every method, PEFT's beside ours
python scripts/benchmark.py vit_b16 --json figures.json    one workload, and a file of its figures
python scripts/benchmark.py linear_768x768_t64 --only frozen,lora,randlora
python scripts/benchmark.py --plans --json plans.json      RandLoRA's eight execution plans of all their layers
python scripts/benchmark.py vit_b16 --profile --json profile.json --only lora,randlora    where a step's time goes
python scripts/benchmark.py --show figures.json            the tables of such a file, in Markdown
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from randlora.analysis import plan_choice, step_profile
from randlora.analysis.layer_speed import VARIANTS, measure, table
from randlora.analysis.workloads import WORKLOADS, Workload
from randlora.bounds import count


def plans(
    workloads: Mapping[str, Workload], rounds: int, device: torch.device, about: Mapping[str, Any], file: Path | None
) -> None:
    """Measures all plans of these workloads' layers; a file is written after each layer, and gone on with."""
    rows = json.loads(file.read_text())["plans"] if file is not None and file.exists() else []
    found, done = [], plan_choice.from_json(rows)
    for choice in plan_choice.choices(workloads, rounds, device, done):
        found.append(choice)
        if file is not None and choice not in done:
            report = dict(about) | {"rounds": rounds, "plans": plan_choice.as_json(found)}
            file.write_text(json.dumps(report, indent=1) + "\n")
    print(plan_choice.table(found))


def tables(report: Mapping[str, Any]) -> str:
    """What a file of --json shows."""
    if "plans" in report:
        return plan_choice.table(plan_choice.from_json(report["plans"]))
    if "profiles" in report:
        return "\n\n".join(f"{name}\n\n{step_profile.table(found)}" for name, found in report["profiles"].items())
    return "\n\n".join(f"{name}\n\n{table(figures)}" for name, figures in report["workloads"].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)}; all if none")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, with commas; of %(default)s")
    parser.add_argument("--plans", action="store_true", help="time the execution plans, not the variants")
    parser.add_argument("--profile", action="store_true", help="torch's profiler over so many rounds, on the CPU")
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures; workloads that it has already are kept")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, print the tables of such a file")
    options = parser.parse_args()
    if options.show is not None:
        try:
            print(tables(json.loads(options.show.read_text())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--show {options.show}: no figures of --json ({type(error).__name__}: {error})")
        return
    names = options.only.split(",")
    for given, allowed in ((options.workloads, WORKLOADS), (names, VARIANTS)):
        for name in given:
            if name not in allowed:
                parser.error(f"{name!r} is not one of {', '.join(allowed)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": options.threads,
        "versions": {"torch": torch.__version__, "peft": version("peft") if find_spec("peft") else None},
    }
    chosen = options.workloads or list(WORKLOADS)
    if options.plans:
        plans({name: WORKLOADS[name] for name in chosen}, options.rounds, device, report, options.json)
        return
    if options.profile:
        found = {name: step_profile.profiled(WORKLOADS[name], names, options.rounds) for name in chosen}
        report |= {"rounds": options.rounds, "profiles": found}
        print(tables(report))
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
        return
    report |= {"rounds": {}, "workloads": {}}
    if options.json is not None and options.json.exists():
        before = json.loads(options.json.read_text())
        report |= {key: before[key] for key in ("rounds", "workloads")}
    for name in chosen:
        figures = measure(WORKLOADS[name], names, options.rounds, device)
        report["rounds"][name], report["workloads"][name] = options.rounds, figures
        print(f"\n{name}\n\n{table(figures)}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
