"""How the arms of a part compare: paired differences with one of them, and average ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from randlora.studies.arms import Arm
from randlora.studies.groups import Cell
from randlora.studies.statistics import Difference, Ranks, average_ranks, holm, student_difference


class Comparison(NamedTuple):
    """Two arms of a cell, over the seeds that both have.

    Args:
        where: The cell.
        reference, other: The labels of the arms.
        difference: Of the reference's scores less the other's, points, with Student's 95 % interval over seeds.
        holm: Its p, corrected for all comparisons with this reference in the part.
    """

    where: Cell
    reference: str
    other: str
    difference: Difference
    holm: float


Compared = Mapping[str, Sequence[Comparison]]  # by reference


def comparisons(arms: Sequence[Arm]) -> Compared:
    """By reference, in order of name, its comparisons with every other arm of its cells.

    Arms that share fewer than two seeds are not compared, and a label without any comparison is left out.
    """
    pairs: dict[str, list[Comparison]] = {}
    for first, second in combinations(arms, 2):
        seeds = sorted(first.scores.keys() & second.scores.keys())
        if first.where == second.where and len(seeds) > 1:
            gap = student_difference(*([arm.scores[seed] for seed in seeds] for arm in (first, second)))
            mirrored = Difference(-gap.mean, -gap.high, -gap.low, gap.p, gap.seeds)
            for ours, theirs, difference in (first, second, gap), (second, first, mirrored):
                pair = Comparison(first.where, ours.label, theirs.label, difference, gap.p)
                pairs.setdefault(ours.label, []).append(pair)
    corrected = {label: holm([pair.difference.p for pair in of_label]) for label, of_label in pairs.items()}
    return {
        label: [pair._replace(holm=p) for pair, p in zip(pairs[label], corrected[label], strict=True)]
        for label in sorted(pairs)
    }


class Ranking(NamedTuple):
    """Average ranks, and the cells over which they are taken."""

    ranks: Ranks
    cells: Sequence[Cell]


def ranking(arms: Sequence[Arm]) -> Ranking | None:
    """Ranks of arms by their means, over the cells that have them all; None without three arms in two cells.

    Where not every arm is in every cell, the arms are taken that are in the most cells, as many of them as make
    the most pairs of an arm and a cell.
    """
    means = {(arm.label, arm.where): arm.mean for arm in arms}
    of_label: dict[str, set[Cell]] = {}
    for arm in arms:
        of_label.setdefault(arm.label, set()).add(arm.where)
    labels = sorted(of_label, key=lambda label: (-len(of_label[label]), label))
    blocks = [
        (labels[:count], set.intersection(*(of_label[label] for label in labels[:count])))
        for count in range(3, len(labels) + 1)
    ]
    whole = [block for block in blocks if len(block[1]) > 1]
    if not whole:
        return None
    chosen, shared = max(whole, key=lambda block: len(block[0]) * len(block[1]))
    cells = sorted(shared, key=lambda where: where.order)
    return Ranking(average_ranks({label: [means[label, where] for where in cells] for label in sorted(chosen)}), cells)
