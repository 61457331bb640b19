"""PEFT's adapter format, both ways: `adapter_config.json` beside `adapter_model.safetensors`; never a pickle.

LoRA, VeRA and RandLoRA are exchanged. Keys are `base_model.model.<module>.<tensor>`; RandLoRA's λ is stored (r, n).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from randlora.adapters.core import Adaptation, Report, adapt, adapted_layers, require_adaptation, unload
from randlora.bases import DenseBasis
from randlora.bases.peft import PeftBasis, columns_as_peft, columns_by_basis
from randlora.errors import SettingsError
from randlora.methods.base import Method
from randlora.methods.lora import LoRA
from randlora.methods.randlora import RandLoRA
from randlora.methods.vera import VeRA

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
# What changes the mathematics of an adapter, with the only value that is understood here.
_PLAIN: dict[str, Any] = {
    "use_dora": False, "use_qalora": False, "use_bdlora": None, "lora_bias": False, "rank_pattern": {},
    "alpha_pattern": {}, "modules_to_save": None, "layer_replication": None, "trainable_token_indices": None,
    "target_parameters": None, "alora_invocation_tokens": None, "bias": "none", "sparse": False, "very_sparse": False,
}  # fmt: skip
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others (PiSSA, OLoRA, …) change W0 as well


def to_peft(model: nn.Module, folder: str | Path, bases: bool = True) -> int:
    """Writes the adapter of `model` for PEFT into `folder` (made if missing); returns the bytes written.

    With `bases` False the fixed matrices are left out; PEFT then draws its own, so the method needs ``basis=peft``.
    Raises SettingsError for methods and sites that PEFT does not have: slices of fused matrices, attention
    modules opened into linears, Kronecker bases or RandLoRA's own over sites of several sizes. PEFT's own files hold
    the bases once more for every site; on loading it warns that these copies are missing, and does without them.
    """
    adaptation = require_adaptation(model)
    _check_sites(model, adaptation)
    method = adaptation.method
    if isinstance(method, LoRA):
        settings, tensors = _lora_out(method, adaptation)
    elif isinstance(method, VeRA):
        settings, tensors = _vera_out(method, adaptation, bases)
    elif isinstance(method, RandLoRA):
        settings, tensors = _randlora_out(method, adaptation, bases)
    else:
        raise SettingsError(f"PEFT has no {method.name} that reads ours: merge the model and save it whole")
    names = [site.name for site in adaptation.sites]
    settings |= {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": all(layer.transposed for layer in adapted_layers(model).values()),
        "inference_mode": True,
        "target_modules": "|".join(map(re.escape, names)),  # a pattern is matched whole, a list at the end of names
        "task_type": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / TENSORS, metadata={"format": "pt"})
    return sum((folder / name).stat().st_size for name in (CONFIG, TENSORS))


def from_peft(model: nn.Module, folder: str | Path) -> Report:
    """Adapts `model` with the adapter that PEFT saved in `folder`.

    Adapters saved without their bases get the ones that PEFT would draw; others keep theirs, and if those cannot be
    drawn again, `save_adapter` refuses and `to_peft` writes them. Raises SettingsError for pickles, unknown types and
    variants such as DoRA, and for modules that the model does not have.
    """
    folder = Path(folder)
    if (folder / PICKLE).exists() and not (folder / TENSORS).exists():
        raise SettingsError(f"{folder / PICKLE} is a pickle, which can run code: save it with safe_serialization=True")
    try:
        settings = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingsError(f"no PEFT adapter can be read from {folder}: {error}") from error
    _check_settings(settings, folder)
    try:
        method = _method(settings, folder)
    except KeyError as error:
        raise SettingsError(f"{folder / CONFIG} has no {error.args[0]}") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        if key.startswith(_PREFIX):
            module, _, name = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
            found.setdefault(module, {})[name] = tensors[key]
    if not found:
        raise SettingsError(f"{folder / TENSORS} has no tensor of the form {_PREFIX}<module>.<tensor>")
    targets = [re.sub(r"([*?[])", r"[\1]", module) for module in found]
    report = adapt(model, method, targets, int(settings.get("projection_prng_key") or 0))
    try:
        _fill(require_adaptation(model), found, tensors, folder)
    except SettingsError:
        unload(model)
        raise
    return report


def _check_settings(settings: Any, folder: Path) -> None:
    """Raises SettingsError for what changes the mathematics of an adapter, or the weights under it."""
    if not isinstance(settings, dict):
        raise SettingsError(f"{folder / CONFIG} is not a JSON object of settings")
    strange = [name for name, plain in _PLAIN.items() if settings.get(name, plain) not in (plain, None)]
    strange += [name for name, value in settings.items() if name.endswith("_config") and value and name != "eva_config"]
    if settings.get("init_lora_weights", True) not in _STARTS:
        strange.append("init_lora_weights")
    if strange:
        raise SettingsError(
            f"{folder / CONFIG} has {strange[0]}={settings[strange[0]]!r}, which is not understood here: "
            "merge it with PEFT and load the plain model"
        )


def _check_sites(model: nn.Module, adaptation: Adaptation) -> None:
    whole = set(adapted_layers(model))
    for site in adaptation.sites:
        if site.name not in whole:
            raise SettingsError(f"{site.name} is a slice of a fused matrix, which PEFT cannot adapt: merge instead")
        parent = model.get_submodule(site.name.rpartition(".")[0])
        if type(parent).__name__ == "UnfusedAttention":
            raise SettingsError(f"{site.name} lies inside nn.MultiheadAttention, unlike in PEFT: merge instead")
    if adaptation.unfrozen:
        raise SettingsError("the method trains parameters beside its updates, which PEFT's file does not hold")


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _lora_out(method: LoRA, adaptation: Adaptation) -> tuple[dict[str, Any], dict[str, Tensor]]:
    alpha = 2 * method.rank if method.alpha is None else method.alpha
    settings = {"peft_type": "LORA", "r": method.rank, "lora_alpha": _number(alpha), "lora_dropout": method.dropout}
    tensors = {}
    for name, update in adaptation.updates.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = update.A, update.B
    return settings, tensors  # type: ignore[return-value]


def _vera_out(method: VeRA, adaptation: Adaptation, bases: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    A, B = _shared(adaptation, method.basis, bases, "basis_A"), _shared(adaptation, method.basis, bases, "basis_B")
    settings = {
        "peft_type": "VERA", "r": method.rank, "d_initial": method.d_initial, "vera_dropout": method.dropout,
        "projection_prng_key": adaptation.seed, "save_projection": bases,
    }  # fmt: skip
    tensors = {"base_model.vera_A": A.block(*A.matrix.shape), "base_model.vera_B": B.block(*B.matrix.shape)}
    tensors = tensors if bases else {}
    for name, update in adaptation.updates.items():
        tensors[f"{_PREFIX}{name}.vera_lambda_b"] = update.b  # type: ignore[assignment]
        tensors[f"{_PREFIX}{name}.vera_lambda_d"] = update.d * update.scale
    return settings, tensors


def _randlora_out(method: RandLoRA, adaptation: Adaptation, bases: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    rank, alpha = method.rank, 2 * method.rank if method.alpha is None else method.alpha
    settings = {
        "peft_type": "RANDLORA", "r": rank, "randlora_alpha": _number(alpha), "randlora_dropout": method.dropout,
        "projection_prng_key": adaptation.seed, "save_projection": bases,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for site in adaptation.sites:
        update = adaptation.updates[site.name]
        missing = math.ceil(site.small / rank) - len(update.lambda_)  # type: ignore[arg-type]
        if missing < 0:
            raise SettingsError(f"{site.name} has {len(update.lambda_)} bases; PEFT has at most {site.small} / {rank}")  # type: ignore[arg-type]
        pad = (0, 0, 0, missing)  # PEFT rounds up: bases that we lack do nothing there
        scaled = update.lambda_ * (update.scale * rank / alpha)  # what PEFT's α / r has not: 1/√n
        tensors[f"{_PREFIX}{site.name}.randlora_lambda"] = nn.functional.pad(scaled, pad).T  # type: ignore[arg-type]
        tensors[f"{_PREFIX}{site.name}.randlora_gamma"] = nn.functional.pad(update.gamma, pad)  # type: ignore[arg-type]
    if bases:
        tensors["base_model.randlora_A"], tensors["base_model.randlora_B"] = _randlora_bases(method, adaptation)
    else:
        _shared(adaptation, method.basis, bases, "basis_A")
    return settings, tensors


def _randlora_bases(method: RandLoRA, adaptation: Adaptation) -> tuple[Tensor, Tensor]:
    """A (r, 1, small) and B (large, n, r) as PEFT allocates and orders them."""
    rank, sites = method.rank, adaptation.sites
    outputs, inputs = max(site.out_features for site in sites), max(site.in_features for site in sites)
    small, large = min(outputs, inputs), max(outputs, inputs)
    A, B = torch.zeros(rank, 1, small), torch.zeros(large, math.ceil(small / rank), rank)
    written: dict[tuple[int, ...], Tensor] = {}
    for site in sites:
        own_A, own_B = adaptation.updates[site.name].bases()
        n = math.ceil(site.small / rank)
        A[:, 0, : site.small] = own_A.float().cpu()
        matrix = nn.functional.pad(own_B.matrix().float().cpu(), (0, n * rank - own_B.columns))
        B[: site.large, :n] = written[site.large, n] = columns_as_peft(matrix, n)
    for (rows, n), block in written.items():
        if not torch.equal(B[:rows, :n], block):
            raise SettingsError(
                "PEFT's order of B's columns depends on a matrix's smaller side, and the sites have several: "
                "train with method.basis=peft, or merge the model and save it whole"
            )
    return A, B


def _shared(adaptation: Adaptation, kind: str, bases: bool, name: str) -> DenseBasis:
    """The one dense matrix of all sites."""
    found = {id(basis): basis for update in adaptation.updates.values() for basis in [getattr(update, name)]}
    first = next(iter(found.values()))
    if not bases and not (kind == "peft" and first.drawn):
        raise SettingsError(
            f"PEFT cannot draw the bases of basis={kind}: write them (bases=True) or train with basis=peft"
        )
    if bases and (len(found) > 1 or not isinstance(first, DenseBasis)):
        raise SettingsError(
            f"PEFT has one dense matrix for all sites, unlike basis={kind}: merge the model and save it"
        )
    return first


def _method(settings: dict[str, Any], folder: Path) -> Method:
    kind = settings.get("peft_type")
    if kind == "LORA":
        scale = math.sqrt(settings["r"]) if settings.get("use_rslora") else 1.0
        return LoRA(settings["r"], settings["lora_alpha"] * scale, settings.get("lora_dropout", 0.0))
    if kind == "VERA":
        return VeRA(settings["r"], settings.get("d_initial", 0.1), settings.get("vera_dropout", 0.0), basis="peft")
    if kind == "RANDLORA":
        dropout = settings.get("randlora_dropout", 0.0)
        return RandLoRA(settings["r"], settings["randlora_alpha"], basis="peft", dropout=dropout)
    raise SettingsError(f"{folder / CONFIG} has peft_type={kind!r}; LORA, VERA and RANDLORA can be read")


@torch.no_grad()
def _fill(
    adaptation: Adaptation, found: dict[str, dict[str, Tensor]], tensors: dict[str, Tensor], folder: Path
) -> None:
    names = {
        "lora_A": "A", "lora_B": "B", "vera_lambda_b": "b", "vera_lambda_d": "d", "randlora_lambda": "lambda_",
        "randlora_gamma": "gamma",
    }  # fmt: skip
    for site, update in adaptation.updates.items():
        strange = set(found[site]) - {*names, "randlora_A", "randlora_B"}  # PEFT repeats the bases at every site
        if strange:
            raise SettingsError(f"{folder / TENSORS}: {site} has {min(strange)}, which is not understood here")
        given = {names[name]: tensor for name, tensor in found[site].items() if name in names}
        for name, parameter in update.named_parameters():
            value = given.get(name)
            value = value.T if value is not None and name == "lambda_" else value
            if value is None or value.shape != parameter.shape:
                shape = None if value is None else tuple(value.shape)
                raise SettingsError(f"{folder / TENSORS}: {site} needs {name} {tuple(parameter.shape)}, found {shape}")
            parameter.copy_(value)
    kind = "vera" if "base_model.vera_A" in tensors else "randlora"
    if f"base_model.{kind}_A" in tensors:
        _keep_bases(
            adaptation, tensors[f"base_model.{kind}_A"].float(), tensors[f"base_model.{kind}_B"].float(), folder
        )


def _keep_bases(adaptation: Adaptation, A: Tensor, B: Tensor, folder: Path) -> None:
    """Puts the stored bases in the place of the drawn ones, unless they are the same."""
    kept: dict[int, PeftBasis] = {}
    for update in adaptation.updates.values():
        n = len(update.lambda_) if B.dim() == 3 else 0  # type: ignore[arg-type]
        stored = {"basis_A": A[:, 0] if n else A, "basis_B": columns_by_basis(B, n) if n else B}
        for name, matrix in stored.items():
            drawn = getattr(update, name)
            if drawn.matrix.shape != matrix.shape:
                raise SettingsError(f"{folder / TENSORS}: bases of shape {tuple(matrix.shape)} do not fit these sites")
            matrix = matrix.to(drawn.matrix.device)
            if not torch.equal(drawn.matrix, matrix):
                basis = kept.setdefault(id(drawn), PeftBasis(drawn.name, matrix, drawn=False))
                setattr(update, name, basis)
