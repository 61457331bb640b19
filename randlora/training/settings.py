"""The settings of a training, checked, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

import torch
from annotated_types import Ge, Le, Lt
from torch import nn

from randlora.adapters.core import Adaptation
from randlora.bounds import Bounded, Count, NotNegative, Positive
from randlora.data.loader import Split
from randlora.errors import SettingsError
from randlora.records.signature import EXCLUDED_FROM_HASH
from randlora.tasks.base import Task
from randlora.training.evaluate import evaluate, mean_loss, predictions
from randlora.training.precision import Precision
from randlora.training.processes import processes
from randlora.training.schedule import Schedule, rate_factor, warmup_steps

if TYPE_CHECKING:
    from accelerate import Accelerator


MOST_STEPS = 10**8  # at a thousand a second, a day
BatchSize = Annotated[int, Ge(1), Le(2**20)]


class Observer(Protocol):
    """What is told of a training while it goes."""

    def begin(self, log: Sequence[str]) -> None:
        """Training begins, or goes on from where `logged` gave this; what was logged later was of a lost attempt."""

    def logged(self) -> Sequence[str]:
        """What has been logged so far, in lines, for a checkpoint."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """What is known after `step` steps, by name."""

    def say(self, text: str) -> None:
        """A sentence for a person."""

    def progress(self, step: int, steps: int, text: str) -> None:
        """`step` of `steps` are done."""


@dataclass(frozen=True)
class Settings(Bounded):
    """The settings of a training that all methods share; the optimiser's own are in `Optimizer`.

    Args:
        epochs: The length, in passes over the training set, where `max_steps` is not given.
        max_steps: The length, in steps of the optimiser.
        stop_at: Steps after which the training pauses, at the latest after its last one: with a checkpoint, scored on
            the validation set alone, and its schedule that of its whole length. Again with a later one, or with None,
            it goes on as if it had not paused.
        min_steps_per_epoch: An epoch of a small set is repeated up to this.
        batch_size: Examples of a step, over all processes.
        micro_batch_size: Examples at a time, per process; None: all of a step at once.
        compile: Whether the blocks of the model run by torch.compile in training steps.
        auto_batch: Whether to halve `micro_batch_size` where memory runs out in a step, and to take the step again.
        evaluation_batch_size: Examples at a time where the model is scored, per process.
        learning_rate: Of the updates.
        head_learning_rate: Of the task's head; None: the same.
        weight_decay: Of all that is trained; how it acts is the optimiser's.
        schedule: cosine, linear or constant, from the rate to `final_rate` times the rate.
        warmup: A part of the steps below 1, a number of steps from 1 on.
        final_rate: See `schedule`.
        max_grad_norm: Gradients are clipped to this norm, all together; None: not at all.
        precision: fp32, or bf16 for autocast; trained tensors stay float32.
        evaluate_every: Steps between scores on the validation set; None: none while training.
        keep_adapters: Whether every one of these steps leaves its adapter, in ``adapters/step_N`` of the run's folder.
        select: The parameters that a run ends with: ``last``, or ``best``, those of lowest validation loss among every
            `evaluate_every` steps and the last one, the first of equals.
        sampling: How training examples are drawn: ``permutation``, each once an epoch, or ``replacement``.
        save_every: Steps between checkpoints; None: by time alone. One is always made after the last step, and when
            interrupted.
        save_minutes: Minutes after which a checkpoint is made, beside `save_every`; None: by steps alone.
        keep_last: How many checkpoints stay until the run is finished.
        log_every: Steps between lines of the log.
        device: auto, cpu or cuda.
        workers: Processes that read and decode; 0 for none beside this one.
        peer_timeout: Minutes that one of several processes waits for another before it gives up.
    """

    section: ClassVar[str] = "trainer"

    epochs: Positive = 10
    max_steps: Annotated[int, Ge(1), Lt(MOST_STEPS)] | None = None
    stop_at: Annotated[int, Ge(1), Lt(MOST_STEPS)] | None = None
    min_steps_per_epoch: Annotated[int, Ge(0), Lt(MOST_STEPS)] = 0
    batch_size: BatchSize = 128
    micro_batch_size: BatchSize | None = None
    compile: bool = False
    auto_batch: bool = False
    evaluation_batch_size: BatchSize = 256
    learning_rate: Positive = 1e-3
    head_learning_rate: Positive | None = None
    weight_decay: NotNegative = 0.1
    schedule: Schedule = "cosine"
    warmup: NotNegative = 0.0
    final_rate: Annotated[float, Ge(0), Le(1)] = 0.01
    max_grad_norm: Positive | None = 1.0
    precision: Precision = "fp32"
    evaluate_every: Count | None = None
    keep_adapters: bool = False
    select: Literal["last", "best"] = "last"
    sampling: Literal["permutation", "replacement"] = "permutation"
    save_every: Count | None = None
    save_minutes: Positive | None = 5
    keep_last: Count = 2
    log_every: Count = 10
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Ge(0), Le(256)] = 0
    peer_timeout: Positive = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.micro_batch_size or 1) > self.batch_size:
            raise SettingsError(
                f"trainer.micro_batch_size={self.micro_batch_size}: must be at most trainer.batch_size, "
                f"{self.batch_size}, or null for all of a process's share at once"
            )
        if self.select == "best" and self.evaluate_every is None:
            raise SettingsError("trainer.select=best: give trainer.evaluate_every, the steps between the candidates")
        if self.keep_adapters and self.evaluate_every is None:
            raise SettingsError("trainer.keep_adapters=true: give trainer.evaluate_every, the steps between them")
        if self.select == "best" and self.stop_at is not None:
            raise SettingsError(
                f"trainer.stop_at={self.stop_at}: a paused run is scored as it stands; use trainer.select=last"
            )

    def decisive(self) -> dict[str, Any]:
        """The settings that change the result, by name: all but those that the run's signature leaves out."""
        return {key: value for key, value in vars(self).items() if f"trainer.{key}" not in EXCLUDED_FROM_HASH}

    @property
    def micro(self) -> int:
        """Examples at a time of one process that has all of a step."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)

    def halved(self) -> Self:
        """The same with half the micro-batch, for a step that does not fit in memory."""
        return replace(self, micro_batch_size=self.micro // 2)

    def steps(self, examples: int) -> int:
        """The optimiser's steps over a training set of this size.

        SettingsError where they are more than anyone can wait for, or fewer than those of the warm-up.
        """
        length = self.max_steps or self.epochs * max(examples / self.batch_size, self.min_steps_per_epoch)
        if length >= MOST_STEPS:
            raise SettingsError(
                f"trainer.epochs={self.epochs}: makes {length:.3g} steps of {examples:,} examples, and a run has fewer "
                f"than {MOST_STEPS:,}; lower it, or give trainer.max_steps"
            )
        steps = max(1, round(length))
        if self.warmup >= 1 and self.warmup > steps:
            raise SettingsError(
                f"trainer.warmup={self.warmup}: the run has {steps:,} steps; give at most so many, or a part below 1"
            )
        return steps

    def rate_factor(self, step: int, steps: int, born: int = 0) -> float:
        """Of the rate at `step` of `steps` for parameters that came at step `born`, whose warm-up is as long as any."""
        rising = warmup_steps(self.warmup, steps)
        return rate_factor(step - born, steps - born, self.schedule, rising, self.final_rate)

    def parameter_groups(self, adaptation: Adaptation, head: nn.Module | None) -> list[dict[str, Any]]:
        """The optimiser's groups: those of the method, and the head."""
        rate, decay = self.learning_rate, self.weight_decay
        groups = adaptation.method.parameter_groups(adaptation.trained(), rate, decay)
        if head is not None:
            rate = self.head_learning_rate or rate
            groups.append({"params": [*head.parameters()], "lr": rate, "weight_decay": decay})
        return groups

    def accelerator(self) -> Accelerator:
        """The devices and processes of this run."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SettingsError("trainer.device=cuda: torch sees no CUDA device here; use auto or cpu")
        accelerator = processes(self.device == "cpu", self.peer_timeout)
        if self.auto_batch and accelerator.num_processes > 1:
            raise SettingsError(
                f"trainer.auto_batch=true: the {accelerator.num_processes} processes of a step cannot repeat it alone; "
                "give trainer.micro_batch_size"
            )
        if self.batch_size % accelerator.num_processes:
            raise SettingsError(
                f"trainer.batch_size={self.batch_size}: must divide by the {accelerator.num_processes} processes"
            )
        return accelerator

    def evaluate(
        self, task: Task, model: nn.Module, split: Split, observer: Observer, accelerator: Accelerator
    ) -> dict[str, float]:
        """`randlora.training.evaluate.evaluate` with these settings."""
        return evaluate(task, model, split, accelerator, **self._scoring(), say=observer.say)

    def predictions(
        self, task: Task, model: nn.Module, split: Split, observer: Observer, accelerator: Accelerator
    ) -> dict[str, list]:
        """`randlora.training.evaluate.predictions` with these settings."""
        return predictions(task, model, split, accelerator, **self._scoring(), say=observer.say)

    def mean_loss(
        self, task: Task, model: nn.Module, split: Split, observer: Observer, accelerator: Accelerator
    ) -> float:
        """`randlora.training.evaluate.mean_loss` with these settings."""
        return mean_loss(task, model, split, accelerator, **self._scoring(), say=observer.say)

    def _scoring(self) -> dict[str, Any]:
        return {"batch_size": self.evaluation_batch_size, "workers": self.workers, "precision": self.precision}
