"""Scores of a model on a split, whoever asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from randlora.adapters.core import merged, relative_norms
from randlora.data.loader import Split, evaluation_keys, loader
from randlora.signals import STOP
from randlora.tasks.base import Batch, Task
from randlora.tasks.mixins import UnequalExamples
from randlora.training.precision import attention_rule, autocast
from randlora.training.processes import summed

if TYPE_CHECKING:
    from accelerate import Accelerator


def evaluate(
    task: Task,
    model: nn.Module,
    split: Split,
    accelerator: Accelerator,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """The task's metrics over all examples of a split, by name: scores of `predictions`, whose arguments these are."""
    columns = predictions(
        task, model, split, accelerator, batch_size=batch_size, workers=workers, precision=precision, say=say
    )
    return task.score(columns) if columns else {}


@torch.no_grad()
def predictions(
    task: Task,
    model: nn.Module,
    split: Split,
    accelerator: Accelerator,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    say: Callable[[str], None] = print,
) -> dict[str, list]:
    """What the task predicts of all examples of a split, by column, and ``row``, which example of the table it is of.

    Every process takes its share of them, and has all in the end. Updates are merged meanwhile, and the model is left
    in evaluation mode on the accelerator's device.

    Args:
        task: Knows what to predict and how to score it.
        model: Bound to the task; adapted or not, and not wrapped for several processes.
        split: What is scored; an empty one has no columns.
        accelerator: The device and the processes.
        batch_size: Examples at a time, per process.
        workers: Processes that read and decode; 0 for none beside this one.
        precision: fp32, or bf16 for autocast.
        say: Hears of examples that cannot be read.

    Raises:
        Interrupted: Between two batches, when a signal has come to any process.
        Unreadable: When more of them cannot be read than the task allows.
    """
    if not len(split):
        return {}
    device, columns = accelerator.device, dict[str, list]()
    model.to(device).eval()
    share = once(split, accelerator, batch_size, workers, say)
    with merged(model), attention_rule(device.type, precision), autocast(device.type, precision):
        for batch in share:
            rows = batch["row"].tolist()
            for key, values in ({"row": rows} | task.predict(model, batch)).items():
                columns.setdefault(key, []).extend(values)
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        shares = gather_object([columns])  # the first has rows, whatever the split's size
        columns = {key: [value for share in shares for value in share.get(key, [])] for key in shares[0]}
    return columns


@torch.no_grad()
def mean_loss(
    task: Task,
    model: nn.Module,
    split: Split,
    accelerator: Accelerator,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    say: Callable[[str], None] = print,
) -> float:
    """The task's loss over all examples of a split that is encoded as for training, a mean over the loss's terms.

    Arguments as of `predictions`.
    """
    device, sums = accelerator.device, torch.zeros(2, dtype=torch.float64)
    model.to(device).eval()
    share = once(split, accelerator, batch_size, workers, say)
    with merged(model), attention_rule(device.type, precision), autocast(device.type, precision):
        for batch in share:
            weight = terms(task, batch)
            sums += torch.tensor([float(task.loss(model, batch)) * weight, weight], dtype=torch.float64)
    total, weights = summed(accelerator, *sums.tolist())
    return total / weights


def terms(task: Task, batch: Batch) -> int:
    """How many terms the mean of a batch's loss is over, so that batches add up to the mean of them all."""
    return task.terms(batch) if isinstance(task, UnequalExamples) else _rows(batch)


def _rows(batch: Any) -> int:
    return len(batch) if isinstance(batch, torch.Tensor) else _rows(next(iter(batch.values())))


def once(
    split: Split, accelerator: Accelerator, batch_size: int, workers: int, say: Callable[[str], None],
    shared: bool = True,
) -> Iterator[Batch]:  # fmt: skip
    """Every example of a split once, in batches on the device; where it is `shared`, this process's part of them.

    Batches have up to `batch_size` examples, read by `workers` processes; `say` hears of those that cannot be read.
    Raises Interrupted between two batches, on every process, when a signal has come to any.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if shared else (0, 1)
    keys = evaluation_keys(split.by_length, batch_size, rank, world)
    batches = chain.from_iterable(loader(split, keys, workers, say))
    most = math.ceil(math.ceil(len(split) / world) / batch_size)  # of any process: all ask the same number of times
    return _stoppable(batches, most, accelerator)


def _stoppable(batches: Iterator[Batch], most: int, accelerator: Accelerator) -> Iterator[Batch]:
    for _ in range(most):
        STOP.check(accelerator)
        batch = next(batches, None)
        if batch is not None:
            yield to_device(batch, accelerator.device)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    return {key: to_device(value, device) for key, value in batch.items()} if isinstance(batch, dict) else batch


def norms(model: nn.Module) -> dict[str, float]:
    """Mean and largest ‖ΔW‖ / ‖W0‖ over the adapted layers."""
    values = list(relative_norms(model).values())
    return {"update/relative_norm_mean": sum(values) / len(values), "update/relative_norm_max": max(values)}


def prefixed(split: str, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics as records name them, ``split/metric``."""
    return {f"{split}/{name}": value for name, value in metrics.items()}


def brief(metrics: dict[str, float]) -> str:
    """Metrics on one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
