"""What adapter.json says: how the sites are built again, and what tells the model that the adapter was trained on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from randlora.adapters.core import Adaptation, adapted_layers, require_adaptation
from randlora.adapters.fingerprint import difference, fingerprint
from randlora.adapters.interface import Method, describe, method_from
from randlora.adapters.ties import shared
from randlora.bases import Basis
from randlora.errors import SettingsError
from randlora.integrity import MANIFEST, Damaged, verify

FORMAT = 2  # 1 had neither manifest nor fingerprint, and is still read
TENSORS, SETTINGS, MODULES = "adapter.safetensors", "adapter.json", "head.safetensors"
_TYPES = {"method": dict, "targets": list, "seed": int, "sites": int, "sites_sha256": str}  # what both formats have


def description(model: nn.Module, modules: Mapping[str, nn.Module], whole: bool) -> dict[str, Any]:
    """What adapter.json says of an adapted model and the modules trained beside; see `randlora.save_adapter`.

    SettingsError where a basis came from a file that no seed gives again.
    """
    adaptation = require_adaptation(model)
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
        "base": fingerprint(frozen(model, adaptation, modules), whole),
        "modules": sorted(modules),
    }
    if modules:
        settings["tied"] = sorted(name for name, module in modules.items() if shared(model, module))
    if adaptation.added:
        settings["unfrozen"] = adaptation.added
    return settings


def read_settings(folder: Path) -> dict[str, Any]:
    """What adapter.json says of an adapter whose files are as they were written; SettingsError names what is not."""
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


def method_of(settings: Mapping[str, Any], folder: Path) -> Method:
    """The method that built the adapter in `folder`; SettingsError where it cannot be built."""
    try:
        return method_from(settings["method"])
    except TypeError as error:
        raise SettingsError(f"{folder / SETTINGS}: the method cannot be built ({error})") from error


def check_sites(adaptation: Adaptation, settings: Mapping[str, Any], folder: Path) -> None:
    """SettingsError unless the sites and the bases are those of the adapter in `folder`."""
    if _sites_sha256(adaptation) != settings["sites_sha256"]:
        raise SettingsError(
            f"the adapter in {folder} was made for {settings['sites']} sites of other names or shapes "
            f"than the {len(adaptation.sites)} that its targets match in this model"
        )
    if _bases_sha256(adaptation) != settings.get("bases_sha256"):
        raise SettingsError(f"the bases drawn here differ from those that the adapter in {folder} was trained with")


def check_frozen(tensors: Mapping[str, Tensor], recorded: Mapping[str, Any], folder: Path) -> None:
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


def frozen(model: nn.Module, adaptation: Adaptation, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights under the updates and beside them: all that is neither trained nor replaced by what is."""
    others = [p for module in (*adaptation.updates.values(), *modules.values()) for p in module.parameters()]
    for layer in adapted_layers(model).values():
        if all(update is not None and update.replaces_base for _, update in layer.segments()):
            others.append(layer.base.weight)  # type: ignore[arg-type]
    ignored = {id(parameter) for parameter in others}
    return {name: p for name, p in model.named_parameters() if not p.requires_grad and id(p) not in ignored}


def _sites_sha256(adaptation: Adaptation) -> str:
    text = json.dumps([[s.name, s.out_features, s.in_features] for s in adaptation.sites])
    return hashlib.sha256(text.encode()).hexdigest()


def _bases_sha256(adaptation: Adaptation) -> list[str]:
    return sorted(f"{basis.name} {basis.sha256()}" for basis in _bases(adaptation))


def _bases(adaptation: Adaptation) -> list[Basis]:
    """The fixed matrices, each once."""
    modules = [module for update in adaptation.updates.values() for module in update.modules()]
    return list({id(module): module for module in modules if isinstance(module, Basis)}.values())
