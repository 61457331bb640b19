"""What the program says, word by word: remedies, hints and reports that are put together from parts."""

import datasets
import numpy as np
import pytest
import torch
from test_training import TASK, Quiet, splits
from torch import nn

import randlora
from conftest import task
from randlora.adapters.targets import match
from randlora.data.labels import described
from randlora.data.loader import Encoder, Skipped, Split, Unreadable
from randlora.data.sources import ArrayImages, Hub
from randlora.errors import SettingsError
from randlora.methods import LoRA
from randlora.tasks import text_metrics
from randlora.tasks.base import Bound
from randlora.training import Trainer
from randlora.training.evaluate import brief, prefixed
from randlora.training.watch import LossWatch

LAYERS = [f"layers.{i}.{part}" for i in (0, 1) for part in ("q_proj", "v_proj", "o_proj", "up_proj", "down", "w", "y")]


@pytest.mark.parametrize(
    ("names", "pattern", "hint"),
    [
        ([], "x", "the model has none"),
        (LAYERS, "layers.*.k_proj", "there are layers.*.v_proj, layers.*.q_proj, layers.*.o_proj"),
        (LAYERS, "layer.12.dwn", "there are layers.*.down, layers.*.w, layers.*.y"),
        (["z", "encoder.block.3.attention"], "attention.", "there are encoder.block.*.attention"),
        ([f"{letter}.3" for letter in "abcdefghij"], "zzzzzz", f"there are {', '.join(f'{x}.*' for x in 'abcdefgh')}"),
    ],
)
def test_a_target_without_a_match_names_what_is_near(names: list[str], pattern: str, hint: str) -> None:
    with pytest.raises(SettingsError) as error:
        match(names, [pattern])
    assert str(error.value) == f"target {pattern!r} matches no linear map; {hint}"


