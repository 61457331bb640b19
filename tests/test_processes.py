"""Several processes: they train what one does, end together when one fails, and say why."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from test_training import TASK, Quiet, StopsAt, splits
from torch import distributed, nn

import randlora
from conftest import REPOSITORY, Attention, settings
from randlora.config import build
from randlora.errors import FAILED, SettingsError
from randlora.experiment import Experiment
from randlora.integrity import read_json
from randlora.methods import Method, RandLoRA
from randlora.records.result import Result
from randlora.run import run
from randlora.tasks.base import Bound
from randlora.training import Interrupted, Optimizer, Trainer, processes
from randlora.training.loop import Loop
from randlora.training.processes import REFUSED, Peers, lost

METHODS = sorted(path.stem for path in (REPOSITORY / "configs" / "method").glob("*.yaml"))
ADAPTED = ["layers.*_proj"]
BROKEN_OFF = ("randlora", "edora", "full")  # EDoRA keeps fixed tensors, too
STEPS = 6


class Net(nn.Module):
    """16 pixels, one attention of width 64 that every method can adapt, four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 64), nn.LayerNorm(64)
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": Attention(64, fused=False)})])
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        return self.head(x + self.layers[0]["attn"](x))


@cache
def method_of(name: str) -> Method:
    if name == "kronecker":
        return RandLoRA(basis="kronecker")
    method = build(settings(f"method={name}")["method"])
    return replace(method, ranks={"layers.0": 3}) if name == "gelora" else method  # else of the data


def train(name: str, folder: Path, observer: Quiet | None = None) -> tuple[list[float], dict[str, float], torch.Tensor]:
    """Every step's loss and gradient's norm, one validation example's scores, and what is trained.

    Micro-batches of 3, then the rest. AdamW's epsilon is large, so that it neither hides a gradient's scale nor makes
    a rounding error of a tiny gradient a difference of a whole step.
    """
    torch.manual_seed(0)
    net, observer, data = Net(), observer or Quiet(), splits(validation=1)
    method = method_of(name)
    randlora.adapt(net, method, ADAPTED)
    net.head.requires_grad_(True)
    trainer = Trainer(max_steps=STEPS, batch_size=8, micro_batch_size=3, learning_rate=0.01, log_every=1, device="cpu")
    accelerator = trainer.accelerator()
    bound = Bound(net, None if name == "full" else net.head)
    trainer.fit(
        TASK, bound, data, seed=1, folder=folder, observer=observer, accelerator=accelerator,
        optimizer=Optimizer("AdamW", eps=1e-3),
    )  # fmt: skip
    lines = [line for line in observer.metrics if "train/loss" in line]
    losses = [line[key] for key in ("train/loss", "train/gradient_norm") for line in lines]
    scores = trainer.evaluate(TASK, net, data.validation, observer, accelerator)
    return losses, scores, torch.cat([p.detach().flatten() for p in bound.trained().values()])


