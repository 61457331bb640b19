"""Reads PEFT's files onto a model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from randlora.adapters.core import Adaptation, Report, adapt, require_adaptation, train_beside
from randlora.adapters.interface import Method
from randlora.adapters.ties import replace_parameters, separate
from randlora.adapters.transaction import unchanged_on_failure
from randlora.bases import DenseBasis
from randlora.bases.peft import columns_by_basis
from randlora.errors import SettingsError
from randlora.methods.dora import DoRA
from randlora.methods.lora import LoRA
from randlora.methods.randlora import RandLoRA
from randlora.methods.ranked_lora import RankedDoRA, RankedLoRA
from randlora.methods.vera import VeRA
from randlora.peft.biases import ALL, NONE, ONLY, biases
from randlora.peft.layout import CONFIG, PICKLE, PREFIX, SHARED, TENSORS
from randlora.peft.options import NOT_GIVEN, READ, REFUSED, STARTS, UNKNOWN, WITHOUT_EFFECT

_PATTERNS = ("rank_pattern", "alpha_pattern")  # a LoRA's: the ranks and alphas of the sites that are not as the others
# PEFT's names of the tensors of a site, and ours.
_TRAINED = {
    "lora_A": "A", "lora_B": "B", "vera_lambda_b": "b", "vera_lambda_d": "d", "randlora_lambda": "lambda_",
    "randlora_gamma": "gamma", "lora_magnitude_vector": "magnitude",
}  # fmt: skip
_WRAPPED = ("modules_to_save.", "original_module.")
_REPEATED = ("randlora_A", "randlora_B")  # PEFT repeats the bases at every site


def from_peft(model: nn.Module, folder: str | Path) -> Report:
    """Adapts `model` with the adapter that PEFT saved in `folder`.

    Adapters saved without their bases get the ones that PEFT would draw; others keep theirs, and if those cannot be
    drawn again, `save_adapter` refuses and `to_peft` writes them. A LoRA with rank_pattern or alpha_pattern becomes a
    `RankedLoRA`, a DoRA a `RankedDoRA`. The modules of modules_to_save take the tensors that PEFT saved of them, in
    parameters of their own (a head that was tied to the embeddings is not, then), and are trained; give them to
    `save_adapter` as its `modules`. Biases that PEFT has trained are read and trained, too, and `save_adapter` keeps
    them by itself. Trained further, the adapter follows the path that it would have in PEFT.

    Raises:
        SettingsError: for pickles, unknown types and settings, and for modules that the model does not have; the model
            is then as it was.
    """
    folder = Path(folder)
    settings, tensors = _read(folder)
    method, seed = _method(settings, folder), int(settings.get("projection_prng_key") or 0)
    modules = _modules(model, settings, tensors, folder)
    given = _take_biases(settings, tensors)
    _take_frozen(model, tensors, folder)
    by_site = _by_site(tensors, folder)
    _refuse_attention(model, by_site, folder)
    known = biases(model, settings.get("bias") or NONE, by_site, [module for module, _ in modules])
    _check_biases(known, given, folder)
    if any(settings.get(name) for name in _PATTERNS):
        method = _ranked(settings, by_site, folder)
    targets = [re.sub(r"([*?[])", r"[\1]", module) for module in by_site]
    with unchanged_on_failure(model):
        for module, _ in modules:
            separate(model, module)
        own = {bias: nn.Parameter(given[name].to(bias)) for name, bias in known.items()}
        replace_parameters(model, own)
        named = {bias: name for name, bias in known.items()}  # once, where modules share it
        trained = {name: own[bias] for bias, name in named.items()}
        report = train_beside(model, trained, adapt(model, method, targets, seed))
        adaptation = require_adaptation(model)
        _fill(adaptation, by_site, folder)
        _replace_bases(adaptation, tensors, folder)
        with torch.no_grad():
            for module, state in modules:
                for key, tensor in module.state_dict(keep_vars=True).items():
                    tensor.copy_(state[key])
                module.requires_grad_(True)
    return report


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors in `folder`."""
    if (folder / PICKLE).exists() and not (folder / TENSORS).exists():
        raise SettingsError(f"{folder / PICKLE} is a pickle, which can run code: save it with safe_serialization=True")
    try:
        settings = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingsError(f"no PEFT adapter can be read from {folder}: {error}") from error
    if not isinstance(settings, dict):
        raise SettingsError(f"{folder / CONFIG} is not a JSON object of settings")
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise SettingsError(f"{folder / TENSORS} has {name} with values that are not finite floats")
    return settings, tensors


