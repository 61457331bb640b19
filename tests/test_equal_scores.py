"""Forgetting at equal scores: sums of squares by numpy's least squares, differences by scipy's paired t-test."""

import contextlib
import io
import json
import sys
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from conftest import REPOSITORY
from randlora.errors import SettingsError
from randlora.studies.analyses import Analysis
from randlora.studies.equal_scores import by_arm, complete, contrasts, levels, numbers, shares
from randlora.studies.statistics import holm
from randlora.use.figures import draw

sys.path.insert(0, str(REPOSITORY / "scripts"))
import forgetting

METHODS, SCALES, SEEDS = ("full", "lora", "vera"), ("4", "16", "64"), range(4)
CHANGES = np.random.default_rng(0).normal(size=(4, 3, 3)) + np.arange(3)[:, None] - 2 * np.arange(3)


def rows(**changed: object) -> list[dict]:
    """Of every method, scale and seed; labels such that an order by letters is not that of the scales."""
    return [
        {
            "model": "m", "task": "t", "run": f"{method} {scale} {seed}", "method": method, "seed": seed,
            "arm": f"{method}, alpha={scale}", "at_score": 0.4, "step": 10, "validation": 0.41, "on": "other",
            "metric": "accuracy", "before": 0.5, "after": 0.5 + CHANGES[seed, i, j], "change": CHANGES[seed, i, j],
            "relative_norm": 0.1, **changed,
        }
        for (i, method), (j, scale), seed in product(enumerate(METHODS), enumerate(SCALES), SEEDS)
    ]  # fmt: skip


def residual(*factors: np.ndarray) -> float:
    """What is left of the changes' sum of squares after a least squares fit of an indicator for every value."""
    design = np.column_stack([np.ones(36), *(np.equal.outer(factor, np.unique(factor)) for factor in factors)])
    fitted = design @ np.linalg.lstsq(design.astype(float), CHANGES.ravel(), rcond=None)[0]
    return float(np.square(CHANGES.ravel() - fitted).sum())


def test_shares_are_those_of_nested_least_squares() -> None:
    seed, method, scale = (axis.ravel() for axis in np.indices((4, 3, 3)))
    fits = [(), (method,), (method, scale), (method * 3 + scale,), (method * 3 + scale, seed)]
    left = [residual(*fit) for fit in fits]
    expected = [*(first - second for first, second in pairwise(left)), left[-1]]
    assert list(shares(rows()).values()) == pytest.approx([part / left[0] for part in expected])
    assert sum(shares(rows()).values()) == pytest.approx(1)


def test_contrasts_are_paired_by_seed_and_corrected_together() -> None:
    found = {one.name: one for one in contrasts(rows(), factor=100)}
    means = CHANGES.mean(2)
    expected = {
        f"{METHODS[i]} - {METHODS[j]}": stats.ttest_rel(means[:, i], means[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))
    } | {
        f"{method}: largest - smallest scale": stats.ttest_rel(CHANGES[:, i, 2], CHANGES[:, i, 0])
        for i, method in enumerate(METHODS)
    }
    assert list(found) == list(expected)
    assert [one.difference.p for one in found.values()] == pytest.approx([test.pvalue for test in expected.values()])
    gaps = [means[:, i] - means[:, j] for i, j in ((0, 1), (0, 2), (1, 2))]
    gaps += [CHANGES[:, i, 2] - CHANGES[:, i, 0] for i in range(3)]
    signs = np.array(list(product((1, -1), repeat=4)))  # by enumeration
    flipped = [np.mean(np.abs((signs * gap).mean(1)) >= abs(gap.mean()) - 1e-12) for gap in gaps]
    assert [one.holm for one in found.values()] == pytest.approx(holm(flipped))
    assert found["full - lora"].difference.mean == pytest.approx(100 * (means[:, 0] - means[:, 1]).mean())


def test_runs_that_never_get_there_are_counted_and_leave_their_pairs_out() -> None:
    some = rows()
    for row in some:
        if row["arm"] == "lora, alpha=4" and row["seed"] > 0:
            row |= {"after": None, "change": None, "relative_norm": None}
    assert [line[:2] for line in by_arm(some)][3] == ["lora, alpha=4", "1 of 4"]
    found = {one.name: one.difference for one in contrasts(some)}
    assert "lora: largest - smallest scale" not in found  # one seed has both ends
    ours = [CHANGES[0, 1].mean() - CHANGES[0, 2].mean(), *(CHANGES[1:, 1, 1:] - CHANGES[1:, 2, 1:]).mean(1)]
    assert (found["lora - vera"].mean, found["lora - vera"].seeds) == (pytest.approx(np.mean(ours)), 4)
    two = [row for row in rows() if row["method"] != "lora"]  # the methods that have all
    assert shares(some) == pytest.approx(shares(two))
    with pytest.raises(SettingsError, match="1 methods have got there in every run, and 4 seeds"):
        shares([row for row in some if row["method"] != "full"])
    never = [row | {"change": None} for row in some]
    assert by_arm(never)[0] == ["full, alpha=4", "0 of 4", "", "", "", ""]
    assert Analysis("forgetting", never[:1]).lines()[0][-2] == ""


def test_scales_are_ordered_by_their_numbers() -> None:
    assert numbers("full, trainer.learning_rate=3e-05") == [3e-05]
    assert numbers("vera, trainer.learning_rate=0.025, d_initial=0.1, rank=256, basis=uniform") == [0.1, 256, 0.025]
    assert levels(rows())["lora, alpha=16"] == 1
    rate = [row | {"arm": row["arm"].replace("alpha", "trainer.learning_rate")} for row in rows()]
    some = [row for row in rows() if row["method"] != "full"] + [row for row in rate if row["method"] == "full"]
    assert complete(some) == ["lora", "vera"]
    assert [one.name for one in contrasts(some)][:2] == ["lora - vera", "full: largest - smallest scale"]


def test_the_script_prints_a_table_for_each_score(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    ends = [
        {key: value for key, value in row.items() if key not in ("at_score", "step", "validation")} for row in rows()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in (*rows(), *rows(change=None, at_score=0.9), *ends)))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        forgetting.main([str(file)])
    text = output.getvalue()
    assert [text.count(f"| m, {where} |") for where in ("at 0.4", "at 0.9", "at the end")] == [3, 2, 3]
    change = 100 * CHANGES[:, 1, 2]
    assert f"| lora, alpha=64 | 4 of 4 | 10 | 41.0 | 0.100 | {change.mean():+.2f} ± {change.std(ddof=1):.2f} |" in text
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(by="loss", metric="token_loss")))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        forgetting.main([str(file)])
    assert "| m, at loss 0.4 | runs | steps | validation loss | ‖ΔW‖/‖W0‖ | change, nats |" in output.getvalue()
    assert f"| 10 | 0.410 | 0.100 | {change.mean() / 100:+.2f} ±" in output.getvalue()
    file.write_text("")
    with pytest.raises(SettingsError, match="there are no rows"):
        forgetting.main([str(file)])
    draw([*rows(), *rows(change=None, at_score=0.9)], tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert drawn.count("lora, alpha=64") >= 1
