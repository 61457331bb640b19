"""Scores against rank and count: slopes by scipy's linregress, p by enumerating signs."""

import contextlib
import io
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from conftest import REPOSITORY
from randlora.errors import SettingsError
from randlora.records import Headline, Result, read
from randlora.studies.ranks import Place, lines, places
from randlora.studies.statistics import holm

sys.path.insert(0, str(REPOSITORY / "scripts"))
import ranks

ARMS = [(1000, 2), (1040, 8), (1090, 64), (2000, 64), (4000, 66), (9000, 1)]  # parameters and rank; the last is alone
SCORES = np.random.default_rng(0).uniform(0.2, 0.8, size=(len(ARMS), 4))


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """Four seeds of each arm, of which the third arm lacks the last."""
    run = next(result for result in read(REPOSITORY / "experiments" / "image_protocol") if result.status == "finished")
    return [
        replace(
            run, signature=f"{arm}{seed}", seed=seed, config={**run.config, "method": {"rank": rank, "alpha": count}},
            trainable_parameters=count, headline=Headline("accuracy", SCORES[arm, seed]),
        )
        for (arm, (count, rank)), seed in product(enumerate(ARMS), range(4)) if (arm, seed) != (2, 3)
    ]  # fmt: skip


def spectra(results: list[Result]) -> list[dict]:
    return [
        {"run": f"lora {result.signature}", "rank": result.config["method"]["rank"], "stable_rank": 1 + result.seed}
        for result in results
    ]


def test_slopes_are_per_doubling_and_by_seed(results: list[Result]) -> None:
    of_places = places(results, spectra(results))
    assert [(place.parameters, place.rank) for place in of_places] == sorted(ARMS)
    assert [place.stable_rank for place in of_places] == [2.5, 2.5, 2.0, 2.5, 2.5, 2.5]
    assert of_places[2].scores == {seed: pytest.approx(100 * SCORES[2, seed]) for seed in range(3)}
    found = lines(of_places)
    assert [(line.alike, round(line.value)) for line in found] == [("parameters", 1043), ("rank", 65)]
    p_values = []
    for line, members, other in zip(found, ([0, 1, 2], [2, 3, 4]), (1, 0), strict=True):
        doublings = np.log2([ARMS[arm][other] for arm in members])
        slopes = [stats.linregress(doublings, 100 * SCORES[members, seed]).slope for seed in range(3)]
        test = stats.ttest_1samp(slopes, 0.0)
        assert (line.slope.mean, line.slope.p, line.slope.seeds) == (
            pytest.approx(np.mean(slopes)), pytest.approx(test.pvalue), 3,
        )  # fmt: skip
        assert (line.slope.low, line.slope.high) == pytest.approx(test.confidence_interval(0.95))
        signs = np.array([*product((1, -1), repeat=3)])
        p_values.append(np.mean(np.abs((signs * slopes).mean(1)) >= abs(np.mean(slopes)) - 1e-12))
    assert [line.holm for line in found] == pytest.approx(holm(p_values))


def test_two_arms_or_one_seed_are_no_line() -> None:
    arms = [Place([], 100, rank, 1.0, {0: 50.0, 1: 51.0}) for rank in (1, 4)]
    assert lines(arms) == []
    assert lines([*arms, Place([], 100, 16, 1.0, {1: 52.0})]) == []
    assert lines([*arms, Place([], 111, 16, 1.0, {0: 50.0, 1: 52.0})]) == []  # 11 % more than the least
    assert len(lines([*arms, Place([], 110, 16, 1.0, {0: 50.0, 1: 52.0})])) == 1


def test_the_script_prints_both_tables_and_draws(
    results: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "read", lambda root: results)
    file, figure = tmp_path / "spectra.jsonl", tmp_path / "ranks.svg"
    file.write_text("".join(json.dumps(row) + "\n" for row in spectra(results)))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        ranks.main([str(tmp_path), "--spectra", str(file), "--out", str(figure)])
    rate = results[0].config["trainer"]["learning_rate"]
    mean, deviation = 100 * SCORES[1].mean(), 100 * SCORES[1].std(ddof=1)
    assert (
        f"| 1,040 | 8 | 2.5 | {results[0].method} | 8 |  | {rate:g} | 1040 | {mean:.1f} ± {deviation:.1f} | 4 |"
        in output.getvalue()
    )
    assert "| about 1,000 parameters | rank |" in output.getvalue()
    assert "| rank 65 | parameters |" in output.getvalue()
    assert all(text in figure.read_text() for text in ("about 1,000 parameters", "rank 65", "n = 3"))
    with pytest.raises(SettingsError, match=r"the run 53 has no row in the spectra: give randlora spectra all runs"):
        places(results, spectra(results)[:-1])
    with pytest.raises(SettingsError, match="the run 00 has no trained update, and so no rank"):
        places(results, [row | {"rank": 0} for row in spectra(results)])
    with pytest.raises(SettingsError, match="no three arms"), contextlib.redirect_stdout(io.StringIO()):
        ranks.main([str(tmp_path), "--spectra", str(file), "--only", f"trainable_parameters={ARMS[0][0]}"])
