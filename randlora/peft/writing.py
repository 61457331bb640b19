"""Writes an adapter as PEFT's files."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from randlora.adapters.attention import UnfusedAttention
from randlora.adapters.core import Adaptation, adapted_layers, require_adaptation
from randlora.adapters.interface import Site, Update
from randlora.adapters.ties import shared
from randlora.bases import PEFT, Basis, DenseBasis
from randlora.bases.peft import columns_as_peft
from randlora.errors import SettingsError
from randlora.methods.common import LowRankUpdate, relative_scale
from randlora.methods.dora import DoRA, DoRAUpdate
from randlora.methods.gelora import GeLoRA
from randlora.methods.lora import LoRA
from randlora.methods.randlora import RandLoRA, RandLoRAUpdate
from randlora.methods.ranked_lora import RankedDoRA, RankedLoRA
from randlora.methods.vera import VeRA, VeRAUpdate
from randlora.peft.biases import ALL, NONE, ONLY, biases
from randlora.peft.layout import CONFIG, NOTE, PREFIX, SHARED, TENSORS

AnyUpdate = TypeVar("AnyUpdate", bound=Update)
Number = TypeVar("Number", bound=float)

INFERENCE_ONLY = (
    "This adapter is for inference with PEFT: it computes the same outputs, but training it further there, or after "
    "reading it back, does not follow the path that training has in randlora. {reason}"
)
SCALES_DIFFER = (
    "The scale of {method} differs from site to site here, and PEFT has no such scale, so it is multiplied into "
    "trained parameters."
)
TRAINS_OTHERWISE = "PEFT would train the two factors of each site as those of a plain LoRA, and {method} does not."
NORM_IS_CONSTANT = "PEFT takes the norm as a constant in backward, and this DoRA, of detach_norm=False, does not."


class Contents(NamedTuple):
    """What a method writes: settings of its own for the configuration, its tensors, and why it is for inference only.

    `inference_only` is "" where training on follows the same path there.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    inference_only: str = ""


def to_peft(
    model: nn.Module, folder: str | Path, bases: bool = True, modules: Mapping[str, nn.Module] | None = None
) -> int:
    """Writes the adapter of `model` for PEFT.

    Every low-rank update is written as a LoRA; ranks and scales that differ between sites go into PEFT's rank_pattern
    and alpha_pattern. DoRA is written with ``use_dora``.

    Trained further, with ``PeftModel.from_pretrained(..., is_trainable=True)``, the adapter follows the path that it
    would have here: always for LoRA, GeLoRA, what SoRA and IncreLoRA end as, and DoRA as its authors have it, for VeRA
    at sites of one input size or with ``basis=peft``, for RandLoRA without `divide_by_root` or at sites of one number
    of bases. Other adapters, and the LoRAs that other methods are written as, are for inference: a warning says so, and
    INFERENCE_ONLY.txt beside the files.

    PEFT's own files hold the bases once more for every site; on loading it warns that these copies are missing, and
    does without them.

    Args:
        model: an adapted model.
        folder: made if missing.
        bases: False leaves the fixed matrices out; PEFT then draws its own, so the method needs ``basis=peft``.
        modules: what was trained beside the updates, such as ``{"score": model.score}``, by its name in `model`: PEFT's
            modules_to_save.

    Returns:
        The bytes written.

    Raises:
        SettingsError: for methods and sites that PEFT does not have (`refusal` says so beforehand): slices of fused
            matrices, attention modules unfused into linear maps, Kronecker bases or RandLoRA's own over sites of
            several sizes; and for `modules` that share parameters with the rest of the model.
    """
    adaptation, modules = require_adaptation(model), modules or {}
    _check(model, adaptation, bases)
    known = dict(model.named_modules())
    if strange := [name for name, module in modules.items() if known.get(name) is not module]:
        raise SettingsError(
            f"modules: {strange[0]} is not the name of this module in the model, by which PEFT finds it"
        )
    for name, module in modules.items():
        for parameter, other in shared(model, module).items():
            own = next(key for key, value in module.named_parameters() if value is parameter)
            raise SettingsError(
                f"modules: {name}.{own} is tied to {other}, and PEFT would train a copy of it: merge the model and "
                "save it whole, or give the module a parameter of its own before it is trained"
            )
    method = adaptation.method
    if isinstance(method, DoRA | RankedDoRA):
        settings, tensors, inference_only = _dora(adaptation)
    elif isinstance(method, VeRA):
        settings, tensors, inference_only = _vera(method, adaptation, bases)
    elif isinstance(method, RandLoRA):
        settings, tensors, inference_only = _randlora(method, adaptation, bases)
    else:
        settings, tensors, inference_only = _low_rank(adaptation)
    names = [site.name for site in adaptation.sites]
    bias, trained = _biases(model, adaptation, names, modules, settings["peft_type"])
    tensors |= trained
    for name, module in modules.items():
        tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    settings |= {
        "modules_to_save": [*modules] or None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": bias,
        "fan_in_fan_out": all(layer.transposed for layer in adapted_layers(model).values()),
        "inference_mode": True,
        "target_modules": "|".join(map(re.escape, names)),  # a pattern is matched whole, a list at the end of names
        "task_type": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / TENSORS, metadata={"format": "pt"})
    (folder / NOTE).unlink(missing_ok=True)
    if inference_only:
        note = INFERENCE_ONLY.format(reason=inference_only.format(method=method.name))
        (folder / NOTE).write_text(note + "\n")
        warnings.warn(f"{folder}: {note}", stacklevel=2)
    return sum(file.stat().st_size for name in (CONFIG, TENSORS, NOTE) if (file := folder / name).exists())


