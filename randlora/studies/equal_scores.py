"""What runs have forgotten where each first reached a score: by arm, and how much is of the method or of its scale.

The rows are those that ``randlora forgetting`` writes (`randlora.use.forgetting`). The arms of a method differ in one
setting, its scale, and are its levels in the order of that setting's value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from randlora.errors import SettingsError
from randlora.records.kept import LOSS
from randlora.studies.groups import spread
from randlora.studies.statistics import Difference, holm, sign_flip_p, student_difference

Rows = Sequence[Mapping[str, Any]]
_NUMBER = re.compile(r"\d+\.?\d*(e[+-]?\d+)?")


def numbers(arm: str) -> list[float]:
    """The numbers in an arm's label, by which its siblings are ordered: the method's own first, then the trainer's."""
    parts = sorted(arm.split(", ")[1:], key=lambda part: part.startswith("trainer."))
    return [float(part.partition("=")[2]) for part in parts if _NUMBER.fullmatch(part.partition("=")[2])]


def levels(rows: Rows) -> dict[str, int]:
    """Of each arm its place among those of its method, from the smallest scale on."""
    of_method: dict[str, set[str]] = {}
    for row in rows:
        of_method.setdefault(row["method"], set()).add(row["arm"])
    return {arm: place for arms in of_method.values() for place, arm in enumerate(sorted(arms, key=numbers))}


def by_arm(rows: Rows, factor: float = 1.0) -> list[list[str]]:
    """A line for each arm: runs that got there of all, steps, validation score, ‖ΔW‖ / ‖W0‖, change; means over seeds.

    Args:
        rows: Of one model and one score.
        factor: Of the changes, such as 100 for points.
    """
    lines = []
    for arm in sorted({row["arm"] for row in rows}, key=lambda arm: (arm.partition(",")[0], numbers(arm))):
        own = [row for row in rows if row["arm"] == arm]
        there = [row for row in own if row["change"] is not None]
        line = [arm, f"{len(there)} of {len(own)}"]
        if there:
            line += [
                f"{np.mean([row['step'] for row in there]):.0f}" if "step" in there[0] else "",
                _validation(there) if "step" in there[0] else "",
                f"{np.mean([row['relative_norm'] for row in there]):.3f}",
                spread([factor * row["change"] for row in there], "+.2f", ".2f"),
            ]
        lines.append(line + [""] * (6 - len(line)))
    return lines


def _validation(rows: Rows) -> str:
    mean = float(np.mean([row["validation"] for row in rows]))
    return f"{mean:.3f}" if rows[0].get("by") == LOSS else f"{100 * mean:.1f}"


class Contrast(NamedTuple):
    """A difference of changes, seed by seed, with Student's interval, and the p of `sign_flip_p`, Holm's for a table.

    Accuracies are few values, so that differences of some seeds may be equal by chance; Student's p is then nought.
    """

    name: str
    difference: Difference
    holm: float


def contrasts(rows: Rows, factor: float = 1.0) -> list[Contrast]:
    """Every two `scaled` methods, by means over the levels that both have in a seed; and the ends of each method's.

    Args:
        rows: Of one model and one score.
        factor: Of the changes, such as 100 for points.

    Returns:
        Those with two seeds or more. A method's change less another's, and that of its largest scale less its smallest.
    """
    place = levels(rows)
    known = {
        (row["method"], place[row["arm"]], row["seed"]): factor * row["change"]
        for row in rows if row["change"] is not None
    }  # fmt: skip
    methods, seeds = sorted({row["method"] for row in rows}), sorted({row["seed"] for row in rows})
    count = max(place.values()) + 1
    pairs: dict[str, list[tuple[float, float]]] = {}
    for first, second in combinations(scaled(rows), 2):
        for seed in seeds:
            both = [i for i in range(count) if (first, i, seed) in known and (second, i, seed) in known]
            if both:
                means = (float(np.mean([known[method, i, seed] for i in both])) for method in (first, second))
                pairs.setdefault(f"{first} - {second}", []).append((next(means), next(means)))
    for method in methods:
        for seed in seeds:
            largest, smallest = (method, count - 1, seed), (method, 0, seed)
            if largest in known and smallest in known:
                pairs.setdefault(f"{method}: largest - smallest scale", []).append((known[largest], known[smallest]))
    found = {name: student_difference(*zip(*values, strict=True)) for name, values in pairs.items() if len(values) > 1}
    corrected = holm([sign_flip_p(np.subtract(*zip(*pairs[name], strict=True))) for name in found])
    return [Contrast(name, found[name], p) for name, p in zip(found, corrected, strict=True)]


def shares(rows: Rows) -> dict[str, float]:
    """Of the changes' sum of squares the parts of method, scale, their interaction, the seed, and what is left.

    Of the methods that are `complete`, and the seeds that all their arms have, so that the parts add up to 1.

    Raises:
        SettingsError: Fewer than two such methods or two such seeds.
    """
    place, methods = levels(rows), complete(rows)
    known = {(row["seed"], row["method"], place[row["arm"]]): row["change"] for row in rows}
    every = [(method, level) for method in methods for level in range(max(place.values()) + 1)]
    seeds = [seed for seed in sorted({row["seed"] for row in rows}) if all((seed, *one) in known for one in every)]
    if len(methods) < 2 or len(seeds) < 2:
        raise SettingsError(
            f"{len(methods)} methods have got there in every run, and {len(seeds)} seeds have all their arms: shares "
            "of the variance need two of each; give a lower score"
        )
    values = np.array([[known[seed, *one] for one in every] for seed in seeds]).reshape(len(seeds), len(methods), -1)
    values -= values.mean()
    of_seed, of_method, of_scale = (values.mean(axis) for axis in ((1, 2), (0, 2), (0, 1)))
    both = values.mean(0) - of_method[:, None] - of_scale
    total = np.square(values).mean()
    parts = {
        "method": np.square(of_method).mean() / total, "scale": np.square(of_scale).mean() / total,
        "method and scale together": np.square(both).mean() / total, "seed": np.square(of_seed).mean() / total,
    }  # fmt: skip
    return {name: float(part) for name, part in parts.items()} | {"rest": float(1 - sum(parts.values()))}


def scaled(rows: Rows) -> list[str]:
    """The methods with a scale of their own, whose arms do not differ in the trainer's settings alone."""
    own = (row["method"] for row in rows if any(not part.startswith("trainer.") for part in row["arm"].split(", ")[1:]))
    return sorted(set(own))


def complete(rows: Rows) -> list[str]:
    """Those of the `scaled` methods of which every run got there."""
    never = {row["method"] for row in rows if row["change"] is None}
    return [method for method in scaled(rows) if method not in never]
