"""Checkpoints: tensors trained or not to be had again, and the optimiser's, in safetensors, with a JSON of the step.

A checkpoint is a folder ``step_N``, sealed by a manifest (`randlora.integrity`), which appears whole or not at all:
it is written and synced under another name, and renamed last. It is read only if every byte is as it was written, and
if it is of the training that asks for it: the same settings, and tensors of the same names, shapes and dtypes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from randlora.adapters.tensor_files import Entry, entry, header, write_tensors
from randlora.errors import SettingsError
from randlora.integrity import DRAFT, Damaged, draft_folder, remove_drafts, seal, sync, verify
from randlora.training.best_step import BestStep

FORMAT = 2  # 1 had no manifest and is not read
TENSORS, STATE = "tensors.safetensors", "state.json"
OF_MODEL, OF_OPTIMIZER, OF_BEST = "trained/", "optimizer/", "best/"  # what the names of tensors begin with


@dataclass(frozen=True)
class State:
    """How far a training is.

    Args:
        step: Steps done.
        train_seconds: What they took, without evaluation and checkpoints.
        best: The best step so far; None where the last one is selected.
        scored: False where a signal came while the step was validated: that is then done first.
        log: What was logged until then, in lines: the log's file may be damaged, or have more.
    """

    step: int = 0
    train_seconds: float = 0.0
    best: BestStep | None = None
    scored: bool = True
    log: Sequence[str] = ()


class Tensors(NamedTuple):
    """What a checkpoint is of.

    Args:
        kept: Every tensor to keep beside the optimiser's, by name.
        optimizer: Over those of them that are trained.
    """

    kept: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: Where they are.
        settings: What makes it this training and no other, as plain data; a checkpoint of other settings is not read.
        keep_last: How many stay.
    """

    folder: Path
    settings: Mapping[str, Any]
    keep_last: int

    def save(self, state: State, model: Tensors) -> Path:
        """Writes ``folder/step_N``, then removes those beyond the newest `keep_last`, and any of later steps.

        Later ones were passed over when this training was resumed. OSError when the disk is full; the older
        checkpoints are then as they were.
        """
        final = self.folder / f"step_{state.step:07d}"
        self.folder.mkdir(exist_ok=True)  # without parents: a run folder that has vanished does not come back empty
        tensors = {OF_MODEL + name: tensor for name, tensor in model.kept.items()}
        for name, tensor in model.kept.items():
            for key, value in model.optimizer.state.get(tensor, {}).items():
                tensors[f"{OF_OPTIMIZER}{key}/{name}"] = torch.as_tensor(value)
        best = state.best
        tensors |= {OF_BEST + name: tensor for name, tensor in (best.parameters if best else {}).items()}
        content = {
            "format": FORMAT,
            "step": state.step,
            "train_seconds": state.train_seconds,
            "best": {"step": best.step, "loss": best.loss} if best else None,
            "scored": state.scored,
            "log": list(state.log),
            "tensors": len(tensors),
            "settings": self.settings,
        }
        with draft_folder(self.folder, final.name) as unseen:
            write_tensors(unseen / TENSORS, tensors)
            (unseen / STATE).write_text(json.dumps(content))
            seal(unseen, (TENSORS, STATE))
            _discard(final)
            unseen.rename(final)
        sync(self.folder)
        newest_first = _newest_first(self.folder)
        for path in {*newest_first} - {*newest_first[newest_first.index(final) :][: self.keep_last]}:
            _discard(path)
        return final

    def resume(
        self, model: Callable[[Collection[str]], Tensors], say: Callable[[str], None], strict: bool = False
    ) -> State:
        """Fills the tensors and the optimiser from the newest valid checkpoint; returns its state.

        What a killed process has left half-written is removed.

        Args:
            model: Gives the tensors to fill, for the names of those that a checkpoint has: some grow in a training.
                For no names it makes them those of the start again.
            say: Told of every checkpoint that is passed over, and why.
            strict: Whether to stop where there are checkpoints and none is valid, instead of starting again.

        Returns:
            The state of the checkpoint; that of the start where none is valid, with nothing filled.

        Raises:
            SettingsError: as `strict` says.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_drafts(self.folder)
        reasons = []
        for path in _newest_first(self.folder):
            try:
                return self._restore(path, model)
            except Damaged as error:
                reasons.append(str(error))
                say(f"passing over a checkpoint: {error}")
        if reasons:
            model(())  # one that was passed over may have been of more tensors
        if reasons and strict:
            raise SettingsError(
                f"resume=strict: none of the {len(reasons)} checkpoints in {self.folder} can be gone on from "
                f"({reasons[0]}); put back a copy, or use resume=true to start again"
            )
        if reasons:
            say("no checkpoint can be gone on from: starting again at step 0")
        return State()

    def _restore(self, path: Path, model: Callable[[Collection[str]], Tensors]) -> State:
        """All of a checkpoint, or Damaged and nothing filled."""
        content = self._content(path)
        stored = header(path / TENSORS)
        kept, optimizer = model([name.removeprefix(OF_MODEL) for name in stored if name.startswith(OF_MODEL)])
        _check(path / TENSORS, stored, kept, content["tensors"])
        tensors = load_file(path / TENSORS)
        states: dict[str, dict[str, Tensor]] = {name: {} for name in kept}
        for name, value in tensors.items():
            if name.startswith(OF_OPTIMIZER):
                _, key, parameter = name.split("/", 2)
                states[parameter][key] = value.to("cpu" if key == "step" else kept[parameter].device)
        with torch.no_grad():
            for name, tensor in kept.items():
                tensor.copy_(tensors[OF_MODEL + name])
                if states[name]:
                    optimizer.state[tensor] = states[name]
        best = content["best"]
        parameters = {name.removeprefix(OF_BEST): tensors[name] for name in tensors if name.startswith(OF_BEST)}
        step = BestStep(best["step"], best["loss"], parameters) if best else None
        return State(content["step"], content["train_seconds"], step, content["scored"], content["log"])

    def _content(self, path: Path) -> dict[str, Any]:
        """What state.json says; Damaged unless the folder is as it was written, by this training and at this step."""
        verify(path, (TENSORS, STATE))
        content = json.loads((path / STATE).read_text())
        if content.get("format") != FORMAT:
            raise Damaged(f"{path} has format {content.get('format')!r}; this version reads {FORMAT}")
        if content["step"] != int(path.name.removeprefix("step_")):
            raise Damaged(f"{path} is not the checkpoint of its name: {STATE} is of step {content['step']}")
        now, then = _flat(json.loads(json.dumps(self.settings))), _flat(content["settings"])
        for name in sorted({*now, *then}):
            if now.get(name) != then.get(name):
                raise Damaged(f"{path} was written with {name}={then.get(name)!r}, and this is {now.get(name)!r}")
        return content


def _check(path: Path, stored: Mapping[str, Entry], kept: Mapping[str, Tensor], count: int) -> None:
    """Damaged unless a header has all tensors of the model, as they should be, and of others those that belong."""
    for name, tensor in kept.items():
        if OF_MODEL + name not in stored:
            raise Damaged(f"{path} lacks {OF_MODEL}{name}")
        if stored[OF_MODEL + name] != entry(tensor):
            raise Damaged(f"{path} has {name} as {stored[OF_MODEL + name]}, and this model has it as {entry(tensor)}")
    for name in stored.keys() - {OF_MODEL + name for name in kept}:
        if not name.startswith(OF_BEST) and (not name.startswith(OF_OPTIMIZER) or name.split("/", 2)[2] not in kept):
            raise Damaged(f"{path} has {name}, and this model has no such tensor")
    if len(stored) != count:
        raise Damaged(f"{path} has {len(stored)} tensors, and {count} were written")


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written, or None."""
    for path in _newest_first(folder):
        try:
            verify(path, (TENSORS, STATE))
        except Damaged:
            continue
        return path
    return None


def _newest_first(folder: Path) -> list[Path]:
    steps = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def _discard(path: Path) -> None:
    """Removes a checkpoint, which is never seen half-removed."""
    if path.exists():
        doomed = path.with_name(f"{DRAFT}old_{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _flat(settings: object, path: str = "") -> dict[str, object]:
    """Plain data as one mapping from dotted names."""
    if not isinstance(settings, Mapping):
        return {path: settings}
    parts = [_flat(part, f"{path}.{key}".strip(".")) for key, part in settings.items()]
    return {name: leaf for part in parts for name, leaf in part.items()}
