"""The figure of committed records shows what their numbers are."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

RECORDS = REPOSITORY / "experiments" / "image_protocol" / "records"
sys.path.insert(0, str(REPOSITORY / "scripts"))
from figure import before, panels  # noqa: E402 - scripts are no package
from table import read  # noqa: E402


def test_points_are_the_records_means() -> None:
    """Oracle: statistics over the scores of the runs, method by method."""
    runs = read(RECORDS)
    points = {point.method: point for point in panels(runs)["cifar10", "clip_tiny", "16"]}
    assert sorted(points) == ["full", "lora", "nola", "randlora", "vera"]
    for method, point in points.items():
        scores = [
            100 * run.result["headline"]["value"]
            for run in runs
            if run.cell == ("cifar10", "clip_tiny", method) and run.budget == (16, None)
        ]
        assert len(scores) == 5
        assert point.mean == pytest.approx(statistics.mean(scores))
        assert point.deviation == pytest.approx(statistics.stdev(scores))
    assert points["lora"].parameters == 150_528
    assert before(runs)["cifar10", "clip_tiny", "16"] == pytest.approx(18.25, abs=0.3)


def test_a_figure_is_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'randlora[figures]'")
    made = []
    for name in ("one.svg", "two.svg"):
        command = [sys.executable, "scripts/figure.py", str(RECORDS), "--out", str(tmp_path / name)]
        subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120)
        made.append((tmp_path / name).read_text())
    assert made[0] == made[1]
    for text in ("cifar10, clip_tiny", "16 shots", "randlora", "accuracy, %"):
        assert text in made[0]
