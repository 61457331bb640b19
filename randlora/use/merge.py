"""A finished run as a plain checkpoint of transformers, open_clip or timm, and as an adapter of PEFT."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

import randlora
from randlora.errors import SettingsError
from randlora.peft import refusal
from randlora.tasks.mixins import Classifies
from randlora.use.trained import Trained

HEAD = "head.safetensors"


def merge(trained: Trained, folder: Path) -> str:
    """Writes the model with its updates in its weights, as the library that made it reads it.

    A head is in the checkpoint where that library has the same classifier; otherwise its tensors are in HEAD.

    Args:
        trained: Its module is plain afterwards.
        folder: Where to; made, and refused unless empty.

    Returns:
        A sentence on what has been written.

    Raises:
        SettingsError: For a folder that holds something, and for a model that only this library knows.
    """
    new_folder(folder)
    task, head = trained.experiment.task, trained.bound.head
    names = task.names() if isinstance(task, Classifies) and task.classifies and head is not None else []
    randlora.merge(trained.backbone.module)
    if trained.experiment.model.save(trained.backbone, folder, head, names):
        return f"{folder}: a plain checkpoint" + ("" if head is None else " with its head")
    assert head is not None
    save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, folder / HEAD)
    return f"{folder}: a plain checkpoint without a head, which no class of its library has, and the head in {HEAD}"


def export(trained: Trained, folder: Path) -> str:
    """Writes the updates in PEFT's format, and a head in HEAD; a sentence on it. SettingsError as `to_peft`."""
    if reason := refusal(trained.backbone.module):
        raise SettingsError(reason)  # before a folder is made
    new_folder(folder)
    randlora.to_peft(trained.backbone.module, folder)
    if trained.bound.head is None:
        return f"{folder}: an adapter for PEFT"
    state = trained.bound.head.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / HEAD)
    return f"{folder}: an adapter for PEFT, and the head in {HEAD}, which PEFT does not read"


def new_folder(folder: Path) -> None:
    """Makes it; SettingsError where something is there."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SettingsError(f"--into {folder}: something is there; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--into {folder}: {error.strerror}; name a folder that can be written") from error
