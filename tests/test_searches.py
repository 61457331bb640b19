"""Searches: runs that pause and go on, and what is chosen from their validation scores, whatever is killed meanwhile."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from test_interruption import code_of, forked

from randlora import cli
from randlora.analysis.campaign_programs import _COMMON, Ours, prepare
from randlora.errors import FINISHED, WRONG_SETTINGS
from randlora.records.record import Record
from randlora.records.result import Result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("vit"))


def command(*overrides: str) -> int:
    sys.argv = ["randlora", *_COMMON, *overrides]
    return cli.main()


def only_run(root: Path) -> Path:
    (status,) = root.glob("*/*/*/*/status.json")
    return status.parent


def validations(folder: Path) -> list[int]:
    """The steps at which the validation set was scored, by the log."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if "validation/accuracy" in row]


def strike(at: int) -> None:
    """Kills this process when it has done so many steps."""
    progress = Record.progress

    def struck(record: Record, step: int, *rest: object) -> None:
        progress(record, step, *rest)  # type: ignore[arg-type]
        if step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    Record.progress = struck  # type: ignore[method-assign]


@pytest.mark.parametrize("method", ["lora", "increlora"])
def test_a_run_that_pauses_goes_on_to_the_same_bits(
    method: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Oracle: the run that nothing paused. It is killed once, and asked for an earlier pause, in between."""
    settings = f"model.weights={model}", f"method={method}", "task.augmentation=crop", "trainer.save_every=1"
    undisturbed, root = tmp_path / "undisturbed", tmp_path / "runs"
    assert code_of(forked(partial(command, *settings, f"run_root={undisturbed}"))) == FINISHED

    def until(stop_at: object, kill: int | None = None) -> int:
        def act() -> int:
            if kill:
                strike(kill)
            return command(*settings, f"run_root={root}", f"trainer.stop_at={stop_at}")

        return code_of(forked(act))

    capfd.readouterr()
    assert until(3) == FINISHED
    folder = only_run(root)
    first = Result.read(folder / "result.json")
    assert (first.status, first.steps, first.headline.value) == ("paused", 3, None)
    assert first.error == "after step 3 of 10; the same command goes on with a later trainer.stop_at, or with none"
    assert set(first.metrics) == {"validation/accuracy", "validation/loss"}
    assert "paused: validation/accuracy" in capfd.readouterr().err
    assert until(3) == until(2) == FINISHED
    assert capfd.readouterr().err.count("already paused") == 2
    assert until(6, kill=5) == -signal.SIGKILL
    assert not (folder / "result.json").is_file()
    assert until(4) == FINISHED  # which has been passed: it is not taken back
    assert Result.read(folder / "result.json").steps in (4, 5)
    assert until(20) == FINISHED
    assert validations(folder)[0] == 3
    last = Result.read(folder / "result.json")
    assert (last.status, last.steps) == ("paused", 10)
    assert not (folder / "predictions.json.gz").exists()  # no test example has been looked at
    assert until("null") == FINISHED
    ours, theirs = (Ours.outputs(None, run) for run in (folder, only_run(undisturbed)))  # type: ignore[arg-type]
    assert Result.read(folder / "result.json").validation == last.validation
    scored = "validation/accuracy"
    rows = [[row for row in outputs.pop("metrics.jsonl") if row.get(scored) is None] for outputs in (ours, theirs)]
    assert rows[0] == rows[1]
    assert ours == theirs
    assert until(3) == FINISHED
    assert "already finished" in capfd.readouterr().err


def test_what_cannot_pause_says_so(capfd: pytest.CaptureFixture) -> None:
    for settings, reason in (
        (("trainer.stop_at=0",), "trainer.stop_at=0: must be a whole number of at least 1"),
        (("trainer.stop_at=2", "trainer.select=best", "trainer.evaluate_every=1"), "trainer.stop_at=2: a paused run is"),
    ):
        assert code_of(forked(partial(command, *settings))) == WRONG_SETTINGS
        assert reason in capfd.readouterr().err
