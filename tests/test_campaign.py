"""Faults, and the campaign that deals them out; `make faults` lets fifty strike our own command."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from randlora.analysis import campaign
from randlora.analysis.campaign import Campaign, Settings, Trial
from randlora.analysis.campaign_programs import Ours
from randlora.analysis.faults import DAMAGES, HUNG, AtCall, Ending, Signals, attempt, damage


@pytest.fixture
def struck(tmp_path: Path) -> Callable[..., Ending]:
    (tmp_path / "runs").mkdir()

    def run(program: Callable[[], object], strike: Signals | AtCall | None = None, limit: float = 20.0) -> Ending:
        return attempt(lambda: program() or 0, tmp_path / "runs", tmp_path / "log", strike, limit)

    return run


def write_all(folder: Path) -> None:
    """Eight calls that change files: a folder, two for each of two files, two renamed and one removed."""
    (folder / "new").mkdir()
    (folder / "new" / "text").write_text("0123456789")
    save_file({"a": torch.arange(100)}, folder / "tensors")
    (folder / "tensors").rename(folder / "renamed")
    os.replace(folder / "renamed", folder / "replaced")
    (folder / "new" / "text").unlink()


def test_calls_that_change_files_are_counted(tmp_path: Path, struck: Callable[..., Ending]) -> None:
    folder = tmp_path / "runs"
    (tmp_path / "elsewhere").mkdir()
    ending = struck(lambda: (write_all(folder), write_all(tmp_path / "elsewhere"), None)[-1])
    assert (ending.code, ending.calls) == (0, 8)
    assert load_file(folder / "replaced")["a"].tolist() == list(range(100))


@pytest.mark.parametrize(
    ("strike", "left"),
    [
        (AtCall(1, part=0.4), {}),
        (AtCall(1, part=0.6), {"new": None}),
        (AtCall(2, part=0.6), {"new": None, "new/text": 0}),
        (AtCall(3, part=0.3), {"new": None, "new/text": 3}),
        (AtCall(5, part=0.5), {"new": None, "new/text": 10, "tensors": 436}),
        (AtCall(6, part=0.4), {"new": None, "new/text": 10, "tensors": 872}),
        (AtCall(6, part=0.6), {"new": None, "new/text": 10, "renamed": 872}),
    ],
)
def test_a_kill_in_a_call_leaves_what_was_done(
    strike: AtCall, left: dict[str, int | None], tmp_path: Path, struck: Callable[..., Ending]
) -> None:
    ending = struck(lambda: write_all(tmp_path / "runs"), strike)
    assert (ending.code, ending.calls, ending.struck) == (-signal.SIGKILL, strike.call, True)
    present = {str(path.relative_to(tmp_path / "runs")): path for path in (tmp_path / "runs").rglob("*")}
    assert {name: path.stat().st_size if path.is_file() else None for name, path in present.items()} == left


@pytest.mark.parametrize("lasting", [False, True])
def test_a_full_disk_fails_as_the_system_does(lasting: bool, tmp_path: Path, struck: Callable[..., Ending]) -> None:
    def program() -> None:
        for name in ("first", "second"):
            try:
                (tmp_path / "runs" / name).write_bytes(b"0123456789")
            except OSError as error:
                print(name, error.errno)
        try:
            save_file({"a": torch.zeros(9)}, tmp_path / "runs" / "tensors")
        except Exception as error:
            print(type(error).__name__, error)

    said = struck(program, AtCall(2, full=True, lasting=lasting, part=0.5)).said
    assert (tmp_path / "runs" / "first").stat().st_size == 5
    expected = [f"first {errno.ENOSPC}"]
    if lasting:
        native = "Error while serializing: I/O error: No space left on device (os error 28)"
        expected += [f"second {errno.ENOSPC}", f"SafetensorError {native}"]
    assert said.splitlines() == expected


def test_signals_come_when_they_should(struck: Callable[..., Ending]) -> None:
    def heard() -> int:
        numbers: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: numbers.append(number))
        while len(numbers) < 2:
            time.sleep(0.001)
        return sum(numbers)

    assert struck(heard, Signals((0.3, 0.0), (signal.SIGTERM, signal.SIGINT), group=True)).code == 17
    assert struck(lambda: time.sleep(20), Signals((0.0,), (signal.SIGTERM,))).code == -signal.SIGTERM
    early = struck(lambda: None, Signals((5.0,), (signal.SIGTERM,)))
    assert (early.code, early.struck) == (0, False)
    assert struck(lambda: time.sleep(20), limit=0.1).code == HUNG


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_changes_a_file(how: str, tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    for seed in range(20):
        path.write_bytes(b"content")
        other.write_bytes(b"another" if seed % 2 else b"content")
        damage(path, how, Random(seed), [other])
        after = path.read_bytes() if path.is_file() else None
        assert after != b"content"
        if how == "flipped":
            different = [bin(a ^ b).count("1") for a, b in zip(after, b"content", strict=True)]
            assert sum(different) == 1
        assert how != "replaced" or (after == b"another" or not seed % 2)
        assert (after is None) is (how == "deleted")
        assert how != "truncated" or b"content".startswith(after)


class Careless:
    """A program that does all that the campaign is there to find."""

    name = "careless"

    def settings(self, rng: Random, number: int) -> Settings:
        return {"save_every": 1, "workers": 0}

    def main(self, settings: Settings, root: Path) -> int:
        """Writes in place, and that it has finished before it has."""
        sums, steps = root / "run" / "checkpoints" / "sum", root / "run" / "checkpoints" / "step.json"
        total = int.from_bytes(sums.read_bytes()) if sums.is_file() else 0
        step = json.loads(steps.read_text()) if steps.is_file() else 0
        print(f"from {step}")
        for name in ("adapter", "checkpoints"):
            (root / "run" / name).mkdir(parents=True, exist_ok=True)
        for done in range(step + 1, campaign.STEPS + 1):
            total += done
            sums.write_bytes(total.to_bytes(8))
            steps.write_text(json.dumps(done))
        (root / "run" / "finished").touch()
        (root / "run" / "adapter" / "file").write_text(str(total))
        return 0

    def load(self, settings: Settings, folder: Path, undisturbed: Path) -> int:
        return campaign.LOADED_DIFFERENT

    def folder(self, root: Path) -> Path:
        return root / "run"

    def state(self, folder: Path) -> str:
        return "finished" if (folder / "finished").is_file() else "running" if folder.is_dir() else ""

    def waits(self, folder: Path, struck: Sequence[str]) -> bool:
        return False

    def outputs(self, folder: Path) -> dict[str, Any]:
        return {"adapter": (folder / "adapter" / "file").read_text()}

    def steps(self, folder: Path) -> int:
        return 0

    def resumed(self, said: str) -> int | None:
        return int(said.split()[1]) if said.startswith("from") else None

    def promised(self, folder: Path) -> int | None:
        return None


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    trials = list(Campaign(Careless(), tmp_path, seed=1).trials([], 32))
    by_kind = {fault: [trial for trial in trials if trial.fault == fault] for fault in campaign.FAULTS}
    in_writes = by_kind["killed in a write"]
    assert any("Expecting value" in sentence for trial in in_writes for sentence in trial.unreadable)
    assert any("running after exit code -9" in trial.false for trial in in_writes)
    assert any("finished, and" in sentence for trial in trials for sentence in trial.false)
    assert sum(trial.tracebacks for trial in by_kind["disk full"]) > 0
    assert any(trial.different == ["adapter"] for trial in trials)
    assert any(trial.silent for trial in trials)
    assert sum(len(trial.struck) for trial in trials) >= 32
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert not any(trial.clean for trial in trials if trial.different)
    assert all((tmp_path / "careless" / f"trial_{t.number}").is_dir() is not t.clean for t in trials)


def test_a_trial_is_a_line_and_a_row(tmp_path: Path) -> None:
    settings = {"save_every": 4}
    trials = [
        Trial("ours", 0, "killed", settings, ["a", "b"], [-9, -9, 0], [3], [2, 1], True),
        Trial("ours", 2, "flipped", settings, ["c"], [0, 1], [], [6], different=["x"], unreadable=["y"], tracebacks=2),
    ]
    (tmp_path / "trials").write_text("".join(campaign.line(trial) + "\n" for trial in trials))
    assert campaign.read(tmp_path / "trials") == trials
    assert [trial.clean for trial in trials] == [True, False]
    rows = [[cell.strip() for cell in row.split("|")[2:-1]] for row in campaign.table(trials).splitlines()[2:]]
    assert rows == [
        ["killed", "1", "2", "3", "1", "1", "0.50", "0", "0", "0", "0"],
        ["flipped", "1", "1", "2", "0", "0", "1.50", "1", "0", "0", "2"],
        ["all", "2", "3", "5", "1", "1", "1.50", "1", "0", "0", "2"],
    ]


def no_command(arguments: Sequence[str]) -> int:
    raise AssertionError("none is asked for")


@pytest.mark.parametrize(
    ("said", "step"),
    [
        ("going on from step 4 of 10\nstep 5/10  loss 1", 4),
        ("loaded in 0.1 s\nstep 1/10  loss 1", 0),
        ("loaded in 0.1 s\nstep 0: validation/loss 1", 0),
        ("loaded in 0.1 s\nSIGTERM: stopping\ninterrupted: checkpoint at step 1: the same command goes on", None),
        ("already finished: runs", None),
    ],
)
def test_where_an_attempt_began(said: str, step: int | None, tmp_path: Path) -> None:
    assert Ours(no_command, tmp_path).resumed(said) == step