def refusal(model: nn.Module, bases: bool = True) -> str | None:
    """Why `to_peft` refuses an adapted model, in a sentence with the remedy; None where it writes it.

    Known as soon as the model is adapted: no value is looked at, and a model on the meta device will do.
    """
    adaptation = require_adaptation(model)
    try:
        _check(model, adaptation, bases)
    except SettingsError as error:
        return str(error)
    return None


def export_warning(model: nn.Module) -> str | None:
    """What to say as training begins where PEFT has the method and `to_peft` will refuse these sites or settings."""
    reason = refusal(model)
    if reason is None or not _has_method(require_adaptation(model)):
        return None
    return f"the adapter cannot be exported to PEFT: {reason}"


def _has_method(adaptation: Adaptation) -> bool:
    """Whether PEFT has the method, or a LoRA that computes the same."""
    low_rank = all(isinstance(update, LowRankUpdate) for update in adaptation.updates.values())
    return low_rank or isinstance(adaptation.method, DoRA | RankedDoRA | VeRA | RandLoRA)


def _check(model: nn.Module, adaptation: Adaptation, bases: bool) -> None:
    """Raises SettingsError for whatever PEFT does not have."""
    _check_sites(model, adaptation)
    method = adaptation.method
    if not _has_method(adaptation):
        raise SettingsError(f"PEFT has no {method.name} that reads ours: merge the model and save it whole")
    if isinstance(method, VeRA):
        pairs = [(update.basis_A, update.basis_B) for _, update in _updates(adaptation, VeRAUpdate)]
        if not bases:
            _check_peft_draws(pairs[0][0], method.basis)
        for one in zip(*pairs, strict=True) if bases else ():
            _shared_matrix(one, method.basis)
    elif isinstance(method, RandLoRA):
        updates = _updates(adaptation, RandLoRAUpdate)
        for site, update in updates:
            if (n := len(update.lambda_)) > math.ceil(site.small / method.rank):
                raise SettingsError(f"{site.name} has {n} bases; PEFT has at most {site.small} / {method.rank}")
        if not bases:
            _check_peft_draws(updates[0][1].basis_A, method.basis)
        elif method.basis != PEFT:
            _check_one_order(method.rank, updates)
    elif len({update.dropout for update in adaptation.updates.values() if isinstance(update, LowRankUpdate)}) > 1:
        raise SettingsError("the sites differ in dropout, and a LoRA of PEFT has one: merge instead")


def _check_one_order(rank: int, updates: list[tuple[Site, RandLoRAUpdate]]) -> None:
    """Raises SettingsError unless one B of PEFT holds the columns of every site where PEFT looks for them."""
    orders = []
    for site, update in updates:
        n, columns = math.ceil(site.small / rank), update.shape[1]
        numbers = nn.functional.pad(torch.arange(columns)[None], (0, n * rank - columns), value=-1)
        orders.append(columns_as_peft(numbers, n)[0])  # (n, rank): which column of ours is there
    longest = max(orders, key=len)
    alike = all(torch.equal(order, longest[: len(order)]) for order in orders)
    if not alike or any(update.basis_B is not updates[0][1].basis_B for _, update in updates):
        raise SettingsError(
            "PEFT's order of B's columns depends on a matrix's smaller side, and the sites have several: "
            "train with method.basis=peft, or merge the model and save it whole"
        )


