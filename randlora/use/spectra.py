"""What an update is like: its spectrum, its size, and where it lies beside the weights that it changes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from randlora.adapters.core import adapted_layers, require_adaptation
from randlora.adapters.quantization import dense
from randlora.bounds import Bounded, Count, Part

PLACES = 33  # of singular values that are kept, from the first to the last
_EPSILON = torch.finfo(torch.float32).eps  # updates are computed in float32


@dataclass(frozen=True)
class Look(Bounded):
    """How closely updates are looked at.

    Args:
        directions: How many of the largest singular directions count, k.
        likeness: Below this cosine to all of W0's singular vectors, one of W' is an intruder.
    """

    directions: Count = 8
    likeness: Part = 0.5


@dataclass(frozen=True)
class Spectrum:
    """The update ΔW = W' - W0 of one site. All but the name and the shape are 0 for an update that is zero.

    Args:
        site: Its name.
        shape: Of W0, (out, in).
        rank: How many singular values are above σ₁ · max(out, in) · 1.2e-7, as numpy counts for float32.
        full: The rank as a part of the largest that this shape has, min(out, in).
        stable_rank: ‖ΔW‖²_F / σ₁².
        effective_rank: exp of the entropy of σ / Σσ (Roy and Vetterli, 2007).
        energy: The part of ‖ΔW‖²_F in its k largest singular values.
        relative_norm: ‖ΔW‖_F / ‖W0‖_F.
        alignment: ‖UᵀΔWV‖²_F / ‖ΔW‖²_F, with W0's k largest singular directions in U and V.
        intruders: How many of the k largest left singular vectors of W' are like none of W0's (Shuttleworth et al.,
            2024, arXiv 2410.21228).
        values: σ / σ₁ of PLACES singular values, evenly spaced from the first to the last.
    """

    site: str
    shape: tuple[int, int]
    rank: int
    full: float
    stable_rank: float
    effective_rank: float
    energy: float
    relative_norm: float
    alignment: float
    intruders: int
    values: tuple[float, ...]


QUANTITIES = [field.name for field in dataclasses.fields(Spectrum) if field.name not in ("site", "shape", "values")]


@torch.no_grad()
def spectra(model: nn.Module, look: Look | None = None) -> list[Spectrum]:
    """Of every site of an adapted model; SettingsError for a model that is not adapted."""
    names = {id(update): name for name, update in require_adaptation(model).updates.items()}
    return [
        spectrum(names[id(update)], weight, update.delta(weight), look or Look())
        for layer in adapted_layers(model).values()
        for rows, update in zip(layer.rows, layer.updates, strict=True)
        for weight in [dense(layer.weight)[rows]]
    ]


@torch.no_grad()
def spectrum(site: str, weight: Tensor, delta: Tensor, look: Look) -> Spectrum:
    """Of one update `delta` beside its `weight`, both (out, in)."""
    weight, delta = weight.double(), delta.double()
    k = min(look.directions, *weight.shape)
    values = torch.linalg.svdvals(delta)
    squares, total = values.square(), values.square().sum().item()
    if not total:
        return Spectrum(site, (weight.shape[0], weight.shape[1]), 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, (0.0,) * PLACES)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    rank = int((values > values[0] * max(weight.shape) * _EPSILON).sum())
    share = values / values.sum()
    kept = values[torch.linspace(0, len(values) - 1, PLACES).round().long()] / values[0]
    new, *_ = torch.linalg.svd(weight + delta, full_matrices=False)
    likest = (left.T @ new[:, :k]).abs().amax(0)
    return Spectrum(
        site=site,
        shape=(weight.shape[0], weight.shape[1]),
        rank=rank,
        full=rank / min(weight.shape),
        stable_rank=total / squares[0].item(),
        effective_rank=torch.special.entr(share).sum().exp().item(),
        energy=squares[:k].sum().item() / total,
        relative_norm=total**0.5 / weight.norm().item(),
        alignment=(left[:, :k].T @ delta @ right[:k].T).square().sum().item() / total,
        intruders=int((likest < look.likeness).sum()),
        values=tuple(kept.tolist()),
    )
