"""Classification and regression of sentences and of pairs: GLUE, with its official metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Len
from torch import Tensor, nn

from randlora.bounds import Count
from randlora.data.labels import Names, check_names, check_real_valued, class_names, described, labelled
from randlora.data.loader import Item
from randlora.data.sources import Table, check_columns
from randlora.data.texts import TokenEncoder, pad_inputs
from randlora.errors import SettingsError, check_choice
from randlora.models.base import Backbone, Model
from randlora.tasks.base import Batch, Bound, Task
from randlora.tasks.mixins import Classifies, KnownShapes

Metric = Callable[[Sequence[float], Sequence[float]], float]  # of the labels and the predictions


def _of_scikit_learn(name: str, **settings: float) -> Metric:
    def metric(label: Sequence[float], predicted: Sequence[float]) -> float:
        from sklearn import metrics

        return float(getattr(metrics, name)(label, predicted, **settings))

    return metric


def _correlation(name: str) -> Metric:
    def metric(label: Sequence[float], predicted: Sequence[float]) -> float:
        from scipy import stats

        correlation = float(getattr(stats, name)(label, predicted).statistic)
        return 0.0 if math.isnan(correlation) else correlation  # a constant prediction correlates with nothing

    return metric


METRICS: Mapping[str, Metric] = {
    "accuracy": _of_scikit_learn("accuracy_score"),
    "f1": _of_scikit_learn("f1_score", zero_division=0.0),
    "matthews": _of_scikit_learn("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


@dataclass(frozen=True)
class TextClassification(Classifies, KnownShapes, Task):
    """Columns `texts` (one or two) and `label`: a class, or a real number where `class_names` is empty.

    `class_names` are in the order of the labels; None takes the data's own (see randlora.data.labels). The first of
    `metrics` is the headline. Texts are cut at `max_length` tokens.
    """

    kinds: ClassVar[tuple[str, ...]] = ("text", "causal_lm")

    texts: Annotated[Sequence[str], Len(1, 2)] = ("sentence",)
    class_names: Names = ()
    metrics: Annotated[Sequence[str], Len(1)] = ("accuracy",)
    max_length: Count = 128

    def __post_init__(self) -> None:
        check_names(self.name, self.class_names)
        super().__post_init__()
        allowed = ("accuracy", "f1", "matthews") if self.classifies else ("pearson", "spearman")
        for metric in self.metrics:
            check_choice("task.metrics", metric, allowed)

    @property
    def classifies(self) -> bool:
        """Whether labels are classes, not real numbers."""
        return self.class_names is None or bool(self.class_names)

    def check_model(self, model: Model) -> None:
        super().check_model(model)
        if "f1" in self.metrics and self.class_count() != 2:
            raise SettingsError(f"task.metrics: f1 is for two classes, {self.name} has {self.class_count()}")

    @property
    def headline(self) -> str:
        return self.metrics[0]

    def class_count(self) -> int:
        return len(self.names()) if self.classifies else super().class_count()

    def names(self) -> Sequence[str]:
        """The class names in the order of the labels, from the data where the settings do not list them."""
        return class_names(self.name, self.source, self.class_names)

    def open(self) -> dict[str, Table]:
        tables = super().open()
        check_columns(tables, [*self.texts, "label"])
        for split, table in tables.items():
            for column in self.texts:
                if not isinstance(text := table[0][column], str):
                    raise SettingsError(f"{self.name}: column {column!r} of {split} holds {text!r}, which is no text")
        if self.classifies:
            return labelled(self.name, self.source, self.class_names, tables)
        check_real_valued(self.name, tables)
        return tables

    def remark(self) -> str | None:
        return described(self.names()) if self.class_names is None else None

    def bind(self, backbone: Backbone) -> Bound:
        model = TextHead(backbone, self.class_count() if self.classifies else 1)
        return Bound(model, model.head)

    def encoder(self, backbone: Backbone, training: bool) -> TextEncoder:
        assert backbone.tokenizer is not None
        return TextEncoder(backbone.tokenizer(), self.texts, self.max_length)

    def sample(self, backbone: Backbone, size: int) -> Batch:
        ids = torch.zeros(size, self.max_length, dtype=torch.int64)
        return {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "label": torch.zeros(size)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._losses(model(batch["inputs"]), batch["label"]).mean()

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["inputs"]).float()

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, list]:
        outputs = self.outputs(model, batch)
        predicted = outputs.argmax(-1) if self.classifies else outputs[:, 0]
        losses = self._losses(outputs, batch["label"])
        return {"predicted": predicted.tolist(), "label": batch["label"].tolist(), "loss": losses.tolist()}

    def score(self, columns: Mapping[str, list]) -> dict[str, float]:
        label, predicted = columns["label"], columns["predicted"]
        if self.classifies:
            label = [int(value) for value in label]
        scores = {metric: METRICS[metric](label, predicted) for metric in self.metrics}
        return scores | {"loss": sum(columns["loss"]) / len(label)}

    def _losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.classifies:
            return F.cross_entropy(outputs.float(), labels.long(), reduction="none")
        return F.mse_loss(outputs.float()[:, 0], labels, reduction="none")


class TextEncoder(TokenEncoder):
    """Tokenised texts and a float32 label (-1 would be a hidden one, and is refused)."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], max_length: int):
        super().__init__(tokenizer)
        self.texts, self.max_length = list(texts), max_length

    def __call__(self, example: Item) -> dict[str, Any]:
        if example["label"] == -1:
            raise SettingsError("this split has hidden labels (-1): map another one in task.source.splits")
        encoded = self.tokenizer(*(example[name] for name in self.texts), truncation=True, max_length=self.max_length)
        return {**encoded, "label": float(example["label"])}

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        labels = torch.tensor([item["label"] for item in items], dtype=torch.float32)
        return {"inputs": pad_inputs(items, self.tokenizer.pad_token_id), "label": labels}


class TextHead(nn.Module):
    """Dropout, a hidden layer with tanh where the model's own head has one, and a linear map to the outputs."""

    def __init__(self, backbone: Backbone, outputs: int):
        super().__init__()
        assert backbone.features is not None
        self.backbone, self.features = backbone.module, backbone.features
        device = next(backbone.module.parameters()).device
        width, dropout = backbone.width, backbone.head_dropout
        layers: list[nn.Module] = [nn.Dropout(dropout)]
        if backbone.head_hidden:
            layers += [nn.Linear(width, width, device=device), nn.Tanh(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(width, outputs, device=device))
        for layer in self.head:
            if isinstance(layer, nn.Linear) and device.type != "meta":
                nn.init.normal_(layer.weight, std=0.02)  # as BERT's and RoBERTa's classifiers
                nn.init.zeros_(layer.bias)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, outputs)."""
        return self.head(self.features(self.backbone, inputs).float())
