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

from randlora.adapters.core import Adaptation, adapted_layers, require_adaptation
from randlora.adapters.interface import Site
from randlora.adapters.ties import shared
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
from randlora.peft.refusals import check, shared_matrix, updates_of

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
    check(model, adaptation, bases)
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
    updates = updates_of(adaptation, LowRankUpdate)
    settings, tensors = _loras([(site, update, update.low_rank()) for site, update in updates])
    plain = isinstance(adaptation.method, LoRA | GeLoRA | RankedLoRA)  # the latter: what has closed or gained ranks
    return Contents(settings, tensors, "" if plain else TRAINS_OTHERWISE)


def _dora(adaptation: Adaptation) -> Contents:
    updates = updates_of(adaptation, DoRAUpdate)
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
    updates = updates_of(adaptation, VeRAUpdate)
    common = _common([update.scale for _, update in updates])
    tensors: dict[str, Tensor] = {}
    if bases:
        A = shared_matrix([update.basis_A for _, update in updates], method.basis)
        B = shared_matrix([update.basis_B for _, update in updates], method.basis)
        tensors |= {f"{SHARED}vera_A": A * common, f"{SHARED}vera_B": B}
    for site, update in updates:
        tensors[f"{PREFIX}{site.name}.vera_lambda_b"] = update.b
        tensors[f"{PREFIX}{site.name}.vera_lambda_d"] = update.d * (update.scale / common)
    alike = all(update.scale == common for _, update in updates)
    return Contents(settings, tensors, "" if alike else SCALES_DIFFER)


def _randlora(method: RandLoRA, adaptation: Adaptation, bases: bool) -> Contents:
    rank, alpha = method.rank, 2 * method.rank if method.alpha is None else method.alpha
    updates = updates_of(adaptation, RandLoRAUpdate)
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
