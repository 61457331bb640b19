"""One run: its folder, its signals, its end, and the record of what came out."""

from __future__ import annotations

import shutil
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from randlora.endings import LOST, NOTHING, ending, interrupted, unwritable
from randlora.errors import BUSY, FAILED, FINISHED, INTERRUPTED, SettingsError
from randlora.experiment import Experiment
from randlora.finetune import finetune
from randlora.plan import check_memory
from randlora.records.console import Console
from randlora.records.lock import Busy
from randlora.records.record import Record
from randlora.records.result import Headline, Result
from randlora.records.versions import commit, versions
from randlora.signals import STOP, Interrupted
from randlora.training.processes import Peers, as_the_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    # Before the record is opened: from then on whatever happens has a result.
    result, peers = _unfinished(experiment, record, accelerator), Peers(accelerator, record.folder.name)
    try:
        if not config["resume"]:
            STOP.check(accelerator)  # before anything is removed
        done = as_the_main_process(accelerator, partial(record.open, config_yaml, config["resume"]))
    except (Busy, Interrupted) as error:
        if accelerator.is_main_process:
            record.console.say(str(error) if isinstance(error, Busy) else f"{error}; {NOTHING}")
        return Outcome(BUSY if isinstance(error, Busy) else INTERRUPTED)
    if done is not None:
        if accelerator.is_main_process:
            record.console.say(f"already {done.status}: {record.folder}  {summary(done)}")
        return Outcome(FINISHED, done.validation)
    STOP.at_once = lambda: record.end(replace(result, **interrupted(record, "ended at once by a second SIGINT", LOST)))
    code, ended = FAILED, {}  # what the result has besides
    try:
        record.start_loggers()
        record.say(f"run folder {record.folder}")
        with peers.watched(lambda failure: record.end(replace(result, **failure))):
            ended = finetune(experiment, record, accelerator)
        code = FINISHED
    except SettingsError as error:
        ended = {"error": str(error)}
        raise
    except (Exception, KeyboardInterrupt) as error:
        ended = ending(error, record, accelerator, experiment.trainer)
        if not ended:
            ended = {"error": f"{type(error).__name__}: {error}"}
            _tell(record, traceback.format_exc())
    finally:
        if code != FINISHED:
            ended = peers.first(ended)
            code = INTERRUPTED if ended.get("status") == "interrupted" else FAILED
        result = replace(result, **ended)
        STOP.at_once = lambda: record.end(result)
        try:
            record.finish(result)
            if result.status == "finished" and accelerator.is_main_process:
                shutil.rmtree(record.checkpoints, ignore_errors=True)
        except OSError as error:  # its folder then says that no process runs it, and no more
            if result.error:
                record.console.say(f"{result.status}: {result.error}")
            sentence = f"the result cannot be written: {unwritable(error, record)}"
            code, result = FAILED, replace(result, status="failed", error=sentence)
        finally:
            record.close()
        accelerator.free_memory()
    _tell(record, f"{result.status}: {summary(result) if code == FINISHED else result.error}", code != FINISHED)
    return Outcome(code, result.validation)


def _unfinished(experiment: Experiment, record: Record, accelerator: Accelerator) -> Result:
    """What a result says of a run before its end."""
    config, device = experiment.config, accelerator.device.type
    return Result(
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
        device=torch.cuda.get_device_name() if device == "cuda" else device,
    )


def _tell(record: Record, text: str, everywhere: bool = True) -> None:
    """Says what is known to have gone wrong, also where the log cannot be written: the console hears it first."""
    with suppress(OSError):
        record.say(text, everywhere)


def summary(result: Result) -> str:
    """One line of a result that has finished or paused."""
    if result.status == "paused":
        return f"validation/{result.metric} {result.validation:.4f} {(result.error or '').partition(';')[0]}"
    before = "" if result.before is None else f" (zero-shot {result.before:.4f})"
    return (
        f"{result.headline.name} {result.headline.value:.4f}{before}, {result.trainable_parameters:,} trained "
        f"parameters, {result.train_seconds:.0f} s of training, peak memory "
        f"{(result.peak_memory_bytes or 0) / 2**20:,.0f} MiB"
    )
