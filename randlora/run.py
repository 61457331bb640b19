"""One run, from a composed config to its record."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora.config import build
from randlora.data.loader import Unreadable
from randlora.errors import FAILED, FINISHED, INTERRUPTED, SettingsError, check_choice, check_count
from randlora.methods import Method
from randlora.models.base import Model
from randlora.records.signature import signature
from randlora.tasks.base import Budget, Task
from randlora.training.trainer import Diverged, Interrupted, Trainer

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Experiment:
    """The objects of one run; making them is quick and checks every setting that can be checked without loading."""

    method: Method
    model: Model
    task: Task
    trainer: Trainer
    patterns: list[str]
    budget: Budget
    config: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Experiment:
        """Raises SettingsError with one sentence for whatever is wrong."""
        parts = {name: build(config[name]) for name in ("method", "model", "task", "trainer")}
        for name, kind in (("method", Method), ("model", Model), ("task", Task), ("trainer", Trainer)):
            if not isinstance(parts[name], kind):
                raise SettingsError(f"{name}: {config[name].get('_target_')!r} is not a {kind.__name__}")
        check_count("seed", config["seed"], 0)
        check_choice("resume", config["resume"], (True, False))
        check_choice("dry_run", config["dry_run"], (True, False, "json"))
        budget = Budget(config["seed"], config["shots"], config["fraction"])
        patterns = parts["model"].patterns(config["targets"])
        parts["task"].check_model(parts["model"])
        if not config["dry_run"]:
            parts["model"].check()
            parts["task"].check()
        parts["task"].training_size(budget)  # refuses shots where there are no classes
        return cls(**parts, patterns=patterns, budget=budget, config=config)

    @property
    def folder(self) -> Path:
        """run_root/task/model/method/signature."""
        names = (self.task.name, self.model.name, self.method.name, signature(self.config, self.task.version))
        return Path(self.config["run_root"]).joinpath(*names)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the exit code, and the validation score, which a sweeper may optimise."""

    code: int
    objective: float | None = None


def dry_run(experiment: Experiment) -> dict[str, Any]:
    """What a run would train, how long, and in how much memory, without weights, data or hub.

    `memory` is that of a training step on one process, by `randlora.memory_plan`; None for a task without a `sample`.
    """
    from randlora.memory_plan import memory_plan

    # Asked of the class and not tried, so that what torch has not implemented for shapes alone is an error.
    memory = None if type(experiment.task).sample is Task.sample else memory_plan(experiment)
    return counts(experiment) | lengths(experiment) | {"memory": memory}


def counts(experiment: Experiment) -> dict[str, Any]:
    """What a run would train, in numbers, found on the meta device.

    `adapter_bytes` is the tensors' alone; a file has under 4 kB more.
    """
    from randlora.adapters import adapt

    backbone = experiment.model.meta_model()
    report = adapt(backbone.module, experiment.method, experiment.patterns, experiment.config["seed"])
    head = _size(_head(experiment, experiment.task.bind(backbone), backbone.module))
    return {
        "sites": [vars(site) for site in report.sites],
        "trainable_parameters": report.trainable_parameters,
        "head_parameters": head,
        "total_parameters": report.total_parameters + head,
        "adapter_bytes": 4 * report.saved_parameters,
    }


def lengths(experiment: Experiment) -> dict[str, float]:
    """How long a run is, from the published size of its training set: optimiser steps, and passes over the set."""
    size = experiment.task.training_size(experiment.budget)
    steps = experiment.trainer.steps(size)
    return {"steps": steps, "epochs": round(steps * experiment.trainer.batch_size / size, 2)}


def head_of(bound: nn.Module, backbone: nn.Module) -> dict[str, nn.Parameter]:
    """What a bound model trains beside its backbone, by name."""
    own = {id(parameter) for parameter in backbone.parameters()}
    return {name: p for name, p in bound.named_parameters() if p.requires_grad and id(p) not in own}


def _head(experiment: Experiment, bound: nn.Module, backbone: nn.Module) -> dict[str, nn.Parameter]:
    """head_of; SettingsError where there is none and the settings give it a rate."""
    head, rate = head_of(bound, backbone), experiment.trainer.head_learning_rate
    if not head and rate is not None:
        raise SettingsError(
            f"trainer.head_learning_rate={rate}: task {experiment.task.name} on {experiment.model.name} trains no "
            "head; use null, or trainer.learning_rate for the updates"
        )
    return head


