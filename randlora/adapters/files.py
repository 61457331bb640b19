"""An adapter on disk: a few small sealed files, and never a pickle.

``adapter.safetensors`` holds one flat float32 tensor per trained name (all sites one after the other, in their
order), so a file is the trained parameters and little else; fixed tensors that no seed gives again (an update's
persistent buffers, such as the factors of a decomposition) are kept beside them. ``adapter.json`` says how to build
the sites again: method, targets, seed, a SHA-256 of the sites and of each fixed basis, and a fingerprint of the frozen
weights (`randlora.adapters.fingerprint`). Bases are regenerated, not stored. ``head.safetensors`` has the tensors of
modules that were trained beside the updates, if any, and ``manifest.json`` the sizes and SHA-256 of all these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from randlora.adapters.core import Adaptation, Report, adapt, require_adaptation, train_beside
from randlora.adapters.identity import (
    MODULES,
    SETTINGS,
    TENSORS,
    check_frozen,
    check_sites,
    description,
    frozen,
    method_of,
    read_settings,
)
from randlora.adapters.tensor_files import entry, header, write_tensors
from randlora.adapters.ties import separate, shared
from randlora.adapters.transaction import unchanged_on_failure
from randlora.errors import SettingsError, check_choice
from randlora.integrity import MANIFEST, Damaged, draft_folder, remove_drafts, seal, sync


def save_adapter(
    model: nn.Module, folder: str | Path, modules: Mapping[str, nn.Module] | None = None, whole: bool = False
) -> int:
    """Writes the adapter of `model` into `folder` (made if missing).

    Args:
        model: An adapted model.
        folder: An adapter in it is replaced; until all of the new one is on the disk it stays.
        modules: What was trained beside the updates, such as ``{"head": head}``, by a name of your own or by the
            module's name in `model`, under which `load_adapter` then looks for it.
        whole: Whether the fingerprint of the frozen weights is made of all values, and not of some of each tensor.

    Returns:
        The bytes written, without those of `modules`.

    Raises:
        SettingsError: The model is not adapted, or has bases from a file that no seed gives again.
    """
    modules, folder = modules or {}, Path(folder)
    settings = description(model, modules, whole)
    folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder)
    with draft_folder(folder, "adapter") as unseen:
        files = {TENSORS: _pack(require_adaptation(model))} | ({MODULES: _state(modules)} if modules else {})
        for name, tensors in files.items():
            write_tensors(unseen / name, tensors)
        (unseen / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        seal(unseen, (*files, SETTINGS))
        for name in (*files, SETTINGS, MANIFEST):
            (unseen / name).replace(folder / name)
    if not modules:
        (folder / MODULES).unlink(missing_ok=True)
    sync(folder)
    return sum((folder / name).stat().st_size for name in (TENSORS, SETTINGS, MANIFEST))


def load_adapter(
    model: nn.Module, folder: str | Path, base: str = "same", modules: Mapping[str, nn.Module] | None = None
) -> Report:
    """Adapts `model` as the adapter in `folder` was, and gives it its trained parameters.

    Args:
        model: With the weights that the adapter was trained on.
        folder: Of the adapter. One that was written before adapters had checksums is read with a warning.
        base: ``same`` refuses a model whose frozen weights are not those of then; ``any`` takes it.
        modules: What gets the tensors of the modules that were saved too, by name; None for the model's own of these
            names, and an empty mapping for none now (see `load_modules`).

    Raises:
        SettingsError: Files are missing or damaged, hold what is not finite or of other shapes or dtypes than the
            method's, or are of another model: of other sites, bases or frozen weights. The model is then as it was.
    """
    folder = Path(folder)
    check_choice("base", base, ("same", "any"))
    settings = read_settings(folder)
    with unchanged_on_failure(model):
        _untie(model, settings, modules, folder)
        beside = _beside(model, settings, folder)
        report = adapt(model, method_of(settings, folder), settings["targets"], settings["seed"])
        report = train_beside(model, beside, report)
        adaptation = require_adaptation(model)
        check_sites(adaptation, settings, folder)
        if base == "same" and "base" in settings:
            check_frozen(frozen(model, adaptation, modules or {}), settings["base"], folder)
        groups = _groups(adaptation)
        expected = {
            name: torch.empty(sum(p.numel() for p in parameters), dtype=_stored(parameters), device="meta")
            for name, parameters in groups.items()
        }
        packed = _tensors(folder / TENSORS, expected, "the method needs")
        if modules is None:
            modules = {name: _submodule(model, name, folder) for name in settings.get("modules", [])}
        if modules:
            load_modules(folder, modules)
        with torch.no_grad():
            for name, parameters in groups.items():
                values = packed[name].split([p.numel() for p in parameters])
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.copy_(value.view_as(parameter))
    return report


def load_modules(folder: str | Path, modules: Mapping[str, nn.Module]) -> None:
    """Gives modules the tensors that `save_adapter` wrote of them.

    Raises SettingsError unless the file is whole and has just the tensors of these; they are then as they were.
    """
    folder = Path(folder)
    read_settings(folder)
    state = _state(modules)
    tensors = _tensors(folder / MODULES, state, "these modules need")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])


def _tensors(path: Path, expected: Mapping[str, Tensor], needs: str) -> dict[str, Tensor]:
    """The tensors of a file, read only if its header has just those expected; SettingsError unless all are finite."""
    try:
        stored = header(path)
    except Damaged as error:
        raise SettingsError(f"no adapter can be read from {path.parent}: {error}") from error
    needed = {name: entry(tensor) for name, tensor in expected.items()}
    if stored != needed:
        wrong = min(name for name in {*stored, *needed} if stored.get(name) != needed.get(name))
        raise SettingsError(f"{path} has {wrong} as {stored.get(wrong)}, and {needs} {needed.get(wrong)}")
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SettingsError(f"{path} has {name} with values that are not finite")
    return tensors


def _state(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every tensor of modules by its name in the file."""
    states = {name: module.state_dict(keep_vars=True) for name, module in modules.items()}
    return {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()}


