"""Training tokens per second of a language model: ours beside transformers' Trainer with PEFT.

python scripts/tokens.py [--rounds 5] [--json FILE] model=smollm2_135m task=commonsense_mix data_root=FOLDER [K=V …]

LoRA and RandLoRA with about as many trained numbers, each by our trainer and by transformers.Trainer on PEFT's model,
in one process, in turns: the same batches, bf16 autocast, AdamW, clipping. Medians over the rounds; the first warms up.
A step counts its tokens without padding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from throughput import Quiet, stepping
from torch.utils.data import Dataset

from randlora.adapters import adapt
from randlora.config import settings
from randlora.data.loader import Split, training_keys
from randlora.data.texts import pad
from randlora.errors import SettingsError, exit_code
from randlora.experiment import Experiment
from randlora.methods import LoRA, Method, RandLoRA
from randlora.tasks.language_model import IGNORED
from randlora.training.trainer import Loop

LORA, RANDLORA = 16, 5  # ranks: 1.18 % of Qwen2-0.5B's parameters each, as in the paper's Table 15


class Rows(Dataset):
    """The examples in the order in which our trainer reads them, encoded by our encoder."""

    def __init__(self, split: Split, batch_size: int, steps: int):
        keys = training_keys(len(split), batch_size, range(steps), seed=0)
        self.split, self.keys = split, [key for step in keys for key in step]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Any:
        return self.split[self.keys[index]]


class Clock(transformers.TrainerCallback):
    """Seconds of each step, between its beginning and its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def ours(experiment: Experiment, method: Method, steps: int) -> Callable[[int], float]:
    """Steps by number, each returning its seconds."""
    backbone = experiment.model.load()
    splits = experiment.task.splits(backbone, experiment.budget)
    adapt(backbone.module, method, experiment.patterns, 0)
    trainer = dataclasses.replace(experiment.trainer, max_steps=steps, precision="bf16", micro_batch_size=None)
    loop = Loop(
        trainer, experiment.task, experiment.bind(backbone), splits, 0, Path(tempfile.mkdtemp()), Quiet(),
        trainer.accelerator(), experiment.optimizer,
    )  # fmt: skip
    step = stepping(loop)

    def timed(index: int) -> float:
        began = time.perf_counter()
        step(index)
        return time.perf_counter() - began

    return timed


def theirs(experiment: Experiment, config: Any, steps: int) -> Callable[[int], float]:
    """The same with PEFT's model in transformers' Trainer, which is started anew for every step."""
    backbone = experiment.model.load()
    encode = experiment.task.encoder(backbone, training=True)
    splits = experiment.task.splits(backbone, experiment.budget)
    rows = Rows(splits.train, experiment.trainer.batch_size, steps)
    model = peft.get_peft_model(backbone.module, config)

    def collate(items: list[Any]) -> dict[str, torch.Tensor]:
        return {**encode.collate(items)["inputs"], "labels": pad([item["labels"] for item in items], IGNORED)}

    def timed(index: int) -> float:
        clock, size = Clock(), experiment.trainer.batch_size
        arguments = transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=size, bf16=True, save_strategy="no",
            report_to=[], logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        part = torch.utils.data.Subset(rows, range(index * size, (index + 1) * size))
        transformers.Trainer(model, arguments, collate, part, callbacks=[clock]).train()
        return clock.seconds[0]

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments, overrides = parser.parse_known_args()
    experiment = Experiment.from_config(settings(*overrides))
    if experiment.model.kind != "causal_lm":
        raise SettingsError(f"model={experiment.model.name}: a causal language model is needed, such as smollm2_135m")
    steps = arguments.rounds + 1
    modules = [pattern.rpartition(".")[2] for pattern in experiment.patterns]
    timed = {
        "LoRA": ours(experiment, LoRA(LORA), steps),
        "LoRA, Trainer + PEFT": theirs(experiment, peft.LoraConfig(r=LORA, target_modules=modules), steps),
        "RandLoRA": ours(experiment, RandLoRA(RANDLORA), steps),
        "RandLoRA, Kronecker": ours(experiment, RandLoRA(RANDLORA, basis="kronecker"), steps),
        "RandLoRA, Trainer + PEFT": theirs(experiment, peft.RandLoraConfig(r=RANDLORA, target_modules=modules), steps),
    }
    backbone = experiment.model.load()
    rows = Rows(experiment.task.splits(backbone, experiment.budget).train, experiment.trainer.batch_size, steps)
    size = experiment.trainer.batch_size
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    tokens = []
    for index in range(steps):
        for name, step in timed.items():
            seconds[name].append(step(index))
        tokens.append(sum(len(rows[i]["input_ids"]) for i in range(index * size, (index + 1) * size)))
    figures = {
        name: statistics.median(count / one for count, one in zip(tokens[1:], values[1:], strict=True))
        for name, values in seconds.items()
    }
    print("| | tokens per second | × Trainer + PEFT |\n|---|---|---|")
    for name, figure in figures.items():
        peer = f"{name.split(',')[0]}, Trainer + PEFT"
        pairs = zip(seconds[peer][1:], seconds[name][1:], strict=True)
        print(f"| {name} | {figure:,.0f} | {statistics.median(p / o for p, o in pairs):.2f} |")
    if arguments.json:
        kept = {"overrides": overrides, "tokens": tokens, "seconds": seconds}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
