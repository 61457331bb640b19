"""Training speed beside a bare loop, or a language model's beside transformers' Trainer with PEFT.

python scripts/throughput.py model=vit_s14 task=cifar10 shots=16 data_root=FOLDER [KEY=VALUE …]
python scripts/throughput.py --rounds 9 --steps 4 --json figures.json …
python scripts/throughput.py --beside peft --rounds 5 model=smollm2_135m task=commonsense_mix data_root=FOLDER …

What is timed: randlora.analysis.step_speed (examples per second) and token_speed (tokens per second).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from randlora.analysis.step_speed import examples_per_second
from randlora.bounds import count
from randlora.config import settings
from randlora.errors import exit_code
from randlora.experiment import Experiment


def beside_loop(experiment: Experiment, rounds: int, steps: int) -> dict[str, Any]:
    speeds = examples_per_second(experiment, rounds, steps)
    print("| examples per second | | of the bare loop |\n|---|---|---|")
    for name, value in speeds.examples_per_second.items():
        ratio = speeds.of_the_bare_loop.get(name)
        print(f"| {name} | {value:,.1f} | {f'{ratio:.2f}' if ratio else ''} |")
    return speeds._asdict()


def beside_peft(experiment: Experiment, rounds: int) -> dict[str, Any]:
    from randlora.analysis.token_speed import token_speeds  # PEFT is optional

    speeds = token_speeds(experiment, rounds)
    print("| | tokens per second | × Trainer + PEFT |\n|---|---|---|")
    for name in speeds.seconds:
        print(f"| {name} | {speeds.tokens_per_second(name):,.0f} | {speeds.times_peer(name):.2f} |")
    return speeds._asdict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", choices=("loop", "peft"), default="loop")
    parser.add_argument("--rounds", type=count, default=9)
    parser.add_argument("--steps", type=count, default=4, help="of a round beside the bare loop; beside PEFT it is one")
    parser.add_argument("--json", type=Path, help="where the figures are added, as a list")
    options, overrides = parser.parse_known_args()
    experiment = Experiment.from_config(settings(*overrides))
    if options.beside == "loop":
        figures = beside_loop(experiment, options.rounds, options.steps)
    else:
        figures = beside_peft(experiment, options.rounds)
    if options.json:
        before = json.loads(options.json.read_text()) if options.json.is_file() else []
        options.json.write_text(json.dumps([*before, {"overrides": overrides, **figures}], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
