"""One run: train, evaluate, record."""

from __future__ import annotations

import gc
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from randlora.adapters import save_adapter
from randlora.adapters.interface import describe, method_from
from randlora.data.loader import Unreadable
from randlora.errors import BUSY, FAILED, FINISHED, INTERRUPTED, SettingsError
from randlora.experiment import Experiment
from randlora.integrity import Damaged, disk_fault, read_json, write_json
from randlora.models.base import Backbone
from randlora.plan import check_memory
from randlora.records.console import Console
from randlora.records.lock import Busy
from randlora.records.memory import PeakMemory
from randlora.records.record import Record, commit, versions
from randlora.records.result import Headline, Result
from randlora.signals import STOP, Interrupted
from randlora.tasks.base import Splits
from randlora.training import Diverged, Trainer, checkpoint
from randlora.training.cached_features import cache_features
from randlora.training.evaluate import brief, norms, prefixed
from randlora.training.out_of_memory import out_of_memory
from randlora.training.processes import Peers, lost

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
NOTHING = "nothing was begun: the same command begins"  # of an interrupted run without a checkpoint
LOST = "there was no checkpoint yet: the same command begins again"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the exit code, and the validation score, which a sweeper may optimise."""

    code: int
    objective: float | None = None


def run(experiment: Experiment, config_yaml: str) -> Outcome:
    """Trains, unless a finished record says it has been done; leaves a record in every case.

    Signals are requests to stop meanwhile; see `randlora.signals`.

    Args:
        experiment: What is run.
        config_yaml: Its settings as the record keeps them for a reader.

    Raises:
        SettingsError: For settings that turn out wrong only now; the record has its sentence, too.
    """
    with STOP:
        return _run(experiment, config_yaml)


def _run(experiment: Experiment, config_yaml: str) -> Outcome:
    config = experiment.config
    accelerator = experiment.trainer.accelerator()
    record = Record(experiment.folder, config, experiment.loggers, Console(), writes=accelerator.is_main_process)
    check_memory(experiment, accelerator.device)
    try:
        if not config["resume"]:
            STOP.check(accelerator)  # before anything is removed
        done = _as_the_main_process(accelerator, partial(record.open, config_yaml, config["resume"]))
    except (Busy, Interrupted) as error:
        if accelerator.is_main_process:
            record.console.say(str(error) if isinstance(error, Busy) else f"{error}; {NOTHING}")
        return Outcome(BUSY if isinstance(error, Busy) else INTERRUPTED)
    if done is not None:
        if accelerator.is_main_process:
            record.console.say(f"already finished: {record.folder}  {summary(done)}")
        return Outcome(FINISHED, done.validation)
    result = Result(
        task=experiment.task.name,
        model=experiment.model.name,
        method=experiment.method.name,
        shots=config["shots"],
        fraction=config["fraction"],
        seed=config["seed"],
        signature=record.folder.name,
        headline=Headline(f"test/{experiment.task.headline}", None),
        config=config,
        task_version=experiment.task.version,
        versions=versions(),
        commit=commit(),
        device=torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
    )
    peers = Peers(accelerator, record.folder.name)
    STOP.at_once = lambda: record.end(replace(result, **_interrupted(record, "ended at once by a second SIGINT", LOST)))
    code, ended = FAILED, {}  # what the result has besides
    try:
        record.start_loggers()
        record.say(f"run folder {record.folder}")
        with peers.watched(lambda failure: record.end(replace(result, **failure))):
            ended = train(experiment, record, accelerator)
        code = FINISHED
    except SettingsError as error:
        ended = {"error": str(error)}
        raise
    except (Interrupted, KeyboardInterrupt) as error:
        ended = _interrupted(record, str(error).partition(" at ")[0] or "stopped by SIGINT", NOTHING)
        code = INTERRUPTED
    except Exception as error:
        ended = _failure(error, record, accelerator, experiment.trainer)
        if "error" not in ended:
            ended["error"] = f"{type(error).__name__}: {error}"
            _tell(record, traceback.format_exc())
    finally:
        if code != FINISHED:
            ended = peers.first(ended)
            code = INTERRUPTED if ended.get("status") == "interrupted" else FAILED
        result = replace(result, **ended)
        STOP.at_once = lambda: record.end(result)
        try:
            record.finish(result)
            if code == FINISHED and accelerator.is_main_process:
                shutil.rmtree(record.checkpoints, ignore_errors=True)
        except OSError as error:  # its folder then says that no process runs it, and no more
            if result.error:
                record.console.say(f"{result.status}: {result.error}")
            sentence = f"the result cannot be written: {_disk(error, record)}"
            code, result = FAILED, replace(result, status="failed", error=sentence)
        finally:
            record.close()
        accelerator.free_memory()
        gc.collect()
    _tell(record, f"{result.status}: {summary(result) if code == FINISHED else result.error}", code != FINISHED)
    return Outcome(code, result.validation)


def _tell(record: Record, text: str, everywhere: bool = True) -> None:
    """Says what is known to have gone wrong, also where the log cannot be written: the console hears it first."""
    with suppress(OSError):
        record.say(text, everywhere)


def _failure(error: Exception, record: Record, accelerator: Accelerator, trainer: Trainer) -> dict[str, Any]:
    """The fields of the result of a run that failed for a known reason; none for an error in the code."""
    text, first = str(error), str(error).partition("\n")[0]
    if isinstance(error, Diverged):
        return {"status": "diverged", "error": text}
    if isinstance(error, Unreadable):
        return {"error": text}
    if out_of_memory(error):
        remedy = "lower trainer.micro_batch_size, set trainer.auto_batch=true or trainer.precision=bf16"
        return {"status": "out_of_memory", "error": f"{first or 'out of memory'} ({remedy})"}
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in text:
        return {
            "error": f"a process that reads data has died ({first}); is there memory for trainer.workers="
            f"{trainer.workers}? {_kept(record) or LOST}"
        }
    if disk_fault(error) or (accelerator.is_main_process and not record.folder.is_dir()):
        return {"error": _disk(error, record)}
    sentence = lost(error, accelerator, trainer.peer_timeout)
    return {"error": sentence} if sentence else {}


def _disk(error: Exception, record: Record) -> str:
    """A sentence for a file that cannot be written."""
    if not record.folder.is_dir():
        return f"the run folder {record.folder} is gone ({error})"
    return f"{disk_fault(error) or error} in {record.folder}, make room; {_kept(record) or LOST}"


def _as_the_main_process(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Does it on the main process; what it returns or raises there is returned or raised on all."""
    if accelerator.num_processes == 1:
        return act()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _interrupted(record: Record, why: str, without_checkpoint: str) -> dict[str, Any]:
    """The fields of the result of an interrupted run, with what the next attempt goes on from."""
    return {"status": "interrupted", "error": f"{why}; {_kept(record) or without_checkpoint}"}


