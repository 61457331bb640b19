"""What a run would do: what it trains, for how long, and in how much memory; without weights, data or hub."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from randlora.adapters.quantization import quantised_maps, stored_bytes
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.models import Model
from randlora.peft import export_warning
from randlora.tasks.mixins import KnownShapes
from randlora.training.precision import autocast


def dry_run(experiment: Experiment) -> dict[str, Any]:
    """`counts`, `lengths`, `memory` by `memory_plan`, and the method's `remark` where it has one."""
    remark = experiment.method.remark
    plan = counts(experiment) | lengths(experiment) | {"memory": memory_plan(experiment)}
    return plan if remark is None else plan | {"remark": remark}


def counts(experiment: Experiment) -> dict[str, Any]:
    """The sites and the parameters of a run, found on the meta device.

    `adapter_bytes` is the tensors' alone; the files have some 2 kB more, and 6 bytes for each frozen tensor. `export`
    is there where the adapter cannot be exported to PEFT, though PEFT has the method.
    """
    backbone = experiment.model.meta_model()
    report = replace(experiment, method=experiment.method.grown()).adapt(backbone)
    head = sum(parameter.numel() for parameter in experiment.bind(backbone).head_parameters().values())
    return {
        "sites": [vars(site) for site in report.sites],
        "trainable_parameters": report.trainable_parameters,
        "head_parameters": head,
        "total_parameters": report.total_parameters + head,
        "adapter_bytes": 4 * report.saved_parameters,
    } | ({"export": warning} if (warning := export_warning(backbone.module)) else {})


def check_memory(experiment: Experiment, device: torch.device) -> None:
    """Raises SettingsError where the model, its updates and what the optimiser keeps are more than the device's memory.

    Only for methods with a size above 1,024: others are small beside their model, and are spared the time to build it.
    """
    if all(size <= 1024 for size in vars(experiment.method).values() if isinstance(size, int)):
        return
    backbone = experiment.model.meta_model()
    experiment.adapt(backbone)
    model = experiment.bind(backbone).model
    held = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    needed = sum(tensor.nbytes for tensor in held) + sum(4 * parameter.numel() for parameter in trained)
    needed += experiment.optimizer.state_bytes(trained)
    cuda = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total
    if needed > there:
        raise SettingsError(
            f"{experiment.method}: needs {needed / 2**30:,.0f} GiB for {sum(p.numel() for p in trained):,} trained "
            f"parameters and what they stand on, and there are {there / 2**30:,.0f} GiB; lower its sizes"
        )


def lengths(experiment: Experiment) -> dict[str, float]:
    """How long a run is, from the published size of its training set: optimiser steps, and passes over the set."""
    size = experiment.task.training_size(experiment.budget)
    steps = experiment.trainer.steps(size)
    return {"steps": steps, "epochs": round(steps * experiment.trainer.batch_size / size, 2)}


def table(plan: Mapping[str, Any]) -> str:
    """A dry run as text: the sites, those of all blocks on one line, then the totals."""
    alike = Counter(
        (re.sub(r"\d+", "*", site["name"]), site["out_features"], site["in_features"], site["trainable_parameters"])
        for site in plan["sites"]
    )
    width = max(len(name) for name, *_ in alike)
    lines = [f"{'site':{width}}  count  out × in         trained, each"]
    for (name, rows, columns, trained), count in alike.items():
        lines.append(f"{name:{width}}  {count:5}  {f'{rows} × {columns}':15}  {trained:13,}")
    trained, total = plan["trainable_parameters"], plan["total_parameters"]
    lines += [
        f"trained {trained:,} of {total:,} parameters ({100 * trained / total:.3g} %), "
        f"{plan['head_parameters']:,} in the head",
        f"adapter {plan['adapter_bytes']:,} bytes; {plan['steps']:,} steps, {plan['epochs']:,} times the training set",
    ]
    if plan["memory"]:
        shares = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan["memory"].items() if name != "total")
        lines.append(f"memory of a step {plan['memory']['total'] / 2**30:.2f} GiB: {shares}")
    lines += [plan[name] for name in ("remark", "export") if name in plan]
    return "\n".join(lines)


def memory_plan(experiment: Experiment) -> dict[str, int] | None:
    """Bytes of a training step on one process, by what they hold, and their sum; None where no shapes are known.

    The step is run on tensors that have only a shape.

    * `weights`: the model with its head, its updates and the fixed bases.
    * `optimizer`: a gradient of every trained parameter, float32, and what the optimiser keeps beside it.
    * `activations`: what a micro-batch of the longest examples keeps for backward; with gradient checkpointing, of one
      block at a time and the blocks' inputs.
    * `working`: twice the largest tensor of these, for what backward makes before it lets go.

    What the allocator and the libraries hold beside this is not in it: some hundred megabytes.
    """
    if not isinstance(experiment.task, KnownShapes):
        return None
    model, kept = _shapes(experiment, experiment.model)
    held = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    activations = sum(kept)
    if experiment.model.gradient_checkpointing:
        _, everything = _shapes(experiment, replace(experiment.model, gradient_checkpointing=False))
        blocks = max(len(module) for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential))
        activations += (sum(everything) - activations) // blocks
    weights = sum(tensor.numel() * tensor.element_size() for tensor in held)
    quantization = getattr(experiment.model, "quantization", None)
    if quantization:
        for linear in (linear for linear in quantised_maps(model).values() if not linear.weight.requires_grad):
            weights -= linear.weight.numel() * linear.weight.element_size() - stored_bytes(linear, quantization)
    plan = {
        "weights": weights,
        "optimizer": 4 * sum(parameter.numel() for parameter in trained) + experiment.optimizer.state_bytes(trained),
        "activations": activations,
        "working": 2 * max(kept, default=0),
    }
    return plan | {"total": sum(plan.values())}


def _shapes(experiment: Experiment, description: Model) -> tuple[nn.Module, list[int]]:
    """The adapted model, without values, and the bytes of every storage that its loss keeps for backward."""
    with step_without_values(replace(experiment, model=description)) as (model, loss):
        return model, saved(model, loss)


@contextmanager
def step_without_values(experiment: Experiment) -> Iterator[tuple[nn.Module, Callable[[], Tensor]]]:
    """The adapted model and the loss of a micro-batch of the longest examples, on tensors that have only a shape."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    trainer, task = experiment.trainer, experiment.task
    assert isinstance(task, KnownShapes)
    planned = replace(experiment, task=task.planned(trainer.micro), method=experiment.method.grown())
    backbone = experiment.model.meta_model()
    planned.adapt(backbone)
    model = planned.bind(backbone).model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _leave_meta(model)
        batch = task.sample(backbone, trainer.micro)
        with autocast("cpu", trainer.precision):
            yield model, lambda: planned.task.loss(model, batch)


def _leave_meta(model: nn.Module) -> None:
    """Onto the CPU, without values; a matrix that two modules share stays one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for part in model.modules():  # each once: a second time fails for one that several updates share
        part.to_empty(device="cpu", recurse=False)
    for first, *others in names.values():
        for other in others:
            module, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(first))


def saved(model: nn.Module, run: Callable[[], object], inputs: Iterable[Tensor] = ()) -> list[int]:
    """The bytes of every storage that `run` keeps for backward, without the model's own and those of `inputs`."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers(), *inputs]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return [size for size, _ in kept.values()]