def _untie(
    model: nn.Module, settings: Mapping[str, Any], modules: Mapping[str, nn.Module] | None, folder: Path
) -> None:
    """Modules that had parameters of their own in the training get some where `model` has them tied; not vice versa."""
    if "tied" not in settings:  # of files without it nothing is known, and of those without modules nothing is needed
        return
    for name in settings["modules"] if modules is None else modules:
        module = _submodule(model, name, folder) if modules is None else modules[name]
        if name not in settings["tied"]:
            if shared(model, module):
                separate(model, module)
        elif not shared(model, module):
            raise SettingsError(
                f"the adapter in {folder} was trained with {name} tied to another module of its model, and in this "
                "model it is not: load a model that ties them"
            )


def _beside(model: nn.Module, settings: Mapping[str, Any], folder: Path) -> dict[str, nn.Parameter]:
    """What was trained as it is beside what the method trains."""
    own, names = dict(model.named_parameters(remove_duplicate=False)), settings.get("unfrozen", [])
    if missing := [name for name in names if name not in own]:
        raise SettingsError(
            f"the adapter in {folder} was trained with {missing[0]}, and this model has none of that name"
        )
    return {name: own[name] for name in names}


def _submodule(model: nn.Module, name: str, folder: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise SettingsError(
            f"the adapter in {folder} has the module {name} too, and this model has none of that name: give it as "
            f"modules={{{name!r}: …}}, or modules={{}} to leave it"
        ) from error


def _groups(adaptation: Adaptation) -> dict[str, list[Tensor]]:
    """Saved tensors by their name within an update, over all sites; unfrozen ones each by its own."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in adaptation.saved().items():
        groups.setdefault(name if name in adaptation.unfrozen else name.rpartition(":")[2], []).append(parameter)
    return groups


def _pack(adaptation: Adaptation) -> dict[str, Tensor]:
    return {
        name: torch.cat([p.detach().reshape(-1).cpu() for p in parameters]).to(_stored(parameters))
        for name, parameters in _groups(adaptation).items()
    }


def _stored(parameters: Sequence[Tensor]) -> torch.dtype:
    """The dtype in the file: float32 for floats of less, so that a model cast to bfloat16 gives a file like others."""
    dtype = parameters[0].dtype
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
