"""The figure of committed results shows what they say."""

import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import REPOSITORY
from randlora.errors import SettingsError
from randlora.records import Headline, Result, read
from randlora.studies.arms import arms, baselines
from randlora.studies.figures import COLOURS, draw, panels
from randlora.studies.groups import Cell, select
from randlora.studies.layouts import grids

STUDY = REPOSITORY / "experiments" / "image_protocol"
CELL = Cell("clip_tiny", "cifar10", 16, None)


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return select(read(STUDY), ["collection=records"])


def test_points_are_the_results_means(results: list[Result]) -> None:
    """Oracle: statistics over the scores of the runs, method by method."""
    points = {point.method: point for point in panels(arms(results))[CELL]}
    assert sorted(points) == ["full", "lora", "nola", "randlora", "vera"]
    for method, point in points.items():
        scores = [
            100 * result.metrics["test/accuracy"]
            for result in results
            if (result.task, result.model, result.method, result.shots) == ("cifar10", "clip_tiny", method, 16)
        ]
        assert len(scores) == 5
        assert point.mean == pytest.approx(statistics.mean(scores))
        assert point.deviation == pytest.approx(statistics.stdev(scores))
    assert points["lora"].parameters == 150_528


def test_a_figure_is_the_same_every_time(results: list[Result], tmp_path: Path) -> None:
    """In another process, too, and from the command line."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'randlora[figures]'")
    draw(select(results, ["task=cifar10", "shots=16"]), tmp_path / "one.svg")
    line = f"scripts/figure.py {STUDY} --only collection=records task=cifar10 shots=16 --out {tmp_path}/two.svg"
    subprocess.run([sys.executable, *line.split()], cwd=REPOSITORY, check=True, timeout=120)
    text = (tmp_path / "one.svg").read_text()
    assert (tmp_path / "two.svg").read_text() == text
    for part in ("cifar10, clip_tiny", "16 shots", "randlora", "accuracy, %"):
        assert part in text


def test_an_unfinished_run_changes_no_figure(results: list[Result], tmp_path: Path) -> None:
    """It has no score before training either, and must not take that line from its panel."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'randlora[figures]'")
    shown = select(results, ["task=cifar10", "model=clip_tiny"])
    stopped = replace(shown[0], status="interrupted", metrics={})
    texts = []
    for name, runs in (("one.svg", shown), ("two.svg", [*shown, stopped])):
        draw(runs, tmp_path / name)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("command", ["figure.py --out one.svg", "table.py --seeds", "table.py --best method.rank"])
def test_runs_that_did_not_finish_are_a_sentence(
    command: str, tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    failed = Result(
        task="cifar10", model="vit", method="lora", shots=None, fraction=None, seed=0, signature="x", config={},
        headline=Headline("test/accuracy", None),
    )  # fmt: skip
    failed.write(tmp_path / "result.json")
    script, *options = command.split()
    assert program(REPOSITORY / "scripts" / script, tmp_path, *options) == 2
    assert "none of the runs has finished" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["figure.nosuch", "nosuch/figure.svg"])
def test_a_file_that_cannot_be_written_is_named(results: list[Result], name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"{name} cannot be written"):
        draw(results[:1], tmp_path / name)


def test_every_method_has_a_colour_of_its_own() -> None:
    methods = {path.stem for path in (REPOSITORY / "configs" / "method").glob("*.yaml")}
    assert methods <= COLOURS.keys()
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_baselines_are_levels_of_the_panels(tmp_path: Path) -> None:
    """Oracle: the means, written out; a line across the panel has the same height at both ends."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'randlora[figures]'")
    runs = [
        replace(results_of("lora", "tiny", 0.8), trainable_parameters=100),
        results_of("pixels", "none", 0.7),
        results_of("linearprobe", "tiny_vision", 0.6),
        results_of("features", "tiny", 0.65),
        results_of("pixels", "none", 0.5, task="other"),
    ]
    of_arms = arms(runs)
    (updated,) = [arm for arm in of_arms if not arm.is_baseline]
    beside = baselines(updated.where, of_arms)
    assert sorted((arm.label, round(arm.mean, 6)) for arm in beside) == [
        ("features", 65.0), ("linearprobe", 60.0), ("pixels", 70.0),
    ]  # fmt: skip
    draw(runs, tmp_path / "one.svg")
    text = (tmp_path / "one.svg").read_text()
    assert text.count("digits, tiny\n") + text.count("digits, tiny<") >= 1
    assert "other, none" in text  # with nothing beside it, a panel of its own
    assert "digits, none" not in text
    (grid,) = [grid for grid in grids("runs", of_arms, {}) if grid.model == "tiny"]
    assert [line.label for line in grid.lines] == ["features", "linearprobe", "lora", "pixels"]


def results_of(method: str, model: str, score: float, task: str = "digits") -> Result:
    return Result(
        task=task, model=model, method=method, shots=4, fraction=None, seed=0, signature=f"{method}{task}",
        headline=Headline("test/accuracy", score), config={"task": {"name": task}, "model": {"name": model}},
        status="finished", metrics={"test/accuracy": score}, trainable_parameters=0,
    )  # fmt: skip