def of_two(work: Callable[[], object], patience: float = 120) -> list[int]:
    """Does `work` in two forked processes that a launcher would have started; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def begin(rank: int) -> None:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked
        os.environ.update(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        code = 99
        try:
            code = work() or 0  # type: ignore[assignment]
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # torch 2.14 with gloo now and then aborts while Python shuts down, all work done

    started = [multiprocessing.get_context("fork").Process(target=begin, args=(rank,)) for rank in (0, 1)]
    for process in started:
        process.start()
    started[0].join(patience)  # who writes the record, and waits for the other
    started[1].join(1.0 if patience < 60 else patience)
    for process in started:
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def test_two_processes_train_what_one_does_by_every_method(tmp_path: Path) -> None:
    """gloo on the CPU; a share of 4 examples is 3 and 1, an epoch of 30 ends within a batch, and one validates nothing.

    A run stopped on two processes goes on on one, and the other way round.
    """

    def work() -> None:
        from accelerate import PartialState

        results = {}
        for name in [*METHODS, "kronecker"]:
            losses, scores, trained = train(name, tmp_path / name)
            results[name] = [losses, scores, trained.tolist()]
        for name in BROKEN_OFF:
            with pytest.raises(Interrupted):
                train(name, tmp_path / f"{name}_from_two", StopsAt(3))
            results[f"{name} resumed"] = train(name, tmp_path / f"{name}_from_one")[2].tolist()
        state = PartialState()
        assert state.num_processes == 2
        if state.is_main_process:
            (tmp_path / "results.json").write_text(json.dumps(results))
        state.wait_for_everyone()

    alone = {name: train(name, tmp_path / "alone" / name) for name in [*METHODS, "kronecker"]}
    for name in BROKEN_OFF:
        with pytest.raises(Interrupted):
            train(name, tmp_path / f"{name}_from_one", StopsAt(3))
    assert of_two(work) == [0, 0]
    results = json.loads((tmp_path / "results.json").read_text())
    for name, (losses, scores, trained) in alone.items():
        assert len(losses) == 2 * STEPS
        assert results[name][0] == pytest.approx(losses, rel=1e-6, abs=1e-6), name
        assert results[name][1] == pytest.approx(scores, abs=1e-6), name
        torch.testing.assert_close(torch.tensor(results[name][2]), trained, rtol=1e-6, atol=1e-6, msg=name)
        if name in BROKEN_OFF:
            on_one = train(name, tmp_path / f"{name}_from_two")[2]
            for other in (on_one, torch.tensor(results[f"{name} resumed"])):
                torch.testing.assert_close(other, trained, rtol=1e-6, atol=1e-6, msg=name)


def test_two_processes_go_by_what_the_first_chooses_from_training_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GeLoRA's ranks; also where the second does not see the first's files, and a run goes on. Oracle: one process."""
    overrides = [
        "method=gelora", "method.examples=16", "model=clip_tiny_vision", "shots=4", "trainer.max_steps=4",
        "trainer.batch_size=8", "trainer.device=cpu", "task.validation_size=10", "task.test_size=20",
    ]  # fmt: skip
    first = tmp_path / "two"

    def start(root: Path, *more: str) -> int:
        if os.environ.get("RANK") == "1":
            monkeypatch.setattr("randlora.finetune.read_json", lambda path: read_json(path.with_name("elsewhere")))
        return run(Experiment.from_config(settings(f"run_root={root}", *overrides, *more)), "as: given\n").code

    def kept(root: Path) -> Result:
        (path,) = root.rglob("result.json")
        return Result.read(path)

    assert start(tmp_path / "one") == 0
    assert of_two(lambda: start(first)) == [0, 0]
    one, two = kept(tmp_path / "one"), kept(first)
    assert set(one.calibrated) == {"ranks"}
    assert two.calibrated == one.calibrated
    assert two.metrics == pytest.approx(one.metrics, rel=1e-5)
    next(first.rglob("result.json")).unlink()
    monkeypatch.setattr("randlora.methods.gelora.hidden_states", None)  # a second choice would end in an error
    assert of_two(lambda: start(first)) == [0, 0]
    assert kept(first).calibrated == one.calibrated


