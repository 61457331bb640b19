"""How much memory a training step takes, found without taking it: the step is run on tensors that have only a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from randlora.adapters import adapt
from randlora.adapters.quantization import quantised_maps, stored_bytes

if TYPE_CHECKING:
    from randlora.models import Model
    from randlora.run import Experiment


def memory_plan(experiment: Experiment) -> dict[str, int]:
    """Bytes on one process, by what they hold, and their sum.

    * `weights`: the model with its head, its updates and the fixed bases.
    * `optimizer`: a gradient and AdamW's two moments for every trained number, float32.
    * `activations`: what a micro-batch of the longest examples keeps for backward; with gradient checkpointing, of one
      block at a time and the blocks' inputs.
    * `working`: twice the largest tensor of these, for what backward makes before it lets go.

    What the allocator and the libraries hold beside this is not in it: some hundred megabytes.
    """
    model, kept = _shapes(experiment, experiment.model)
    held = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    activations = sum(kept)
    if experiment.model.gradient_checkpointing:
        _, everything = _shapes(experiment, replace(experiment.model, gradient_checkpointing=False))
        blocks = max(len(module) for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential))
        activations += (sum(everything) - activations) // blocks
    weights = sum(tensor.numel() * tensor.element_size() for tensor in held)
    quantization = getattr(experiment.model, "quantization", None)
    if quantization:
        for linear in (one for one in quantised_maps(model).values() if not one.weight.requires_grad):
            weights -= linear.weight.numel() * linear.weight.element_size() - stored_bytes(linear, quantization)
    plan = {
        "weights": weights,
        "optimizer": 12 * trained,
        "activations": activations,
        "working": 2 * max(kept, default=0),
    }
    return plan | {"total": sum(plan.values())}


def _shapes(experiment: Experiment, description: Model) -> tuple[nn.Module, list[int]]:
    """The adapted model, without numbers, and the bytes of every storage that its loss keeps for backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    trainer = experiment.trainer
    size = min(trainer.micro_batch_size or trainer.batch_size, trainer.batch_size)
    task, backbone = experiment.task.planned(size), description.meta_model()
    adapt(backbone.module, experiment.method, experiment.patterns, experiment.config["seed"])
    model = task.bind(backbone).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _leave_meta(model)
        batch = task.sample(backbone, size)
        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.precision == "bf16"):
            return model, saved(model, lambda: task.loss(model, batch))


def _leave_meta(model: nn.Module) -> None:
    """Onto the CPU, without numbers; a matrix that two modules share stays one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    model.to_empty(device="cpu")
    for first, *others in names.values():
        for other in others:
            module, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(first))


def saved(model: nn.Module, run: Callable[[], Any]) -> list[int]:
    """The bytes of every storage that `run` keeps for backward, without the model's own."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return [size for size, _ in kept.values()]
