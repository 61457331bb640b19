"""What every task offers to the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from randlora.data.loader import Encoder, Split
from randlora.data.sources import Source, Table
from randlora.data.subsets import check_budget, few_shot, fractional, split_validation, subsample, validation_size_of
from randlora.errors import SettingsError
from randlora.models.base import Backbone, Model


@dataclass(frozen=True)
class Budget:
    """How much of the training set is used: `shots` per class, a `fraction`, or all. `seed` draws it."""

    seed: int
    shots: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        check_budget(self.shots, self.fraction)


@dataclass(frozen=True)
class Splits:
    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Task:
    """A data set and its score; the model decides the head.

    A set without a validation split gives a tenth of its training split for one, no more than `validation_size` rows.

    Args:
        name: as in configs and records.
        source: where the examples are.
        sizes: the rows of the source's splits as published (or a list of them, where reduced copies are known to go
            round); they are checked against what is loaded, and the first lets a dry run count steps without data.
            None for data that are not published: the splits that are there are counted.
        validation_size: the most rows that validation uses; 0 trains on all where there is no validation split.
        test_size: the most rows of the test split that are used, None for all; scores on fewer are not comparable with
            published ones, and the record's config shows it.
    """

    kinds: ClassVar[tuple[str, ...]]  # of models that it makes sense with
    version: ClassVar[int] = 1  # raised when scores stop being comparable

    name: str
    source: Source
    sizes: Mapping[str, int | Sequence[int]] | None = None
    validation_size: int = 5000
    test_size: int | None = None

    def check(self) -> None:
        """Raises SettingsError for data that are known to be missing, without opening them."""
        self.source.check()

    def check_model(self, model: Model) -> None:
        """Raises SettingsError for a model of a kind that the task cannot use."""
        if model.kind not in self.kinds:
            raise SettingsError(
                f"task={self.name} needs a model of kind {' or '.join(self.kinds)}; model={model.name} is {model.kind}"
            )

    def training_size(self, budget: Budget) -> int:
        """The training examples of a run, from the published sizes or, without them, from the data."""
        if self.sizes is None:
            count, splits = len(self.source.open("train")), self.source.available()
        else:
            count, splits = _published(self.sizes["train"])[0], list(self.sizes)
        if "validation" not in splits:
            count -= validation_size_of(count, self.validation_size)
        if budget.shots is not None:
            return budget.shots * self.class_count()
        return count if budget.fraction is None else max(1, round(count * budget.fraction))

    def class_count(self) -> int:
        """How many classes `shots` multiplies; SettingsError for a task without classes."""
        raise SettingsError(f"shots: task {self.name} has no classes to draw from; use fraction")

    def open(self) -> dict[str, Table]:
        """The source's splits. Raises SettingsError when they are missing or have another size than published."""
        sizes = self.sizes or {}
        tables = {split: self.source.open(split) for split in (sizes or self.source.available())}
        for split, published in sizes.items():
            count = len(tables[split])
            if count not in _published(published):
                expected = " or ".join(map(str, _published(published)))
                raise SettingsError(
                    f"{self.name}: the {split} split has {count} rows, expected {expected}; for data of your own give "
                    f"task.sizes.{split}={count}, or task.sizes=null to count them"
                )
        return tables

    def splits(self, backbone: Backbone, budget: Budget) -> Splits:
        """Opens the data and draws the budget; SettingsError as `open`."""
        tables = self.open()
        count = len(tables["train"])
        train, validation = np.arange(count), None
        if "validation" not in tables:
            train, validation = split_validation(count, validation_size_of(count, self.validation_size), self.name)
        if budget.shots is not None:
            self.class_count()
            train = train[few_shot(tables["train"].column("label")[train], budget.shots, budget.seed)]
        elif budget.fraction is not None:
            train = train[fractional(len(train), budget.fraction, budget.seed)]
        if validation is None:
            held = tables["validation"]
            validation = subsample(len(held), self.validation_size, self.name)
        else:
            held = tables["train"]
        test = self.test_rows(tables["test"])
        return Splits(
            Split(tables["train"], train, self.encoder(backbone, training=True), budget.seed, self.tolerance()),
            Split(held, validation, self.encoder(backbone, training=False), tolerance=self.tolerance()),
            Split(tables["test"], test, self.encoder(backbone, training=False), tolerance=self.tolerance()),
        )

    def test_rows(self, table: Table) -> np.ndarray:
        """Which rows of the test split are used."""
        return subsample(len(table), self.test_size, self.name)

    # What a task must give, and what it may.

    def bind(self, backbone: Backbone) -> nn.Module:
        """The model with its head. Cheap, and right on the meta device."""
        raise NotImplementedError

    @property
    def headline(self) -> str:
        """The metric that a result is known by."""
        raise NotImplementedError

    def encoder(self, backbone: Backbone, training: bool) -> Encoder:
        """From the source's examples to batches."""
        raise NotImplementedError

    def weight(self, batch: Mapping[str, Any]) -> int:
        """How many terms the mean of `loss` is over, so that micro-batches add up to their step's mean."""
        return len(next(iter(batch.values())))

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The mean loss of a batch, a scalar."""
        raise NotImplementedError

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, list]:
        """One entry per example in every column: what `score` needs."""
        raise NotImplementedError

    def score(self, columns: Mapping[str, list]) -> dict[str, float]:
        """Metrics by name, from the columns of all examples."""
        raise NotImplementedError

    def sample(self, backbone: Backbone, size: int) -> dict[str, Any]:
        """A batch of `size` examples, as long as they can be, of zeros: only its shapes matter."""
        raise NotImplementedError

    def planned(self, size: int) -> Task:
        """The task with shapes that do not depend on what is in a batch of `size`, as a memory plan needs it."""
        return self

    def frozen_part(self, model: nn.Module) -> Callable[[Mapping[str, Any]], dict[str, Tensor]] | None:
        """From a batch to one that starts behind the frozen part of the model, so that this part is computed once.

        None where no such part comes first. `loss` and `predict` take both kinds of batch.
        """
        return None

    def remark(self) -> str | None:
        """A sentence for the log when a run begins, such as on a metric that cannot be computed here."""
        return None

    def tolerance(self) -> float:
        """The largest share of a split's examples that may be damaged and left out."""
        return 0.0

    def zero_shot(self, backbone: Backbone) -> bool:
        """Whether the bound model can be scored before training."""
        return False


def _published(sizes: int | Sequence[int]) -> Sequence[int]:
    return [sizes] if isinstance(sizes, int) else sizes
