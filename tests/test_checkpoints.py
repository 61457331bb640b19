"""Checkpoints that are damaged, half-written, or of another training. The untouched run's bits are the oracle."""

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import start
from test_training import TASK, Quiet, StopsAt, WithLoss, fit, flattened, model, select_best, splits, trainer_of

from randlora.data.loader import Unreadable
from randlora.errors import FAILED, FINISHED, SettingsError
from randlora.integrity import MANIFEST, seal
from randlora.methods import IncreLoRA, LoRA, RandLoRA
from randlora.tasks.base import Bound, Splits
from randlora.training import Interrupted, Optimizer, Trainer, loop
from randlora.training.best_step import BestStep
from randlora.training.checkpoint import STATE, TENSORS, Checkpoints, State, Tensors, latest

FILES = (TENSORS, STATE, MANIFEST)
STEP_2 = "step_0000002"
STEPS = ["step_0000006", "step_0000007"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(folder: Path) -> Path:
    """A folder with the checkpoints of steps 6 and 7 of 20."""
    with pytest.raises(Interrupted):
        fit(model(dropout=0.3), folder, StopsAt(7), save_every=3)
    assert names(folder) == STEPS
    return folder


class Reader:
    """Reads checkpoints onto a small model, with an optimiser that has taken a step."""

    def __init__(self, folder: Path, settings: dict | None = None, method: LoRA | RandLoRA | None = None):
        self.net = model(method or LoRA(rank=2))
        self.trained = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values())
        about = settings or {"seed": 1, "trainer": {"learning_rate": 0.1}}
        self.checkpoints = Checkpoints(folder, about, keep_last=2)
        self.tensors = Tensors(self.trained, self.optimizer)
        self.said: list[str] = []

    def save(self, step: int) -> None:
        self.net(torch.randn(3, 16, generator=torch.Generator().manual_seed(step))).sum().backward()
        self.optimizer.step()
        self.checkpoints.save(State(step, 1.0, BestStep().or_now(step, {"loss": 0.1}, self.trained)), self.tensors)

    def resume(self, strict: bool = False) -> State:
        self.said.clear()
        return self.checkpoints.resume(lambda names: self.tensors, self.said.append, strict)

    def bits(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for _, value in sorted(state.items())]
        return [tensor.detach().clone() for tensor in [*self.trained.values(), *moments]]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, list[torch.Tensor]]:
    """A folder with checkpoints of steps 1 and 2, and the bits of step 1."""
    writer = Reader(tmp_path)
    writer.save(1)
    bits = writer.bits()
    writer.save(2)
    return tmp_path, bits


def test_any_flipped_bit_is_named_and_the_older_checkpoint_is_read(two: tuple[Path, list[torch.Tensor]]) -> None:
    folder, bits = two
    rng = random.Random(0)
    for i in range(200):
        path = folder / "step_0000002" / FILES[i % 3]
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        reader = Reader(folder)
        assert reader.resume().step == 1
        assert len(reader.said) == 1
        assert f"{path} is damaged" in reader.said[0]
        assert same(reader.bits(), bits)
        path.write_bytes(content)
    assert Reader(folder).resume().step == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(path: Path) -> None:
    path.write_bytes((path.parent / FILES[FILES.index(path.name) - 1]).read_bytes())


def exchange(path: Path) -> None:
    path.write_bytes((path.parents[1] / "step_0000001" / path.name).read_bytes())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, swap, exchange, Path.unlink])
def test_cut_lost_and_exchanged_files_are_named(
    two: tuple[Path, list[torch.Tensor]], name: str, damage: Callable[[Path], None]
) -> None:
    folder, bits = two
    damage(folder / "step_0000002" / name)
    reader = Reader(folder)
    assert reader.resume().step == 1
    # Another step's manifest speaks of other files; the first that is not so is named.
    assert str(folder / "step_0000002" / (STATE if (damage, name) == (exchange, MANIFEST) else name)) in reader.said[0]
    assert same(reader.bits(), bits)


def test_a_folder_of_folders_is_made(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "a" / "b")
    assert reader.resume().step == 0
    reader.save(1)
    assert names(tmp_path / "a" / "b") == ["step_0000001"]


