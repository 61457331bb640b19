"""The steps of a training, from the last checkpoint to the end: the same for every method, model and task."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from randlora.adapters.core import cached, require_adaptation, resume
from randlora.adapters.interface import Step, describe
from randlora.data.loader import loader, training_keys
from randlora.errors import SettingsError
from randlora.records.metrics import Row
from randlora.rng import integer
from randlora.signals import STOP, Interrupted
from randlora.tasks.base import Bound, Splits, Task
from randlora.training.best_step import BestStep
from randlora.training.checkpoint import Checkpoints, State, Tensors, latest
from randlora.training.compilation import CompiledBlocks
from randlora.training.evaluate import brief, norms, prefixed, terms, to_device
from randlora.training.optimizers import Optimizer
from randlora.training.out_of_memory import out_of_memory
from randlora.training.outcome import Diverged, Fit
from randlora.training.precision import attention_rule, autocast
from randlora.training.processes import summed
from randlora.training.settings import Observer, Settings
from randlora.training.watch import Losses, LossWatch, StepLoss

if TYPE_CHECKING:
    from accelerate import Accelerator


class Loop:
    """One training: the settings, and what changes while it goes."""

    stopping: bool  # whether to stop after this step, and whether to save, as all processes know it
    save_due: bool

    def __init__(
        self, settings: Settings, task: Task, bound: Bound, splits: Splits, seed: int, folder: Path, observer: Observer,
        accelerator: Accelerator, optimizer: Optimizer, steps: int | None = None,
        keep: Callable[[int], None] | None = None,
    ):  # fmt: skip
        self.settings, self.task, self.splits, self.seed = settings, task, splits, seed
        self.folder, self.observer, self.accelerator = folder, observer, accelerator
        self.adaptation = require_adaptation(bound.model)
        self.plain = bound.model.to(accelerator.device)  # .to before the optimiser sees the parameters
        self.bound, self.algorithm, self.keep = bound, optimizer, keep
        if accelerator.ddp_handler is not None:
            # Every forward reaches every update; of a whole model it may leave out some (a mask token).
            accelerator.ddp_handler.find_unused_parameters = bool(self.adaptation.unfrozen)
        self.assemble()
        self.compiled = CompiledBlocks(self.plain) if settings.compile else nullcontext()
        self.steps = steps or settings.steps(len(splits.train))
        self.until = min(self.steps, settings.stop_at or self.steps)
        about = {"seed": seed, "steps": self.steps, "examples": len(splits.train)}
        about |= settings.decisive() | {"method": describe(self.adaptation.method), "optimizer": optimizer.describe()}
        self.checkpoints = Checkpoints(folder, about, settings.keep_last)
        self.best = BestStep() if settings.select == "best" else None
        if self.best and not len(splits.validation):
            raise SettingsError("trainer.select=best: there is no validation example; raise task.validation_size")
        if settings.stop_at is not None and not len(splits.validation):
            raise SettingsError(
                f"trainer.stop_at={settings.stop_at}: there is no validation example to score a paused run by; raise "
                "task.validation_size"
            )
        self.scores: dict[str, float] = {}  # the last ones of the validation set
        self.last_loss = math.nan  # of a training step
        self.losses, self.watch = Losses(), LossWatch()
        self.saved_at = time.monotonic()

    def assemble(self, known: Mapping[Tensor, Any] | None = None) -> None:
        """An optimiser and processes for what is trained now; given an earlier optimiser's state, it is kept."""
        self.trained = self.bound.trained()
        groups = self.settings.parameter_groups(self.adaptation, self.bound.head)
        self.optimizer = self.algorithm.over(group | {"initial_lr": group["lr"]} for group in groups)
        if known is not None:
            self.optimizer.state.update((tensor, known[tensor]) for tensor in self.trained.values() if tensor in known)
            self.accelerator.free_memory()  # of the processes' earlier wrapper
        self.model: nn.Module = self.accelerator.prepare(self.plain)

    def tensors(self, names: Collection[str] | None = None) -> Tensors:
        """What a checkpoint is of; given the names in one, the updates first take the tensors that they had then.

        Without names, as `Update.resume` says, those of the start.
        """
        if names is not None and resume(self.plain, names):
            self.assemble({})
        # Also the updates' fixed tensors that no seed gives again.
        fixed = {name: tensor for name, tensor in self.adaptation.saved().items() if not tensor.requires_grad}
        return Tensors(self.trained | fixed, self.optimizer)

    def fit(self, strict: bool) -> Fit:
        """All steps from the newest valid checkpoint on; see `Trainer.fit`."""
        state = self.checkpoints.resume(self.tensors, self.observer.say, strict)
        if summed(self.accelerator, state.step)[0] != state.step * self.accelerator.num_processes:
            raise RuntimeError(f"processes read different checkpoints in {self.folder}: do all see the same files?")
        if state.step:
            self.best = state.best
            self.observer.say(f"going on from step {state.step} of {self.steps}")
        self.observer.begin(state.log)
        with STOP:
            if not state.scored:
                self.validate(state.step)
            seconds = self.train(state.step, state.train_seconds)
            paused = None if self.settings.stop_at is None else self.pause(state, seconds)
        selected = self.restore_best(self.best) if self.best else None
        self.plain.train()  # drops what an evaluation before has kept of other parameters
        count = sum(tensor.numel() for tensor in self.adaptation.trained().values())
        micro = self.settings.micro_batch_size if self.settings.auto_batch else None
        if paused is not None:
            done = max(state.step, self.until)
            return Fit(done, seconds, seconds / done, count, micro_batch_size=micro, paused=paused)
        self.adaptation.method = self.adaptation.method.finish(self.adaptation.updates)
        return Fit(self.steps, seconds, seconds / self.steps, count, selected, micro)

    def train(self, start: int, seconds: float) -> float:
        """Steps `start` to `until`; returns `seconds` and what they took, without evaluation and checkpoints."""
        settings, self.fed = self.settings, self.batches(start)
        pauses = settings.stop_at is not None
        for step in range(start, self.until):
            began, done, at = time.perf_counter(), step + 1, self.at(step)
            read = self.step(at)
            seconds += time.perf_counter() - began
            self._report(read)
            self.observer.progress(done, self.steps, f"loss {self.last_loss:.3f}")
            scored, last = False, done == self.until
            with suppress(Interrupted):  # it is then scored again when the run goes on
                if self._due(settings.evaluate_every, done) or (last and (self.best or pauses)):
                    self.validate(done)
                scored = True
            stopping = not scored or self.stopping or (STOP.came and self.accelerator.num_processes == 1)
            if stopping or self.save_due or last or self._due(settings.save_every, done):
                self._report(self.read())  # a signal may have come after the step
                self._save(State(done, seconds, self.best, scored, self.observer.logged()))
            if stopping:
                raise Interrupted(f"stopped by {STOP.reason} at step {done} of {self.steps}; the same command goes on")
        return seconds

    def pause(self, state: State, seconds: float) -> dict[str, float]:
        """The validation scores of a training that pauses here; a checkpoint has them in its log.

        Args:
            state: That of the checkpoint which the training went on from. It may have been of this step, or of a later
                one: a training is never taken back.
            seconds: What all steps have taken.
        """
        done = max(state.step, self.until)
        if state.step < self.until:
            return self.scores
        for row in map(Row.of, reversed(state.log)):
            if row.step == done and (scores := {k: v for k, v in row.metrics.items() if k.startswith("validation/")}):
                return scores
        if state.scored:  # else it has just been done
            self.validate(done)
        self._save(State(done, seconds, None, True, self.observer.logged()))
        return self.scores

    def at(self, step: int) -> Step:
        """Where the training is at a step, whose learning rates the optimiser is given."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.settings.rate_factor(step, self.steps, group.get("born", 0))
        rate = self.settings.learning_rate * self.settings.rate_factor(step, self.steps)
        return Step(step, self.steps, rate, self.seed)

    def validate(self, done: int) -> None:
        """Scores the validation set; keeps the adapter, and the parameters of the lowest loss, where that is wished."""
        about = self.observer, self.accelerator
        scores = self.settings.evaluate(self.task, self.plain, self.splits.validation, *about)
        if self.best and self.splits.labelled is not None:
            scores |= {"loss": self.settings.mean_loss(self.task, self.plain, self.splits.labelled, *about)}
        self.scores = prefixed("validation", scores)
        named = self.scores | norms(self.plain)
        self.observer.log(named, done)
        self.observer.say(f"step {done}: {brief(named)}")
        if self.keep:
            self.keep(done)
        if self.best:
            self.best = self.best.or_now(done, scores, self.trained)

    def restore_best(self, best: BestStep) -> int:
        """Gives the model its best parameters; returns their step."""
        if not best.step:
            raise Diverged("trainer.select=best: the validation loss was never finite")
        self.tensors(best.parameters)
        best.give_to(self.trained)
        self.observer.say(f"selected step {best.step} of {self.steps}, with a validation loss of {best.loss:.4g}")
        return best.step

    def step(self, step: Step) -> list[StepLoss]:
        """One optimiser step; returns the losses that were read in it, of this step and of those before it."""
        self.model.train()
        # The noise of a step depends on the step, so that a resumed run draws what an unbroken one draws.
        torch.manual_seed(integer("noise", self.seed, step.number, self.accelerator.process_index))
        self.adaptation.method.before_step(self.adaptation.updates.values(), step)
        try:
            mean = self.gradients(next(self.fed), step)
        except (RuntimeError, MemoryError) as error:
            if not self.settings.auto_batch or not out_of_memory(error) or self.settings.micro == 1:
                raise
            self.settings = self.settings.halved()
        else:
            return self.stepped(mean, step)
        # Here and not above: an error being handled holds the tensors that did not fit.
        self.observer.say(
            f"step {step.number}: out of memory; from here on trainer.micro_batch_size={self.settings.micro}"
        )
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        self.fed = self.batches(step.number)
        return self.step(step)

    def gradients(self, batches: list[dict[str, Any]], step: Step) -> Tensor:
        """Puts a step's gradients at the trained tensors; returns this process's part of the mean loss, a scalar."""
        device, precision, world = self.accelerator.device, self.settings.precision, self.accelerator.num_processes
        micro = [to_device(batch, device) for batch in batches]
        weights = [terms(self.task, batch) for batch in micro]
        (total,) = summed(self.accelerator, sum(weights))
        if not total:
            raise SettingsError(f"step {step.number}: its examples have nothing to learn; are they cut too short?")
        mean = torch.zeros((), device=device)
        unchanged = cached(self.plain) if len(micro) > 1 else nullcontext()  # nothing trained changes between them
        with self.compiled, unchanged, attention_rule(device.type, precision):
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
        return mean

    def stepped(self, mean: Tensor, step: Step) -> list[StepLoss]:
        """Takes the optimiser's step with the gradients that are there; see `step`."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.settings.max_grad_norm or math.inf)
        late = time.monotonic() - self.saved_at > 60 * (self.settings.save_minutes or math.inf)
        loss: Tensor | float = mean
        if self.accelerator.num_processes == 1:
            self.stopping, self.save_due = STOP.came, late
        else:  # every process saves and stops after the same step
            loss, stopping, saving = summed(self.accelerator, float(mean), STOP.came, late)
            self.stopping, self.save_due = stopping > 0, saving > 0
        done = step.number + 1
        self.losses.add(done, step.rate, loss, norm)
        read = self.read() if self._reads(done) else []
        method, updates = self.adaptation.method, self.adaptation.updates.values()
        if method.after_backward(updates, step):
            self.assemble(self.optimizer.state)
        self.optimizer.step()
        method.after_step(updates, step)
        self.optimizer.zero_grad(set_to_none=True)
        return read

    def read(self) -> list[StepLoss]:
        """The losses of the steps since the last reading; Diverged at the first where it, or the norm, is no number."""
        read = self.losses.read()
        for step in read:
            if not (math.isfinite(step.loss) and math.isfinite(step.norm)):
                raise Diverged(
                    f"step {step.done - 1}: the loss is {step.loss:.3g} and the gradient's norm {step.norm:.3g} at "
                    f"learning rate {step.rate:.3g}; last good checkpoint: {latest(self.folder) or 'none'}"
                )
        return read

    def batches(self, start: int) -> Iterator[list[dict[str, Any]]]:
        """This process's micro-batches of every step from `start` to `until`."""
        settings, process = self.settings, self.accelerator
        steps, rank, world = range(start, self.until), process.process_index, process.num_processes
        shape = len(self.splits.train), settings.batch_size, steps, self.seed, rank, world
        keys = training_keys(*shape, settings.sampling == "replacement")
        return loader(self.splits.train, keys, settings.workers, self.observer.say, settings.micro_batch_size)

    def _due(self, every: int | None, done: int) -> bool:
        return every is not None and done % every == 0 and done < self.steps

    def _reads(self, done: int) -> bool:
        """Whether losses are read in this step: always where that waits for nothing.

        On a device those are read that are logged, and all of them before the model is scored or kept.
        """
        settings = self.settings
        return (
            not _waits(self.accelerator.device)
            or self._logs(done)
            or done == self.until
            or self._due(settings.evaluate_every, done)
            or self._due(settings.save_every, done)
            or self.stopping
            or self.save_due
        )

    def _logs(self, done: int) -> bool:
        return done % self.settings.log_every == 0 or done in (1, self.steps)

    def _report(self, read: Sequence[StepLoss]) -> None:
        for step in read:
            self.last_loss = step.loss
            if warning := self.watch.add(step.loss):
                self.observer.say(f"step {step.done}: {warning}")
            if self._logs(step.done):
                named = {"train/loss": step.loss, "train/learning_rate": step.rate, "train/gradient_norm": step.norm}
                self.observer.log(named, step.done)

    def _save(self, state: State) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.save(state, self.tensors())
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()


def _waits(device: torch.device) -> bool:
    """Whether to read a number from the device waits for work that it has not done yet."""
    return device.type != "cpu"
