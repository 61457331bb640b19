"""Examples per second of training, beside a bare loop over the same model and batch, and the loader's own speed.

python scripts/throughput.py model=vit_s14 task=cifar10 shots=16 data_root=FOLDER [KEY=VALUE …]
python scripts/throughput.py --rounds 9 --steps 4 --json figures.json …

The bare loop has its batch in memory: forward, backward, clipping, AdamW. Ours reads, decodes and augments every batch,
seeds its noise, and watches the loss. Both take turns in one process on the same module; medians over the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from randlora.adapters import adapt
from randlora.config import settings
from randlora.data.loader import loader, training_keys
from randlora.errors import exit_code
from randlora.experiment import Experiment
from randlora.tasks.base import Splits
from randlora.training import Trainer
from randlora.training.evaluate import to_device
from randlora.training.trainer import Loop

WORKERS = (0, 2)


class Quiet:
    """An observer that looks away."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def say(self, text: str) -> None: ...

    def progress(self, step: int, steps: int, text: str) -> None: ...


def measure(overrides: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Medians of examples per second, by what was timed."""
    experiment = Experiment.from_config(settings(*overrides))
    seed, batch_size = experiment.budget.seed, experiment.trainer.batch_size
    torch.manual_seed(seed)
    backbone = experiment.model.load()
    splits = experiment.task.splits(backbone, experiment.budget)
    adapt(backbone.module, experiment.method, experiment.patterns, seed)
    bound = experiment.bind(backbone)

    def loop(workers: int) -> Loop:
        trainer = dataclasses.replace(
            experiment.trainer, workers=workers, micro_batch_size=None, max_steps=rounds * steps + 1
        )
        folder, accelerator = Path(tempfile.mkdtemp()), trainer.accelerator()
        optimizer = experiment.optimizer
        return Loop(trainer, experiment.task, bound, splits, seed, folder, Quiet(), accelerator, optimizer)

    loops = {workers: loop(workers) for workers in WORKERS}
    timed: dict[str, Callable[[int], None]] = {"bare loop": bare(loops[0], experiment.trainer)}
    for workers, ours in loops.items():
        timed[f"ours, {workers} workers"] = stepping(ours)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(rounds + 1):
        for name, run in timed.items():
            began = time.perf_counter()
            for step in range(steps if round_ else 1):
                run(round_ * steps + step)
            if round_:  # the first warms up
                seconds[name].append((time.perf_counter() - began) / steps)
    figures = {name: batch_size / statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: statistics.median(b / o for b, o in zip(seconds["bare loop"], values, strict=True))
        for name, values in seconds.items()
    }
    for workers in WORKERS:
        figures[f"loader alone, {workers} workers"] = loading(splits, experiment.trainer, workers, rounds * steps)
    return {"overrides": overrides, "examples_per_second": figures, "of_the_bare_loop": ratios}


def stepping(ours: Loop) -> Callable[[int], None]:
    batches: list[Iterator] = []

    def step(index: int) -> None:
        if not batches:
            batches.append(ours.batches(0))
        ours.step(batches[0], index)

    return step


def bare(like: Loop, trainer: Trainer) -> Callable[[int], None]:
    """The loop that everybody writes first, on one batch that stays in memory."""
    model, task = like.plain, like.task
    parameters = list(like.trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=trainer.learning_rate)
    (batch,) = (to_device(batch, like.accelerator.device) for batch in next(like.batches(0)))

    def step(_: int) -> None:
        model.train()
        with torch.autocast(like.accelerator.device.type, torch.bfloat16, enabled=trainer.precision == "bf16"):
            loss = task.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def loading(splits: Splits, trainer: Trainer, workers: int, steps: int) -> float:
    """Examples per second of the loader with nobody to wait for, its start left out."""
    keys = training_keys(len(splits.train), trainer.batch_size, range(steps + 1), seed=0)
    batches = loader(splits.train, keys, workers)
    next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return trainer.batch_size * steps / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where the figures are added, as a list")
    arguments, overrides = parser.parse_known_args()
    found = measure(overrides, arguments.rounds, arguments.steps)
    print("| examples per second | | of the bare loop |\n|---|---|---|")
    for name, value in found["examples_per_second"].items():
        ratio = found["of_the_bare_loop"].get(name)
        print(f"| {name} | {value:,.1f} | {f'{ratio:.2f}' if ratio else ''} |")
    if arguments.json:
        before = json.loads(arguments.json.read_text()) if arguments.json.is_file() else []
        arguments.json.write_text(json.dumps([*before, found], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
