"""The compact evidence of a study from its run folders: results.jsonl and curves.jsonl.gz.

python scripts/collect.py runs --into experiments/STUDY
python scripts/collect.py other_runs --into experiments/STUDY --collection scan

Tables and figures come out of the study as they do out of the run folders, which are not needed after it. Given again,
nothing changes; a result that differs from the one collected is refused, unless --replace is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from randlora.errors import exit_code
from randlora.studies.collect import RESULTS, collect


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a run's folder, or a folder of runs")
    parser.add_argument("--into", type=Path, required=True, metavar="STUDY", help="such as experiments/image_protocol")
    parser.add_argument("--collection", default="records", help="the part of the study that these runs are")
    parser.add_argument("--replace", action="store_true", help="take these where the study has other results")
    options = parser.parse_args(arguments)
    added = collect(options.runs, options.into, options.collection, options.replace)
    print(f"{added} results added to {options.into / RESULTS}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
