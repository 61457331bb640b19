"""The memory of a training step as the process takes it, to compare with the dry run's plan."""

from __future__ import annotations

from contextlib import nullcontext

from randlora.adapters.quantization import load_library
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.records.memory import PeakMemory
from randlora.tasks.mixins import KnownShapes
from randlora.training.evaluate import to_device
from randlora.training.precision import attention_rule, autocast


def peak_bytes(experiment: Experiment) -> int:
    """The most memory of three steps over the longest micro-batch: forward, backward, the optimiser.

    On a GPU the allocator's peak; on a CPU the process's, less what it held before the model was loaded. Whatever
    loads libraries, such as a plan of the same step, comes before. Raises SettingsError where no batch is known.
    """
    task, trainer, device = experiment.task, experiment.trainer, experiment.trainer.accelerator().device
    if not isinstance(task, KnownShapes):
        raise SettingsError(f"task={task.name}: the shapes of its batches are not known without data")
    if quantization := getattr(experiment.model, "quantization", None):
        load_library(quantization)  # whose memory is not the model's
    before = 0 if device.type == "cuda" else PeakMemory(device).bytes()
    random = None in (getattr(experiment.model, "weights", ""), getattr(experiment.model, "pretrained", ""))
    with device if random and device.type == "cuda" else nullcontext():  # where a large model's take seconds to draw
        backbone = experiment.model.load()
    for tensor in [*backbone.module.parameters(), *backbone.module.buffers()]:
        tensor.data = tensor.data.clone()  # a mapped file would count whole, read or not
    experiment.adapt(backbone)
    model = experiment.bind(backbone).model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = experiment.optimizer.over([{"params": trained, "lr": 1e-6, "weight_decay": 0.0}])
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
    return peak.bytes() - before