def _method(settings: dict[str, Any], folder: Path) -> Method:
    """Our method of these settings; SettingsError for what changes the mathematics or the weights under it."""
    peft_type = settings.get("peft_type")
    if peft_type not in ("LORA", "VERA", "RANDLORA"):
        raise SettingsError(f"{folder / CONFIG} has peft_type={peft_type!r}; LORA, VERA and RANDLORA can be read")
    strange = [name for name, value in settings.items() if name not in READ | WITHOUT_EFFECT and value not in NOT_GIVEN]
    if (bias := settings.get("bias") or NONE) not in (NONE, ALL) and not str(bias).endswith(ONLY):
        strange.append("bias")
    if settings.get("init_lora_weights", True) not in STARTS:
        strange.append("init_lora_weights")
    if peft_type != "LORA":
        strange += [name for name in _PATTERNS if settings.get(name)]
    if strange:
        raise SettingsError(
            f"{folder / CONFIG} has {strange[0]}={settings[strange[0]]!r}, which is not read here, since "
            f"{REFUSED.get(strange[0], UNKNOWN)}: merge it with PEFT, where PEFT can, and load the plain model"
        )
    try:
        if peft_type == "LORA":
            scale = math.sqrt(settings["r"]) if settings.get("use_rslora") else 1.0
            method = DoRA if settings.get("use_dora") else LoRA
            return method(settings["r"], settings["lora_alpha"] * scale, settings.get("lora_dropout", 0.0))
        if peft_type == "VERA":
            return VeRA(settings["r"], settings.get("d_initial", 0.1), settings.get("vera_dropout", 0.0), basis="peft")
        dropout = settings.get("randlora_dropout", 0.0)
        return RandLoRA(settings["r"], settings["randlora_alpha"], basis="peft", dropout=dropout)
    except KeyError as error:
        raise SettingsError(f"{folder / CONFIG} has no {error.args[0]}") from error


