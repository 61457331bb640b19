"""Scores without a pretrained model. Oracle: scikit-learn on features that are made here anew."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from conftest import REPOSITORY, settings
from randlora.baselines import baselines
from randlora.data.subsets import few_shot, split_validation, validation_size_of
from randlora.errors import FINISHED, WRONG_SETTINGS
from randlora.experiment import Experiment
from randlora.records import read
from randlora.studies.collect import without_folders
from randlora.studies.tables import over_seeds


def test_digits_by_their_pixels(tmp_path: Path, program: Callable, capsys: pytest.CaptureFixture) -> None:
    """The strength is chosen on validation: the test set would choose another one here."""
    options = ["task=digits", "shots=4", f"run_root={tmp_path}", "--seeds", "2"]
    assert program(REPOSITORY / "train.py", "baselines", *options) == FINISHED
    results = {result.method: result for result in read(tmp_path) if result.seed == 1}
    digits = load_digits()
    x, y = np.floor(digits.images * (255 / 16)).reshape(-1, 64) / 255, digits.target
    train, validation = split_validation(1400, validation_size_of(1400, 5000), "digits")
    train = train[few_shot(y[train], 4, 1)]
    grey = np.repeat(x, 3, axis=1)
    scores = {}
    for strength in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0):
        model = LogisticRegression(C=strength, max_iter=5000).fit(grey[train], y[train])
        scores[strength] = model.score(grey[validation], y[validation]), model.score(grey[1400:], y[1400:])
    best = max(scores, key=lambda strength: scores[strength][0])
    assert max(scores, key=lambda strength: scores[strength][1]) != best
    pixels, majority = results["pixels"], results["majority"]
    assert pixels.metrics["validation/accuracy"] == pytest.approx(scores[best][0])
    assert pixels.metrics["test/accuracy"] == pytest.approx(scores[best][1])
    assert pixels.trainable_parameters == 10 * 192 + 10
    assert pixels.examples == {"train": 40, "validation": 140, "test": 397}
    assert majority.metrics["test/accuracy"] == pytest.approx(np.mean(y[1400:] == 0))  # all are as frequent
    assert majority.metrics["test/loss"] == pytest.approx(np.log(10))
    assert "| digits | none | 4 | pixels | 1,930 | accuracy, % |  |" in over_seeds(read(tmp_path))


def texts(root: Path, label: Callable[[int], object]) -> None:
    (root / "mine").mkdir()
    for split, numbers in (("train", range(40)), ("validation", range(40, 50)), ("test", range(50, 70))):
        lines = [f"word{i % 3} of {i},{label(i)}" for i in numbers]
        (root / "mine" / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")


def test_texts_by_their_words(tmp_path: Path) -> None:
    texts(tmp_path, lambda i: "abc"[i % 3])
    options = ["task=own_texts", "task.source.folder=mine", f"data_root={tmp_path}", "task.texts=[text]"]
    majority, words = baselines(settings(*options, "task.class_names=null"))
    assert words.metrics["test/accuracy"] == 1.0  # a word says the class
    assert majority.metrics["test/accuracy"] == pytest.approx(np.mean([i % 3 == 0 for i in range(50, 70)]))
    assert (words.model, words.method, words.metric) == ("none", "words", "accuracy")
    assert str(tmp_path) not in str(without_folders(words).config)  # a study names no folder of a machine


def test_numbers_by_their_words(tmp_path: Path) -> None:
    texts(tmp_path, lambda i: float(i % 3) + 0.01 * i)
    options = ["task=own_texts", "task.source.folder=mine", f"data_root={tmp_path}", "task.texts=[text]"]
    majority, words = baselines(settings(*options, "task.class_names=[]", "task.metrics=[pearson]"))
    counter = CountVectorizer(ngram_range=(1, 2)).fit([f"word{i % 3} of {i}" for i in range(40)])
    counts = counter.transform([f"word{i % 3} of {i}" for i in range(70)])
    target = np.array([i % 3 + 0.01 * i for i in range(70)])
    reached = []
    for strength in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0):
        predicted = Ridge(alpha=1 / strength).fit(counts[:40], target[:40]).predict(counts)
        reached.append([np.corrcoef(predicted[rows], target[rows])[0, 1] for rows in (slice(40, 50), slice(50, 70))])
    validation, test = max(reached)
    assert words.metrics["validation/pearson"] == pytest.approx(validation, abs=1e-6)
    assert words.metrics["test/pearson"] == pytest.approx(test, abs=1e-6)
    assert majority.metrics["test/pearson"] == 0.0
    assert majority.metrics["test/loss"] == pytest.approx(np.mean((target[50:] - target[:40].mean()) ** 2))


def test_what_has_no_baseline_is_refused(program: Callable, capsys: pytest.CaptureFixture) -> None:
    assert program(REPOSITORY / "train.py", "baselines", "task=e2e_nlg", "data_root=.") == WRONG_SETTINGS
    assert "error: task e2e_nlg is no classification: there is no baseline for it" in capsys.readouterr().err


def test_digits_by_the_frozen_features(tmp_path: Path, program: Callable, capsys: pytest.CaptureFixture) -> None:
    """Oracle: scikit-learn on what open_clip's encode_image gives, scaled by hand; distances by NumPy."""
    import torch

    options = ["task=digits", "shots=4", "task.validation_size=40", "task.test_size=60", f"run_root={tmp_path}"]
    assert program(REPOSITORY / "train.py", "baselines", "--features", "model=clip_tiny", *options) == FINISHED
    (result,) = [result for result in read(tmp_path) if result.method == "features"]
    (nearest,) = [result for result in read(tmp_path) if result.method == "centroid"]
    assert (result.model, result.trainable_parameters) == ("clip_tiny", 10 * 128 + 10)
    experiment = Experiment.from_config(settings("model=clip_tiny", *options))
    backbone = experiment.model.load()
    splits = experiment.task.splits(backbone, experiment.budget)
    encoded = []
    for split in (splits.train, splits.validation, splits.test):
        items = [splits.test.encode(split.table[int(row)]) for row in split.rows]  # without augmentation
        with torch.no_grad():
            features = backbone.module.eval().encode_image(torch.stack([item["image"] for item in items]))
        unit = torch.nn.functional.normalize(features, dim=-1).double().numpy()
        encoded.append((unit, [item["label"] for item in items]))
    centre, scale = encoded[0][0].mean(0), encoded[0][0].std(0)
    (x, y), *others = [((features - centre) / scale, labels) for features, labels in encoded]
    models = [LogisticRegression(C=c, max_iter=2000).fit(x, y) for c in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)]
    best = max(models, key=lambda model: model.score(*others[0]))
    assert result.metrics["validation/accuracy"] == pytest.approx(best.score(*others[0]))
    assert result.metrics["test/accuracy"] == pytest.approx(best.score(*others[1]), abs=0.02)
    (given, of), _, (asked, answers) = encoded
    means = np.stack([given[np.array(of) == label].mean(0) for label in range(10)])
    right = np.linalg.norm(asked[:, None] - means, axis=2).argmin(1) == answers
    assert nearest.metrics["test/accuracy"] == pytest.approx(right.mean(), abs=0.02)
    assert (nearest.model, nearest.trainable_parameters) == ("clip_tiny", 10 * 128)
    assert program(REPOSITORY / "train.py", "baselines", "--features", "task=mrpc", "data_root=.") == WRONG_SETTINGS
