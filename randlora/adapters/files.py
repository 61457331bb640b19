"""An adapter on disk: two small files, and never a pickle.

``adapter.safetensors`` holds one flat float32 tensor per trained name (all sites one after the other, in their
order), so a file is the trained parameters and little else. ``adapter.json`` says how to build the sites again:
method, targets, seed, and a SHA-256 of the sites and of each fixed basis. Bases are regenerated, not stored.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from randlora.adapters.core import Adaptation, Report, adapt, require_adaptation, unload
from randlora.adapters.interface import describe, method_from
from randlora.bases import Basis
from randlora.errors import SettingsError

FORMAT = 1
TENSORS, SETTINGS = "adapter.safetensors", "adapter.json"


def save_adapter(model: nn.Module, folder: str | Path) -> int:
    """Writes the adapter of `model` into `folder` (made if missing); returns the bytes written.

    Raises SettingsError when the model is not adapted, or has bases from a file that no seed gives again.
    """
    adaptation = require_adaptation(model)
    if not all(basis.reproducible for basis in _bases(adaptation)):
        raise SettingsError("this adapter's bases came from a file and no seed gives them: write it with to_peft")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_pack(adaptation), folder / TENSORS)
    settings = {
        "format": FORMAT,
        "method": describe(adaptation.method),
        "targets": adaptation.targets,
        "seed": adaptation.seed,
        "sites": len(adaptation.sites),
        "sites_sha256": _sites_sha256(adaptation),
        "bases_sha256": _bases_sha256(adaptation),
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    return sum((folder / name).stat().st_size for name in (TENSORS, SETTINGS))


def load_adapter(model: nn.Module, folder: str | Path) -> Report:
    """Adapts `model` as the adapter in `folder` was, and gives it its trained parameters.

    Raises SettingsError when files are missing or damaged, when the model's sites are not those of the adapter,
    or when the bases drawn here are not those it was trained with.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingsError(f"no adapter can be read from {folder}: {error}") from error
    if settings.get("format") != FORMAT:
        raise SettingsError(f"{folder / SETTINGS} has format {settings.get('format')!r}; this version reads {FORMAT}")
    report = adapt(model, method_from(settings["method"]), settings["targets"], settings["seed"])
    try:
        _fill(require_adaptation(model), settings, tensors, folder)
    except SettingsError:
        unload(model)
        raise
    return report


def _fill(adaptation: Adaptation, settings: dict, tensors: dict[str, Tensor], folder: Path) -> None:
    if _sites_sha256(adaptation) != settings["sites_sha256"]:
        raise SettingsError(
            f"the adapter in {folder} was made for {settings['sites']} sites of other names or shapes "
            f"than the {len(adaptation.sites)} that its targets match in this model"
        )
    if _bases_sha256(adaptation) != settings["bases_sha256"]:
        raise SettingsError(f"the bases drawn here differ from those that the adapter in {folder} was trained with")
    _unpack(adaptation, tensors, folder)


def _groups(adaptation: Adaptation) -> dict[str, list[nn.Parameter]]:
    """Trained tensors by their name within an update, over all sites; unfrozen ones each by its own."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in adaptation.trained().items():
        groups.setdefault(name if name in adaptation.unfrozen else name.rpartition(":")[2], []).append(parameter)
    return groups


def _pack(adaptation: Adaptation) -> dict[str, Tensor]:
    return {
        name: torch.cat([p.detach().reshape(-1).cpu() for p in parameters])
        for name, parameters in _groups(adaptation).items()
    }


@torch.no_grad()
def _unpack(adaptation: Adaptation, tensors: dict[str, Tensor], folder: Path) -> None:
    groups = _groups(adaptation)
    sizes = {name: sum(p.numel() for p in parameters) for name, parameters in groups.items()}
    stored = {name: tensor.numel() for name, tensor in tensors.items()}
    if sizes != stored:
        raise SettingsError(f"{folder / TENSORS} holds {stored}, the method needs {sizes}")
    for name, parameters in groups.items():
        for parameter, values in zip(parameters, tensors[name].split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(values.view_as(parameter))


def _sites_sha256(adaptation: Adaptation) -> str:
    text = json.dumps([[s.name, s.out_features, s.in_features] for s in adaptation.sites])
    return hashlib.sha256(text.encode()).hexdigest()


def _bases_sha256(adaptation: Adaptation) -> list[str]:
    return sorted(f"{basis.name} {basis.sha256()}" for basis in _bases(adaptation))


def _bases(adaptation: Adaptation) -> list[Basis]:
    """The fixed matrices, each once."""
    modules = [module for update in adaptation.updates.values() for module in update.modules()]
    return list({id(module): module for module in modules if isinstance(module, Basis)}.values())
