"""What runs have forgotten at equal scores: by arm, by pairs, and how much of it is of the method or of its scale.

python scripts/forgetting.py experiments/forgetting/forgetting.jsonl

The file is what `randlora forgetting RUNS --at-score … [--by loss] --into FILE`, or that without `--at-score`, has
written, of runs of several methods, each with as many values of one setting, its scale, and several seeds. Three tables
for each model and score: the mean change of each arm over its seeds; differences seed by seed, methods over all scales
and the ends of each method's, with Student's 95 % interval and p corrected for the number of the table's (Holm); and
what part of the changes' sum of squares goes with the method, with the scale, and with the seed, of the methods of
which every run got there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from randlora.errors import SettingsError, exit_code
from randlora.records.kept import LOSS
from randlora.studies.analyses import read_rows
from randlora.studies.equal_scores import by_arm, complete, contrasts, shares
from randlora.studies.tables import difference_cells, markdown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    options = parser.parse_args(arguments)
    groups: dict[tuple, list[dict]] = {}
    for row in read_rows(options.rows):
        groups.setdefault((row["model"], row["metric"], row.get("at_score"), row.get("by")), []).append(row)
    if not groups:
        raise SettingsError(f"{options.rows}: there are no rows; give what `randlora forgetting --into` has written")
    for (model, metric, score, by), rows in groups.items():
        factor, unit = (1.0, "nats") if metric == "token_loss" else (100.0, "points")
        where = f"{model}, {'at the end' if score is None else ' '.join(['at', *filter(None, [by]), f'{score:g}'])}"
        heads = [where, "runs", "steps", "validation loss" if by == LOSS else "validation, %", "‖ΔW‖/‖W0‖"]
        print(markdown([*heads, f"change, {unit}"], by_arm(rows, factor)))
        lines = [[one.name, *difference_cells(one.difference, one.holm)] for one in contrasts(rows, factor)]
        print("\n" + markdown([where, f"difference, {unit}", "95 % interval", "seeds", "p, Holm"], lines))
        try:
            parts = shares(rows)
        except SettingsError as error:
            print(f"\n{where}: {error}\n")
            continue
        shown = [", ".join(complete(rows)), *(f"{part:.0%}" for part in parts.values())]
        print("\n" + markdown([where, *parts], [shown]) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