def test_slices_that_are_not_there_are_answered_with_those_that_are() -> None:
    model = nn.ModuleDict({"c_attn": nn.Linear(4, 12), "fc": nn.Linear(4, 4)})
    fused = "c_attn has no slice 'z'; it has c_attn[q], c_attn[k], c_attn[v]"
    plain = "fc has no slice 'q'; it has none: it is not a fused matrix that is known"
    for target, sentence in (("c_attn[z]", fused), ("fc[q]", plain)):
        with pytest.raises(SettingsError) as error:
            randlora.adapt(model, LoRA(2), [target])
        assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({}, "for the train split; put the data there"),
        (
            {"splits": {"test": "rows"}},
            "test split; put rows there that are in no other split: they alone give the result",
        ),
        ({"repository": "x/y"}, "train split; put the data there, or leave data_root out to fetch it"),
        ({"origin": "http://x"}, "train split; put the data there; from http://x, by scripts/data.py prepare"),
    ],
)
def test_missing_files_are_answered_with_where_they_go(options: dict, remedy: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = Hub("birds", root=str(tmp_path), **options)
    name = next(iter(source.splits.values()))
    with pytest.raises(SettingsError) as error:
        source.check()
    endings = f"no {name}.parquet, no {name}.json, .jsonl, .csv, .tsv and no image folder {name}/"
    assert str(error.value).startswith(f"data_root={tmp_path}: {tmp_path}/birds has {endings} for the ")
    assert str(error.value).endswith(remedy)


def test_both_halves_of_a_split_must_be_there(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A split of two files is their rows one after the other; an optional one needs both to be one at all."""
    parts = Hub(".", root=str(tmp_path), splits={"test": "a+b"}, optional=["test"])
    rows = {"a": [0, 1], "b": [1, 0, 1]}
    for name, labels in rows.items():
        assert parts.available() == []
        datasets.Dataset.from_dict({"label": labels}).to_parquet(str(tmp_path / f"{name}.parquet"))
    assert parts.available() == ["test"]
    assert parts.open("test").column("label").tolist() == [0, 1, 1, 0, 1]
    assert Hub(".", repository="x", splits={"test": "a"}, optional=["test"]).available() == []


def test_examples_that_cannot_be_read_are_counted_aloud_once() -> None:
    said: list[str] = []
    split = Split(ArrayImages(np.zeros((3, 1, 1), np.uint8), np.arange(3)), np.arange(2000), Encoder(), tolerance=0.001)
    for _ in range(2):
        split.skip(Skipped(7, "OSError: cut"), said.append)
    assert said == ["example 7 cannot be read (OSError: cut) and is left out: 1 of 2,000 so far"]
    split.skip(Skipped(8, "b"), said.append)
    assert said[1:] == ["example 8 cannot be read (b) and is left out: 2 of 2,000 so far"]
    with pytest.raises(Unreadable) as error:
        split.skip(Skipped(9, "c"), said.append)
    assert str(error.value) == ("example 9 cannot be read (c): 3 of 2,000, more than task.unreadable=0.001 allows")


def test_names_and_scores_on_one_line() -> None:
    assert described(["ant", "bee"]) == "classes in the order of their labels: ant, bee"
    assert (
        brief(prefixed("test", {"accuracy": 0.98765, "loss": 12345.6})) == "test/accuracy 0.9877, test/loss 1.235e+04"
    )


@pytest.mark.parametrize(
    ("package", "java", "sentence"),
    [
        (None, "/bin/java", "its program is in the Python package pycocoevalcap (pip install pycocoevalcap)"),
        (object(), None, "it is a Java program, and there is no java on the PATH"),
    ],
)
def test_why_meteor_is_left_out(package: object, java: str | None, sentence: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", {"pycocoevalcap": package}.__getitem__)
    monkeypatch.setattr(text_metrics.shutil, "which", {"java": java}.__getitem__)
    assert task("e2e_nlg").remark() == f"METEOR is left out: {sentence}"


def test_a_loss_that_rises_is_reported_once() -> None:
    """At a mean of more than 1.05 of the first over a full window, of which the oldest leaves."""
    watch = LossWatch(window=2)
    assert [watch.add(loss) for loss in (2.0, 2.2, 2.0, 2.1)] == [None] * 4  # means 2.1, 2.1 and 2.05
    assert watch.add(2.34) == (
        "the training loss, 2.22 over 2 steps, is above its start, 2: the learning rate or the method's alpha is "
        "probably too large"
    )
    assert watch.add(9.0) is None
    usual = LossWatch()
    assert [usual.add(1.0 + (i > 0)) is None for i in range(20)] == [True] * 19 + [False]


def test_a_training_reports_what_it_does_when_it_is_due(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The first, the last and every third step are logged, every step is shown, every second one scored."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    randlora.adapt(net, LoRA(2), ["0"])
    shown: list[tuple] = []

    class Noting(Quiet):
        def progress(self, step: int, steps: int, text: str) -> None:
            shown.append((step, steps, text))

    observer = Noting()
    trainer = Trainer(max_steps=7, batch_size=4, log_every=3, evaluate_every=2, device="cpu", schedule="constant")
    trainer.fit(
        TASK, Bound(net), splits(), seed=1, folder=tmp_path, observer=observer, accelerator=trainer.accelerator(),
    )  # fmt: skip
    lines = [line for line in observer.metrics if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 3, 6, 7]
    assert all(line["train/learning_rate"] == 1e-3 and line["train/gradient_norm"] > 0 for line in lines)
    scores = [line for line in observer.metrics if "validation/accuracy" in line]
    assert [line["step"] for line in scores] == [2, 4, 6]
    assert set(scores[0]) == {
        "step", "validation/accuracy", "validation/count", "update/relative_norm_mean", "update/relative_norm_max",
    }  # fmt: skip
    assert 0 < scores[0]["update/relative_norm_max"] < scores[2]["update/relative_norm_max"]
    assert [step for step, *_ in shown] == [1, 2, 3, 4, 5, 6, 7]
    for line in lines:
        assert (line["step"], 7, f"loss {line['train/loss']:.3f}") in shown
    assert [text.partition(":")[0] for text in observer.said] == ["step 2", "step 4", "step 6"]
    assert observer.said[0].startswith("step 2: validation/accuracy ")
