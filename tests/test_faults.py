"""Faults of the machine: what was written before stays whole, a sentence says what happened, the record is true."""

import errno
import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import Bars, Pixels8, splits
from torch import nn

from randlora.adapters import tensor_files
from randlora.data.loader import Split
from randlora.errors import FAILED, FINISHED, INTERRUPTED, SettingsError
from randlora.experiment import Experiment
from randlora.methods import RandLoRA
from randlora.models.base import Backbone, Model
from randlora.records.record import state
from randlora.records.result import Result
from randlora.run import run
from randlora.tasks.base import Budget, Splits
from randlora.training import Optimizer, Trainer, checkpoint


@dataclass(frozen=True)
class ToyModel(Model):
    """Two linear maps."""

    kind = "vision"

    def load(self) -> Backbone:
        torch.manual_seed(0)
        return Backbone(nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)), "vision", 4)


@dataclass(frozen=True)
class ToyTask(Bars):
    """Bars, as a whole run has them; `fault` happens in the loss of each batch."""

    fault: Any = None

    def splits(self, backbone: Backbone, budget: Budget) -> Splits:
        data = splits()
        return replace(data, train=Split(data.train.table, data.train.rows, Pixels8()))

    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        loss = super().loss(model, batch)
        return self.fault(loss) if self.fault else loss


def experiment(root: Path, fault: Any = None, **changes: Any) -> Experiment:
    trainer = Trainer(**{"max_steps": 6, "batch_size": 8, "save_every": 2, "log_every": 1, "device": "cpu"} | changes)
    config = {
        "resume": True, "shots": None, "fraction": None, "seed": 1, "run_root": str(root), "predictions": True,
    }  # fmt: skip
    return Experiment(
        RandLoRA(rank=3), ToyModel("toy"), ToyTask("bars", None, fault=fault), trainer, Optimizer(), [], ["0", "2"],  # type: ignore[arg-type]
        Budget(1, None, None), config,
    )  # fmt: skip


def start(about: Experiment) -> int:
    return run(about, "as: given\n").code


def adapter(about: Experiment) -> bytes:
    return (about.folder / "adapter" / "adapter.safetensors").read_bytes()


class Do:
    """Does something in the loss of step `at`, which is what that returns, or as it was."""

    def __init__(self, at: int, act: Any):
        self.at, self.act, self.calls = at, act, 0

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        changed = self.act() if self.calls == self.at else None
        return loss * changed if isinstance(changed, float) else loss


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A hundred runs: no garbage is looked for, nor git asked, nor packages' versions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)
        patch.setattr("randlora.run.commit", lambda: None)
        patch.setattr("randlora.run.versions", dict)
        yield


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with a run that was stopped after its third step."""
    root = tmp_path_factory.mktemp("stopped")
    assert start(experiment(root, Do(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))) == INTERRUPTED
    return root


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that nothing happened to."""
    about = experiment(tmp_path_factory.mktemp("unbroken"))
    assert start(about) == FINISHED
    return adapter(about)