def broken_run(root: Path, fails: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Result:
    """The record of a run of two processes that wait for each other, of which the second first does what `fails`."""
    experiment = Experiment.from_config(settings(f"run_root={root}", "trainer.device=cpu", *overrides))

    def train(experiment, record, accelerator):  # type: ignore[no-untyped-def]
        if not accelerator.is_main_process:
            fails()
        accelerator.reduce(torch.ones(1))
        return {"status": "finished"}

    monkeypatch.setattr("randlora.run.finetune", train)
    codes = of_two(lambda: run(experiment, "as: given\n").code, patience=15)
    assert codes[0] == FAILED
    assert codes[1] != 0
    return Result.read(experiment.folder / "result.json")


def key_error() -> None:
    raise KeyError("pixels")


def test_one_process_failure_is_recorded_with_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = broken_run(tmp_path, key_error, monkeypatch)
    assert (result.status, result.error) == ("failed", "process 1 of 2: KeyError: 'pixels'")


def test_a_failure_is_recorded_while_nothing_ends_the_wait_for_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with NCCL: the connection stays, so that the first process hears of it by the note alone."""
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr("gc.collect", lambda: None if os.environ["RANK"] == "0" else time.sleep(600))
    result = broken_run(tmp_path, key_error, monkeypatch)
    assert (result.status, result.error) == ("failed", "process 1 of 2: KeyError: 'pixels'")


def test_a_stuck_process_is_waited_for_no_longer_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = broken_run(tmp_path, lambda: time.sleep(600), monkeypatch, "trainer.peer_timeout=0.02")
    assert result.status == "failed"
    assert result.error.startswith("process 0 of 2 waited 0.02 minutes for another one and gave up: it is stuck")


def test_a_killed_process_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = broken_run(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
    assert result.status == "failed"
    assert result.error.startswith("process 0 of 2 lost another one, which ended without a word: was it killed?")


ON = {name: "true" if "_USE_" in name else "4" for name in REFUSED} | {
    "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
}  # fmt: skip


@pytest.mark.parametrize("name", ON)
def test_what_accelerates_environment_adds_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ON:  # as `accelerate launch` sets them where nothing is asked for
        monkeypatch.setenv(other, {"4": "1", "true": "false"}.get(ON[other], "no"))
    Trainer(device="cpu").accelerator()
    monkeypatch.setenv(name, ON[name])
    with pytest.raises(SettingsError, match=f"{name}={ON[name]}: .* is not supported, because .*; unset it, or launch"):
        Trainer(device="cpu").accelerator()


class Second:
    """Stands where the accelerator of the second of three processes does."""

    process_index, num_processes = 1, 3


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("[gloo] Timed out waiting 60000ms\nfor recv"), "process 1 of 3 waited 7 minutes .* slower than"),
        (distributed.DistError("Watchdog timeout"), r"process 1 of 3 waited 7 minutes .*\(Watchdog timeout\)$"),
        (RuntimeError("Gloo: Connection closed by peer\nat x"), r"process 1 of 3 lost .* killed\? \(Gloo: .* peer\)$"),
        (distributed.DistError("broken"), r"process 1 of 3 lost another one, .* killed\? \(broken\)$"),
        (RuntimeError("shapes differ"), None),
        (ValueError("gloo"), None),
    ],
)
def test_what_an_error_says_of_another_process(error: Exception, says: str | None) -> None:
    sentence = lost(error, Second(), 7.0)  # type: ignore[arg-type]
    assert sentence is says or re.search(says or "$^", sentence or "")
    assert lost(error, type("Alone", (), {"process_index": 0, "num_processes": 1})(), 7.0) is None


def test_the_first_failure_of_all_processes_is_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever notes first; the note's own process and those that ended alike say it as it is."""
    store = distributed.HashStore()
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)

    def peers(rank: int, run: str = "a", world: int = 3) -> Peers:
        return Peers(type("Process", (), {"process_index": rank, "num_processes": world})(), run)  # type: ignore[arg-type]

    stopped, failed = {"status": "interrupted", "error": "stopped"}, {"status": "failed", "error": "KeyError"}
    assert peers(0).first(stopped) == stopped  # and leaves no note
    assert peers(1).first(failed) == failed
    elsewhere = {"status": "failed", "error": "process 1 of 3: KeyError"}
    assert peers(0).first({"status": "failed", "error": "lost"}) == elsewhere
    assert peers(0).first(stopped) == elsewhere
    assert peers(0).first({}) == elsewhere
    assert peers(1).first({"status": "failed", "error": "another"}) == failed
    assert peers(2).first(failed) == failed
    assert peers(0, run="b").first(stopped) == stopped
    assert peers(0, world=1).first(failed) == failed
    assert peers(0, world=1).store is None
    assert peers(0, world=2).store is store


