"""Searches: runs that pause and go on, and what is chosen from their validation scores, whatever is killed."""

import io
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console
from test_interruption import code_of, forked

from randlora import cli
from randlora.analysis.campaign_programs import _COMMON, Ours, prepare
from randlora.errors import FAILED, FINISHED, INTERRUPTED, WRONG_SETTINGS, SettingsError
from randlora.records.lock import living
from randlora.records.record import Record
from randlora.records.result import Result
from randlora.studies.arms import arms, load
from randlora.studies.rates import tried
from randlora.sweeps import findings
from randlora.sweeps.findings import Finding
from randlora.sweeps.status import status
from randlora.sweeps.strategies import RATE, TPE, WORST, Arm, Grid, Halving, Strategy
from randlora.sweeps.sweep import Sweep


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


def test_a_run_that_pauses_goes_on_to_the_same_bits(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Oracle: the run that nothing paused. It is killed once, and asked for an earlier pause, meanwhile; ranks grow."""
    settings = f"model.weights={model}", "method=increlora", "task.augmentation=crop", "trainer.save_every=1"
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
        (
            ("trainer.stop_at=2", "trainer.select=best", "trainer.evaluate_every=1"),
            "trainer.stop_at=2: a paused run is",
        ),
    ):
        assert code_of(forked(partial(command, *settings))) == WRONG_SETTINGS
        assert reason in capfd.readouterr().err


def reach(
    score: Callable[[Arm, Mapping[str, float], int], float], strategy: Strategy, arms: Sequence[Arm], order: Random
):
    """The courses at the end of a search in which the scores of what is wanted come one at a time, in any order."""
    known: dict[tuple[str, str, int], float] = {}
    before: dict[str, Sequence[Mapping[str, float]]] = {}
    while True:
        courses = strategy.courses(arms, lambda arm, values, step: known.get((arm.label, str(values), step)), before)
        before = json.loads(json.dumps({course.arm.label: course.trials for course in courses}))
        wanted = [(course, *want) for course in courses for want in course.wanted]
        if not wanted:
            return courses, known
        course, number, step = order.choice(wanted)
        key = course.arm.label, str(course.trials[number]), step
        assert key not in known  # nothing is run twice
        known[key] = score(course.arm, course.trials[number], step)


def hill(best: float) -> Callable[[Arm, Mapping[str, float], int], float]:
    """Best at this multiple of an arm's own rate and at its own scale, with noise that is the smaller the longer."""

    def score(arm: Arm, values: Mapping[str, float], step: int) -> float:
        noise = Random(f"{arm.label}{values}{step}").random() / step
        away = abs(math.log(values[RATE] / arm.rate / best))
        return noise - away - abs(math.log(values[arm.scale_key] / arm.scale) if arm.scale_key else 0)

    return score


ARMS = [Arm("method=lora", 1e-3, 90, "method.alpha", 16.0), Arm("method=full", 3e-4, 90)]


@pytest.mark.parametrize("order", range(3))
def test_a_grid_finds_the_best_of_its_points_and_grows_for_all_arms(order: int) -> None:
    """Oracle: the points and the best of them, written out."""
    (lora, full), known = reach(hill(1.0), Grid(), ARMS, Random(order))
    rates = [1.11e-4, 3.33e-4, 1e-3, 3e-3, 9e-3]
    expected = [{RATE: rate, "method.alpha": alpha} for rate in rates for alpha in (8.0, 16.0, 32.0)]
    assert lora.trials == expected
    assert expected[lora.chosen] == max(expected, key=lambda values: known["method=lora", str(values), 90])
    assert [values[RATE] for values in full.trials] == [float(f"{3e-4 * 3 ** (k / 3):.3g}") for k in range(-7, 8)]
    assert full.trials[full.chosen] == {RATE: 3e-4}
    assert (lora.steps, full.steps) == (15 * 90, 15 * 90) == (Grid().most_steps(90),) * 2
    assert lora.edges == full.edges == {}
    # Full's best is where it was, LoRA's is beyond the last rate: both grow by a column of three, and by no more.
    score = lambda arm, *rest: hill(27.0 if arm.scale_key else 1.0)(arm, *rest)  # noqa: E731
    (lora, full), known = reach(score, Grid(), ARMS, Random(order))
    assert lora.trials == [*expected, *({RATE: 0.027, "method.alpha": alpha} for alpha in (8.0, 16.0, 32.0))]
    assert lora.trials[lora.chosen] == {RATE: 0.027, "method.alpha": 16.0}
    assert lora.edges == {RATE: "upper"}
    assert [values[RATE] for values in full.trials[15:]] == [float(f"{3e-4 * 3 ** (k / 3):.3g}") for k in (8, 9, 10)]
    assert (lora.steps, full.steps, full.edges) == (18 * 90, 18 * 90, {})
    (lora, _), _ = reach(score, Grid(extend=0), ARMS, Random(order))
    assert (len(lora.trials), lora.edges) == (15, {RATE: "upper"})
    # At a corner, twice: 5 × 3, 6 × 4 and 7 × 5 points.
    corner = lambda arm, values, step: -values[RATE] + values.get("method.alpha", 0)  # noqa: E731
    (lora, full), _ = reach(corner, Grid(extend=2), ARMS, Random(order))
    assert len(lora.trials) == len(full.trials) == len({str(values) for values in full.trials}) == 35
    assert lora.edges == {RATE: "lower", "method.alpha": "upper"}
    assert full.edges == {RATE: "lower"}


@pytest.mark.parametrize(("order", "best", "last"), [(0, 1.0, 1), (1, 3.0, 1), (2, 1 / 3, 1), (0, 3.0, 3)])
def test_halving_compares_what_its_definition_compares(order: int, best: float, last: int) -> None:
    """Oracle: Jamieson and Talwalkar's loop, n / η^i trials of R η^(i - 2) steps each, and `last` at the least."""
    score, strategy = hill(best), Halving(extend=0, finalists=last)
    courses, known = reach(score, strategy, ARMS, Random(order))
    for course in courses:
        kept, steps = [*course.trials], 0
        for step, before, size in ((10, 0, 5), (30, 10, last), (90, 30, 1)):
            steps += len(kept) * (step - before)
            kept = sorted(kept, key=lambda values: -score(course.arm, values, step))[:size]
        assert course.trials[course.chosen] == kept[0]
        assert course.steps == steps == strategy.most_steps(90) == 15 * 10 + 5 * 20 + last * 60
        reached = sorted(step for label, _, step in known if label == course.arm.label)
        assert reached == [10] * 15 + [30] * 5 + [90] * last
    assert Halving(min_steps=20).rungs(90) == [30, 90]
    assert Halving(eta=2).rungs(90) == [23, 45, 90]
    assert [Halving().kept(trials, rung) for trials, rung in ((2, 1), (4, 2), (60, 2))] == [2, 3, 6]
    with pytest.raises(SettingsError, match=r"search.min_steps=31: a run has 90 steps.*nothing is left to promote"):
        Halving(min_steps=31).rungs(90)
    with pytest.raises(SettingsError, match=r"search.rates=400: with search.scales=3 makes 1,200 points"):
        Grid(rates=400)


def test_a_failed_trial_is_the_worst_and_equal_ones_are_taken_near_the_arms_own_settings() -> None:
    flat = lambda arm, values, step: WORST if values[RATE] >= 1e-3 else 0.5  # noqa: E731
    (lora, full), _ = reach(flat, Halving(), ARMS, Random(0))
    assert lora.trials[lora.chosen] == {RATE: 3.33e-4, "method.alpha": 16.0}
    assert full.trials[full.chosen] == {RATE: 3e-4}
    (lora, _), known = reach(lambda *_: WORST, Halving(), ARMS, Random(0))
    assert lora.chosen is None
    assert {step for *_, step in known} == {10}


@pytest.mark.parametrize("order", range(2))
def test_tpe_draws_the_same_whatever_comes_first(order: int) -> None:
    """Oracle of the bounds: the settings. Most trials that follow the start are nearer to the best than it was."""
    pytest.importorskip("optuna")
    strategy = TPE(trials=20, batch=2, seed=order)
    (lora, full), _ = reach(hill(3.0), strategy, ARMS, Random(0))
    for other in range(1, 3):
        again, _ = reach(hill(3.0), strategy, ARMS, Random(other))
        assert [course.trials for course in again] == [lora.trials, full.trials]
    assert lora.trials[0] == {RATE: 1e-3, "method.alpha": 16.0}
    assert all(1.11e-4 <= values[RATE] <= 9e-3 and 8 <= values["method.alpha"] <= 32 for values in lora.trials)
    assert len({str(values) for values in lora.trials}) == len(lora.trials) == 20 == len(full.trials)
    away = [abs(math.log(values[RATE] / 3e-3)) for values in lora.trials]
    assert statistics.median(away[10:]) < statistics.median(away[:5])
    assert lora.steps == strategy.most_steps(90) == 20 * 90
    (lora, _), _ = reach(hill(9.0), strategy, ARMS, Random(0))
    assert lora.edges in ({RATE: "upper"}, {})


TRIALS = int(os.environ.get("RANDLORA_SEARCH_TRIALS", 0))
KILLS = 50 if TRIALS else 2
OWN_RATE = [override for override in _COMMON if not override.startswith("trainer.learning_rate")]


def searched(root: Path, *overrides: str, kills: int = 0) -> int:
    """A search's command in this process; up to so many of its runs, and every fifth time itself, are killed."""
    progress = Record.progress

    def struck(record: Record, step: int, *rest: Any) -> None:
        progress(record, step, *rest)
        struck = [path.read_text() for path in root.glob("struck_*")]
        rate, attempt = record.config["trainer"]["learning_rate"], struck.count(record.folder.name)
        if len(struck) < kills and Random(f"{rate} {step} {attempt}").random() < (0.1 if TRIALS else 0.3):
            with suppress(FileExistsError), (root / f"struck_{len(struck)}").open("x") as file:
                file.write(record.folder.name)
                file.flush()
                os.kill(os.getppid() if len(struck) % 5 == 1 else os.getpid(), signal.SIGKILL)

    Record.progress = struck  # type: ignore[method-assign]
    sys.argv = ["randlora", "-m", *OWN_RATE, f"run_root={root}", "trainer.save_every=2", *overrides]
    return cli.main()


def until_it_is_done(root: Path, *overrides: str, kills: int = 0) -> int:
    """How many calls of a search's command it takes."""
    for calls in range(1, 3 + kills):
        code = code_of(forked(partial(searched, root, *overrides, kills=kills), 3600))
        if code == FINISHED:
            return calls
        assert code in (FAILED, INTERRUPTED, -signal.SIGKILL)
        while any(map(living, root.glob("*/*/*/*/"))):  # runs whose launcher was killed
            time.sleep(0.02)
    raise AssertionError("it did not come to its end")


def decided(root: Path) -> tuple[Sweep, list[Finding]]:
    (path,) = root.glob("sweeps/*/sweep.json")
    return Sweep.read(path), findings.read(path.with_name(findings.NAME))


@pytest.mark.parametrize("kind", ["halving", "tpe"])
def test_a_search_goes_on_to_the_same_trials_and_choice_whatever_is_killed(
    kind: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Oracle: the search that nothing disturbed, of one worker.

    RANDLORA_SEARCH_TRIALS=200 python -m pytest tests/test_searches.py -n 0 -s -k whatever_is_killed is the long run.
    """
    many = TRIALS or 6
    if kind == "halving":
        rates = many // 2 if TRIALS else 3
        size = f"search.rates={rates}", "search.scales=1", f"search.rate_factor={100 ** (1 / many):.4f}"
        size = *size, "search.extend=0", f"method={'lora,vera' if TRIALS else 'lora'}"
    else:
        pytest.importorskip("optuna")
        size = f"search.trials={many // 2}", "search.startup=1", "method=lora"
    command = f"search={kind}", *size, f"model.weights={model}", "seed=0"
    undisturbed = tmp_path / "undisturbed"
    assert until_it_is_done(undisturbed, *command) == 1
    sweep, found = decided(undisturbed)
    assert sum(len(finding.trials) for finding in found) == (TRIALS if TRIALS and kind == "halving" else many // 2)
    outputs = partial(Ours.outputs, Ours(lambda arguments: 0, model))
    for workers in (1, 2) if TRIALS else (2,) if kind == "halving" else (1,):
        root = tmp_path / f"workers_{workers}"
        root.mkdir()
        calls = until_it_is_done(root, *command, f"hydra.launcher.workers={workers}", kills=KILLS)
        kills = len([*root.glob("struck_*")])
        print(f"{kind}, {workers} workers: {kills} kills, {calls} calls")
        assert kills == KILLS
        ours, same = decided(root)
        assert same == found
        assert ours.jobs == sweep.jobs
        for job in sweep.jobs:
            states = [Result.read(where / job.folder / "result.json").status for where in (root, undisturbed)]
            assert states[0] == states[1] in ("paused", "finished")
            if states == ["finished", "finished"]:
                assert outputs(root / job.folder) == outputs(undisturbed / job.folder)
    finished = [*undisturbed.glob("*/*/*/*/predictions.json.gz")]
    chosen = {undisturbed / run for finding in found for run in finding.trials[finding.chosen].runs}
    assert {path.parent for path in finished} == chosen  # no other run has seen a test example
    capfd.readouterr()
    assert until_it_is_done(undisturbed, *command) == 1  # nothing is left to do
    said = capfd.readouterr()
    assert said.err.count("already finished") == len(chosen)
    assert "to run" not in said.err
    for finding in found:
        assert f"{finding.metric} {finding.best:.4f}" in said.out
    shown = Console(file=io.StringIO(), width=250)
    shown.print(status(undisturbed))
    assert all(finding.stands in shown.file.getvalue() for finding in found)
    if kind == "halving":
        (part,) = load([undisturbed])
        for arm in arms(part.results):
            (finding,) = (f for f in found if f.label == f"method={arm.method}")
            assert [run.path.parent for run in arm.runs] == [undisturbed / finding.trials[finding.chosen].runs[0]]
            points = tried(arm, part.curves)
            rests = {str(run.steps) for run in part.results}  # at the rung between, all were promoted
            scores = [(trial.values[RATE], *of_rung) for trial in finding.trials for of_rung in trial.scores.items()]
            expected = {(rate, step, round(score, 9)) for rate, step, score in scores if step in rests}
            assert {(point.rate, str(point.steps), round(point.validation / 100, 9)) for point in points} == expected
            assert [point.rate for point in points if point.chosen] == [finding.trials[finding.chosen].values[RATE]]


def test_a_search_says_what_it_cannot_search(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def main(*overrides: str) -> int:
        first = [override for override in overrides if override == "-m"]
        rest = [override for override in overrides if override != "-m"]
        monkeypatch.setattr(sys, "argv", ["randlora", *first, *OWN_RATE, f"model.weights={model}", *rest])
        return cli.main()

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    here = f"run_root={tmp_path}"
    for overrides, reason in (
        (["search=grid"], "a search makes many runs; give it with -m"),
        (["-m", "search=grid", "seed=0,1", "hydra/sweeper=basic"], "a search makes many runs; give it with -m"),
        (["-m", "seed=0,1", "hydra/sweeper=search"], "give search=grid, search=halving or search=tpe instead"),
        (
            ["-m", "search=grid", "trainer.learning_rate=0.1"],
            "trainer.learning_rate is given, and the search decides it",
        ),
        (["-m", "search=halving", "trainer.stop_at=3"], "trainer.stop_at is given, and the search decides it"),
        (["-m", "search=grid", "method=lora", "method.alpha=1,2"], "(search.scales=1)"),
        (["-m", "search=grid", "search.rates=3,5"], "search.rates: a search is one"),
        (["-m", "search=grid", "seed=choice(0,1)", "search.rates=0"], "search.rates=0: must be a whole number of at"),
        (["-m", "search=halving", "search.min_steps=9"], "search.min_steps=9: a run has 10 steps"),
        (["-m", "search=grid", "resume=false"], "resume=false: every rung would begin again"),
        (["-m", "search=grid", "trainer.max_steps=interval(5,10)"], "a search takes lists of values"),
        (["-m", "search=grid", "method=lora", "method.rank=0"], "LoRA.rank=0: must be a whole number"),
        (["-m", "search=grid", "search.eta=3"], "search.eta: no such setting"),
    ):
        assert main(*overrides, here) == WRONG_SETTINGS, overrides
        said = capfd.readouterr().err
        assert reason in said, said
        assert said.count("error:") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main("-m", "search=grid", here) == WRONG_SETTINGS
    assert "start it without torchrun" in capfd.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    size = "search.rates=2", "search.scales=2", "method=lora,full", "seed=0,1"
    once = "search.eta=2", "search.finalists=1"
    assert main("-m", "search=halving", *once, *size, "dry_run=true", here) == FINISHED
    said = capfd.readouterr()
    # 4 trials for 3 steps, 2 for 2 more, 1 for 5 more; two seeds.
    assert "method=lora, method=full: 42 steps for each, compared after 3, 5, 10" in said.err
    assert said.out.count("│ digits") == 2 * 4 * 2
    assert not list(tmp_path.rglob("*.json"))
