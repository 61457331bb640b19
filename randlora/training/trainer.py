"""The loop that every method, model and task goes through."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from randlora.adapters.core import adaptation_of, cached, merged, relative_norms
from randlora.data.loader import CachedFeatures, Split, evaluation_keys, loader, training_keys
from randlora.errors import SettingsError, check_choice, check_count, check_positive, check_range
from randlora.rng import integer
from randlora.tasks.base import Splits, Task
from randlora.training import checkpoint
from randlora.training.precision import attention_rule
from randlora.training.schedule import check_schedule, rate_factor
from randlora.training.watch import LossWatch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Diverged(RuntimeError):
    """The loss or a gradient is no longer a number."""


class Interrupted(RuntimeError):
    """The run was asked to stop; a checkpoint is there to go on from."""


class Observer(Protocol):
    """What the loop tells about itself."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def say(self, text: str) -> None: ...

    def progress(self, step: int, steps: int, text: str) -> None: ...


@dataclass(frozen=True)
class Fit:
    """What a finished training leaves: metrics of the splits, and what it took."""

    metrics: dict[str, float]
    steps: int
    train_seconds: float  # without evaluation and checkpoints
    seconds_per_step: float


@dataclass(frozen=True)
class Trainer:
    """AdamW with the settings that all methods share.

    `epochs` or, where given, `max_steps` is the length; an epoch of a small set is repeated up to
    `min_steps_per_epoch`. A step is `batch_size` examples over all processes, in micro-batches of `micro_batch_size`
    per process (None: at once). `learning_rate` is the updates'; `head_learning_rate` the task head's (None: the
    same). `warmup`: a part of the steps below 1, a number of steps from 1 on. `schedule` ends at `final_rate` times
    the rate. `precision` bf16 is autocast; trained tensors stay float32. `evaluate_every` steps the validation set is
    scored (None: at the end only), `save_every` steps a checkpoint is written (None: only when interrupted). `device`
    is auto, cpu or cuda.
    """

    epochs: float = 10
    max_steps: int | None = None
    min_steps_per_epoch: int = 0
    batch_size: int = 128
    micro_batch_size: int | None = None
    evaluation_batch_size: int = 256
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    warmup: float = 0.0
    final_rate: float = 0.01
    max_grad_norm: float | None = 1.0
    precision: str = "fp32"
    evaluate_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    device: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        check_positive("trainer.epochs", self.epochs)
        for name in ("max_steps", "micro_batch_size", "evaluate_every", "save_every"):
            if getattr(self, name) is not None:
                check_count(f"trainer.{name}", getattr(self, name))
        check_count("trainer.min_steps_per_epoch", self.min_steps_per_epoch, 0)
        for name in ("batch_size", "evaluation_batch_size", "log_every"):
            check_count(f"trainer.{name}", getattr(self, name))
        check_count("trainer.workers", self.workers, 0)
        check_positive("trainer.learning_rate", self.learning_rate)
        if self.head_learning_rate is not None:
            check_positive("trainer.head_learning_rate", self.head_learning_rate)
        if self.max_grad_norm is not None:
            check_positive("trainer.max_grad_norm", self.max_grad_norm)
        check_range("trainer.weight_decay", self.weight_decay, 0)
        check_schedule(self.schedule, self.warmup, self.final_rate)
        check_choice("trainer.precision", self.precision, ("fp32", "bf16"))
        check_choice("trainer.device", self.device, ("auto", "cpu", "cuda"))

    def steps(self, examples: int) -> int:
        """The optimiser's steps over a training set of this size."""
        per_epoch = max(examples / self.batch_size, self.min_steps_per_epoch)
        return self.max_steps or max(1, round(self.epochs * per_epoch))

    def accelerator(self) -> Accelerator:
        """The devices and processes of this run."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SettingsError("trainer.device=cuda: torch sees no CUDA device here; use auto or cpu")
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # The buffers are the fixed bases, which every process draws alike.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        accelerator = Accelerator(cpu=self.device == "cpu", kwargs_handlers=[ddp])
        if self.batch_size % accelerator.num_processes:
            raise SettingsError(
                f"trainer.batch_size={self.batch_size}: must divide by the {accelerator.num_processes} processes"
            )
        return accelerator

    def fit(
        self, task: Task, model: nn.Module, splits: Splits, *, seed: int, folder: Path, observer: Observer,
        accelerator: Accelerator, zero_shot: bool = False,
    ) -> Fit:  # fmt: skip
        """Trains `model` (adapted, with its head) and scores it; goes on from a checkpoint in `folder`, if any."""
        return Loop(self, task, model, splits, seed, folder, observer, accelerator).fit(zero_shot)


class Loop:
    """One training: the settings, and what changes while it goes."""

    def __init__(
        self, trainer: Trainer, task: Task, model: nn.Module, splits: Splits, seed: int, folder: Path,
        observer: Observer, accelerator: Accelerator,
    ):  # fmt: skip
        self.settings, self.task, self.seed = trainer, task, seed
        self.folder, self.observer, self.accelerator = folder, observer, accelerator
        adaptation = adaptation_of(model)
        assert adaptation is not None
        self.adaptation = adaptation
        self.plain = model.to(accelerator.device)  # .to before the optimiser sees the parameters
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise SettingsError(f"method {adaptation.method.name} has nothing to train here: this model gets no head")
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(trainer.betas[0], trainer.betas[1]))
        if accelerator.ddp_handler is not None:
            # Every forward reaches every update; of a whole model it may leave out some (a mask token).
            accelerator.ddp_handler.find_unused_parameters = bool(adaptation.unfrozen)
        self.model: nn.Module = accelerator.prepare(model)
        self.splits = Splits(*(self._cache_features(split) for split in (splits.train, splits.validation, splits.test)))
        self.steps = trainer.steps(len(splits.train))
        self.watch = LossWatch()
        self.interrupted = False

    def fit(self, zero_shot: bool) -> Fit:
        metrics: dict[str, float] = {}
        start, seconds = 0, 0.0
        resumable = checkpoint.latest(self.folder)
        if zero_shot:
            metrics |= self.evaluate("zero_shot", self.splits.test)
            self.observer.say(f"before training: {_brief(metrics)}")
        if resumable is not None:
            state = checkpoint.restore(resumable, self.trained, self.optimizer)
            start, seconds = int(state["step"]), state["train_seconds"]
            self.observer.say(f"going on from step {start} of {self.steps}")
        with self._listening():
            seconds = self.train(start, seconds)
        self.adaptation.method.finish(self.adaptation.updates.values())
        metrics |= self.evaluate("validation", self.splits.validation)
        metrics |= self.evaluate("test", self.splits.test)
        self.observer.log(metrics | self.norms(), self.steps)
        return Fit(metrics, self.steps, seconds, seconds / self.steps)

    def train(self, start: int, seconds: float) -> float:
        """Steps `start` to the end; returns `seconds` and what they took, without evaluation and checkpoints."""
        settings, batches = self.settings, self.batches(start)
        for step in range(start, self.steps):
            began = time.perf_counter()
            # The noise of a step depends on the step, so that a resumed run draws what an unbroken one draws.
            torch.manual_seed(integer("noise", self.seed, step, self.accelerator.process_index))
            factor = rate_factor(step, self.steps, settings.schedule, settings.warmup, settings.final_rate)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            loss, norm = self.step(batches, step)
            seconds += time.perf_counter() - began
            self._report(step, loss, norm, factor * settings.learning_rate)
            done = step + 1
            if settings.evaluate_every and done % settings.evaluate_every == 0 and done < self.steps:
                scores = self.evaluate("validation", self.splits.validation) | self.norms()
                self.observer.log(scores, done)
                self.observer.say(f"step {done}: {_brief(scores)}")
            if self.interrupted or (settings.save_every and done % settings.save_every == 0 and done < self.steps):
                self._save(done, seconds)
            if self.interrupted:
                raise Interrupted(f"stopped at step {done} of {self.steps}; run the same command to go on")
        return seconds

    def step(self, batches: Iterator[list[dict[str, Any]]], step: int) -> tuple[float, float]:
        """One optimiser step; returns the mean loss and the norm of the gradient before clipping."""
        self.model.train()
        micro = [self.to_device(batch) for batch in next(batches)]
        weights = [self.task.weight(batch) for batch in micro]
        world = self.accelerator.num_processes
        (total,) = self._sum(float(sum(weights)))
        if not total:
            raise SettingsError(f"step {step}: its examples have nothing to learn; are they cut too short?")
        mean = torch.zeros((), device=self.accelerator.device)
        unchanged = cached(self.plain) if len(micro) > 1 else nullcontext()  # nothing trained changes between them
        with unchanged, self._attention():
            for i, (batch, weight) in enumerate(zip(micro, weights, strict=True)):
                last = i == len(micro) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.model):
                    with self._autocast():
                        loss = self.task.loss(self.model, batch)
                    # Processes' gradients are averaged, so each counts `world` times over the weight of all.
                    share = loss * (weight * world / total)
                    penalty = self.adaptation.method.penalty(self.adaptation.updates.values()) if last else None
                    self.accelerator.backward(share if penalty is None else share + penalty)
                mean += loss.detach() * (weight / total)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.settings.max_grad_norm or math.inf)
        value, stopping = self._sum(float(mean), float(self.interrupted))
        size, self.interrupted = float(norm), stopping > 0  # every process stops after the same step
        if not (math.isfinite(value) and math.isfinite(size)):
            last_good = checkpoint.latest(self.folder)
            raise Diverged(
                f"step {step}: the loss is {value:.3g} and the gradient's norm {size:.3g} at learning rate "
                f"{self.optimizer.param_groups[0]['lr']:.3g}; last good checkpoint: {last_good or 'none'}"
            )
        updates = self.adaptation.updates
        self.adaptation.method.after_backward(updates.values(), step)
        self.optimizer.step()
        self.adaptation.method.after_step(updates.values(), step)
        self.optimizer.zero_grad(set_to_none=True)
        return value, size

    @torch.no_grad()
    def evaluate(self, name: str, split: Split) -> dict[str, float]:
        """Metrics of a split, as ``name/metric``; every process takes its share."""
        if not len(split):
            return {}
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        columns: dict[str, list] = {}
        self.plain.eval()
        with merged(self.plain), self._attention(), self._autocast():
            for batch in self._once(split, rank, world):
                for key, values in self.task.predict(self.plain, self.to_device(batch)).items():
                    columns.setdefault(key, []).extend(values)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            shares = gather_object([columns])  # the first has rows, whatever the split's size
            columns = {key: [value for share in shares for value in share.get(key, [])] for key in shares[0]}
        return {f"{name}/{key}": value for key, value in self.task.score(columns).items()}

    @torch.no_grad()
    def _cache_features(self, split: Split) -> Split:
        """The split as the frozen part of the model leaves it, where that is the same every time."""
        frozen = self.task.frozen_part(self.plain)
        if frozen is None or split.encode.random or not len(split):
            return split
        self.plain.eval()
        with self._attention(), self._autocast():
            return CachedFeatures([frozen(self.to_device(batch)) for batch in self._once(split)]).split()

    def _once(self, split: Split, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
        """Every example of this process's share, once, in batches."""
        keys = evaluation_keys(split.by_length, self.settings.evaluation_batch_size, rank, world)
        return chain.from_iterable(loader(split, keys, self.settings.workers, self.observer.say))

    def norms(self) -> dict[str, float]:
        """Mean and largest ‖ΔW‖ / ‖W0‖ over the adapted modules."""
        values = list(relative_norms(self.plain).values())
        return {"update/relative_norm_mean": sum(values) / len(values), "update/relative_norm_max": max(values)}

    def _groups(self) -> list[dict[str, Any]]:
        """The method's groups, and one for the task's head."""
        settings, own = self.settings, {id(p) for p in self.adaptation.trained().values()}
        groups = self.adaptation.method.parameter_groups(
            self.adaptation.trained(), settings.learning_rate, settings.weight_decay
        )
        head = [p for p in self.trained.values() if id(p) not in own]
        if head:
            rate = settings.head_learning_rate or settings.learning_rate
            groups.append({"params": head, "lr": rate, "weight_decay": settings.weight_decay})
        return [group | {"initial_lr": group["lr"]} for group in groups]

    def batches(self, start: int) -> Iterator[list[dict[str, Any]]]:
        """This process's micro-batches of every step from `start` to the end."""
        settings, process = self.settings, self.accelerator
        steps, rank, world = range(start, self.steps), process.process_index, process.num_processes
        keys = training_keys(len(self.splits.train), settings.batch_size, steps, self.seed, rank, world)
        return loader(self.splits.train, keys, settings.workers, self.observer.say, settings.micro_batch_size)

    def _report(self, step: int, loss: float, norm: float, rate: float) -> None:
        done = step + 1
        warning = self.watch.add(loss)
        if warning:
            self.observer.say(f"step {done}: {warning}")
        if done % self.settings.log_every == 0 or done in (1, self.steps):
            self.observer.log({"train/loss": loss, "train/learning_rate": rate, "train/gradient_norm": norm}, done)
        self.observer.progress(done, self.steps, f"loss {loss:.3f}")

    def _save(self, done: int, seconds: float) -> None:
        if self.accelerator.is_main_process:
            state = {"step": done, "train_seconds": seconds}
            checkpoint.save(self.folder, state, self.trained, self.optimizer)
        self.accelerator.wait_for_everyone()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _attention(self) -> AbstractContextManager[None]:
        return attention_rule(self.accelerator.device.type, self.settings.precision)

    def to_device(self, batch: Any) -> Any:
        """The batch with its tensors on this process's device."""
        if isinstance(batch, torch.Tensor):
            return batch.to(self.accelerator.device, non_blocking=True)
        return {key: self.to_device(value) for key, value in batch.items()} if isinstance(batch, dict) else batch

    def _sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.accelerator.num_processes == 1:
            return list(values)
        reduced: Any = self.accelerator.reduce(torch.tensor(values, device=self.accelerator.device), "sum")
        return reduced.tolist()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run at the next step's end, with a checkpoint."""

        def stop(number: int, frame: Any) -> None:
            self.interrupted = True

        try:
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: nobody to listen for
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _brief(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