class Disk:
    """Refuses the `first` write to it and, where it stays full, all later ones: opening, writing tensors, syncing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, first: int, stays: bool, code: int):
        self.first, self.stays, self.code, self.writes = first, stays, code, 0
        opens = Path.open

        def opened(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if mode[0] in "wax" and path.is_relative_to(folder):
                self.write()
            return opens(path, mode, *rest, **more)

        def before(act: Any) -> Any:
            return lambda *arguments, **more: (self.write(), act(*arguments, **more))[1]

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(os, "fsync", before(lambda descriptor: None))
        monkeypatch.setattr(tensor_files, "save_file", before(tensor_files.save_file))

    def write(self) -> None:
        self.writes += 1
        if self.writes == self.first or (self.stays and self.writes > self.first):
            raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("stays", [False, True])
def test_a_disk_that_is_full_at_any_write(
    stays: bool, stopped: Path, unbroken: bytes, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """The checkpoint before stays good, no record says more than happened, and the same command ends as ever."""
    first, refused = 0, True
    while refused:
        first += 4 if stays else 1
        root = tmp_path / str(first)
        shutil.copytree(stopped, root)
        about = experiment(root)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, root, first, stays, errno.ENOSPC)
            try:
                code = start(about)
            except SettingsError as error:
                code = FAILED
                print(error, file=sys.stderr)
            refused = disk.writes >= first
        errors = capfd.readouterr().err
        assert "Traceback" not in errors, first
        if not refused:
            break
        if code == FINISHED:  # only the owner's file could not be removed
            assert adapter(about) == unbroken, first
            continue
        assert code == FAILED, first
        assert "No space left on device" in errors, first
        remaining = checkpoint.latest(about.folder / "checkpoints")
        assert remaining is not None, first
        assert remaining.name >= "step_0000003", first
        known = state(about.folder)  # interrupted: it was before, and nothing was begun
        assert known in ("interrupted", "failed", "dead", "finished"), first
        if known == "finished":
            assert adapter(about) == unbroken, first
        if known == "failed":
            assert Result.read(about.folder / "result.json").error.startswith("No space left on device in "), first
        assert start(about) == FINISHED, first
        assert adapter(about) == unbroken, first
        steps = [json.loads(line) for line in (about.folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "train/loss" in line] == [1, 2, 3, 4, 5, 6], first
    assert first > 25


def test_a_run_folder_that_vanishes(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """It does not come back in part; what lies beside it stays."""
    beside = tmp_path / "bars" / "beside"
    beside.mkdir(parents=True)
    about = experiment(tmp_path, Do(4, lambda: shutil.rmtree(tmp_path / "bars" / "toy")))
    assert start(about) == FAILED
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert f"the run folder {about.folder} is gone" in errors
    assert [path.name for path in (tmp_path / "bars").iterdir()] == ["beside"]


def test_a_folder_that_becomes_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        about = experiment(tmp_path, Do(4, lambda: Disk(patch, tmp_path, 1, True, errno.EROFS)))
        assert start(about) == FAILED
    assert state(about.folder) == "dead"
    assert checkpoint.latest(about.folder / "checkpoints").name == "step_0000002"


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(factor: float, tmp_path: Path) -> None:
    about = experiment(tmp_path, Do(6, lambda: factor))
    assert start(about) == FAILED
    result = Result.read(about.folder / "result.json")
    good = about.folder / "checkpoints" / "step_0000004"
    assert result.status == "diverged"
    assert result.error.startswith(f"step 5: the loss is {factor:.3g} ")
    assert result.error.endswith(f"last good checkpoint: {good}")
    assert checkpoint.latest(about.folder / "checkpoints") == good


def test_memory_that_runs_out_is_recorded_or_made_do_with(tmp_path: Path) -> None:
    def fails() -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    about = experiment(tmp_path / "a", Do(4, fails))
    assert start(about) == FAILED
    result = Result.read(about.folder / "result.json")
    assert result.status == "out_of_memory"
    assert "trainer.auto_batch=true" in result.error
    again = experiment(tmp_path / "b", Do(4, fails), auto_batch=True)
    assert start(again) == FINISHED
    assert Result.read(again.folder / "result.json").micro_batch_size == 4
    assert again.folder.name == about.folder.name


def test_a_dead_process_that_reads_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(encoder: object, example: dict) -> None:
        if multiprocessing.parent_process() and example["label"] == 3 and parent.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(encoder, example)

    parent, encode = tmp_path / "now", Pixels8.__call__
    monkeypatch.setattr(Pixels8, "__call__", die)
    about = experiment(tmp_path / "run", Do(3, parent.touch), workers=1, max_steps=60, save_every=2)
    assert start(about) == FAILED
    result = Result.read(about.folder / "result.json")
    assert result.error.startswith("a process that reads data has died (")
    assert re.search(r"checkpoint at step \d+: the same command goes on$", result.error)
    parent.unlink()
    assert start(about) == FINISHED


def test_clocks_that_jump(tmp_path: Path, unbroken: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock goes back a year at every look; no duration, nor saving by time, goes by it."""
    times = iter(range(2_000_000_000, 0, -31_536_000))
    saved: list[int] = []
    save = checkpoint.Checkpoints.save
    monkeypatch.setattr(
        checkpoint.Checkpoints,
        "save",
        lambda self, state, tensors: (saved.append(state.step), save(self, state, tensors)),
    )
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    about = experiment(tmp_path, save_every=None, save_minutes=1e-9)
    assert start(about) == FINISHED
    result = Result.read(about.folder / "result.json")
    assert 0 < result.train_seconds < 60
    assert saved == [1, 2, 3, 4, 5, 6]
    assert adapter(about) == unbroken
