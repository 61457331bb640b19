"""The setting of each method that trains a given number of parameters, on a model and its targets; see randlora.budget.

python scripts/budget.py 55296 model=minilm task=mrpc targets=attention_with_output
python scripts/budget.py 55296 --only lora,vera,gelora model=minilm task=mrpc targets=attention_with_output

Where no value comes within 2 %, the nearest is printed with a remark. Nothing is loaded.
"""

from __future__ import annotations

import argparse
import sys

from randlora.budget import matched
from randlora.config import CONFIGS, settings
from randlora.errors import SettingsError, exit_code
from randlora.experiment import Experiment
from randlora.overrides import options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=int, help="how many parameters are to be trained, a head not counted")
    parser.add_argument("--only", help="methods, with commas; all if not given")
    arguments, overrides = parser.parse_known_args()
    methods = arguments.only.split(",") if arguments.only else options("method", [CONFIGS])
    model = Experiment.from_config(settings(*overrides, "dry_run=true")).model.meta_model().module
    for name in methods:
        experiment = Experiment.from_config(settings(*overrides, f"method={name}", "dry_run=true"))
        try:
            match = matched(model, experiment.method, experiment.patterns, arguments.target)
        except SettingsError as error:
            print(f"{f'method={name}':45} {error}")
            continue
        remark = "" if match.within else "  the nearest: none comes within 2 %"
        print(f"{f'method={name} {match.override}':45} {match.parameters:12,} {match.error:+7.1%}{remark}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
