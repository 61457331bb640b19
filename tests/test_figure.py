"""The figure of committed records shows what their numbers are."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

RECORDS = REPOSITORY / "experiments" / "image_protocol" / "records"
sys.path.insert(0, str(REPOSITORY / "scripts"))
from figure import draw, panels  # noqa: E402 - scripts are no package
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


def test_an_unfinished_run_changes_no_figure(tmp_path: Path) -> None:
    """It has no score before training either, and must not take that line from its panel."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'randlora[figures]'")
    runs = [run for run in read(RECORDS) if run.cell[:2] == ("cifar10", "clip_tiny")]
    stopped = runs[0]._replace(result=runs[0].result | {"status": "interrupted", "metrics": {}})
    made = []
    for name, shown in (("one.svg", runs), ("two.svg", [*runs, stopped])):
        draw(shown, tmp_path / name)
        made.append((tmp_path / name).read_text())
    assert made[0] == made[1]


@pytest.mark.parametrize("command", ["figure.py --out one.svg", "table.py --seeds", "table.py --best method.rank"])
def test_runs_that_did_not_finish_are_a_sentence(command: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar10" / "vit" / "lora" / "x"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"status": "failed", "config": {}}')
    script, *options = command.split()
    run = [sys.executable, REPOSITORY / "scripts" / script, tmp_path, *options]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "none of the runs has finished" in done.stderr
    assert "Traceback" not in done.stderr
