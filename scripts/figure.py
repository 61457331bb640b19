"""A figure of results: the score against the number of trained parameters or the learning rate; or of an analysis.

python scripts/figure.py experiments/image_protocol --only collection=records --out accuracy.svg
python scripts/figure.py experiments/halving --rates --out rates.svg
python scripts/figure.py experiments/analyses/cka.jsonl --out cka.svg

One panel per task, model and budget, four in a row; a point per method, its mean over seeds and sample deviation; the
dashed line is the score before training. With --rates a panel per method of a cell that has several learning rates: the
validation score against the rate, faint before a run's end, and a ring round the chosen point.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from randlora.errors import SettingsError, exit_code
from randlora.records import read
from randlora.studies.analyses import read_rows
from randlora.studies.arms import arms, load
from randlora.studies.collect import RESULTS
from randlora.studies.figures import draw, draw_rates
from randlora.studies.groups import select
from randlora.studies.rates import tried
from randlora.use import figures as analysis


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--only", metavar="KEY=VALUE", nargs="+", default=[], help="runs that have one of the values")
    parser.add_argument("--out", type=Path, required=True, help="such as figure.svg or figure.png")
    parser.add_argument("--rates", action="store_true", help="validation scores against the learning rate")
    options = parser.parse_args(arguments)
    if options.rates:
        points = {
            f"{arm.label}, {arm.where.task}": found
            for part in load([options.root], options.only)
            for arm in arms(part.results)
            if (found := tried(arm, part.curves))
        }
        if not points:
            raise SettingsError(f"{options.root}: no method has finished runs of several learning rates")
        draw_rates(points, options.out)
    elif options.root.suffix == ".jsonl" and options.root.name != RESULTS:
        analysis.draw(read_rows(options.root), options.out)
    else:
        draw(select(read(options.root), options.only), options.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))
