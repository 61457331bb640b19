"""Training tokens per second of a language model: ours beside transformers' Trainer with PEFT.

LoRA and RandLoRA with about as many trained parameters, each by our trainer and by transformers.Trainer on PEFT's
model, in one process, in turns: the same batches, bf16 autocast, AdamW, clipping. A step counts its tokens without
padding.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch.utils.data import Dataset, Subset

from randlora.analysis.step_speed import loop, our_step
from randlora.analysis.timing import interleaved, seconds_of
from randlora.data.loader import Split, training_keys
from randlora.data.texts import pad
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.methods import LoRA, Method, RandLoRA
from randlora.tasks.language_model import IGNORED

LORA, RANDLORA = 16, 5  # ranks: 1.18 % of Qwen2-0.5B's parameters each, as in the paper's Table 15
PEER = "{method}, Trainer + PEFT"
TimedStep = Callable[[], float]  # takes the next step, and returns its seconds


class TokenSpeeds(NamedTuple):
    """The tokens of every step, and its seconds by what was timed; the first step warms up."""

    tokens: list[int]
    seconds: dict[str, list[float]]

    def tokens_per_second(self, name: str) -> float:
        """The median over the steps."""
        return statistics.median(n / s for n, s in zip(self.tokens[1:], self.seconds[name][1:], strict=True))

    def times_peer(self, name: str) -> float:
        """The median over the steps of the seconds of Trainer and PEFT divided by these."""
        peer = self.seconds[PEER.format(method=name.split(",")[0])]
        return statistics.median(theirs / own for theirs, own in zip(peer[1:], self.seconds[name][1:], strict=True))


def token_speeds(experiment: Experiment, rounds: int) -> TokenSpeeds:
    """Steps of every variant in turn, `rounds` after the first; SettingsError without a causal language model."""
    if experiment.model.kind != "causal_lm":
        raise SettingsError(f"model={experiment.model.name}: a causal language model is needed, such as smollm2_135m")
    steps, size = rounds + 1, experiment.trainer.batch_size
    modules = [pattern.rpartition(".")[2] for pattern in experiment.patterns]
    lora = peft.LoraConfig(r=LORA, target_modules=modules)
    randlora = peft.RandLoraConfig(r=RANDLORA, target_modules=modules)
    timed = {
        "LoRA": ours(experiment, LoRA(LORA), steps),
        PEER.format(method="LoRA"): theirs(experiment, lora, steps),
        "RandLoRA": ours(experiment, RandLoRA(RANDLORA), steps),
        "RandLoRA, Kronecker": ours(experiment, RandLoRA(RANDLORA, basis="kronecker"), steps),
        PEER.format(method="RandLoRA"): theirs(experiment, randlora, steps),
    }
    rows = Rows(experiment.task.splits(experiment.model.load(), experiment.budget).train, size, steps)
    tokens = [sum(len(rows[i]["input_ids"]) for i in range(index * size, (index + 1) * size)) for index in range(steps)]
    return TokenSpeeds(tokens, interleaved(timed, steps, warm_up=0))


def ours(experiment: Experiment, method: Method, steps: int) -> TimedStep:
    """Steps of our trainer."""
    experiment = replace(experiment, method=method, budget=replace(experiment.budget, seed=0))
    backbone = experiment.model.load()
    splits = experiment.task.splits(backbone, experiment.budget)
    experiment.adapt(backbone)
    bound = experiment.bind(backbone)
    step = our_step(loop(experiment, bound, splits, steps, workers=experiment.trainer.workers, precision="bf16"))
    return partial(seconds_of, step)


def theirs(experiment: Experiment, config: peft.PeftConfig, steps: int) -> TimedStep:
    """Steps of PEFT's model in transformers' Trainer, which is started anew for every step."""
    backbone, size = experiment.model.load(), experiment.trainer.batch_size
    encode = experiment.task.encoder(backbone, training=True)
    rows = Rows(experiment.task.splits(backbone, experiment.budget).train, size, steps)
    model = peft.get_peft_model(backbone.module, config)

    def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**encode.collate(items)["inputs"], "labels": pad([item["labels"] for item in items], IGNORED)}

    def seconds() -> Iterator[float]:
        for index in range(steps):
            clock = Clock()
            arguments = transformers.TrainingArguments(
                output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=size, bf16=True,
                save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
                remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
            part = Subset(rows, range(index * size, (index + 1) * size))
            transformers.Trainer(model, arguments, collate, part, callbacks=[clock]).train()
            yield clock.seconds

    return seconds().__next__


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
    """Seconds of the last step, between its beginning and its end."""

    began = seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.began
