"""Whole runs of the embedded default: the record, skipping, resuming, sweeps, mirrors, and runs that go wrong."""

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import randlora
from conftest import REPOSITORY, settings
from randlora.adapters import tensor_files
from randlora.data.loader import evaluation_keys, loader
from randlora.data.sources import ArrayImages
from randlora.errors import FAILED, FINISHED, SettingsError
from randlora.experiment import Experiment
from randlora.models import OpenClip
from randlora.plan import counts, lengths
from randlora.records.predictions import example_scores, read_columns
from randlora.records.record import state
from randlora.records.result import Result
from randlora.records.tensorboard import TensorBoard
from randlora.run import run
from randlora.tasks import ImageClassification
from randlora.training import Trainer
from randlora.training.evaluate import evaluate

SHORT = ("trainer.max_steps=3", "trainer.batch_size=4", "task.test_size=10", "task.validation_size=10", "shots=2")


# What others' scripts rely on.
KEYS = {
    "status", "headline", "metrics", "trainable_parameters", "head_parameters", "total_parameters", "adapter_bytes",
    "train_seconds", "seconds_per_step", "peak_memory_bytes", "steps", "seed", "signature", "config", "versions",
    "commit", "device", "error", "examples", "task_version",
}  # fmt: skip


def start(root: Path, *overrides: str) -> tuple[int, Experiment]:
    experiment = Experiment.from_config(settings(f"run_root={root}", *SHORT, *overrides))
    return run(experiment, "as: given\n").code, experiment


def result_of(experiment: Experiment) -> dict:
    return json.loads((experiment.folder / "result.json").read_text())