def test_the_latest_is_the_newest_that_is_whole(two: tuple[Path, list[torch.Tensor]]) -> None:
    folder, _ = two
    older, newer = sorted(folder.iterdir())
    assert latest(folder) == newer
    cut(newer / TENSORS)
    assert latest(folder) == older
    older.rename(folder / "step_9999999")
    shutil.copytree(folder / "step_9999999", folder / "step_10000000")
    assert latest(folder) == folder / "step_10000000"
    for path in folder.iterdir():
        cut(path / STATE)
    assert latest(folder) is None


def test_a_checkpoint_under_another_steps_name_is_passed_over(two: tuple[Path, list[torch.Tensor]]) -> None:
    folder, _ = two
    shutil.copytree(folder / "step_0000001", folder / "step_0000009")
    reader = Reader(folder)
    assert reader.resume().step == 2
    assert "step_0000009 is not the checkpoint of its name: state.json is of step 1" in reader.said[0]


def test_where_none_is_valid_it_starts_again_or_stops(two: tuple[Path, list[torch.Tensor]]) -> None:
    folder, _ = two
    for path in folder.iterdir():
        cut(path / TENSORS)
    reader = Reader(folder)
    before = reader.bits()
    assert reader.resume() == State()
    assert len(reader.said) == 3
    assert reader.said[-1] == "no checkpoint can be gone on from: starting again at step 0"
    with pytest.raises(SettingsError, match=r"resume=strict: none of the 2 checkpoints .* use resume=true"):
        reader.resume(strict=True)
    assert same(reader.bits(), before)
    assert Reader(folder / "nowhere").resume(strict=True) == State()  # a first start is no fault


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A change of the tensors, sealed again."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)
        seal(folder, (TENSORS, STATE))

    return edit


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (edited(lambda t: t.pop("trained/0.updates.0.A")), "lacks trained/0.updates.0.A"),
        (edited(lambda t: t.pop("best/3.updates.0.B")), "has 19 tensors, and 20 were written"),
        (edited(lambda t: t.pop("optimizer/exp_avg/0.updates.0.A")), "has 19 tensors, and 20 were written"),
        (edited(lambda t: t.update({"optimizer/step/x": torch.zeros(1)})), "has optimizer/step/x, and this model"),
        (edited(lambda t: t.update({"trained/x": torch.zeros(1)})), "has trained/x, and this model has no such tensor"),
        (edited(lambda t: t.update({"trained/0.updates.0.A": torch.zeros(3, 16)})), r"F32 \(3, 16\), and this model"),
        (edited(lambda t: t.update({k: v.half() for k, v in t.items()})), r"as F16 .* has it as F32"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused_before_any_is_copied(
    two: tuple[Path, list[torch.Tensor]], edit: Callable[[Path], None], sentence: str
) -> None:
    folder, _ = two
    shutil.rmtree(folder / "step_0000001")
    edit(folder / "step_0000002")
    reader = Reader(folder)
    before = reader.bits()
    with pytest.raises(SettingsError, match=sentence):
        reader.resume(strict=True)
    assert same(reader.bits(), before)


def test_a_start_again_after_a_checkpoint_of_a_grown_model_has_the_same_bits(tmp_path: Path) -> None:
    """The checkpoint has more tensors than the start, and is passed over after the updates have taken them."""
    method = IncreLoRA(rank=4, top=1, gain=2, interval=3)
    unbroken, again, strict, observer = model(method), model(method), model(method), Quiet()
    at_start = flattened(strict)
    with pytest.raises(Interrupted):
        fit(model(method), tmp_path / "a", StopsAt(7))
    (checkpoint,) = (tmp_path / "a").iterdir()
    edited(lambda t: t.update({"trained/x": torch.zeros(1)}))(checkpoint)
    settings = trainer_of()
    with pytest.raises(SettingsError, match="trained/x, and this model has no such tensor"):
        settings.fit(
            TASK, Bound(strict, None), splits(), seed=1, folder=tmp_path / "a", observer=observer,
            accelerator=settings.accelerator(), strict=True,
        )  # fmt: skip
    assert torch.equal(flattened(strict), at_start)
    fit(again, tmp_path / "a", observer)
    assert "trained/x, and this model has no such tensor" in observer.said[-2]
    fit(unbroken, tmp_path / "b")
    assert torch.equal(flattened(again), flattened(unbroken))


def test_a_checkpoint_of_other_settings_is_passed_over(two: tuple[Path, list[torch.Tensor]]) -> None:
    folder, _ = two
    other = Reader(folder, settings={"seed": 1, "trainer": {"learning_rate": 0.2}})
    assert other.resume().step == 0
    assert "was written with trainer.learning_rate=0.1, and this is 0.2" in other.said[0]
    wider = Reader(folder, method=LoRA(rank=3))
    assert wider.resume().step == 0
    assert "and this model has it as F32 (3, 16)" in wider.said[0]


def test_a_checkpoints_file_says_all_that_makes_its_training(tmp_path: Path) -> None:
    """By the names that files on people's disks have."""
    fit(model(LoRA(rank=2)), tmp_path, max_steps=3, evaluate_every=2, select="best", task=WithLoss("bars", None))  # type: ignore[arg-type]
    state = json.loads((tmp_path / "step_0000003" / STATE).read_text())
    settings = state.pop("settings")
    assert set(state) == {"format", "step", "train_seconds", "best", "scored", "log", "tensors"}
    assert (state["format"], state["step"], state["scored"], state["log"]) == (2, 3, True, [])
    assert set(state["best"]) == {"step", "loss"}
    assert state["tensors"] == 4 * 5  # trained, three of AdamW's and the best
    assert {key: settings[key] for key in ("seed", "steps", "examples")} == {"seed": 1, "steps": 3, "examples": 30}
    assert settings["method"]["class"] == "randlora.methods.lora:LoRA"
    assert settings["optimizer"] == {"algorithm": "AdamW"}
    assert (settings["learning_rate"], settings["batch_size"]) == (0.05, 8)
    assert "workers" not in settings


def test_a_checkpoint_of_another_training_says_what_differs(tmp_path: Path) -> None:
    fit(model(LoRA(rank=2)), tmp_path, max_steps=2)

    def refused(seed: int = 1, data: Splits | None = None, method: LoRA | None = None, **changes: object) -> str:
        given = {key: changes.pop(key, None) for key in ("optimizer", "steps")}
        trainer = trainer_of(**{"max_steps": 2} | changes)
        with pytest.raises(SettingsError, match=r"^resume=strict: none of the 1 checkpoints") as error:
            trainer.fit(
                TASK, Bound(model(method or LoRA(rank=2))), data or splits(), seed=seed, folder=tmp_path,
                observer=Quiet(), accelerator=trainer.accelerator(), strict=True, **given,  # type: ignore[arg-type]
            )  # fmt: skip
        return str(error.value).partition(" was written with ")[2].partition(");")[0]

    fewer = dataclasses.replace(splits(), train=splits().validation)
    assert refused(seed=2) == "seed=1, and this is 2"
    assert refused(steps=4) == "steps=2, and this is 4"
    assert refused(data=fewer) == "examples=30, and this is 5"
    assert refused(method=LoRA(rank=2, alpha=3)) == "method.alpha=None, and this is 3"
    assert refused(optimizer=Optimizer("SGD")) == "optimizer.algorithm='AdamW', and this is 'SGD'"
    assert refused(optimizer=Optimizer(eps=1e-7)) == "optimizer.eps=None, and this is 1e-07"
    assert refused(schedule="linear") == "schedule='cosine', and this is 'linear'"


def test_a_checkpoint_of_another_format_is_passed_over(two: tuple[Path, list[torch.Tensor]]) -> None:
    folder, _ = two
    newest = folder / STEP_2
    content = json.loads((newest / STATE).read_text())
    for changed in (content | {"format": 3}, {key: value for key, value in content.items() if key != "format"}):
        (newest / STATE).write_text(json.dumps(changed))
        seal(newest, (TENSORS, STATE))
        reader = Reader(folder)
        assert reader.resume().step == 1
        assert reader.said[0].endswith(f"has format {changed.get('format')}; this version reads 2")


def test_a_checkpoint_that_cannot_be_removed_does_no_harm(
    two: tuple[Path, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a network's file system keeps a file that is open elsewhere; it is not taken for a checkpoint."""

    def kept(*about: object, **named: object) -> None:
        raise OSError("Directory not empty")

    folder, _ = two
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", kept)
        for step in (3, 4, 4):
            Reader(folder).save(step)
    assert [name for name in names(folder) if not name.startswith(".")] == ["step_0000003", "step_0000004"]
    assert Reader(folder).resume().step == 4
    assert names(folder) == ["step_0000003", "step_0000004"]


def test_settings_that_change_no_result_may_differ(tmp_path: Path) -> None:
    interrupted(tmp_path)
    observer = Quiet()
    fit(model(dropout=0.3), tmp_path, observer, save_every=5, save_minutes=None, log_every=3, workers=2, keep_last=1)
    assert observer.said == ["going on from step 7 of 20"]
    observer = Quiet()
    fit(model(dropout=0.3), tmp_path, observer, batch_size=4)
    assert "was written with batch_size=8, and this is 4" in observer.said[0]


@pytest.mark.parametrize("damaged", [STEPS[1:], STEPS])
def test_a_run_with_damaged_checkpoints_ends_with_the_same_bits(tmp_path: Path, damaged: list[str]) -> None:
    unbroken, resumed, observer = model(dropout=0.3), model(dropout=0.3), Quiet()
    fit(unbroken, tmp_path / "a")
    interrupted(tmp_path / "b")
    for name in damaged:
        cut(tmp_path / "b" / name / TENSORS)
    fit(resumed, tmp_path / "b", observer)
    assert sum(said.startswith("passing over") for said in observer.said) == len(damaged)
    assert observer.said[-1].endswith("from step 6 of 20" if len(damaged) == 1 else "starting again at step 0")
    assert torch.equal(flattened(resumed), flattened(unbroken))


@pytest.mark.parametrize("stop", [5, 13])
def test_the_best_step_is_that_of_the_older_checkpoint(tmp_path: Path, stop: int) -> None:
    """Stopped before and after the best step, the last checkpoint lost."""
    unbroken, resumed = model(dropout=0.3), model(dropout=0.3)
    result = select_best(unbroken, tmp_path / "a")
    for at in (stop - 2, stop):
        with pytest.raises(Interrupted):
            select_best(model(dropout=0.3), tmp_path / "b", StopsAt(at))
    cut(tmp_path / "b" / f"step_{stop:07d}" / TENSORS)
    assert select_best(resumed, tmp_path / "b").selected_step == result.selected_step
    assert torch.equal(flattened(resumed), flattened(unbroken))


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep_last: int) -> None:
    fit(model(), tmp_path, save_every=4, keep_last=keep_last)
    assert names(tmp_path) == [f"step_{step:07d}" for step in (4, 8, 12, 16, 20)[-keep_last:]]


def test_damaged_checkpoints_of_later_steps_take_no_valid_ones_place(two: tuple[Path, list[torch.Tensor]]) -> None:
    folder, _ = two
    (folder / "step_0000008").mkdir()
    reader = Reader(folder)
    assert reader.resume().step == 2
    reader.save(3)
    assert names(folder) == ["step_0000002", "step_0000003"]


class Steps(Quiet):
    """Counts."""

    taken = 0

    def progress(self, step: int, steps: int, text: str) -> None:
        self.taken += 1


def test_the_last_step_has_a_checkpoint_without_being_asked(tmp_path: Path) -> None:
    first, again, steps = model(), model(), Steps()
    result = fit(first, tmp_path, save_every=None, save_minutes=None)
    assert names(tmp_path) == ["step_0000020"]
    assert fit(again, tmp_path, steps).train_seconds == result.train_seconds
    assert steps.taken == 0
    assert torch.equal(flattened(again), flattened(first))


def test_time_alone_makes_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a minute passes on with every look: one look at the start, after a save and in each step."""
    looks = iter(range(1000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: 60.0 * next(looks))
    fit(model(), tmp_path, save_minutes=5, max_steps=20, keep_last=9)
    assert names(tmp_path) == [f"step_{step:07d}" for step in (6, 12, 18, 20)]


def test_a_full_disk_leaves_the_older_checkpoints(
    two: tuple[Path, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = two

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Reader(folder).save(3)
    assert names(folder) == ["step_0000001", "step_0000002"]
    assert Reader(folder).resume().step == 2


def test_a_kill_at_any_moment_leaves_a_valid_checkpoint_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    """A fork for each thing that a save asks of the disk, killed before it; the state is that of before or of after."""
    writer = Reader(tmp_path / "0")
    for step in (1, 2):
        writer.save(step)
    older = writer.bits()
    writer.save(3)
    newer = writer.bits()
    seen, calls, killed = set(), 0, True
    while killed:
        calls += 1
        folder = tmp_path / str(calls)
        shutil.copytree(tmp_path / "0" / STEP_2, folder / STEP_2)
        shutil.copytree(tmp_path / "0" / STEP_2, folder / "step_0000001")
        child = os.fork()
        if child == 0:
            _killed_at(calls, dataclasses.replace(writer.checkpoints, folder=folder), writer.tensors)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        reader = Reader(folder)
        seen.add(step := reader.resume().step)
        assert same(reader.bits(), newer if step == 3 else older)
        assert not list(folder.glob(".*"))
        assert not reader.said
    assert (step, seen) == (3, {2, 3})
    assert calls > 20


def _killed_at(count: int, checkpoints: Checkpoints, tensors: Tensors) -> None:
    """Saves step 3 in a forked process, killed before so many calls that open, rename or remove files."""
    calls = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal calls
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"):
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        best = BestStep().or_now(3, {"loss": 0.1}, tensors.kept)
        sys.addaudithook(hook)
        checkpoints.save(State(3, 1.0, best), tensors)
    finally:
        os._exit(0)


def test_a_run_that_ends_while_it_evaluates_goes_on_with_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same run, untouched. Once it is finished its checkpoints are gone."""
    _, untouched = start(tmp_path / "a")

    def ends(*args: object, **kwargs: object) -> None:
        raise Unreadable("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "predictions", ends)
        code, experiment = start(tmp_path / "b")
    assert code == FAILED
    assert latest(experiment.folder / "checkpoints") == experiment.folder / "checkpoints" / "step_0000003"
    assert start(tmp_path / "b", "resume=strict")[0] == FINISHED
    lines = (experiment.folder / "train.log").read_text()
    assert "going on from step 3 of 3" in lines
    results = [json.loads((e.folder / "result.json").read_text()) for e in (untouched, experiment)]
    assert results[0]["metrics"] == results[1]["metrics"]
    for folder in (untouched.folder, experiment.folder):
        assert not (folder / "checkpoints").exists()


def test_a_manifest_without_the_tensors_is_passed_over(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    reader.save(3)
    (tmp_path / "step_0000003" / TENSORS).unlink()
    seal(tmp_path / "step_0000003", (STATE,))
    said: list[str] = []
    assert reader.checkpoints.resume(lambda names: reader.tensors, said.append) == State()
    assert said[0].endswith(f"{MANIFEST} does not list {TENSORS}")
    assert latest(tmp_path) is None


def test_after_a_checkpoint_of_other_tensors_the_model_is_asked_for_those_of_the_start(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight])
    checkpoints = Checkpoints(tmp_path, {}, keep_last=2)
    checkpoints.save(State(3), Tensors({"a": weight}, optimizer))
    asked: list[list[str]] = []

    def larger(names: Collection[str]) -> Tensors:
        asked.append([*names])
        return Tensors({"a": torch.zeros(3)}, optimizer)

    assert checkpoints.resume(larger, lambda text: None).step == 0
    assert asked == [["a"], []]


def test_an_optimisers_state_goes_where_its_tensors_are_and_its_count_of_steps_stays(tmp_path: Path) -> None:
    """As torch's optimisers have it; the meta device stands for one that is not the CPU."""
    weight, elsewhere = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device="meta"))
    optimizer, other = torch.optim.AdamW([weight]), torch.optim.AdamW([elsewhere])
    weight.sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, {}, keep_last=1)
    checkpoints.save(State(1), Tensors({"a": weight}, optimizer))
    assert checkpoints.resume(lambda names: Tensors({"a": elsewhere}, other), lambda text: None).step == 1
    devices = {key: value.device.type for key, value in other.state[elsewhere].items()}
    assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_what_is_no_checkpoint_is_left_alone_and_what_was_half_removed_goes(
    two: tuple[Path, list[torch.Tensor]],
) -> None:
    folder, _ = two
    for name in ("step_by_step", ".draft_old_step_0000002"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    assert latest(folder) == folder / STEP_2
    writer = Reader(folder)
    writer.save(2)
    assert names(folder) == ["step_0000001", STEP_2, "step_by_step"]
    assert writer.resume().step == 2


def test_a_parameters_name_may_have_a_slash(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], momentum=0.5)
    weight.sum().backward()
    optimizer.step()
    checkpoints, kept = Checkpoints(tmp_path, {}, keep_last=2), {"blocks.a/b/c": weight}
    checkpoints.save(State(3), Tensors(kept, optimizer))
    other = torch.optim.SGD([weight], momentum=0.5)
    assert checkpoints.resume(lambda names: Tensors(kept, other), lambda text: None).step == 3
    assert other.state[weight]["momentum_buffer"].tolist() == [1, 1]
