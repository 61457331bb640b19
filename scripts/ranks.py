"""Scores against the number of trained parameters and the rank of the update, and how they rise with each.

python scripts/ranks.py experiments/rank --spectra experiments/rank/spectra.jsonl --only collection=records --out F.svg

The runs are of one model and task, at several counts and ranks; the spectra are what `randlora spectra RUNS --into
FILE` has written of them. Two tables: a row per arm, and a row for each three arms or more of a like count, or of a
like rank (within 10 %): the slope of their scores per doubling of the other, fitted seed by seed, with Student's 95 %
interval and p by flipping the seeds' signs, corrected for the number of rows (Holm). --out draws these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from randlora.errors import SettingsError, exit_code
from randlora.records import read
from randlora.studies.analyses import read_rows
from randlora.studies.groups import select, spread, value
from randlora.studies.ranks import draw_lines, lines, name, places
from randlora.studies.tables import difference_cells, markdown

SETTINGS = ("method.rank", "method.num_bases", "trainer.learning_rate", "method.alpha")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--only", metavar="KEY=VALUE", nargs="+", default=[], help="runs that have one of the values")
    parser.add_argument("--spectra", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--out", type=Path, help="such as figure.svg or figure.png")
    options = parser.parse_args(arguments)
    of_places = places(select(read(options.root), options.only), read_rows(options.spectra))
    rows = [
        [
            f"{place.parameters:,}", f"{place.rank:.0f}", f"{place.stable_rank:.1f}", place.runs[0].method,
            *(value(place.runs[0], key) for key in SETTINGS), spread([*place.scores.values()]),
            str(len(place.scores)),
        ]
        for place in of_places
    ]  # fmt: skip
    heads = ["trained parameters", "rank of ΔW", "stable rank", "method", *SETTINGS, "score, %", "seeds"]
    print(markdown(heads, rows))
    found = lines(of_places)
    if not found:
        raise SettingsError("no three arms have a like number of parameters, or a like rank, and two seeds in common")
    slopes = [
        [name(line), "parameters" if line.alike == "rank" else "rank", *difference_cells(line.slope, line.holm)]
        for line in found
    ]
    print("\n" + markdown(["of", "per doubling of", "points", "95 % interval", "seeds", "p, Holm"], slopes))
    if options.out:
        draw_lines(found, options.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))
