"""Checkpoints: tensors trained or not to be had again, and the optimiser's, in safetensors, with a JSON of the step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, STATE = "tensors.safetensors", "state.json"


def save(folder: Path, state: dict[str, float], kept: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Path:
    """Writes ``folder/step_N`` for state["step"] = N and removes older ones. It appears whole or not at all."""
    step = int(state["step"])
    final, draft = folder / f"step_{step:07d}", folder / f".draft_{step:07d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {f"trained/{name}": tensor.detach() for name, tensor in kept.items()}
    for name, tensor in kept.items():
        for key, value in optimizer.state.get(tensor, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, draft / TENSORS)
    (draft / STATE).write_text(json.dumps(state))
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    for other in folder.glob("step_*"):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = [path for path in folder.glob("step_*") if (path / STATE).is_file()]
    return max(complete, default=None)


def names(path: Path) -> list[str]:
    """Of the tensors that a checkpoint holds, without the optimiser's."""
    with safe_open(path / TENSORS, "pt") as file:
        return [entry.partition("/")[2] for entry in file.keys() if entry.startswith("trained/")]  # noqa: SIM118


@torch.no_grad()
def restore(path: Path, kept: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Fills the tensors and the optimiser from a checkpoint; returns the state that was saved."""
    tensors = load_file(path / TENSORS)
    for name, tensor in kept.items():
        tensor.copy_(tensors.pop(f"trained/{name}"))
    for entry, value in tensors.items():
        _, key, name = entry.split("/", 2)
        device = "cpu" if key == "step" else kept[name].device
        optimizer.state[kept[name]][key] = value.to(device)
    return json.loads((path / STATE).read_text())
