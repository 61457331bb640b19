"""Sweeps: what a run that dies takes with it, which is nothing, and what the same command then does.

RANDLORA_SWEEP_RUNS=60 python -m pytest tests/test_sweeps.py -n 0 -s -k storm is the long run.
"""

import importlib
import io
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from rich.console import Console
from test_interruption import code_of, forked

import randlora.run
from conftest import REPOSITORY, settings
from randlora import cli
from randlora.analysis.campaign_programs import _COMMON, Ours, prepare
from randlora.errors import BUSY, FINISHED, INTERRUPTED, WRONG_SETTINGS
from randlora.experiment import Experiment
from randlora.records.lock import Lock, living
from randlora.records.metrics import Row
from randlora.records.record import Record
from randlora.records.result import Result
from randlora.signals import STOP
from randlora.sweeps.launcher import Local
from randlora.sweeps.planning import Planned, complaints, seconds_per_step
from randlora.sweeps.pool import Pool
from randlora.sweeps.progress import Display, Progress, duration, progress
from randlora.sweeps.status import status
from randlora.sweeps.sweep import NAME, TO_DO, Job, Standing, Sweep, standing

RUNS = int(os.environ.get("RANDLORA_SWEEP_RUNS", 7))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("vit"))


def fail() -> None:
    raise KeyError("planted")


def exhaust() -> None:
    raise MemoryError


def until_told() -> None:
    """Waits, a minute at most, until this run is asked to stop."""
    deadline = time.monotonic() + 60
    while not STOP.came and time.monotonic() < deadline:
        time.sleep(0.01)


def orphan() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    until_told()


def stop() -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    until_told()


def stuck() -> None:
    """In a step that would never end."""
    for _ in range(2):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(1)
    time.sleep(100)


FAULTS: Mapping[str, Callable[[], None]] = {
    "exception": fail,
    "exit": lambda: os._exit(7),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory": exhaust,
    "launcher": orphan,
    "stop": stop,
    "stuck": stuck,
}
Plan = Mapping[int, tuple[str, int]]  # by seed a fault, and the step that it comes at, the first time alone


def strike(root: Path, plan: Plan) -> None:
    """From now on the runs of this process and its forks have these faults, and note that they finished."""
    progress, finetune = Record.progress, randlora.run.finetune

    def struck(record: Record, step: int, *rest: Any) -> None:
        seed = record.config["seed"]
        fault, at = plan.get(seed, ("", 0))
        noted = root / f"struck_{seed}"
        progress(record, step, *rest)
        if step == at and not noted.exists():
            noted.touch()
            FAULTS[fault]()

    def counted(experiment: Any, *rest: Any) -> Any:
        ended = finetune(experiment, *rest)
        with (root / "done").open("a") as file:
            file.write(f"{experiment.budget.seed}\n")
        return ended

    Record.progress, randlora.run.finetune = struck, counted  # type: ignore[method-assign]


def launched(root: Path, plan: Plan, *overrides: str) -> int:
    """A sweep's command in this process.

    `root` gets files: struck_SEED, done with a line for each run that finished, and objectives as a sweeper has them.
    """
    launch = Local.launch
    strike(root, plan)

    def noted(launcher: Local, *jobs: Any, **first: int) -> Any:
        returns = launch(launcher, *jobs, **first)
        (root / "objectives").write_text(json.dumps([returned.return_value for returned in returns]))
        return returns

    Local.launch = noted  # type: ignore[method-assign]
    root.mkdir(exist_ok=True)
    sys.argv = ["randlora", "-m", *_COMMON, f"run_root={root}", "trainer.save_every=2", *overrides]
    return cli.main()


def sweep_of(root: Path) -> Sweep:
    (path,) = root.glob(f"sweeps/*/{NAME}")
    return Sweep.read(path)