def test_each_split_is_scored_under_its_own_name(tmp_path: Path) -> None:
    """White and black squares; the validation split calls them by their classes, the test split by each other's."""
    rng = np.random.default_rng(0)
    for split, count, (white, black) in (("train", 8, "ab"), ("validation", 5, "ab"), ("test", 6, "ba")):
        for name, level in ((white, 200), (black, 0)):
            folder = tmp_path / "squares" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = level + rng.integers(0, 55, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    overrides = [
        "task=own_images", "task.source.folder=squares", f"data_root={tmp_path}", "model=clip_tiny_vision",
        "trainer.max_steps=5", "trainer.batch_size=8", "trainer.learning_rate=1e-2", f"run_root={tmp_path / 'runs'}",
    ]  # fmt: skip
    experiment = Experiment.from_config(settings(*overrides))
    assert run(experiment, "as: given\n").code == FINISHED
    metrics = result_of(experiment)["metrics"]
    assert (metrics["validation/accuracy"], metrics["test/accuracy"]) == (1.0, 0.0)


def test_a_run_leaves_a_complete_record(tmp_path: Path) -> None:
    code, experiment = start(tmp_path)
    assert code == FINISHED
    folder = experiment.folder
    assert folder.parent == tmp_path / "digits" / "clip_tiny" / "randlora"
    result = result_of(experiment)
    assert set(result) >= KEYS
    assert result["status"] == "finished"
    assert [result[key] for key in ("task", "model", "method", "shots")] == ["digits", "clip_tiny", "randlora", 2]
    assert result["headline"] == {"name": "test/accuracy", "value": result["metrics"]["test/accuracy"]}
    assert {"zero_shot/accuracy", "validation/accuracy", "test/accuracy"} <= set(result["metrics"])
    assert result["examples"] == {"train": 20, "validation": 10, "test": 10}
    assert result["peak_memory_bytes"] > 50e6
    assert result["adapter_bytes"] == sum(p.stat().st_size for p in (folder / "adapter").iterdir())
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    assert result["selected_step"] is None
    assert lines[-1]["update/relative_norm_max"] >= lines[-1]["update/relative_norm_mean"] > 0
    assert set(result["metrics"]) < set(lines[-1])
    assert (folder / "config.yaml").read_text() == "as: given\n"
    log = (folder / "train.log").read_text()
    assert "zero_shot/accuracy" in log
    assert "cannot be exported to PEFT" in log.partition("step 0")[0].partition("step 1")[0]


def test_a_run_that_goes_on_keeps_what_its_method_chose_from_training_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks are in the record, in the adapter and in the counts; a second attempt does not choose again."""
    code, experiment = start(tmp_path, "method=gelora", "method.examples=16")
    assert code == FINISHED
    result = result_of(experiment)
    ranks = result["calibrated"]["ranks"]
    assert set(result["calibrated"]) == {"ranks"}
    assert len(ranks) == 9  # blocks of the two towers
    assert max(ranks.values()) > 1
    blocks = {re.sub(r"\.(attn|mlp)\..*", "", site["name"]): 0 for site in counts(experiment)["sites"]}
    for site in counts(experiment)["sites"]:
        blocks[re.sub(r"\.(attn|mlp)\..*", "", site["name"])] += site["out_features"] + site["in_features"]
    assert result["trainable_parameters"] == sum(ranks[name] * size for name, size in blocks.items())
    assert json.loads((experiment.folder / "adapter" / "adapter.json").read_text())["method"]["ranks"] == ranks
    (experiment.folder / "result.json").unlink()
    monkeypatch.setattr("randlora.methods.gelora.hidden_states", None)
    code, again = start(tmp_path, "method=gelora", "method.examples=16")
    assert code == FINISHED
    assert result_of(again)["calibrated"]["ranks"] == ranks
    assert result_of(again)["metrics"] == result["metrics"]


METHODS = sorted(path.stem for path in (REPOSITORY / "configs" / "method").glob("*.yaml"))
METHODS.remove("linearprobe")  # trains a head alone, and CLIP has none
MORE = {
    "increlora": ["method.top=99"],
    "lorta": ["method.alpha=16", "targets=['visual.*.in_proj[q]','visual.*.in_proj[v]']"],
    "gelora": ["targets=vision", "method.mean_rank=3"],  # with which the count is known without data
}


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_saved_adapter_gives_the_recorded_score(method: str, tmp_path: Path) -> None:
    """The score of the trained model: it differs from the one before training."""
    options = (f"method={method}", "trainer.learning_rate=0.01", *MORE.get(method, []))
    code, experiment = start(tmp_path, *options)
    assert code == FINISHED
    backbone = experiment.model.load()
    splits = experiment.task.splits(backbone, experiment.budget)
    randlora.load_adapter(backbone.module, experiment.folder / "adapter")
    randlora.merge(backbone.module)
    bound = experiment.task.bind(backbone).model.eval()
    ((batch,),) = loader(splits.test, evaluation_keys(range(10), 10), 0)
    with torch.no_grad():
        scores = experiment.task.score(experiment.task.predict(bound, batch))
    recorded = result_of(experiment)["metrics"]
    assert scores["accuracy"] == recorded["test/accuracy"]
    assert scores["loss"] == pytest.approx(recorded["test/loss"], rel=1e-4)
    assert abs(recorded["test/loss"] / recorded["zero_shot/loss"] - 1) > 1e-4
    assert result_of(experiment)["trainable_parameters"] == counts(experiment)["trainable_parameters"]


def test_a_finished_run_is_skipped_and_begun_again_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, experiment = start(tmp_path)
    stamp = (experiment.folder / "result.json").stat().st_mtime_ns
    code, _ = start(tmp_path)
    assert code == FINISHED
    assert "already finished" in capsys.readouterr().err
    assert (experiment.folder / "result.json").stat().st_mtime_ns == stamp
    start(tmp_path, "resume=false")
    assert (experiment.folder / "result.json").stat().st_mtime_ns > stamp


def test_a_run_whose_evidence_is_damaged_is_done_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """To the bit; the file is named. A whole result of other settings is no result of this run."""
    _, experiment = start(tmp_path)
    names = ("metrics.jsonl", "predictions.json.gz", "result.json")
    paths = {name: experiment.folder / name for name in names}
    log = [line.partition('"time"')[0] for line in paths["metrics.jsonl"].read_text().splitlines()]
    predicted = paths["predictions.json.gz"].read_bytes()

    def damage(name: str, how: str) -> None:
        content = paths[name].read_bytes()
        if how == "removed":
            paths[name].unlink()
        elif how == "flipped":
            paths[name].write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        else:
            result = Result.read(paths["result.json"])
            replace(result, signature="0123456789ab").write(paths["result.json"], result.files)

    for name, how in zip(names, ("flipped", "removed", "another run's"), strict=True):
        damage(name, how)
        capsys.readouterr()
        start(tmp_path)
        said = capsys.readouterr().err
        assert f"the run had finished, but {paths[name]} is" in said
        assert paths["predictions.json.gz"].read_bytes() == predicted
        assert [line.partition('"time"')[0] for line in paths["metrics.jsonl"].read_text().splitlines()] == log
    start(tmp_path)
    assert "already finished" in capsys.readouterr().err


def test_what_was_calibrated_is_taken_up_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Oracle: the run that chose; the head starts from the same random numbers where nothing is chosen anew."""
    options = ("method=gelora", "model=clip_tiny_vision")
    _, experiment = start(tmp_path, *options)
    head = (experiment.folder / "adapter" / "head.safetensors").read_bytes()
    path = experiment.folder / "calibrated.json"
    for damaged in (False, True):
        (experiment.folder / "result.json").unlink()
        if damaged:
            path.write_text(path.read_text().replace('"seed"', '"need"').replace("1", "2", 1))
        capsys.readouterr()
        start(tmp_path, *options)
        assert (f"{path} is damaged" in capsys.readouterr().err) is damaged
        assert (experiment.folder / "adapter" / "head.safetensors").read_bytes() == head


def test_a_full_disk_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In what native code raises for it; at the end nothing can be written at all."""

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def write(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_files, "save_file", full)
    code, experiment = start(tmp_path)
    result = result_of(experiment)
    assert (code, result["status"]) == (FAILED, "failed")
    assert result["error"].startswith(f"No space left on device in {experiment.folder}, make room; there was no checkp")
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(Result, "write", write)
    code, _ = start(tmp_path)
    assert code == FAILED
    assert "the result cannot be written: No space left on device" in capsys.readouterr().err
    assert state(experiment.folder) == "dead"


def test_a_frozen_text_tower_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    calls = []
    encode = open_clip.CLIP.encode_text
    monkeypatch.setattr(open_clip.CLIP, "encode_text", lambda self, text: calls.append(1) or encode(self, text))
    start(tmp_path, "targets=vision")
    few = len(calls)
    calls.clear()
    start(tmp_path, "targets=all")
    # Once before and once after training; between, once when frozen, else in each of the three steps.
    assert (few, len(calls)) == (3, 5)


FROZEN_TOWERS = [
    ("model=clip_tiny_vision", "method=linearprobe", "task.augmentation=none"),
    ("model=clip_tiny", "targets=text", "task.augmentation=none"),
]


@pytest.mark.parametrize("overrides", FROZEN_TOWERS)
def test_behind_a_frozen_tower_every_image_is_decoded_once(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same run with nothing kept, whose scores are the same."""
    decoded: list[int] = []
    read = ArrayImages.__getitem__
    monkeypatch.setattr(ArrayImages, "__getitem__", lambda table, i: decoded.append(i) or read(table, i))
    kept = result_of(start(tmp_path / "kept", *overrides)[1])
    assert len(decoded) == 20 + 10 + 10  # two shots of ten classes, validation, test
    monkeypatch.setattr(ImageClassification, "frozen_part", lambda task, model: None)
    anew = result_of(start(tmp_path / "anew", *overrides)[1])
    assert len(decoded) >= 40 + 3 * 4 + 10 + 10
    assert kept["metrics"] == pytest.approx(anew["metrics"], rel=1e-4)


@pytest.mark.parametrize("overrides", FROZEN_TOWERS)
def test_damaged_images_do_not_shorten_a_run(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the dry run, which knows nothing of damage; 20 images in batches of 1, three of them unreadable."""
    read, digits = ArrayImages.__getitem__, 1797 - 397

    def damaged(table: ArrayImages, index: int) -> object:
        if len(table) == digits and index in broken:
            raise OSError("cut short")
        return read(table, index)

    length = ("trainer.max_steps=null", "trainer.epochs=1", "trainer.batch_size=1", "task.unreadable=0.2")
    experiment = Experiment.from_config(settings(f"run_root={tmp_path}", *SHORT, *overrides, *length))
    rows = experiment.task.splits(experiment.model.load(), experiment.budget).train.rows
    broken = set(rows[:3].tolist())
    monkeypatch.setattr(ArrayImages, "__getitem__", damaged)
    assert run(experiment, "as: given\n").code == FINISHED
    assert result_of(experiment)["steps"] == lengths(experiment)["steps"] == 20


def test_augmented_images_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    read = ArrayImages.__getitem__
    monkeypatch.setattr(ArrayImages, "__getitem__", lambda table, i: decoded.append(i) or read(table, i))
    start(tmp_path, "model=clip_tiny_vision", "method=linearprobe", "task.augmentation=crop")
    assert len(decoded) == 3 * 4 + 10 + 10


def test_a_probe_needs_a_head(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="linearprobe has nothing to train here"):
        start(tmp_path, "method=linearprobe")


def test_an_error_is_recorded_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("something")

    monkeypatch.setattr(Trainer, "fit", broken)
    code, experiment = start(tmp_path)
    assert code == FAILED
    result = result_of(experiment)
    assert (result["status"], result["error"]) == ("failed", "KeyError: 'something'")
    assert result["headline"] == {"name": "test/accuracy", "value": None}
    assert set(result) >= KEYS
    assert "Traceback" in (experiment.folder / "train.log").read_text()
    monkeypatch.undo()
    code, _ = start(tmp_path)
    assert code == FINISHED


def test_running_out_of_memory_is_recorded_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "fit", full)
    code, experiment = start(tmp_path)
    assert code == FAILED
    assert result_of(experiment)["status"] == "out_of_memory"
    assert "micro_batch_size" in result_of(experiment)["error"]


def test_divergence_is_recorded(tmp_path: Path) -> None:
    code, experiment = start(tmp_path, "trainer.learning_rate=1e30", "trainer.max_grad_norm=null")
    assert code == FAILED
    assert result_of(experiment)["status"] == "diverged"
    assert "learning rate" in result_of(experiment)["error"]


def test_two_loggers_mirror_a_run(tmp_path: Path) -> None:
    """Oracle: TensorBoard's own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, experiment = start(tmp_path, "logger=[wandb,tensorboard]", "logger.wandb.mode=disabled")
    assert code == FINISHED
    events = EventAccumulator(str(experiment.folder / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (experiment.folder / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(logged)


def test_tensorboard_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="logger=tensorboard: the package is not installed: pip install"):
        TensorBoard()


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_other_optimizers_run_and_have_records_of_their_own(optimizer: str, tmp_path: Path) -> None:
    code, experiment = start(tmp_path, f"optimizer={optimizer}")
    assert code == FINISHED
    assert experiment.folder.name != Experiment.from_config(settings(f"run_root={tmp_path}", *SHORT)).folder.name


def test_a_terminated_run_exits_with_85_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", f"run_root={tmp_path}", *SHORT, "trainer.max_steps=100000"]
    process = subprocess.Popen(command, cwd=REPOSITORY, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 85, errors
    (path,) = tmp_path.rglob("result.json")
    assert json.loads(path.read_text())["status"] == "interrupted"
    assert list(path.parent.glob("checkpoints/step_*/tensors.safetensors"))


def test_peak_memory_sees_what_was_allocated_and_forgets_what_was_before() -> None:
    """In a process of its own: one that has freed gigabytes allocates without growing."""
    code = """
import torch
from randlora.records.memory import PeakMemory

size = 300 * 2**20
block = torch.ones(size // 4)
del block
before = PeakMemory(torch.device("cpu"))
low = before.bytes()
block = torch.ones(size // 4)
high = before.bytes()
del block
print(high - low, PeakMemory(torch.device("cpu")).bytes() - high, size)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    grown, after, size = map(int, done.stdout.split())
    assert grown > 0.9 * size
    if Path("/proc/self/clear_refs").exists():
        assert after <= 0


@pytest.mark.parametrize("model", ["clip_tiny", "clip_tiny_vision"])
def test_a_run_keeps_what_it_predicted_of_every_test_example(model: str, tmp_path: Path) -> None:
    """Rows and labels are the data's own, with features cached or not, and the headline is their mean."""
    _, experiment = start(
        tmp_path, f"model={model}", "method=linearprobe" if model.endswith("vision") else "method=lora"
    )
    result = Result.read(experiment.folder / "result.json")
    columns = read_columns(result)
    table = experiment.task.open()["test"]
    assert columns["row"] == sorted(experiment.task.test_rows(table).tolist())
    assert columns["label"] == table.column("label")[columns["row"]].tolist()
    assert np.mean(list(example_scores(result).values())) == pytest.approx(result.headline.value)
    assert np.mean(columns["loss"]) == pytest.approx(result.metrics["test/loss"])
    _, without = start(tmp_path / "without", f"model={model}", "predictions=false")
    assert not (without.folder / "predictions.json.gz").exists()


def test_the_best_step_is_what_is_scored_and_recorded(tmp_path: Path) -> None:
    settings = ("trainer.select=best", "trainer.evaluate_every=1", "trainer.learning_rate=0.1")
    code, experiment = start(tmp_path, *settings)
    assert code == FINISHED
    result = result_of(experiment)
    lines = [json.loads(line) for line in (experiment.folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation/loss"] for line in lines[:-1] if "validation/loss" in line}
    assert sorted(losses) == [1, 2, 3]
    assert result["selected_step"] == min(losses, key=lambda step: losses[step])
    assert result["metrics"]["validation/loss"] == pytest.approx(min(losses.values()))


def test_the_embedded_weights_are_as_many_as_their_card_says() -> None:
    assert sum(p.numel() for p in OpenClip(name="clip_tiny").load().module.parameters()) == 6_065_985


@pytest.mark.parametrize(("task", "percent"), [("tiny_imagenet", 20.5), ("cifar10", 18.1)])
def test_the_embedded_weights_score_what_their_card_says(task: str, percent: float, shared_data: Path) -> None:
    """Oracle: the card's zero-shot scores of 10,000 images, within three deviations of a subsample of 500."""
    experiment = Experiment.from_config(settings(f"task={task}", f"data_root={shared_data}", "task.test_size=500"))
    backbone = experiment.model.load()
    test = experiment.task.splits(backbone, experiment.budget).test
    scores = evaluate(experiment.task, experiment.task.bind(backbone).model, test, experiment.trainer.accelerator())
    assert 100 * scores["accuracy"] == pytest.approx(percent, abs=3 * (percent * (100 - percent) / 500) ** 0.5)
