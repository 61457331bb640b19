"""How two searches of the same arms compare: what each chose, and what that is worth in the full one.

python scripts/searches.py experiments/halving/halving.json experiments/halving/grid.json

python scripts/searches.py experiments/halving/halving.json experiments/halving/grid.json --finalists 3

The files are search.json of two sweeps, the second of a search that gave every trial of the first a whole run. A row
per method: the steps of both, the settings that each chose, the validation scores of whole runs with these, their
difference over seeds with its standard error, and how many trials of the second are better than the first's choice.
With --finalists, the choice is what a search by halving would have made, had so many of its best gone to the end.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from randlora.errors import SettingsError, exit_code
from randlora.studies.tables import markdown
from randlora.sweeps.findings import Finding, Trial, read

NAMES = (
    "cell", "method", "steps", "of the full", "share", "chosen", "score, %", "by the full", "score, %",
    "difference, points", "better ones",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", type=Path)
    parser.add_argument("full", type=Path)
    parser.add_argument("--finalists", type=int, default=0, help="of the last comparison but one; 0: as it was")
    options = parser.parse_args(arguments)
    full = {(finding.cell, finding.label): finding for finding in read(options.full)}
    rows = []
    for finding in read(options.search):
        if (finding.cell, finding.label) not in full:
            raise SettingsError(
                f"{options.full}: has no {finding.label} on {finding.cell}; give the full search of both"
            )
        whole = full[finding.cell, finding.label]
        rows.append(row(with_finalists(finding, whole, options.finalists) if options.finalists else finding, whole))
    if not rows:
        raise SettingsError(f"{options.search}: there is no search; give the search.json of a sweep")
    print(markdown(NAMES, rows))


def with_finalists(finding: Finding, full: Finding, count: int) -> Finding:
    """The search with the best `count` of its last comparison but one at the end, with the scores of the full one."""
    if len(finding.rungs) < 2:
        raise SettingsError("--finalists: this search compares its trials once; give one by halving")
    before, last = map(str, finding.rungs[-2:])
    there = [trial.scores.get(before) or -math.inf for trial in finding.trials]
    best = sorted(range(len(there)), key=lambda number: -there[number])[:count]
    final = {words(trial): trial.scores.get(last) or -math.inf for trial in full.trials}
    chosen = max(best, key=lambda number: final[words(finding.trials[number])])
    went = sum(last in trial.scores for trial in finding.trials)
    more = (count - went) * (finding.rungs[-1] - finding.rungs[-2]) * finding.seeds
    return replace(finding, chosen=chosen, steps=finding.steps + more)


def row(finding: Finding, full: Finding) -> list[str]:
    """The cells of one method."""
    rung = str(full.rungs[-1])
    scores = {words(trial): trial.scores.get(rung) for trial in full.trials}
    each = {words(trial): trial.each.get(rung, ()) for trial in full.trials}
    known = [score for score in scores.values() if score is not None]
    if finding.chosen is None or full.chosen is None:
        raise SettingsError(f"{finding.label} on {finding.cell}: nothing is chosen yet")
    ours, best = (words(of.trials[of.chosen or 0]) for of in (finding, full))
    ours_score, best_score = (scores.get(choice) for choice in (ours, best))
    if ours_score is None or best_score is None:
        raise SettingsError(f"{finding.label} on {finding.cell}: the full search has no score of {ours}")
    return [
        finding.cell, finding.label, f"{finding.steps:,}", f"{full.steps:,}", f"{finding.steps / full.steps:.0%}", ours,
        f"{100 * ours_score:.1f}", best, f"{100 * best_score:.1f}", difference(each[ours], each[best]),
        f"{sum(score > ours_score for score in known)} of {len(full.trials)}",
    ]  # fmt: skip


def difference(ours: Sequence[float | None], best: Sequence[float | None]) -> str:
    """The mean of one less the other, seed by seed, and its standard error, points."""
    pairs = [100 * (a - b) for a, b in zip(ours, best, strict=True) if a is not None and b is not None]
    if ours == best:
        return "the same"
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return f"{statistics.mean(pairs):+.1f} ± {error:.1f}"


def words(trial: Trial) -> str:
    """The settings of a trial."""
    return ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in trial.values.items())


if __name__ == "__main__":
    sys.exit(exit_code(main))
