"""A figure of results: the score against the number of trained parameters.

python scripts/figure.py experiments/image_protocol --only collection=records --out accuracy.svg

One panel per task, model and budget, four in a row; a point per method, its mean over seeds and sample deviation; the
dashed line is the score before training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from randlora.errors import exit_code
from randlora.records import read
from randlora.studies.figures import draw
from randlora.studies.groups import select


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--only", metavar="KEY=VALUE", nargs="+", default=[], help="runs that have one of the values")
    parser.add_argument("--out", type=Path, required=True, help="such as figure.svg or figure.png")
    options = parser.parse_args(arguments)
    draw(select(read(options.root), options.only), options.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))
