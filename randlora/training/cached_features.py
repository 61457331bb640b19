"""Behind a frozen tower: its features are made once and trained on, instead of made again in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from randlora.data.loader import Encoder, Item, Split
from randlora.tasks.base import Batch, Splits, Task
from randlora.tasks.mixins import FrozenFeatures
from randlora.training.evaluate import once
from randlora.training.precision import attention_rule, autocast
from randlora.training.settings import Observer, Settings

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def cache_features(
    task: Task, model: nn.Module, splits: Splits, settings: Settings, observer: Observer, accelerator: Accelerator
) -> Splits:
    """The splits as the frozen part of the bound model leaves them, where that is the same every time.

    Runs that part over the data, every process over all of them. Splits stay as they are for a task without such a
    part, where examples are encoded at random, and where they are empty.
    """
    frozen = task.frozen_part(model) if isinstance(task, FrozenFeatures) else None
    if frozen is None:
        return splits
    device, precision = accelerator.device, settings.precision
    model.to(device).eval()

    def cached(split: Split) -> Split:
        if split.encode.random or not len(split):
            return split
        batches = once(split, accelerator, settings.evaluation_batch_size, settings.workers, observer.say, shared=False)
        with attention_rule(device.type, precision), autocast(device.type, precision):
            features = CachedFeatures([{**frozen(batch), "row": batch["row"]} for batch in batches])
        return Split(features, np.arange(len(features)), features)

    train, validation, test = (cached(split) for split in (splits.train, splits.validation, splits.test))
    return replace(splits, train=train, validation=validation, test=test)


class CachedFeatures(Encoder):
    """Batches of features as a table, and as the encoder of its rows: nothing is read or decoded again."""

    def __init__(self, batches: Sequence[Batch]):
        self.columns: dict[str, Tensor] = {
            key: torch.cat([batch[key].cpu() for batch in batches]) for key in batches[0]
        }

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Item:
        return {key: values[index] for key, values in self.columns.items()}

    def column(self, name: str) -> np.ndarray:
        return self.columns[name].numpy()

    def __call__(self, example: Item) -> Item:
        return example
