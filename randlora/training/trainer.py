"""Optimisation: the loop that every method, model and task goes through."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from randlora.adapters.core import cached, require_adaptation
from randlora.adapters.interface import describe
from randlora.data.loader import loader, training_keys
from randlora.errors import SettingsError
from randlora.rng import integer
from randlora.signals import STOP, Interrupted
from randlora.tasks.base import Bound, Splits, Task
from randlora.training.best_step import BestStep
from randlora.training.checkpoint import Checkpoints, State, latest
from randlora.training.evaluate import brief, norms, prefixed, terms, to_device
from randlora.training.optimizers import Optimizer
from randlora.training.precision import attention_rule, autocast
from randlora.training.schedule import rate_factor
from randlora.training.settings import Observer, Settings
from randlora.training.watch import LossWatch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Diverged(RuntimeError):
    """The loss or a gradient is no longer a number."""


@dataclass(frozen=True)
class Fit:
    """What a finished training took; seconds are without evaluation and checkpoints.

    `selected_step` is the step whose parameters the model now has, where the best was to be selected.
    """

    steps: int
    train_seconds: float
    seconds_per_step: float
    selected_step: int | None = None


@dataclass(frozen=True)
class Trainer(Settings):
    """Trains whatever it is given by its settings; see `Settings` for these."""

    def fit(
        self, task: Task, bound: Bound, splits: Splits, *, seed: int, folder: Path, observer: Observer,
        accelerator: Accelerator, optimizer: Optimizer | None = None, steps: int | None = None, strict: bool = False,
    ) -> Fit:  # fmt: skip
        """Trains an adapted model with its head; goes on from the newest valid checkpoint in `folder`.

        Args:
            task: Knows the loss.
            bound: What the task made of the adapted model.
            splits: The training split is learned from; the validation split is scored every `evaluate_every` steps.
            seed: Of the order of the data and of dropout.
            folder: Where checkpoints are; the last one is of the last step, so that this returns at once again.
            observer: Hears of losses, scores and progress.
            accelerator: The device and the processes.
            optimizer: None for AdamW.
            steps: How many; None for what the settings make of the training split's length.
            strict: Whether to stop where there are checkpoints and none is valid, instead of starting again.

        Raises:
            Diverged: When the loss or the gradient's norm is not finite.
            Interrupted: When a signal asked for it, with a checkpoint to go on from.
            SettingsError: As `strict` says; nothing to train; the best step to select and no validation loss.
        """
        loop = Loop(self, task, bound, splits, seed, folder, observer, accelerator, optimizer or Optimizer(), steps)
        return loop.fit(strict)


class Loop:
    """One training: the settings, and what changes while it goes."""

    def __init__(
        self, trainer: Trainer, task: Task, bound: Bound, splits: Splits, seed: int, folder: Path, observer: Observer,
        accelerator: Accelerator, optimizer: Optimizer, steps: int | None = None,
    ):  # fmt: skip
        self.settings, self.task, self.splits, self.seed = trainer, task, splits, seed
        self.folder, self.observer, self.accelerator = folder, observer, accelerator
        self.adaptation = require_adaptation(bound.model)
        self.plain = bound.model.to(accelerator.device)  # .to before the optimiser sees the parameters
        self.trained = bound.trained()
        # What a checkpoint holds: also the updates' fixed tensors that no seed gives again.
        self.kept = self.trained | {name: t for name, t in self.adaptation.saved().items() if not t.requires_grad}
        updates, rate, decay = self.adaptation.trained(), trainer.learning_rate, trainer.weight_decay
        groups = self.adaptation.method.parameter_groups(updates, rate, decay)
        if bound.head is not None:
            rate = trainer.head_learning_rate or rate
            groups.append({"params": [*bound.head.parameters()], "lr": rate, "weight_decay": decay})
        self.optimizer = optimizer.over(group | {"initial_lr": group["lr"]} for group in groups)
        if accelerator.ddp_handler is not None:
            # Every forward reaches every update; of a whole model it may leave out some (a mask token).
            accelerator.ddp_handler.find_unused_parameters = bool(self.adaptation.unfrozen)
        self.model: nn.Module = accelerator.prepare(self.plain)
        self.steps = steps or trainer.steps(len(splits.train))
        about = {
            "seed": seed, "steps": self.steps, "examples": len(splits.train), "trainer": trainer.decisive(),
            "method": describe(self.adaptation.method), "optimizer": optimizer.describe(),
        }  # fmt: skip
        self.checkpoints = Checkpoints(folder, about, self.kept, self.trained, self.optimizer, trainer.keep_last)
        self.best = BestStep() if trainer.select == "best" else None
        if self.best and not len(splits.validation):
            raise SettingsError("trainer.select=best: there is no validation example; raise task.validation_size")
        self.watch = LossWatch()
        self.stopping = False  # as all processes know it
        self.saved_at, self.save_due = time.monotonic(), False

    def fit(self, strict: bool) -> Fit:
        """All steps from the newest valid checkpoint on; see `Trainer.fit`."""
        state = self.checkpoints.resume(self.observer.say, strict)
        if self._sum(state.step)[0] != state.step * self.accelerator.num_processes:
            raise RuntimeError(f"processes read different checkpoints in {self.folder}: do all see the same files?")
        if state.step:
            self.best = state.best
            self.observer.say(f"going on from step {state.step} of {self.steps}")
        self.observer.begin(state.step)
        with STOP:
            if not state.scored:
                self.validate(state.step)
            seconds = self.train(state.step, state.train_seconds)
        selected = self.restore_best(self.best) if self.best else None
        self.plain.train()  # drops what an evaluation before has kept of other parameters
        self.adaptation.method.finish(self.adaptation.updates.values())
        return Fit(self.steps, seconds, seconds / self.steps, selected)

    def train(self, start: int, seconds: float) -> float:
        """Steps `start` to the end; returns `seconds` and what they took, without evaluation and checkpoints."""
        settings, batches = self.settings, self.batches(start)
        for step in range(start, self.steps):
            began, done = time.perf_counter(), step + 1
            # The noise of a step depends on the step, so that a resumed run draws what an unbroken one draws.
            torch.manual_seed(integer("noise", self.seed, step, self.accelerator.process_index))
            factor = rate_factor(step, self.steps, settings.schedule, settings.warmup, settings.final_rate)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            loss, norm = self.step(batches, step)
            seconds += time.perf_counter() - began
            self._report(done, loss, norm, factor * settings.learning_rate)
            scored = True
            try:
                if self._due(settings.evaluate_every, done) or (self.best and done == self.steps):
                    self.validate(done)
            except Interrupted:
                scored = False  # it is done again when the run goes on
            stopping = not scored or self.stopping or (STOP.came and self.accelerator.num_processes == 1)
            if stopping or self.save_due or done == self.steps or self._due(settings.save_every, done):
                self._save(done, seconds, scored)
            if stopping:
                raise Interrupted(f"stopped by {STOP.reason} at step {done} of {self.steps}; the same command goes on")
        return seconds

    def validate(self, done: int) -> None:
        """Scores the validation set, and keeps the parameters where its loss is the lowest so far and that matters."""
        about = self.observer, self.accelerator
        scores = self.settings.evaluate(self.task, self.plain, self.splits.validation, *about)
        if self.best and self.splits.labelled is not None:
            scores |= {"loss": self.settings.mean_loss(self.task, self.plain, self.splits.labelled, *about)}
        named = prefixed("validation", scores) | norms(self.plain)
        self.observer.log(named, done)
        self.observer.say(f"step {done}: {brief(named)}")
        if self.best:
            self.best = self.best.or_now(done, scores, self.trained)

    def restore_best(self, best: BestStep) -> int:
        """Gives the model its best parameters; returns their step."""
        if not best.step:
            raise Diverged("trainer.select=best: the validation loss was never finite")
        best.give_to(self.trained)
        self.observer.say(f"selected step {best.step} of {self.steps}, with a validation loss of {best.loss:.4g}")
        return best.step

    def step(self, batches: Iterator[list[dict[str, Any]]], step: int) -> tuple[float, float]:
        """One optimiser step; returns the mean loss and the norm of the gradient before clipping."""
        self.model.train()
        device, precision, world = self.accelerator.device, self.settings.precision, self.accelerator.num_processes
        micro = [to_device(batch, device) for batch in next(batches)]
        weights = [terms(self.task, batch) for batch in micro]
        (total,) = self._sum(float(sum(weights)))
        if not total:
            raise SettingsError(f"step {step}: its examples have nothing to learn; are they cut too short?")
        mean = torch.zeros((), device=device)
        unchanged = cached(self.plain) if len(micro) > 1 else nullcontext()  # nothing trained changes between them
        with unchanged, attention_rule(device.type, precision):
            for i, (batch, weight) in enumerate(zip(micro, weights, strict=True)):
                last = i == len(micro) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.model):
                    with autocast(device.type, precision):
                        loss = self.task.loss(self.model, batch)
                    # Processes' gradients are averaged, so each counts `world` times over the weight of all.
                    share = loss * (weight * world / total)
                    penalty = self.adaptation.method.penalty(self.adaptation.updates.values()) if last else None
                    self.accelerator.backward(share if penalty is None else share + penalty)
                mean += loss.detach() * (weight / total)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.settings.max_grad_norm or math.inf)
        late = time.monotonic() - self.saved_at > 60 * (self.settings.save_minutes or math.inf)
        value, stopping, saving = self._sum(float(mean), float(STOP.came), float(late))
        # Every process saves and stops after the same step.
        size, self.stopping, self.save_due = float(norm), stopping > 0, saving > 0
        if not (math.isfinite(value) and math.isfinite(size)):
            raise Diverged(
                f"step {step}: the loss is {value:.3g} and the gradient's norm {size:.3g} at learning rate "
                f"{self.optimizer.param_groups[0]['lr']:.3g}; last good checkpoint: {latest(self.folder) or 'none'}"
            )
        updates = self.adaptation.updates
        self.adaptation.method.after_backward(updates.values(), step)
        self.optimizer.step()
        self.adaptation.method.after_step(updates.values(), step)
        self.optimizer.zero_grad(set_to_none=True)
        return value, size

    def batches(self, start: int) -> Iterator[list[dict[str, Any]]]:
        """This process's micro-batches of every step from `start` to the end."""
        settings, process = self.settings, self.accelerator
        steps, rank, world = range(start, self.steps), process.process_index, process.num_processes
        replacement = settings.sampling == "replacement"
        keys = training_keys(len(self.splits.train), settings.batch_size, steps, self.seed, rank, world, replacement)
        return loader(self.splits.train, keys, settings.workers, self.observer.say, settings.micro_batch_size)

    def _due(self, every: int | None, done: int) -> bool:
        return every is not None and done % every == 0 and done < self.steps

    def _report(self, done: int, loss: float, norm: float, rate: float) -> None:
        warning = self.watch.add(loss)
        if warning:
            self.observer.say(f"step {done}: {warning}")
        if done % self.settings.log_every == 0 or done in (1, self.steps):
            self.observer.log({"train/loss": loss, "train/learning_rate": rate, "train/gradient_norm": norm}, done)
        self.observer.progress(done, self.steps, f"loss {loss:.3f}")

    def _save(self, done: int, seconds: float, scored: bool) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.save(State(done, seconds, self.best, scored))
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.accelerator.num_processes == 1:
            return list(values)
        reduced: Any = self.accelerator.reduce(torch.tensor(values, device=self.accelerator.device), "sum")
        return reduced.tolist()