def _kept(record: Record) -> str | None:
    """What the next attempt goes on from, if there is a checkpoint."""
    latest = checkpoint.latest(record.checkpoints)
    return f"checkpoint at step {int(latest.name.rpartition('_')[2])}: the same command goes on" if latest else None


def train(experiment: Experiment, record: Record, accelerator: Accelerator) -> dict[str, Any]:
    """Loads, adapts, trains, scores and saves; returns the fields of the result that come of it."""
    task, trainer, seed = experiment.task, experiment.trainer, experiment.budget.seed
    STOP.check(accelerator)
    remark = task.remark()
    if remark:
        record.say(remark)
    memory = PeakMemory(accelerator.device)
    torch.manual_seed(seed)  # random weights and heads
    began = time.perf_counter()
    backbone = experiment.model.load()
    STOP.check(accelerator)
    splits = task.splits(backbone, experiment.budget)
    STOP.check(accelerator)
    experiment, chosen = calibrated(experiment, backbone, splits, record, accelerator)
    report = experiment.adapt(backbone)
    bound = experiment.bind(backbone)
    head = bound.head_parameters()
    head_size = sum(parameter.numel() for parameter in head.values())
    examples = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
    record.say(
        f"{experiment.model.name}: {report.trainable_parameters:,} of {report.total_parameters:,} parameters in "
        f"{len(report.sites)} sites, {head_size:,} in the head; {examples['train']:,} training examples; "
        f"loaded in {time.perf_counter() - began:.1f} s"
    )
    STOP.check(accelerator)
    splits = cache_features(task, bound.model, splits, trainer, record, accelerator)

    def scores(name: str, split: str) -> dict[str, float]:
        return prefixed(name, trainer.evaluate(task, bound.model, getattr(splits, split), record, accelerator))

    metrics: dict[str, float] = {}
    if task.zero_shot and bound.head is None:
        metrics = scores("zero_shot", "test")
        record.say(f"before training: {brief(metrics)}")
    fit = trainer.fit(
        task, bound, splits, seed=seed, folder=record.checkpoints, observer=record, accelerator=accelerator,
        optimizer=experiment.optimizer, steps=trainer.steps(examples["train"]),
        strict=experiment.config["resume"] == "strict",
    )  # fmt: skip
    metrics |= scores("validation", "validation")
    columns = trainer.predictions(task, bound.model, splits.test, record, accelerator)
    metrics |= prefixed("test", task.score(columns))
    if experiment.config["predictions"]:
        record.keep_predictions(columns)
    record.log(metrics | norms(bound.model), fit.steps)
    adapter_bytes = None
    if accelerator.is_main_process:
        adapter_bytes = save_adapter(backbone.module, record.folder / "adapter", bound.modules())
    headline, grown = f"test/{task.headline}", fit.trainable_parameters - report.trainable_parameters
    return vars(fit) | {
        "status": "finished",
        "calibrated": chosen,
        "headline": Headline(headline, metrics[headline]),
        "metrics": metrics,
        "head_parameters": head_size,
        "total_parameters": report.total_parameters + grown + head_size,
        "adapter_bytes": adapter_bytes,
        "peak_memory_bytes": memory.bytes(),
        "examples": examples,
    }


def calibrated(
    experiment: Experiment, backbone: Backbone, splits: Splits, record: Record, accelerator: Accelerator
) -> tuple[Experiment, dict[str, Any] | None]:
    """The experiment with its method as training data make it, and what they chose, if anything.

    A run that goes on takes what it began with, from calibrated.json, unless the file is damaged.
    """
    before, path = experiment.method, record.folder / "calibrated.json"
    if not before.calibration_examples:
        return experiment, None
    try:
        experiment = replace(experiment, method=method_from(read_json(path)))
    except Damaged as error:
        if path.is_file():
            record.say(f"{error}; it is made again")
        experiment = experiment.calibrated(backbone, splits, accelerator)
        if accelerator.is_main_process:
            write_json(path, describe(experiment.method))
    old = describe(before)
    chosen = {name: value for name, value in describe(experiment.method).items() if value != old[name]}
    record.say(f"{before.name} chose from training data: {chosen}")
    return experiment, chosen


def summary(result: Result) -> str:
    """One line of a finished result."""
    before = "" if result.before is None else f" (zero-shot {result.before:.4f})"
    return (
        f"{result.headline.name} {result.headline.value:.4f}{before}, {result.trainable_parameters:,} trained "
        f"parameters, {result.train_seconds:.0f} s of training, peak memory "
        f"{(result.peak_memory_bytes or 0) / 2**20:,.0f} MiB"
    )
