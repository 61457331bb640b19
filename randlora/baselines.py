"""What a reader tries first: the majority class, and a linear model on pixels, word counts or frozen features.

The linear models are scikit-learn's. They are recorded as runs are, without a pretrained model as methods of the model
``none``, so that every table and figure has them beside the adapters. A score that does not beat them says nothing of
fine-tuning.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from randlora.bounds import count
from randlora.config import General, build, settings
from randlora.data.images import rgb
from randlora.data.loader import Split, evaluation_keys, loader
from randlora.errors import FINISHED, SettingsError
from randlora.models.base import Backbone, Model, Pixels
from randlora.records.result import NO_MODEL, Headline, Result
from randlora.records.signature import signature
from randlora.records.versions import commit, versions
from randlora.tasks import ImageClassification, TextClassification
from randlora.tasks.base import Budget, Splits, Task
from randlora.tasks.image_classification import ImageClassifier

MAJORITY, PIXELS, WORDS, CENTROID, FEATURES = "majority", "pixels", "words", "centroid", "features"
SIDE = 32  # to which larger images, and those of several sizes, are made smaller
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # scikit-learn's C, chosen on the validation split


class Estimator(Protocol):
    """What scikit-learn's classifiers and regressions share."""

    def fit(self, x: Any, y: np.ndarray) -> Any: ...

    def predict(self, x: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Data:
    """A split as a linear model takes it: features (N, d), dense or sparse, and labels (N,)."""

    features: Any
    labels: np.ndarray


def baselines(config: Mapping[str, Any], features: bool = False) -> Iterator[Result]:
    """Those of a run's task, budget and seed; its method takes no part.

    Args:
        config: Settings of a run.
        features: Whether to give, last, two on the features of the frozen image tower of the run's model, which takes
            no part in the others: the nearest of the classes' means, and a linear model of the features, each scaled to
            unit variance: a linear probe whose optimum is found.

    Raises:
        SettingsError: The task's outputs are neither classes nor numbers, its data are missing, or there are no
            features of images.
    """
    general, task = General.from_config(config), build(config["task"])
    budget = Budget(general.seed, general.shots, general.fraction)
    if not isinstance(task, ImageClassification | TextClassification):
        raise SettingsError(f"task {task.name} is no classification: there is no baseline for it")
    model = build(config["model"])
    if features:
        if not isinstance(task, ImageClassification):
            raise SettingsError(f"task {task.name} has no images: --features is for tasks of image classification")
        task.check_model(model)
        model.check()
    nothing: Any = None  # the encoders are not used
    backbone = Backbone(nothing, "", 0, Pixels(SIDE, (0, 0, 0), (1, 1, 1)), tokenizer=lambda: nothing)
    task.check()
    splits = task.splits(backbone, budget)
    train, validation, test = _data(task, splits)
    linear = PIXELS if isinstance(task, ImageClassification) else WORDS
    yield _best(config, task, MAJORITY, [_majority(task)], (train, validation, test), splits)
    yield _best(config, task, linear, [_linear(task, c) for c in STRENGTHS], (train, validation, test), splits)
    if features:
        from sklearn.neighbors import NearestCentroid
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        assert isinstance(task, ImageClassification)
        encoded = _features(task, model, budget)
        yield _best(config, task, CENTROID, [NearestCentroid()], encoded, splits)
        candidates = [make_pipeline(StandardScaler(), _linear(task, c)) for c in STRENGTHS]
        yield _best(config, task, FEATURES, candidates, encoded, splits)


def _best(
    config: Mapping[str, Any], task: Any, method: str, candidates: Sequence[Any], data: Sequence[Data], splits: Splits
) -> Result:
    """Of the candidates, fitted to the training split, the one with the best score on validation."""
    train, validation, test = data
    tried = []
    for estimator in candidates:
        estimator.fit(train.features, train.labels)
        tried.append((_scores(task, estimator, validation) if len(validation.labels) else {}, estimator))
    chosen, estimator = max(tried, key=lambda scored: scored[0].get(task.headline, 0.0))
    metrics = {f"validation/{name}": value for name, value in chosen.items()}
    metrics |= {f"test/{name}": value for name, value in _scores(task, estimator, test).items()}
    return _result(config, task, method, estimator, metrics, splits)


def _features(task: ImageClassification, model: Model, budget: Budget) -> list[Data]:
    """Of train, validation and test, each image as it is scored: (N, width), of the frozen tower."""
    torch.manual_seed(budget.seed)  # for weights that are random
    backbone = model.load()
    splits = task.splits(backbone, budget)
    classifier = task.bind(backbone).model.eval()
    assert isinstance(classifier, ImageClassifier)
    parts = []
    for split in (splits.train, splits.validation, splits.test):
        plain = Split(split.table, split.rows, splits.test.encode, tolerance=split.tolerance)
        features, labels = [np.zeros((0, backbone.width), dtype=np.float32)], [np.zeros(0, dtype=np.int64)]
        with torch.inference_mode():
            for (batch,) in loader(plain, evaluation_keys(range(len(plain)), 256), workers=0):
                features.append(classifier.image_features(batch["image"]).float().numpy())
                labels.append(batch["label"].numpy())
        parts.append(Data(np.concatenate(features), np.concatenate(labels)))
    return parts


def _data(task: ImageClassification | TextClassification, splits: Splits) -> list[Data]:
    """Train, validation and test."""
    parts = splits.train, splits.validation, splits.test
    labels = [split.table.column("label")[split.rows] for split in parts]
    if isinstance(task, ImageClassification):
        return [Data(_pixels(split), of_split) for split, of_split in zip(parts, labels, strict=True)]
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer

    texts = [[[str(text) for text in split.table.column(name)[split.rows]] for name in task.texts] for split in parts]
    counters = [CountVectorizer(ngram_range=(1, 2)).fit(column) for column in texts[0]]
    counted = [
        hstack([counter.transform(column) for counter, column in zip(counters, columns, strict=True)], format="csr")
        for columns in texts
    ]
    return [Data(features, of_split) for features, of_split in zip(counted, labels, strict=True)]


def _pixels(split: Split) -> np.ndarray:
    """Of RGB images with values from 0 to 1, no larger than SIDE × SIDE: (N, height · width · 3)."""
    from PIL import Image

    images = [rgb(split.table[int(row)]["image"]) for row in split.rows]
    sizes = {image.size for image in images}
    if len(sizes) > 1 or any(max(size) > SIDE for size in sizes):
        images = [image.resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images]
    return np.array([np.asarray(image, dtype=np.float32).ravel() / 255 for image in images])


def _majority(task: ImageClassification | TextClassification) -> Estimator:
    from sklearn.dummy import DummyClassifier, DummyRegressor

    return DummyClassifier(strategy="prior") if task.classifies else DummyRegressor()


def _linear(task: ImageClassification | TextClassification, strength: float) -> Estimator:
    from sklearn.linear_model import LogisticRegression, Ridge

    return LogisticRegression(C=strength, max_iter=2000) if task.classifies else Ridge(alpha=1 / strength)


def _scores(task: ImageClassification | TextClassification, estimator: Any, data: Data) -> dict[str, float]:
    """By the task's own metrics."""
    predicted = estimator.predict(data.features)
    if task.classifies:
        known = {label: place for place, label in enumerate(estimator.classes_)}
        likely = estimator.predict_proba(data.features)
        right = [likely[i, known[y]] if y in known else 0.0 for i, y in enumerate(data.labels)]
        losses = -np.log(np.maximum(right, np.finfo(float).tiny))
    else:
        losses = (predicted - data.labels) ** 2
    return task.score({"predicted": predicted.tolist(), "label": data.labels.tolist(), "loss": losses.tolist()})


def _result(
    given: Mapping[str, Any], task: Task, method: str, estimator: Any, metrics: Mapping[str, float], splits: Splits
) -> Result:
    config = {name: given[name] for name in ("task", "seed", "shots", "fraction", "run_root", "data_root")}
    model = given["model"] if method in (CENTROID, FEATURES) else {"name": NO_MODEL}
    config |= {"model": model, "method": {"name": method}}
    estimator = estimator[-1] if method == FEATURES else estimator
    size = sum(np.size(getattr(estimator, name, ())) for name in ("coef_", "intercept_", "centroids_"))
    return Result(
        task=task.name,
        model=config["model"]["name"],
        method=method,
        shots=given["shots"],
        fraction=given["fraction"],
        seed=given["seed"],
        signature=signature(config, task.version),
        headline=Headline(f"test/{task.headline}", metrics[f"test/{task.headline}"]),
        config=config,
        task_version=task.version,
        status="finished",
        metrics=metrics,
        trainable_parameters=size,
        examples={name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        versions=versions(),
        commit=commit(),
        device="cpu",
    )


def main(arguments: Sequence[str]) -> int:
    """randlora baselines task=… [KEY=VALUE …] [--seeds COUNT] [--features]"""
    parser = argparse.ArgumentParser(
        prog="randlora baselines", description="Scores that need no fine-tuning, recorded beside the runs'."
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of a run, such as task=cifar10 shots=16")
    parser.add_argument("--seeds", type=count, help="seeds 0, 1, … in place of the one in the settings")
    parser.add_argument("--features", action="store_true", help="also two models on the frozen model's features")
    options = parser.parse_args(arguments)
    seeds = [[]] if options.seeds is None else [[f"seed={seed}"] for seed in range(options.seeds)]
    for seed in seeds:
        config = settings(*options.settings, *seed)
        for result in baselines(config, options.features):
            names = result.task, result.model, result.method, result.signature
            folder = Path(config["run_root"]).joinpath(*names)
            folder.mkdir(parents=True, exist_ok=True)
            result.write(folder / "result.json")
            print(f"{result.method}: {result.headline.name} {result.headline.value:.4f}, seed {result.seed}: {folder}")
    return FINISHED
