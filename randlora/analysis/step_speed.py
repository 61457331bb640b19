"""Examples per second of training, beside a bare loop over the same model and batch, and the loader's own speed.

The bare loop has its batch in memory: forward, backward, clipping, AdamW. Ours reads, decodes and augments every batch,
seeds its noise, and watches the loss. Both take turns in one process on the same module; medians over the rounds.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from randlora.analysis.timing import interleaved, seconds_of
from randlora.data.loader import loader, training_keys
from randlora.experiment import Experiment
from randlora.tasks.base import Bound, Splits
from randlora.training.evaluate import to_device
from randlora.training.loop import Loop
from randlora.training.precision import Precision, autocast
from randlora.training.trainer import Trainer

Step = Callable[[], object]  # takes the next training step


class Quiet:
    """An observer that says nothing."""

    def begin(self, log: Sequence[str]) -> None: ...

    def logged(self) -> Sequence[str]:
        return ()

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def say(self, text: str) -> None: ...

    def progress(self, step: int, steps: int, text: str) -> None: ...


class Speeds(NamedTuple):
    """Medians by what was timed."""

    examples_per_second: dict[str, float]
    of_the_bare_loop: dict[str, float]


def examples_per_second(experiment: Experiment, rounds: int, steps: int, workers: Sequence[int] = (0, 2)) -> Speeds:
    """Speeds of the bare loop, of ours with each number of `workers`, and of the loader alone.

    A round takes `steps` steps of every one in turn; the first round is not counted.
    """
    torch.manual_seed(experiment.budget.seed)
    backbone = experiment.model.load()
    splits = experiment.task.splits(backbone, experiment.budget)
    experiment.adapt(backbone)
    bound, total = experiment.bind(backbone), (rounds + 1) * steps
    loops = {count: loop(experiment, bound, splits, total, workers=count) for count in workers}
    called = {"bare loop": bare_step(loops[workers[0]], experiment.trainer)}
    called |= {f"ours, {count} workers": our_step(ours) for count, ours in loops.items()}
    timed = {name: partial(seconds_of, step, steps) for name, step in called.items()}
    seconds = interleaved(timed, rounds, warm_up=1)
    speeds = {name: experiment.trainer.batch_size / statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: statistics.median(bare / own for bare, own in zip(seconds["bare loop"], values, strict=True))
        for name, values in seconds.items()
    }
    speeds |= {f"loader alone, {n} workers": loader_speed(splits, experiment.trainer, n, total) for n in workers}
    return Speeds(speeds, ratios)


def loop(
    experiment: Experiment,
    bound: Bound,
    splits: Splits,
    steps: int,
    *,
    workers: int,
    precision: Precision | None = None,
) -> Loop:
    """Our training loop over an adapted model, as long as `steps`, a step's batch at once."""
    precision = precision or experiment.trainer.precision
    trainer = replace(experiment.trainer, workers=workers, micro_batch_size=None, max_steps=steps, precision=precision)
    return Loop(
        trainer, experiment.task, bound, splits, experiment.budget.seed, Path(tempfile.mkdtemp()), Quiet(),
        trainer.accelerator(), experiment.optimizer,
    )  # fmt: skip


def our_step(ours: Loop) -> Step:
    """The next step of our loop, from the first on."""

    def steps() -> Iterator[object]:
        ours.fed = ours.batches(0)
        for index in range(ours.steps):
            yield ours.step(ours.at(index))

    return steps().__next__


def bare_step(like: Loop, trainer: Trainer) -> Step:
    """A step of the loop that everybody writes first, on one batch that stays in memory."""
    model, task, device = like.plain, like.task, like.accelerator.device
    parameters = list(like.trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=trainer.learning_rate)
    batch = to_device(next(like.batches(0))[0], device)

    def step() -> None:
        model.train()
        with autocast(device.type, trainer.precision):
            loss = task.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def loader_speed(splits: Splits, trainer: Trainer, workers: int, steps: int) -> float:
    """Examples per second of the loader with nobody to wait for, its start left out."""
    keys = training_keys(len(splits.train), trainer.batch_size, range(steps + 1), seed=0)
    batches = loader(splits.train, keys, workers)
    next(batches)
    return trainer.batch_size / seconds_of(lambda: next(batches), steps)