def _check_sites(model: nn.Module, adaptation: Adaptation) -> None:
    whole = set(adapted_layers(model))
    for site in adaptation.sites:
        if isinstance(model.get_submodule(site.name.rpartition(".")[0]), UnfusedAttention):
            raise SettingsError(
                f"{site.name} lies inside nn.MultiheadAttention, which PEFT does not unfuse: its LoRA has a layer for "
                "all of it, and its DoRA, VeRA and RandLoRA have none; merge instead"
            )
        if site.name not in whole:
            raise SettingsError(
                f"{site.name} is a slice of a fused matrix, and PEFT adapts matrices whole: merge instead"
            )


def _biases(
    model: nn.Module, adaptation: Adaptation, sites: list[str], modules: Mapping[str, nn.Module], peft_type: str
) -> tuple[str, dict[str, Tensor]]:
    """PEFT's `bias` for what is trained beside the updates, and its tensors."""
    if not adaptation.unfrozen:
        return NONE, {}
    for which in (peft_type.lower() + ONLY, ALL):
        found = biases(model, which, sites, modules.values())
        if {*found.values()} == {*adaptation.unfrozen.values()}:
            inner = {f"{site}.bias": f"{site}.base_layer.bias" for site in sites}
            return which, {f"{PREFIX}{inner.get(name, name)}": bias.detach().clone() for name, bias in found.items()}
    raise SettingsError(
        "parameters are trained beside the updates that are neither all biases of the model nor those of its sites, "
        "and PEFT's file does not hold them: merge the model and save it whole"
    )


def _number(value: float) -> float | int:
    """As PEFT writes it: a whole number without its point."""
    return int(value) if float(value).is_integer() else value


def _low_rank(adaptation: Adaptation) -> Contents:
    updates = _updates(adaptation, LowRankUpdate)
    settings, tensors = _loras([(site, update, update.low_rank()) for site, update in updates])
    plain = isinstance(adaptation.method, LoRA | GeLoRA | RankedLoRA)  # the latter: what has closed or gained ranks
    return Contents(settings, tensors, "" if plain else TRAINS_OTHERWISE)


def _dora(adaptation: Adaptation) -> Contents:
    updates = _updates(adaptation, DoRAUpdate)
    settings, tensors = _loras([(site, update, update.factors()) for site, update in updates])
    tensors |= {f"{PREFIX}{site.name}.lora_magnitude_vector": update.magnitude for site, update in updates}
    detached = all(update.detach_norm for _, update in updates)
    return Contents(settings | {"use_dora": True}, tensors, "" if detached else NORM_IS_CONSTANT)