@pytest.mark.parametrize("kind", ["NO", "MULTI_GPU", "FSDP"])
def test_accelerate_is_asked_for_plain_data_parallelism(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed buffers are not sent, a peer is waited for as long as asked, and what else it may bring is refused."""
    asked: dict = {}

    class Recorder:
        distributed_type = type("Kind", (), {"value": kind})

        def __init__(self, **options: object) -> None:
            asked.update(options)

    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    if kind == "FSDP":
        with pytest.raises(SettingsError, match="accelerate brings FSDP, and only plain data parallelism"):
            processes.processes(True, 2.5)
    else:
        assert isinstance(processes.processes(True, 2.5), Recorder)
    data_parallel, group = asked.pop("kwargs_handlers")
    assert asked == {"cpu": True}
    assert not data_parallel.broadcast_buffers
    assert group.timeout.total_seconds() == 150


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_is_shared_out_evenly_and_cannot_be_repeated_by_one_process_of_several(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def several(*about: object) -> object:
        asked.append(about)
        return type("Process", (), {"num_processes": world})()

    monkeypatch.setattr("randlora.training.settings.processes", several)
    assert Trainer(batch_size=6, device="cpu", peer_timeout=3).accelerator().num_processes == world  # type: ignore[attr-defined]
    assert Trainer(batch_size=6, device="auto").accelerator().num_processes == world  # type: ignore[attr-defined]
    assert asked == [(True, 3), (False, 10)]
    if world == 1:
        Trainer(batch_size=7, auto_batch=True).accelerator()
        return
    with pytest.raises(SettingsError, match=rf"^trainer.batch_size=7: must divide by the {world} processes"):
        Trainer(batch_size=7).accelerator()
    with pytest.raises(SettingsError, match=rf"^trainer.auto_batch=true: the {world} processes of a step cannot"):
        Trainer(batch_size=6, auto_batch=True).accelerator()


class Joined:
    """Stands where the accelerator of one of two processes does, whose other one has the same numbers and one more."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, rank: int = 0):
        self.process_index, self.is_main_process = rank, rank == 0
        self.sent: list[torch.Tensor] = []

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.sent.append(value)
        return 2 * value + 1


def test_numbers_are_summed_exactly_over_processes() -> None:
    """2^24 + 1 is no number of float32; a process alone asks nobody."""
    accelerator, large = Joined(), 2**24 + 1
    assert processes.summed(accelerator, large, 0.5) == [2 * large + 1, 2.0]  # type: ignore[arg-type]
    assert len(accelerator.sent) == 1
    far, devices = Joined(), []
    far.device = torch.device("meta")
    far.reduce = lambda value, reduction: devices.append(value.device.type) or torch.zeros(1)  # type: ignore[method-assign]
    assert processes.summed(far, 1) == [0]  # type: ignore[arg-type]
    assert devices == ["meta"]
    alone = Joined()
    alone.num_processes = 1
    assert processes.summed(alone, large, True) == [large, True]  # type: ignore[arg-type]
    assert alone.sent == []


def test_what_the_main_process_does_is_done_once_and_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it returns and what it raises; the broadcast of accelerate is replaced by a note from one to the other."""
    told: list[object] = []
    monkeypatch.setattr(
        "accelerate.utils.broadcast_object_list", lambda given: told.extend(given) or given if main else [*told]
    )

    def twice(act: Callable[[], object]) -> list[object]:
        nonlocal main
        told.clear()
        outcomes: list[object] = []
        for rank in (0, 1):
            main = rank == 0
            try:
                outcomes.append(processes.as_the_main_process(Joined(rank), act))  # type: ignore[arg-type]
            except KeyError as error:
                outcomes.append(error)
        return outcomes

    main, done = True, []
    assert twice(lambda: done.append(1) or 7) == [7, 7]
    assert done == [1]
    assert [*map(repr, twice({}.popitem))] == 2 * ["KeyError('popitem(): dictionary is empty')"]
    alone = Joined(0)
    alone.num_processes = 1
    assert processes.of_the_main_process(alone, 5) == 5  # type: ignore[arg-type]


def test_processes_that_read_different_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randlora.training.loop.summed", lambda accelerator, *values: [value + 1 for value in values])
    with pytest.raises(RuntimeError, match=r"^processes read different checkpoints in .*: do all see the same files"):
        train("lora", tmp_path)


@pytest.mark.parametrize(("name", "unused"), [("lora", False), ("full", True)])
def test_parameters_are_looked_for_after_each_step_only_where_some_may_get_no_gradient(
    name: str, unused: bool, tmp_path: Path
) -> None:
    """Of a whole model; torch's DistributedDataParallel takes longer then."""
    torch.manual_seed(0)
    net = Net()
    randlora.adapt(net, method_of(name), ADAPTED)
    trainer = Trainer(max_steps=1, device="cpu")
    accelerator = trainer.accelerator()
    Loop(trainer, TASK, Bound(net), splits(), 0, tmp_path, Quiet(), accelerator, Optimizer())
    assert accelerator.ddp_handler.find_unused_parameters is unused  # type: ignore[union-attr]


def test_scores_are_taken_with_the_trainers_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, observer = Trainer(evaluation_batch_size=7, workers=3, precision="bf16"), Quiet()
    given = ("task", "model", "split", "accelerator")
    for name in ("evaluate", "predictions", "mean_loss"):
        monkeypatch.setattr(f"randlora.training.settings.{name}", lambda *parts, **options: (parts, options))
        parts, options = getattr(trainer, name)(*given[:3], observer, given[3])
        assert parts == given
        assert options == {"batch_size": 7, "workers": 3, "precision": "bf16", "say": observer.say}
