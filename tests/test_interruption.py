"""Signals at every moment of a run, two processes in one folder, and what a run that was stopped leaves and goes on to.

Runs are forked, of a net that trains in milliseconds, and a stage is replaced by one that sends the signal: the moment
is exact.
"""

import gc
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import accelerate  # noqa: F401  so that the forked need not
import numpy as np
import pytest
import torch
import torch._dynamo  # which an optimiser imports
from safetensors.torch import load_file
from test_training import Pixels8, WithLoss, splits
from test_wandb import records as mirrored
from torch import nn

import randlora.finetune
import randlora.run
from randlora import cli, records
from randlora.data.loader import Split
from randlora.errors import BUSY, FINISHED, INTERRUPTED
from randlora.experiment import Experiment
from randlora.methods import LoRA
from randlora.models.base import Backbone, Model
from randlora.records import lock
from randlora.records.console import Console
from randlora.records.lock import Busy, Lock, Owner, living, started
from randlora.records.metrics import Row
from randlora.records.record import Record
from randlora.records.tensorboard import TensorBoard
from randlora.records.wandb import Wandb
from randlora.run import run
from randlora.signals import SIGNALS, STOP, Interrupted, StopRequest
from randlora.tasks.base import Budget, Splits
from randlora.training import Optimizer, Trainer
from randlora.training.checkpoint import Checkpoints
from randlora.training.evaluate import once


@dataclass(frozen=True)
class Net(Model):
    """Two linear maps."""

    kind: ClassVar[str] = "vision"

    def load(self) -> Backbone:
        return Backbone(nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 4)), "vision", 4)


class Exact(Pixels8):
    """Without noise: scores are those of the parameters."""

    def __call__(self, example):  # type: ignore[no-untyped-def]
        pixels = torch.from_numpy(np.asarray(example["image"], dtype=np.float32)).flatten() / 255
        return {"image": pixels, "label": example["label"]}


@dataclass(frozen=True)
class ZeroShot(WithLoss):
    """30 examples to train on, 10 to validate and 60 to test on; scored before training, too."""

    zero_shot: ClassVar[bool] = True

    def splits(self, backbone: Backbone, budget: Budget) -> Splits:
        all_ = splits(validation=10)
        scored = (Split(part.table, part.rows, Exact()) for part in (all_.validation, all_.test))
        return Splits(all_.train, *scored)


def experiment(root: Path, resume: bool | str = True, loggers: tuple = (), **changes: Any) -> Experiment:
    """8 steps; a step in two, its parameters scored; test examples in six batches."""
    settings = {
        "max_steps": 8, "batch_size": 8, "learning_rate": 0.05, "evaluation_batch_size": 10, "evaluate_every": 2,
        "select": "best", "log_every": 1, "device": "cpu", "save_minutes": None,
        "keep_adapters": changes.get("evaluate_every", 2) is not None,
    }  # fmt: skip
    trainer = Trainer(**settings | changes)  # type: ignore[arg-type]
    config = {
        "resume": resume, "shots": None, "fraction": None, "seed": 0, "predictions": True, "run_root": str(root),
        "tags": [],
    }  # fmt: skip
    task = ZeroShot("bars", None, {"train": 30, "test": 60})  # type: ignore[arg-type]
    return Experiment(
        LoRA(rank=2), Net("net"), task, trainer, Optimizer(), loggers, ["0", "3"], Budget(0, None, None), config
    )


def forked(act: Callable[[], int | None], seconds: int = 60) -> int:
    """The pid of a child that does it and ends with what it returns; it is killed after so many seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        gc.freeze()  # what was there before is not looked through again
        signal.alarm(seconds)
        code = act() or 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def code_of(child: int) -> int:
    """A child's exit code; the negative signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_code(*arguments: Any, **changes: Any) -> int:
    return run(experiment(*arguments, **changes), "as: given\n").code


def record_of(root: Path) -> dict:
    (path,) = root.rglob("result.json")
    return json.loads(path.read_text())