def _size(head: Mapping[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in head.values())


def run(experiment: Experiment, config_yaml: str) -> Outcome:
    """Trains, unless a finished record says it has been done; leaves a record in every case."""
    import torch

    from randlora.records.console import Console
    from randlora.records.record import Record, commit, versions

    config = experiment.config
    accelerator = experiment.trainer.accelerator()
    logger = build(config["logger"])
    record = Record(
        experiment.folder, config, [logger] if logger else [], Console(), writes=accelerator.is_main_process
    )
    done = record.result()
    if done is not None and done["status"] == "finished" and config["resume"]:
        if accelerator.is_main_process:
            record.console.say(f"already finished: {record.folder}  {summary(done)}")
        return Outcome(FINISHED, _objective(done))
    if not config["resume"]:
        record.clear()
    record.open(config_yaml)
    result: dict[str, Any] = {
        "status": "failed",
        "headline": {"name": f"test/{experiment.task.headline}", "value": None},
        "metrics": {},
        "seed": config["seed"],
        "signature": record.folder.name,
        "config": config,
        "task_version": experiment.task.version,
        "versions": versions(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "error": None,
    }
    code = FAILED
    try:
        record.start_loggers(list(config["tags"]))
        record.say(f"run folder {record.folder}")
        result |= _train(experiment, record, accelerator)
        code = FINISHED
    except SettingsError as error:
        result["error"] = str(error)
        raise
    except (Interrupted, KeyboardInterrupt) as error:
        result |= {"status": "interrupted", "error": str(error) or "stopped before the first step"}
        code = INTERRUPTED
    except Diverged as error:
        result |= {"status": "diverged", "error": str(error)}
    except Unreadable as error:
        result["error"] = str(error)
    except torch.OutOfMemoryError as error:
        remedy = "lower trainer.micro_batch_size or set trainer.precision=bf16"
        result |= {"status": "out_of_memory", "error": f"{str(error).splitlines()[0]} ({remedy})"}
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        record.say(traceback.format_exc(), everywhere=True)
    finally:
        record.finish(KEYS | result)
        accelerator.free_memory()
        gc.collect()
    end = summary(result) if code == FINISHED else result["error"]
    record.say(f"{result['status']}: {end}", everywhere=code != FINISHED)
    return Outcome(code, _objective(result))


# Every key of result.json, for runs that end before it is known.
KEYS: dict[str, Any] = dict.fromkeys(
    (
        "status", "headline", "metrics", "trainable_parameters", "head_parameters", "total_parameters", "adapter_bytes",
        "train_seconds", "seconds_per_step", "peak_memory_bytes", "steps", "seed", "signature", "config", "versions",
        "commit", "device", "error", "examples", "task_version",
    )
)  # fmt: skip


def _train(experiment: Experiment, record: Any, accelerator: Any) -> dict[str, Any]:
    """Loads, adapts, trains, scores and saves; returns what the result has of it."""
    import torch
    from safetensors.torch import save_file

    from randlora.adapters import adapt, save_adapter
    from randlora.records.memory import PeakMemory

    seed = experiment.config["seed"]
    if experiment.task.remark():
        record.say(experiment.task.remark())
    memory = PeakMemory(accelerator.device)
    torch.manual_seed(seed)  # random weights and heads
    began = time.perf_counter()
    backbone = experiment.model.load()
    splits = experiment.task.splits(backbone, experiment.budget)
    report = adapt(backbone.module, experiment.method, experiment.patterns, seed)
    model = experiment.task.bind(backbone)
    head = _head(experiment, model, backbone.module)
    record.say(
        f"{experiment.model.name}: {report.trainable_parameters:,} of {report.total_parameters:,} parameters in "
        f"{len(report.sites)} sites, {_size(head):,} in the head; {len(splits.train):,} training examples; "
        f"loaded in {time.perf_counter() - began:.1f} s"
    )
    fit = experiment.trainer.fit(
        experiment.task,
        model,
        splits,
        seed=seed,
        folder=record.checkpoints,
        observer=record,
        accelerator=accelerator,
        zero_shot=experiment.task.zero_shot(backbone),
    )
    adapter_bytes = None
    if accelerator.is_main_process:
        adapter_bytes = save_adapter(backbone.module, record.folder / "adapter")
        if head:
            tensors = {name: p.detach().cpu() for name, p in head.items()}
            save_file(tensors, record.folder / "adapter" / "head.safetensors")
    headline = f"test/{experiment.task.headline}"
    return {
        "status": "finished",
        "headline": {"name": headline, "value": fit.metrics[headline]},
        "metrics": fit.metrics,
        "trainable_parameters": report.trainable_parameters,
        "head_parameters": _size(head),
        "total_parameters": report.total_parameters + _size(head),
        "adapter_bytes": adapter_bytes,
        "train_seconds": fit.train_seconds,
        "seconds_per_step": fit.seconds_per_step,
        "peak_memory_bytes": memory.bytes(),
        "steps": fit.steps,
        "examples": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
    }


def summary(result: Mapping[str, Any]) -> str:
    """One line of a finished result."""
    name, value = result["headline"]["name"], result["headline"]["value"]
    before = result["metrics"].get(name.replace("test/", "zero_shot/"))
    start = "" if before is None else f" (zero-shot {before:.4f})"
    return (
        f"{name} {value:.4f}{start}, {result['trainable_parameters']:,} trained parameters, "
        f"{result['train_seconds']:.0f} s of training, peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )


def _objective(result: Mapping[str, Any]) -> float | None:
    return result["metrics"].get(result["headline"]["name"].replace("test/", "validation/"))


def table(plan: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """A dry run as text: the sites by kind, then the totals."""
    import re

    kinds: dict[tuple[str, int, int, int], int] = {}
    for site in plan["sites"]:
        kind = (
            re.sub(r"\d+", "*", site["name"]),
            site["out_features"],
            site["in_features"],
            site["trainable_parameters"],
        )
        kinds[kind] = kinds.get(kind, 0) + 1
    width = max(len(name) for name, *_ in kinds)
    lines = [f"{'site':{width}}  count  out × in         trained, each"]
    for (name, rows, columns, count), number in kinds.items():
        lines.append(f"{name:{width}}  {number:5}  {f'{rows} × {columns}':15}  {count:13,}")
    trained, total = plan["trainable_parameters"], plan["total_parameters"]
    lines += [
        f"trained {trained:,} of {total:,} parameters ({100 * trained / total:.3g} %), "
        f"{plan['head_parameters']:,} in the head",
        f"adapter {plan['adapter_bytes']:,} bytes; {plan['steps']:,} steps, {plan['epochs']:,} times the training set",
    ]
    if plan["memory"]:
        shares = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan["memory"].items() if name != "total")
        lines.append(f"memory of a step {plan['memory']['total'] / 2**30:.2f} GiB: {shares}")
    return "\n".join(lines)