def states(root: Path) -> list[str]:
    """Of the jobs, once no process runs one of them any more."""
    sweep = sweep_of(root)
    folders = [root / job.folder for job in sweep.jobs]
    deadline = time.monotonic() + 60
    while any(map(living, folders)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [standing(folder).state for folder in folders]


def shown(root: Path) -> str:
    """What `randlora status` prints, without frames and on one line."""
    console = Console(file=io.StringIO(), width=250)
    console.print(status(root))
    return re.sub(r"[\s│]+", " ", console.file.getvalue())


def test_a_storm_takes_nothing_with_it(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Oracle: the sweep that nothing disturbed. The launcher is killed in the first two calls."""
    rng = Random(20)
    seeds = [*range(RUNS)]
    early = rng.sample(seeds[: RUNS // 2 + 1], 4 * max(1, RUNS // 15))
    plan = {seed: (fault, rng.randint(1, 7)) for seed, fault in zip(early, [*FAULTS][:4] * RUNS, strict=False)}
    # The last one starts when another has ended, so that the two never run at once.
    plan |= {RUNS // 2 + 1: ("launcher", 3), RUNS - 1: ("launcher", 4)}
    command = (
        f"model.weights={model}", "method=lora", f"seed={','.join(map(str, seeds))}", "hydra.launcher.workers=2",
    )  # fmt: skip
    undisturbed, root = tmp_path / "undisturbed", tmp_path / "runs"
    assert code_of(forked(partial(launched, undisturbed, {}, *command), 600)) == FINISHED
    failures = {seed for seed, (fault, _) in plan.items() if fault in ("exception", "memory")}
    for call in ("first", "second"):
        assert code_of(forked(partial(launched, root, plan, *command), 600)) == -signal.SIGKILL
        known = states(root)
        said = capfd.readouterr().err
        assert {seed for seed, state in enumerate(known) if state in ("failed", "out_of_memory")} == failures
        assert ("to do" if call == "first" else "interrupted") in known
        assert [known[seed] for seed in seeds if plan.get(seed, ("",))[0] in ("exit", "kill")].count("dead") == (
            len(failures) if call == "first" else 0
        )
        table = shown(root)
        assert all(f" {count} {state}" in table for state, count in Counter(known).items())
        assert (f"{len(failures)} have failed, which retry=true runs again" in said) is (call == "second")
    assert code_of(forked(partial(launched, root, plan, *command, "retry=true"), 600)) == FINISHED
    assert states(root) == ["finished"] * RUNS
    said = capfd.readouterr()
    assert f"{RUNS} finished" in said.err
    assert said.out.count("│ finished │") == RUNS
    assert sorted(map(int, (root / "done").read_text().split())) == seeds
    outputs = partial(Ours.outputs, Ours(lambda arguments: 0, model))
    for ours, theirs in zip(sweep_of(root).jobs, sweep_of(undisturbed).jobs, strict=True):
        assert ours == theirs
        assert outputs(root / ours.folder) == outputs(undisturbed / theirs.folder)
    scores = [Result.read(root / job.folder / "result.json").validation for job in sweep_of(root).jobs]
    assert json.loads((root / "objectives").read_text()) == scores


@pytest.mark.parametrize(("fault", "reason"), [("stop", "stopped by SIGTERM"), ("stuck", "ended at once by a second")])
def test_a_sweep_that_is_asked_to_stop_stops_its_runs(
    fault: str, reason: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    command = f"model.weights={model}", "method=lora", "seed=0,1"
    assert code_of(forked(partial(launched, tmp_path, {0: (fault, 4)}, *command))) == INTERRUPTED
    assert states(tmp_path) == ["interrupted", TO_DO]
    first, _ = sweep_of(tmp_path).jobs
    error = Result.read(tmp_path / first.folder / "result.json").error or ""
    assert error.startswith(reason)
    assert re.search("checkpoint at step [24]: the same command goes on", error)
    assert f"interrupted vit_tiny lora {Path(first.folder).name} step 4/10" in shown(tmp_path).replace(" digits", "")
    assert ("1 interrupted, 1 to do" in capfd.readouterr().err) is (fault == "stop")


def test_all_jobs_are_checked_before_one_starts_and_a_dry_run_is_one_table(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Oracle of the counts: rank 2 at three matrices of 16 × 16 and two of 16 and 32."""

    def main(*overrides: str) -> int:
        monkeypatch.setattr(sys, "argv", ["randlora", "-m", f"run_root={tmp_path / 'runs'}", *overrides])
        return cli.main()

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert main("task=cars,dtd,mnist,svhn", "seed=0,1", f"data_root={tmp_path}") == WRONG_SETTINGS
    (said,) = capfd.readouterr().err.splitlines()
    assert f"{tmp_path}/cars has no train.parquet" in said
    assert "(2 of 8 jobs), and 6 more for 3 other reasons, the first job of each: " in said
    assert "each: task=dtd seed=0; task=mnist seed=0; " in said
    assert not list(tmp_path.rglob("sweep.json"))
    dry = *_COMMON, f"model.weights={model}", "method=lora", "method.rank=2", "dry_run=true", "trainer.max_steps=5,10"
    assert main(*dry) == FINISHED
    out = capfd.readouterr().out
    rows = re.findall(r"│ trainer.max_steps=(\d+) *│ digits │ vit_tiny │ lora *│ *([\d,]+) │ *([\d,]+) │ *(\d+) │", out)
    count = f"{2 * (3 * (16 + 16) + 2 * (16 + 32)):,}"
    assert rows == [("5", count, "170", "5"), ("10", count, "170", "10")]
    assert not list(tmp_path.rglob("status.json"))
    with pytest.raises(SystemExit) as end:
        sys.exit(main(*dry, "hydra.launcher.workers=0"))
    assert end.value.code == WRONG_SETTINGS
    assert "hydra.launcher.workers=0: must be a whole number of at least 1" in capfd.readouterr().err


def test_a_run_that_another_process_is_at_is_tried_last_and_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Here this one; and what another sweep of the same runs has finished is skipped."""
    command = *_COMMON, f"model.weights={model}", "method=lora", "trainer.save_every=2", f"run_root={tmp_path}"
    busy, free = (Experiment.from_config(settings(*command, f"seed={seed}")).folder for seed in (0, 1))
    busy.mkdir(parents=True)
    lock = Lock(busy)
    lock.acquire()
    assert code_of(forked(partial(launched, tmp_path, {}, *command, "seed=0,1"))) == BUSY
    lock.release()
    said = capfd.readouterr().err
    assert re.search(r"seed=1: finished.*\nseed=0: running: process \d+ on ", said)
    assert f"process {os.getpid()} on" in said
    assert code_of(forked(partial(launched, tmp_path, {}, *command, "seed=0,1,1"))) == FINISHED
    said = capfd.readouterr().err
    assert "job 2 (seed=1) is the same run as job 1" in said
    assert "seed=1: already finished" in said
    assert "1 to run, 10 steps; by finished runs like these about " in said
    assert len(list(tmp_path.glob(f"sweeps/*/{NAME}"))) == 2
    first, second, third = json.loads((tmp_path / "objectives").read_text())
    assert (first, second) == tuple(Result.read(folder / "result.json").validation for folder in (busy, free))
    assert third == second
    (seconds,) = seconds_per_step(tmp_path).values()
    results = [Result.read(folder / "result.json").seconds_per_step or 0 for folder in (busy, free)]
    assert seconds == pytest.approx(sum(results) / 2)
    for folder, code, said in ((tmp_path, FINISHED, "2 finished"), (tmp_path / "none", WRONG_SETTINGS, "no run below")):
        monkeypatch.setattr(sys, "argv", ["randlora", "status", str(folder)])
        assert cli.main() == code
        assert said in "".join(capfd.readouterr())


def test_few_reasons_are_a_sentence_each() -> None:
    jobs = [Planned(number, [], None, f"seed={number}", error=error) for number, error in enumerate("aab")]  # type: ignore[arg-type]
    assert complaints(jobs) == ["a (2 of 3 jobs)", "b (1 of 3 jobs)"]


def test_a_sweep_is_known_by_what_was_asked_for(tmp_path: Path) -> None:
    """Not by where its data and records lie, who watches, or the order; what has changed beneath is said."""
    sweep = Sweep(tmp_path, ["seed=0,1", "method=lora"], {"params": None}, [Job("seed=0", "a/b/c/1", 5)], "abc", 0)
    for command in (
        ["method=lora", "seed=0,1"],
        [*sweep.command, "run_root=x", "retry=true", "logger=wandb", "+logger.wandb.mode=offline", "resume=false"],
    ):
        assert Sweep(tmp_path, command, {"params": None}).id == sweep.id
    for command, sweeper in ((["seed=0,1,2", "method=lora"], {"params": None}), (sweep.command, {"params": {"a": 1}})):
        assert Sweep(tmp_path, command, sweeper).id != sweep.id
    sweep.write()
    assert Sweep.read(sweep.folder / NAME) == sweep
    assert sweep.changes(sweep) == []
    now = Sweep(tmp_path, sweep.command, sweep.sweeper, [Job("seed=0", "a/b/c/2", 5)], "abd")
    commit, settings = sweep.changes(now)
    assert "commit was abc, and is abd now" in commit
    assert "the settings behind 1 jobs have changed" in settings
    assert [job.folder for job in sweep.with_jobs([*now.jobs, Job("seed=1", "e", 5)]).jobs] == ["a/b/c/2", "e"]


@pytest.mark.parametrize(("gpus", "given"), [("3, 5", ["3 2", "5 2", "3 2"]), ("", [" 2"] * 3)])
def test_each_process_has_a_gpu_and_a_share_of_the_threads(
    gpus: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without GPUs the parent imports what they have; with some it must not, since imports may touch one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)  # which nothing here needs
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        pool = Pool(3)

    def act(number: int) -> int:
        importlib.import_module("colorsys")
        (tmp_path / str(number)).write_text(f"{os.environ['CUDA_VISIBLE_DEVICES']} {torch.get_num_threads()}")
        return number

    for number in range(3):
        assert pool.free
        pool.start(number, partial(act, number), tmp_path / "log")
    assert not pool.free
    codes: dict[int, int] = {}
    while pool.running:
        codes |= dict(pool.ended(1))
    pool.close()
    assert codes == {0: 0, 1: 1, 2: 2}
    assert [(tmp_path / str(number)).read_text() for number in range(3)] == given
    assert ("colorsys" in sys.modules) is (gpus == "")


def test_progress_is_that_of_this_attempt(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Ten steps a second before, two now."""
    assert progress(tmp_path) == Progress()
    (tmp_path / "status.json").write_text('{"status": "running", "time": 1000.0, "steps": 100}')
    assert (str(progress(tmp_path)), standing(tmp_path)) == ("step 0/100", Standing("dead"))
    rows = [Row(step, 100 + step / 10, {}) for step in range(1, 21)] + [
        Row(step, 1000 + step / 2, {}) for step in range(21, 41)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(row.line() for row in rows) + '{"step": 41, "ti')
    known = progress(tmp_path)
    assert known == Progress(40, 100, 2.0)
    assert (known.seconds_left, str(known)) == (30.0, "step 40/100  2 steps/s  30 s left")
    display = Display(jobs=3, steps=300, seconds_between_lines=0)
    display.end(100)
    display.show({"seed=1": tmp_path})
    said = capsys.readouterr().err
    assert re.fullmatch(r"1 of 3 jobs, 140 of 300 steps, 0 s left; seed=1  step 40/100  2 steps/s  30 s left\n", said)
    assert [duration(seconds) for seconds in (9.7, 99, 100, 5900, 7260, 172800, 183600)] == [
        "10 s", "99 s", "2 min", "98 min", "2 h 1 min", "2 d 0 h", "2 d 3 h",
    ]  # fmt: skip


def test_a_sweep_goes_on_after_a_failure_and_skips_what_is_done(
    tmp_path: Path, program: Callable[..., int], capfd: pytest.CaptureFixture
) -> None:
    short = ("trainer.max_steps=3", "trainer.batch_size=8", "task.test_size=20", "task.validation_size=10", "shots=2")
    line = [REPOSITORY / "train.py", "-m", "method.rank=6,0,12", "seed=0", f"run_root={tmp_path}", *short]
    assert program(*line) == 2
    assert capfd.readouterr().err.count("RandLoRA.rank=0") == 1
    assert len(list(tmp_path.rglob("result.json"))) == 2
    assert program(*line) == 2
    assert capfd.readouterr().err.count("already finished") == 2