def _loras(
    updates: Sequence[tuple[Site, LowRankUpdate | DoRAUpdate, tuple[Tensor, Tensor]]],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A LoRA of each site's own rank and scale; one without any rank left gets one that is zero, which PEFT needs."""
    factors = {
        site.name: (A, B) if len(A) else (A.new_zeros(1, site.in_features), B.new_zeros(site.out_features, 1))
        for site, _, (A, B) in updates
    }
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    alphas = {site.name: _number(update.scale * ranks[site.name]) for site, update, _ in updates}
    (rank, rank_pattern), (alpha, alpha_pattern) = _commonest(ranks), _commonest(alphas)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": updates[0][1].dropout}
    if rank_pattern or alpha_pattern:
        settings |= {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    return settings, tensors


def _commonest(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """The commonest of the sites' values, and those of the other sites by the pattern that matches that site alone."""
    ((common, _),) = Counter(values.values()).most_common(1)
    return common, {f"^{re.escape(name)}": value for name, value in values.items() if value != common}


def _vera(method: VeRA, adaptation: Adaptation, bases: bool) -> Contents:
    settings = {
        "peft_type": "VERA", "r": method.rank, "d_initial": method.d_initial, "vera_dropout": method.dropout,
        "projection_prng_key": adaptation.seed, "save_projection": bases,
    }  # fmt: skip
    updates = _updates(adaptation, VeRAUpdate)
    common = _common([update.scale for _, update in updates])
    tensors: dict[str, Tensor] = {}
    if bases:
        A = _shared_matrix([update.basis_A for _, update in updates], method.basis)
        B = _shared_matrix([update.basis_B for _, update in updates], method.basis)
        tensors |= {f"{SHARED}vera_A": A * common, f"{SHARED}vera_B": B}
    for site, update in updates:
        tensors[f"{PREFIX}{site.name}.vera_lambda_b"] = update.b
        tensors[f"{PREFIX}{site.name}.vera_lambda_d"] = update.d * (update.scale / common)
    alike = all(update.scale == common for _, update in updates)
    return Contents(settings, tensors, "" if alike else SCALES_DIFFER)


def _randlora(method: RandLoRA, adaptation: Adaptation, bases: bool) -> Contents:
    rank, alpha = method.rank, 2 * method.rank if method.alpha is None else method.alpha
    updates = _updates(adaptation, RandLoRAUpdate)
    roots = [update.scale / relative_scale(rank, method.alpha) for _, update in updates]  # 1, or 1/√n
    common = _common(roots)
    settings = {
        "peft_type": "RANDLORA", "r": rank, "randlora_alpha": _number(alpha * common),
        "randlora_dropout": method.dropout, "projection_prng_key": adaptation.seed, "save_projection": bases,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for (site, update), root in zip(updates, roots, strict=True):
        missing = math.ceil(site.small / rank) - len(update.lambda_)
        pad = (0, 0, 0, missing)  # PEFT rounds up: bases that we lack do nothing there
        tensors[f"{PREFIX}{site.name}.randlora_lambda"] = nn.functional.pad(update.lambda_ * (root / common), pad).T
        tensors[f"{PREFIX}{site.name}.randlora_gamma"] = nn.functional.pad(update.gamma, pad)
    if bases:
        tensors[f"{SHARED}randlora_A"], tensors[f"{SHARED}randlora_B"] = _randlora_bases(rank, updates)
    return Contents(settings, tensors, "" if all(root == common for root in roots) else SCALES_DIFFER)


def _common(scales: Sequence[float]) -> float:
    """The one scale of all sites, which PEFT can be given where nothing is trained; 1 if there are several."""
    return scales[0] if len(set(scales)) == 1 else 1.0


def _randlora_bases(rank: int, updates: list[tuple[Site, RandLoRAUpdate]]) -> tuple[Tensor, Tensor]:
    """A (r, 1, small) and B (large, n, r) as PEFT allocates and orders them."""
    outputs, inputs = (max(sizes) for sizes in zip(*(site.shape for site, _ in updates), strict=True))
    small, large = min(outputs, inputs), max(outputs, inputs)
    A, B = torch.zeros(rank, 1, small), torch.zeros(large, math.ceil(small / rank), rank)
    for site, update in updates:
        fixed = update.fixed()
        n = math.ceil(site.small / rank)
        A[:, 0, : site.small] = fixed.A.float().cpu()
        matrix = nn.functional.pad(fixed.B.matrix().float().cpu(), (0, n * rank - fixed.B.columns))
        B[: site.large, :n] = columns_as_peft(matrix, n)
    return A, B


def _updates(adaptation: Adaptation, expected: type[AnyUpdate]) -> list[tuple[Site, AnyUpdate]]:
    """The sites with their updates, all of the class that their method builds."""
    pairs = []
    for site in adaptation.sites:
        update = adaptation.updates[site.name]
        if not isinstance(update, expected):
            raise SettingsError(f"PEFT has no {type(update).__name__}: merge the model and save it whole")
        pairs.append((site, update))
    return pairs


def _shared_matrix(bases: Sequence[Basis], basis: str) -> Tensor:
    """The one dense matrix of all sites."""
    first = bases[0]
    if any(other is not first for other in bases) or not isinstance(first, DenseBasis):
        raise SettingsError(
            f"PEFT has one dense matrix for all sites, unlike basis={basis}: merge the model and save it"
        )
    return first.block(*first.matrix.shape)


def _check_peft_draws(first: Basis, basis: str) -> None:
    """SettingsError unless PEFT can draw these bases from the seed."""
    if basis != PEFT or not first.reproducible:
        raise SettingsError(
            f"PEFT cannot draw the bases of basis={basis}: write them (bases=True) or train with basis=peft"
        )
