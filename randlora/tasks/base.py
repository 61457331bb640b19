"""What every task offers to training and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor, nn

from randlora.adapters.core import require_adaptation
from randlora.bounds import Bounded, Count, CountOrZero, FolderName, Fraction, Seed
from randlora.data.loader import Encoder, Split
from randlora.data.sources import Source, Table
from randlora.data.subsets import few_shot, fractional, split_validation, subsample, validation_size_of
from randlora.errors import SettingsError
from randlora.models.base import Backbone, Model

Batch = Mapping[str, Any]  # tensors by name, and what else an encoder's collate puts there


@dataclass(frozen=True)
class Budget(Bounded):
    """How much of the training set is used: `shots` per class, a `fraction`, or all. `seed` draws it."""

    section: ClassVar[str] = ""

    seed: Seed
    shots: Count | None = None
    fraction: Fraction | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots is not None and self.fraction is not None:
            raise SettingsError(f"shots={self.shots} and fraction={self.fraction}: give one of them")


@dataclass(frozen=True)
class Splits:
    """What is learned from, what chooses between settings, and what is only reported.

    `labelled` is the validation set encoded as for training, where the task's loss needs that: its scores have none.
    """

    train: Split
    validation: Split
    test: Split
    labelled: Split | None = None


class Bound(NamedTuple):
    """A model that a task can train and score, and the part of it that is the task's own: None where nothing is.

    The head's parameters are trained beside the method's, and saved as ``head.`` and their names in `head`.
    """

    model: nn.Module
    head: nn.Module | None = None

    def modules(self) -> dict[str, nn.Module]:
        """What `randlora.save_adapter` is to save beside the updates: the head, if there is one."""
        return {} if self.head is None else {"head": self.head}

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The head's parameters by the names that they are saved under; empty without a head."""
        named = self.head.named_parameters() if self.head is not None else ()
        return {f"head.{name}": parameter for name, parameter in named}

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name in `model`; SettingsError when there is nothing."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not trained:
            method = require_adaptation(self.model).method.name
            raise SettingsError(f"method {method} has nothing to train here: this model gets no head")
        return trained


@dataclass(frozen=True)
class Task(Bounded, ABC):
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

    section: ClassVar[str] = "task"
    kinds: ClassVar[tuple[str, ...]]  # of models that it makes sense with
    version: ClassVar[int] = 1  # raised when scores stop being comparable
    zero_shot: ClassVar[bool] = False  # whether a model without a head is scored before training, too
    unreadable = 0.0  # the largest share of a split that may be damaged and left out; a setting where files may be

    name: FolderName
    source: Source
    sizes: Mapping[str, Count | Sequence[Count]] | None = None
    validation_size: CountOrZero = 5000
    test_size: Count | None = None

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
            Split(tables["train"], train, self.encoder(backbone, training=True), budget.seed, self.unreadable),
            Split(held, validation, self.encoder(backbone, training=False), tolerance=self.unreadable),
            Split(tables["test"], test, self.encoder(backbone, training=False), tolerance=self.unreadable),
        )

    def test_rows(self, table: Table) -> np.ndarray:
        """Which rows of the test split are used."""
        return subsample(len(table), self.test_size, self.name)

    def remark(self) -> str | None:
        """A sentence for the log when a run begins, such as on a metric that is left out; None: nothing to say."""
        return None

    # What a task must give; what only some can do is in `randlora.tasks.mixins`.

    @property
    @abstractmethod
    def headline(self) -> str:
        """The metric that a result is known by; a class attribute will do."""

    @abstractmethod
    def bind(self, backbone: Backbone) -> Bound:
        """The model with its head. Cheap, and right on the meta device."""

    @abstractmethod
    def encoder(self, backbone: Backbone, training: bool) -> Encoder:
        """From the source's examples to batches."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar. The model is called by its `forward`, as DDP needs it."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, list]:
        """What `score` needs, by column, with one entry per example in each. The model is the bound one itself."""

    @abstractmethod
    def score(self, columns: Mapping[str, list]) -> dict[str, float]:
        """Metrics by name, from the columns of all examples."""


def _published(sizes: int | Sequence[int]) -> Sequence[int]:
    return [sizes] if isinstance(sizes, int) else sizes
