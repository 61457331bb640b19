"""The memory of a training step: the dry run's plan beside what the process takes (randlora.analysis.step_memory).

python scripts/memory.py [--json FILE] model=smollm2_135m task=arc_easy data_root=FOLDER [KEY=VALUE …]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from randlora.analysis.step_memory import peak_bytes
from randlora.config import settings
from randlora.errors import exit_code
from randlora.experiment import Experiment
from randlora.plan import memory_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures are added, as a list")
    options, overrides = parser.parse_known_args()
    experiment = Experiment.from_config(settings(*overrides))
    plan = memory_plan(experiment)  # first, since it loads every library that a step needs
    peak, device = peak_bytes(experiment), experiment.trainer.accelerator().device.type
    for name, size in [*(plan or {}).items(), (f"peak, {device}", peak)]:
        print(f"{name:12} {size / 2**20:9,.0f} MiB")
    if options.json:
        before = json.loads(options.json.read_text()) if options.json.is_file() else []
        figures = {"overrides": overrides, "device": device, "plan": plan, "peak": peak}
        options.json.write_text(json.dumps([*before, figures], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
