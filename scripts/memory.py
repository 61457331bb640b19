"""The memory of a training step: the dry run's plan beside what the process takes.

python scripts/memory.py [--json FILE] model=smollm2_135m task=arc_easy data_root=FOLDER [KEY=VALUE …]

Three steps over the longest micro-batch: forward, backward, the optimiser's. On a GPU the allocator's peak; on a CPU
the peak of the process, less what it held before the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from randlora.config import settings
from randlora.errors import SettingsError, exit_code
from randlora.experiment import Experiment
from randlora.plan import memory_plan
from randlora.records.memory import PeakMemory
from randlora.tasks.mixins import KnownShapes
from randlora.training.evaluate import to_device
from randlora.training.precision import attention_rule, autocast


def measure(overrides: list[str]) -> dict[str, Any]:
    experiment = Experiment.from_config(settings(*overrides))
    task = experiment.task
    if not isinstance(task, KnownShapes):
        raise SettingsError(f"task={task.name}: the shapes of its batches are not known without data")
    plan = memory_plan(experiment)  # first, since it loads every library that a step needs
    trainer, device = experiment.trainer, experiment.trainer.accelerator().device
    if getattr(experiment.model, "quantization", None):
        import torchao  # noqa: F401 - a library, not the model's memory
    before = 0 if device.type == "cuda" else PeakMemory(device).bytes()
    backbone = experiment.model.load()
    for tensor in [*backbone.module.parameters(), *backbone.module.buffers()]:
        tensor.data = tensor.data.clone()  # a mapped file would count whole, read or not
    experiment.adapt(backbone)
    model = experiment.bind(backbone).model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = experiment.optimizer.over([{"params": trained, "lr": 1e-6}])
    size = min(trainer.micro_batch_size or trainer.batch_size, trainer.batch_size)
    batch = to_device(task.sample(backbone, size), device)
    peak = PeakMemory(device)  # after loading, which may hold two copies of a weight
    with attention_rule(device.type, trainer.precision):
        for _ in range(3):
            with autocast(device.type, trainer.precision):
                loss = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"overrides": overrides, "device": device.type, "plan": plan, "peak": peak.bytes() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures are added, as a list")
    arguments, overrides = parser.parse_known_args()
    found = measure(overrides)
    for name, value in [*found["plan"].items(), (f"peak, {found['device']}", found["peak"])]:
        print(f"{name:12} {value / 2**20:9,.0f} MiB")
    if arguments.json:
        before = json.loads(arguments.json.read_text()) if arguments.json.is_file() else []
        arguments.json.write_text(json.dumps([*before, found], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