def lines_of(root: Path) -> list[dict]:
    (path,) = root.rglob("metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapter_of(root: Path) -> dict[str, torch.Tensor]:
    (path,) = root.rglob("adapter/adapter.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unbroken")
    assert code_of(forked(partial(run_code, root))) == FINISHED
    return root


class Moment(NamedTuple):
    """The first call of ``owner.name`` after `steps` steps, in which the signal comes, and what is kept of the run."""

    owner: type
    name: str
    number: int
    steps: int
    kept: str
    batch: int = 1  # of those that are predicted after these steps


MOMENTS = {
    "loading": Moment(Net, "load", signal.SIGTERM, 0, "nothing was begun"),
    "reading data": Moment(ZeroShot, "splits", signal.SIGUSR1, 0, "nothing was begun"),
    "zero-shot": Moment(ZeroShot, "predict", signal.SIGUSR2, 0, "nothing was begun", batch=2),
    "training": Moment(Record, "log", signal.SIGINT, 3, "checkpoint at step 4"),
    "saving": Moment(Checkpoints, "save", signal.SIGTERM, 3, "checkpoint at step 4"),
    "validation": Moment(ZeroShot, "predict", signal.SIGUSR1, 4, "checkpoint at step 4"),
    "final evaluation": Moment(ZeroShot, "predict", signal.SIGTERM, 8, "checkpoint at step 8", batch=5),
}


def interrupted_at(moment: Moment, root: Path, happens: Callable[[], None] | None = None) -> int:
    """The exit code of a run that gets the moment's signal; 98 if it predicts more than the batch that it came in.

    Or that something else happens to.
    """
    steps = calls = 0
    progress, call = Record.progress, getattr(moment.owner, moment.name)

    def count(record: Record, step: int, *rest: Any) -> None:
        nonlocal steps
        steps = step
        progress(record, step, *rest)

    def signalled(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += steps == moment.steps
        if calls == moment.batch and steps == moment.steps:
            os.kill(os.getpid(), moment.number) if happens is None else happens()
        return call(*arguments, **named)

    Record.progress = count  # type: ignore[method-assign]
    setattr(moment.owner, moment.name, signalled)
    code = run_code(root, save_every=3 if moment.owner is Checkpoints else None)
    return 98 if moment.name == "predict" and calls != moment.batch else code


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_is_recorded_and_gone_on_from(moment: str, tmp_path: Path, unbroken: Path) -> None:
    """Oracle of the end: the run that nothing stopped, to the bit. No second batch is scored after a signal."""
    number, kept = MOMENTS[moment].number, MOMENTS[moment].kept
    assert code_of(forked(partial(interrupted_at, MOMENTS[moment], tmp_path))) == INTERRUPTED
    record = record_of(tmp_path)
    assert record["status"] == "interrupted"
    assert record["error"].startswith(f"stopped by {signal.Signals(number).name}; {kept}: the same command")
    (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
    steps = [int(path.name.removeprefix("step_")) for path in sorted(folder.glob("checkpoints/step_*"))]
    assert steps[-1:] == [int(word) for word in kept.split() if word.isdigit()]
    assert records.state(folder) == json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert not (folder / "owner.json").exists()
    assert code_of(forked(partial(run_code, tmp_path))) == FINISHED
    assert record_of(tmp_path)["metrics"] == record_of(unbroken)["metrics"]
    ours, theirs = adapter_of(tmp_path), adapter_of(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    without_time = [[{**line, "time": 0} for line in lines_of(root)] for root in (tmp_path, unbroken)]
    assert without_time[0] == without_time[1]
    kept_adapters = [
        {path.parent.name: path.read_bytes() for path in root.rglob("adapters/*/adapter.safetensors")}
        for root in (tmp_path, unbroken)
    ]
    assert kept_adapters[0] == kept_adapters[1]
    assert sorted(kept_adapters[0]) == [f"step_000000{step}" for step in (2, 4, 6, 8)]


def test_what_is_finished_anyway_is_finished(tmp_path: Path) -> None:
    """A signal while the adapter is saved, after all that a signal could stop."""

    def signalled() -> int:
        before = randlora.finetune.save_adapter
        randlora.finetune.save_adapter = lambda *rest: os.kill(os.getpid(), signal.SIGTERM) or before(*rest)
        return run_code(tmp_path, keep_adapters=False)

    assert code_of(forked(signalled)) == FINISHED
    assert record_of(tmp_path)["status"] == "finished"


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_is_a_request_and_none_is_left_after_it(number: int) -> None:
    handlers = [signal.getsignal(other) for other in SIGNALS]
    with StopRequest() as outer:
        with outer:
            outer.check()
            os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=f"stopped by {signal.Signals(number).name}"):
            outer.check()
    assert handlers == [signal.getsignal(other) for other in SIGNALS]
    outer.check()


@pytest.mark.parametrize(("step", "kept"), [(1, "there was no checkpoint yet"), (6, "checkpoint at step 4")])
def test_a_second_interrupt_ends_at_once_with_a_true_record(step: int, kept: str, tmp_path: Path) -> None:
    """In a step that would never end."""

    def stuck() -> int:
        loss, calls = ZeroShot.loss, iter(range(1, 100))

        def interrupted_twice(*arguments: Any) -> Any:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(100)
            return loss(*arguments)

        ZeroShot.loss = interrupted_twice  # type: ignore[method-assign]
        return run_code(tmp_path, save_every=4)

    assert code_of(forked(stuck)) == INTERRUPTED
    record = record_of(tmp_path)
    assert record["status"] == "interrupted"
    assert record["error"].startswith(f"ended at once by a second SIGINT; {kept}: the same command")
    assert not list(tmp_path.rglob("owner.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_workers_at_work(
    number: int, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """As a terminal and a scheduler send it, which are not the workers' parent; batches are on their way."""

    def group() -> int:
        os.setsid()
        progress = Record.progress

        def signalled(record: Record, step: int, *rest: Any) -> None:
            if step == 3:
                sender = os.fork()
                if not sender:
                    signal.signal(number, signal.SIG_IGN)
                    os.killpg(0, number)
                    os._exit(0)
                os.waitpid(sender, 0)
                time.sleep(0.3)  # in which a worker that heard it would end
                assert [child.is_alive() for child in multiprocessing.active_children()] == [True]
            progress(record, step, *rest)

        Record.progress = signalled  # type: ignore[method-assign]
        return run_code(tmp_path, workers=1, max_steps=40, select="last", evaluate_every=None)

    assert code_of(forked(group)) == INTERRUPTED
    assert "checkpoint at step 3" in record_of(tmp_path)["error"]
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert "killed" not in errors


@dataclass
class Processes:
    """An accelerator of one of several processes; `others` is how many of them a signal has come to."""

    process_index: int
    num_processes: int
    others: float = 0
    asked: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        self.asked += 1
        return value + self.others


@pytest.mark.parametrize(("world", "batch"), [(2, 2), (3, 1), (4, 5), (1, 3)])
def test_all_processes_ask_equally_often_whatever_their_share(world: int, batch: int) -> None:
    """Or one would wait for the others for ever; five examples do not divide. A signal to another process counts."""
    split = Split(splits().test.table, np.arange(5), Exact())
    every = [Processes(rank, world) for rank in range(world)]
    rows = [
        [row for part in once(split, process, batch, 0, print) for row in part["row"].tolist()]  # type: ignore[arg-type]
        for process in every
    ]
    assert sorted(chain.from_iterable(rows)) == [0, 1, 2, 3, 4]
    asked = math.ceil(math.ceil(5 / world) / batch) if world > 1 else 0
    assert [process.asked for process in every] == [asked] * world
    for process in every:
        whole = once(split, process, batch, 0, print, shared=False)  # type: ignore[arg-type]
        assert torch.cat([part["row"] for part in whole]).tolist() == [0, 1, 2, 3, 4]
    elsewhere = Processes(0, 1, device=torch.device("meta"))
    assert next(once(split, elsewhere, batch, 0, print))["image"].is_meta  # type: ignore[arg-type]
    told = Processes(0, 2, others=1)
    with STOP, pytest.raises(Interrupted, match="stopped by a signal to another process"):
        next(once(split, told, batch, 0, print))  # type: ignore[call-overload]


def test_before_anything_is_removed_a_signal_leaves_all_as_it_was(tmp_path: Path) -> None:
    assert code_of(forked(partial(run_code, tmp_path, max_steps=1))) == FINISHED
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def early() -> int:
        with STOP:
            os.kill(os.getpid(), signal.SIGTERM)
            return run_code(tmp_path, False, max_steps=1)

    assert code_of(forked(early)) == INTERRUPTED
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == kept


def test_an_error_before_the_record_is_opened_leaves_nothing_and_one_in_opening_no_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no more threads")

    for owner, name in ((randlora.run, "Peers"), (Record, "_status")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(RuntimeError, match="no more threads"):
                run_code(tmp_path)
        assert list(tmp_path.rglob("*" if name == "Peers" else lock.OWNER)) == []


def test_what_a_killed_writer_left_in_a_run_folder_is_removed(tmp_path: Path) -> None:
    record = Record(tmp_path, {"run_root": ""}, (), Console())
    (tmp_path / ".draft_config.yaml.1").write_text("hal")
    record.open("", resume=True)
    record.close()
    assert list(tmp_path.glob(".draft_*")) == []


# Locks


def hold(root: Path, resume: bool, begin: int, end: int, say: int) -> int:
    """A run that begins when a byte comes, and, if it may, trains until `end` is closed."""

    def train(its: Experiment, *_: object) -> dict:
        (its.folder / "begun").write_text("")
        os.write(say, b"x")
        os.read(end, 1)
        raise RuntimeError("over")

    randlora.run.finetune = train
    randlora.run.commit = lambda: None
    os.read(begin, 1)
    return run_code(root, resume)


@pytest.mark.parametrize("how", ["together", "apart"])
def test_of_two_processes_in_a_folder_one_refuses(how: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """25 pairs each: resuming, beginning again, or one of each."""
    for case in range(25):
        root, (begin, start), (end, stop), (hear, say) = tmp_path / str(case), os.pipe(), os.pipe(), os.pipe()

        def child(resume: bool) -> int:
            os.close(stop)  # noqa: B023
            return hold(root, resume, begin, end, say)  # noqa: B023

        children = [
            forked(partial(child, resume)) for resume in ((True, True), (True, False), (False, False))[case % 3]
        ]
        os.write(start, b"x" if how == "apart" else b"xx")
        os.read(hear, 1)
        if how == "apart":
            os.write(start, b"x")
        refused, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == BUSY
        (folder,) = (path.parent for path in root.rglob("begun"))  # which a process that begins again would remove
        assert records.state(folder) == "running"
        os.close(stop)
        (owner,) = {*children} - {refused}
        assert code_of(owner) == 1
        assert f"another process (pid {owner} on {os.uname().nodename}) is running this run" in capfd.readouterr().err
        assert record_of(root)["error"] == "RuntimeError: over"
        for descriptor in (begin, start, end, hear, say):
            os.close(descriptor)


def test_of_two_processes_that_take_over_from_a_dead_one_one_refuses(tmp_path: Path) -> None:
    def take(begin: int, end: int) -> int:
        os.read(begin, 1)
        try:
            Lock(tmp_path).acquire()
        except Busy:
            return BUSY
        os.read(end, 1)
        os._exit(0)  # and leaves the lock of a dead process

    for _ in range(10):
        (begin, start), (end, stop) = os.pipe(), os.pipe()
        children = [forked(partial(take, begin, end)) for _ in range(2)]
        os.write(start, b"xx")
        refused, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == BUSY
        os.write(stop, b"x")
        assert [code_of(child) for child in children if child != refused] == [0]
        for descriptor in (begin, start, end, stop):
            os.close(descriptor)


def test_a_killed_owner_is_gone_at_once_and_its_record_dead(tmp_path: Path) -> None:
    def own() -> int:
        record = Record(tmp_path, {"run_root": ""}, (), records.record.Console())
        record.open("", resume=True)
        time.sleep(60)
        return 0

    child = forked(own)
    while not (tmp_path / "status.json").exists():
        time.sleep(0.01)
    assert records.state(tmp_path) == "running"
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "running"
    os.kill(child, signal.SIGKILL)
    while started(child):  # until the kernel has done it; nobody has waited for the process yet
        time.sleep(0.01)
    assert records.state(tmp_path) == "dead"
    Lock(tmp_path).acquire()
    os.waitpid(child, 0)


def write_owner(folder: Path, owner: Owner, age: float = 0) -> None:
    (folder / lock.OWNER).write_text(json.dumps(vars(owner)))
    os.utime(folder / lock.OWNER, (time.time() - age,) * 2)


def test_an_owner_is_alive_by_its_start_here_and_by_its_beat_elsewhere(tmp_path: Path) -> None:
    here = Owner.present()
    elsewhere = replace(here, host="other", machine="other")
    for owner, age, alive in (
        (here, 1e6, True),  # a beat that failed: the process is there
        (replace(here, started="1"), 0, False),  # an earlier process of the same id
        (elsewhere, 0, True),
        (elsewhere, lock.STALE_SECONDS - 20, True),
        (elsewhere, lock.STALE_SECONDS + 20, False),
    ):
        write_owner(tmp_path, owner, age)
        assert (living(tmp_path) == owner) is alive, (owner, age)
        if alive:
            with pytest.raises(Busy, match=f"pid {os.getpid()} on {owner.host}"):
                Lock(tmp_path).acquire()
        else:
            taken = Lock(tmp_path)
            taken.acquire()
            assert living(tmp_path) == here
            taken.release()
            assert living(tmp_path) is None
    (tmp_path / lock.OWNER).write_text("{")
    with pytest.raises(Busy):
        Lock(tmp_path).acquire()
    assert [path.name for path in tmp_path.iterdir() if path.name != lock.MUTEX] == [lock.OWNER]


def test_an_owner_beats_until_it_gives_the_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    owner, path = Lock(tmp_path), tmp_path / lock.OWNER
    owner.acquire()
    os.utime(path, (0, 0))
    while not path.stat().st_mtime:
        time.sleep(0.01)
    owner.release()
    path.write_text("another's")
    time.sleep(0.05)
    os.utime(path, (0, 0))
    time.sleep(0.1)
    assert path.stat().st_mtime == 0


@pytest.mark.parametrize("moment", ["training", "validation", "final evaluation"])
def test_a_process_whose_folder_was_taken_over_stops_and_writes_no_more(
    moment: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """It slept, say, and a process on another machine that saw no beat is now the owner."""
    folder, left = experiment(tmp_path, save_every=3).folder, dict[Path, bytes]()

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def take_over() -> None:
        write_owner(folder, replace(Owner.present(), host="other", machine="other"))
        left.update(content())

    def taken_over() -> int:
        code = interrupted_at(MOMENTS[moment], tmp_path, take_over)
        assert left
        assert content() == left
        return code

    assert code_of(forked(taken_over)) in (INTERRUPTED, 98)
    assert "on other) runs this run now" in capfd.readouterr().err


# Records


def test_a_damaged_result_is_set_aside(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert code_of(forked(partial(run_code, tmp_path, max_steps=1))) == FINISHED
    (path,) = tmp_path.rglob("result.json")
    path.write_text(path.read_text()[:100])
    damaged = path.read_text()
    assert code_of(forked(partial(run_code, tmp_path, max_steps=1))) == FINISHED
    assert path.with_name("result.json.damaged").read_text() == damaged
    assert "it is now result.json.damaged" in capfd.readouterr().err
    assert record_of(tmp_path)["status"] == "finished"


@pytest.mark.parametrize("damage", ["shorter", "removed", "none"])
def test_a_run_whose_adapter_is_damaged_has_not_finished(
    damage: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert code_of(forked(partial(run_code, tmp_path, max_steps=1))) == FINISHED
    (path,) = tmp_path.rglob("adapter/adapter.safetensors")
    content = path.read_bytes()
    if damage == "shorter":
        path.write_bytes(content[:-1])
    elif damage == "removed":
        path.unlink()
    capfd.readouterr()
    assert code_of(forked(partial(run_code, tmp_path, max_steps=1))) == FINISHED
    said = capfd.readouterr().err
    assert ("already finished" in said) is (damage == "none")
    assert ("the run had finished, but" in said) is (damage != "none")
    assert path.read_bytes() == content


def test_the_log_goes_on_as_the_checkpoint_has_it(tmp_path: Path) -> None:
    """Rows of lost steps, torn lines and damage are gone, the other rows are to the letter as they were."""
    record = Record(tmp_path, {}, [], Console())
    record.begin([])
    record.log({"train/loss": 0.5}, 1)
    record.log({"train/loss": float("nan"), "count": 4}, 2)
    kept = record.logged()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(kept)
    record.log({"train/loss": 0.1}, 3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 2.5, "train/loss": 0.6}\n{"step": 4, "ti')
    again = Record(tmp_path, {}, [], Console())
    again.begin(kept[:2])
    again.log({"train/loss": 0.1}, 3)
    rows = [Row.of(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row.step, row.metrics.get("train/loss")) for row in rows[::2]] == [(1, 0.5), (3, 0.1)]
    assert np.isnan(rows[1].metrics["train/loss"])
    assert rows[1].metrics["count"] == 4


def test_mirrors_have_every_step_once_after_a_kill(tmp_path: Path) -> None:
    """Oracles: TensorBoard's reader, and W&B's file. Killed at step 7, with a checkpoint of step 6."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def attempt(kill: bool) -> int:
        if kill:
            progress = Record.progress
            Record.progress = lambda record, step, *rest: (  # type: ignore[method-assign]
                os.kill(os.getpid(), signal.SIGKILL) if step == 7 else progress(record, step, *rest)
            )
        return run_code(tmp_path, True, (Wandb(mode="offline"), TensorBoard()), save_every=3, keep_last=1)

    assert code_of(forked(partial(attempt, True))) == -signal.SIGKILL
    assert [line["step"] for line in lines_of(tmp_path) if "train/loss" in line] == [*range(1, 8)]
    assert code_of(forked(partial(attempt, False))) == FINISHED
    expected = {line["step"]: line["train/loss"] for line in lines_of(tmp_path) if "train/loss" in line}
    assert [line["step"] for line in lines_of(tmp_path) if "train/loss" in line] == [*range(1, 9)]
    (events,) = tmp_path.rglob("tensorboard")
    scalars = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [*range(1, 9)]
    assert [scalar.value for scalar in scalars] == pytest.approx([*expected.values()])
    losses: dict[int, float] = {}
    for record in mirrored(tmp_path):
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in items:
            assert items["_step"] not in losses
            losses[items["_step"]] = items["train/loss"]
    assert losses == pytest.approx(expected)


def test_a_signal_before_the_first_import_is_recorded_and_ends_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def early() -> int:
        monkeypatch.setattr(cli, "register_resolvers", lambda: (os.kill(os.getpid(), signal.SIGUSR1), register())[1])
        monkeypatch.setattr(sys, "argv", ["randlora", "-m", "seed=0,1", f"run_root={tmp_path}"])
        return cli.main()

    register = cli.register_resolvers
    monkeypatch.chdir(tmp_path)
    assert code_of(forked(early)) == INTERRUPTED
    assert record_of(tmp_path)["error"].startswith("stopped by SIGUSR1; nothing was begun")