def _modules(
    model: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The modules of modules_to_save, ends of names, with their tensors, which are taken out of `tensors`."""
    modules = []
    for wanted in settings.get("modules_to_save") or []:
        for name, module in model.named_modules():
            prefix = f"{PREFIX}{name}."
            if not f".{name}".endswith(f".{wanted}") or not any(key.startswith(prefix) for key in tensors):
                continue
            state = {key.removeprefix(prefix): tensors.pop(key) for key in [*tensors] if key.startswith(prefix)}
            # With bias="all" PEFT writes biases twice more, by the names of its wrapper.
            state = {key: tensor for key, tensor in state.items() if not key.startswith(_WRAPPED)}
            shapes, needed = ({key: tuple(t.shape) for key, t in of.items()} for of in (state, module.state_dict()))
            if shapes != needed:
                raise SettingsError(f"{folder / TENSORS}: {name} needs {needed}, found {shapes}")
            modules.append((module, state))
        if left := [key for key in tensors if f".{wanted}." in key and ".lora_" not in key]:
            raise SettingsError(f"{folder / TENSORS} has {left[0]}, and this model has no module for it")
    return modules


def _take_biases(settings: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes out the biases that were trained beside, by their names in the model."""
    if (settings.get("bias") or NONE) == NONE:
        return {}
    keys = [key for key in tensors if key.startswith(PREFIX) and f".{key}".endswith(".bias")]
    return {key.removeprefix(PREFIX).replace(".base_layer.", "."): tensors.pop(key) for key in keys}


def _check_biases(known: Mapping[str, nn.Parameter], given: Mapping[str, Tensor], folder: Path) -> None:
    """SettingsError unless the file has just those biases that this model has."""
    shapes, needed = ({name: tuple(t.shape) for name, t in of.items()} for of in (given, known))
    if shapes != needed:
        wrong = min(name for name in {*shapes, *needed} if shapes.get(name) != needed.get(name))
        raise SettingsError(
            f"{folder / TENSORS} has {wrong} as {shapes.get(wrong)}, and in this model it is {needed.get(wrong)}: load "
            "the model that PEFT adapted"
        )


def _take_frozen(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Takes out what PEFT stores of the model itself: embeddings, and an output layer under an update.

    SettingsError unless it is what this model has, rounded to the other's dtype at most.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for key in [*tensors]:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if key.startswith(PREFIX) and name in own:
            here, stored = own[name].detach(), tensors.pop(key).to(own[name].device)
            if not (torch.equal(here, stored.to(here.dtype)) or torch.equal(here.to(stored.dtype), stored)):
                raise SettingsError(
                    f"{folder / TENSORS} has {name} with other values or of another shape than in this model: load the "
                    "weights that PEFT adapted"
                )


def _ranked(settings: dict[str, Any], sites: Iterable[str], folder: Path) -> RankedLoRA:
    """LoRA or DoRA of the ranks and alphas that PEFT's patterns give the sites: of the first that matches an end."""

    def of(name: str, site: str, common: float) -> Any:
        patterns = (settings.get(name) or {}).items()
        return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", site)), common)

    try:
        ranks = {site: of("rank_pattern", site, settings["r"]) for site in sites}
        roots = {site: math.sqrt(rank) if settings.get("use_rslora") else 1.0 for site, rank in ranks.items()}
        alphas = {site: of("alpha_pattern", site, settings["lora_alpha"]) * root for site, root in roots.items()}
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise SettingsError(f"{folder / CONFIG} has patterns that give no ranks or alphas: {error}") from error
    method = RankedDoRA if settings.get("use_dora") else RankedLoRA
    return method(ranks, alphas, settings.get("lora_dropout", 0.0))


def _by_site(tensors: dict[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each site by their own names."""
    by_site: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        if key.startswith(PREFIX):
            module, _, name = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            by_site.setdefault(module, {})[name] = tensors[key]
    if not by_site:
        raise SettingsError(f"{folder / TENSORS} has no tensor of the form {PREFIX}<module>.<tensor>")
    return by_site


def _refuse_attention(model: nn.Module, sites: Iterable[str], folder: Path) -> None:
    """SettingsError for updates of nn.MultiheadAttention, or inside of one."""
    whole = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    for site in sites:
        if site in whole:
            raise SettingsError(
                f"{folder / TENSORS} has {site}, an nn.MultiheadAttention, which PEFT adapts as one layer, and which "
                "is unfused here: merge it with PEFT and load the plain model"
            )
        if site.rpartition(".")[0] in whole:
            raise SettingsError(
                f"{folder / TENSORS} has {site}, inside an nn.MultiheadAttention, which in PEFT never uses the update: "
                "leave it out"
            )


@torch.no_grad()
def _fill(adaptation: Adaptation, by_site: dict[str, dict[str, Tensor]], folder: Path) -> None:
    """Copies the stored parameters into the updates."""
    for site, update in adaptation.updates.items():
        strange = set(by_site[site]) - {*_TRAINED, *_REPEATED}
        if strange:
            raise SettingsError(f"{folder / TENSORS}: {site} has {min(strange)}, which is not understood here")
        stored = {_TRAINED[name]: tensor for name, tensor in by_site[site].items() if name in _TRAINED}
        for path, parameter in update.named_parameters():
            name = path.rpartition(".")[2]  # DoRA's A and B are a LoRA's
            value = stored.get(name)
            value = value.T if value is not None and name == "lambda_" else value
            if value is None or value.shape != parameter.shape:
                shape = None if value is None else tuple(value.shape)
                raise SettingsError(f"{folder / TENSORS}: {site} needs {name} {tuple(parameter.shape)}, found {shape}")
            parameter.copy_(value)


def _replace_bases(adaptation: Adaptation, tensors: dict[str, Tensor], folder: Path) -> None:
    """Puts the stored bases, if any, in the place of the drawn ones, unless they are the same."""
    name = "vera" if isinstance(adaptation.method, VeRA) else "randlora"
    if f"{SHARED}{name}_A" not in tensors:
        return
    A, B = tensors[f"{SHARED}{name}_A"].float(), tensors[f"{SHARED}{name}_B"].float()
    replaced: dict[int, DenseBasis] = {}
    for update in adaptation.updates.values():
        n = len(update.lambda_) if B.dim() == 3 else 0  # type: ignore[arg-type]
        stored = {"basis_A": A[:, 0] if n else A, "basis_B": columns_by_basis(B, n) if n else B}
        for attribute, matrix in stored.items():
            drawn = getattr(update, attribute)
            if drawn.matrix.shape != matrix.shape:
                raise SettingsError(f"{folder / TENSORS}: bases of shape {tuple(matrix.shape)} do not fit these sites")
            matrix = matrix.to(drawn.matrix.device)
            if not torch.equal(drawn.matrix, matrix):
                basis = replaced.setdefault(id(drawn), DenseBasis(drawn.name, matrix, reproducible=False))
                setattr(update, attribute, basis)
