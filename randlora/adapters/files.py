"""An adapter on disk: a few small sealed files, and never a pickle.

``adapter.safetensors`` holds one flat float32 tensor per trained name (all sites one after the other, in their
order), so a file is the trained parameters and little else; fixed tensors that no seed gives again (an update's
persistent buffers, such as the factors of a decomposition) are kept beside them. ``adapter.json`` says how to build
the sites again: method, targets, seed, a SHA-256 of the sites and of each fixed basis, and a fingerprint of the frozen
weights (`randlora.adapters.fingerprint`). Bases are regenerated, not stored. ``head.safetensors`` has the tensors of
modules that were trained beside the updates, if any, and ``manifest.json`` the sizes and SHA-256 of all these files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from randlora.adapters.core import Adaptation, Report, adapt, adapted_layers, require_adaptation
from randlora.adapters.fingerprint import difference, fingerprint
from randlora.adapters.header import entry, header
from randlora.adapters.interface import Method, describe, method_from
from randlora.bases import Basis
from randlora.errors import SettingsError, check_choice
from randlora.integrity import DRAFT, MANIFEST, Damaged, remove_drafts, seal, sync, verify

FORMAT = 2  # 1 had neither manifest nor fingerprint, and is still read
TENSORS, SETTINGS, MODULES = "adapter.safetensors", "adapter.json", "head.safetensors"
_TYPES = {"method": dict, "targets": list, "seed": int, "sites": int, "sites_sha256": str}  # what both formats have


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
    adaptation, modules = require_adaptation(model), modules or {}
    if not all(basis.reproducible for basis in _bases(adaptation)):
        raise SettingsError("this adapter's bases came from a file and no seed gives them: write it with to_peft")
    settings = {
        "format": FORMAT,
        "method": describe(adaptation.method),
        "targets": adaptation.targets,
        "seed": adaptation.seed,
        "sites": len(adaptation.sites),
        "sites_sha256": _sites_sha256(adaptation),
        "bases_sha256": _bases_sha256(adaptation),
        "base": fingerprint(_frozen(model, adaptation, modules), whole),
        "modules": sorted(modules),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder)
    draft = folder / f"{DRAFT}adapter"
    draft.mkdir()
    try:
        files = {TENSORS: _pack(adaptation)} | ({MODULES: _state(modules)} if modules else {})
        for name, tensors in files.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, draft / name)
        (draft / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        seal(draft, (*files, SETTINGS))
        for name in (*files, SETTINGS, MANIFEST):
            (draft / name).replace(folder / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
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
    settings = _read(folder)
    with unchanged_on_failure(model):
        report = adapt(model, _method(settings, folder), settings["targets"], settings["seed"])
        adaptation = require_adaptation(model)
        _check_sites(adaptation, settings, folder)
        if base == "same" and "base" in settings:
            _check_frozen(_frozen(model, adaptation, modules or {}), settings["base"], folder)
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
    _read(folder)
    state = _state(modules)
    tensors = _tensors(folder / MODULES, state, "these modules need")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Whatever ends the code inside early, the model has its modules, parameters and `requires_grad` of before."""
    parts = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    adapted = {id(module) for module in model.modules() if "_adaptation" in module.__dict__}
    try:
        yield
    except BaseException:
        for module, children, parameters in parts:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
            if id(module) not in adapted:
                module.__dict__.pop("_adaptation", None)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise


def _read(folder: Path) -> dict[str, Any]:
    """The settings of an adapter whose files are as they were written."""
    try:
        if (folder / MANIFEST).exists():
            verify(folder, (TENSORS, SETTINGS))
        settings = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"no adapter can be read from {folder}: {error}") from error
    if not isinstance(settings, dict) or settings.get("format") not in (1, FORMAT):
        given = settings.get("format") if isinstance(settings, dict) else settings
        raise SettingsError(f"{folder / SETTINGS} has format {given!r}; this version reads 1 and {FORMAT}")
    for name, kind in _TYPES.items():
        if not isinstance(settings.get(name), kind):
            value = f"{name}={settings.get(name)!r:.60}"
            raise SettingsError(f"{folder / SETTINGS} has {value}, which is no {kind.__name__}")
    if settings["format"] == FORMAT and not (folder / MANIFEST).exists():
        raise Damaged(f"no adapter can be read from {folder}: {MANIFEST} is missing")
    if settings["format"] == 1:
        warnings.warn(
            f"the adapter in {folder} was written before adapters had checksums, so damage and another base model go "
            "unnoticed; save it again",
            stacklevel=3,
        )
    return settings


def _method(settings: Mapping[str, Any], folder: Path) -> Method:
    try:
        return method_from(settings["method"])
    except TypeError as error:
        raise SettingsError(f"{folder / SETTINGS}: the method cannot be built ({error})") from error


def _check_sites(adaptation: Adaptation, settings: Mapping[str, Any], folder: Path) -> None:
    if _sites_sha256(adaptation) != settings["sites_sha256"]:
        raise SettingsError(
            f"the adapter in {folder} was made for {settings['sites']} sites of other names or shapes "
            f"than the {len(adaptation.sites)} that its targets match in this model"
        )
    if _bases_sha256(adaptation) != settings.get("bases_sha256"):
        raise SettingsError(f"the bases drawn here differ from those that the adapter in {folder} was trained with")


def _check_frozen(tensors: Mapping[str, Tensor], recorded: Mapping[str, Any], folder: Path) -> None:
    """SettingsError unless the frozen weights are those of the fingerprint; a warning where none can be compared."""
    try:
        other = difference(recorded, tensors)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(f"{folder / SETTINGS} has a fingerprint that cannot be read: {error}") from error
    if other.changed or other.missing:
        example = f", such as {other.changed[0]}" if other.changed else ""
        raise SettingsError(
            f"the adapter in {folder} was trained on another model: of its {other.tensors} frozen tensors this one has "
            f"{len(other.changed)} with other values{example}, and lacks {other.missing}; load the weights that it was "
            "trained on, or give base='any'"
        )
    if other.tensors and not other.compared:
        warnings.warn(
            f"whether the adapter in {folder} was trained on this model cannot be told: its weights were of another "
            "precision, and names and shapes alone agree",
            stacklevel=3,
        )


def _frozen(model: nn.Module, adaptation: Adaptation, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights under the updates and beside them: all that is neither trained nor replaced by what is."""
    others = [p for module in (*adaptation.updates.values(), *modules.values()) for p in module.parameters()]
    for layer in adapted_layers(model).values():
        if all(update is not None and update.replaces_base for _, update in layer.segments()):
            others.append(layer.base.weight)  # type: ignore[arg-type]
    ignored = {id(parameter) for parameter in others}
    return {name: p for name, p in model.named_parameters() if not p.requires_grad and id(p) not in ignored}


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


def _sites_sha256(adaptation: Adaptation) -> str:
    text = json.dumps([[s.name, s.out_features, s.in_features] for s in adaptation.sites])
    return hashlib.sha256(text.encode()).hexdigest()


def _bases_sha256(adaptation: Adaptation) -> list[str]:
    return sorted(f"{basis.name} {basis.sha256()}" for basis in _bases(adaptation))


def _bases(adaptation: Adaptation) -> list[Basis]:
    """The fixed matrices, each once."""
    modules = [module for update in adaptation.updates.values() for module in update.modules()]
    return list({id(module): module for module in modules if isinstance(module, Basis)}.values())
