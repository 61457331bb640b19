"""What of an adapted model PEFT's files cannot hold, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from randlora.adapters.attention import UnfusedAttention
from randlora.adapters.core import Adaptation, adapted_layers, require_adaptation
from randlora.adapters.interface import Site, Update
from randlora.bases import PEFT, Basis, DenseBasis
from randlora.bases.peft import columns_as_peft
from randlora.errors import SettingsError
from randlora.methods.common import LowRankUpdate
from randlora.methods.dora import DoRA
from randlora.methods.randlora import RandLoRA, RandLoRAUpdate
from randlora.methods.ranked_lora import RankedDoRA
from randlora.methods.vera import VeRA, VeRAUpdate

AnyUpdate = TypeVar("AnyUpdate", bound=Update)


def refusal(model: nn.Module, bases: bool = True) -> str | None:
    """Why `to_peft` refuses an adapted model, in a sentence with the remedy; None where it writes it.

    Known as soon as the model is adapted: no value is looked at, and a model on the meta device will do.
    """
    adaptation = require_adaptation(model)
    try:
        check(model, adaptation, bases)
    except SettingsError as error:
        return str(error)
    return None


def export_warning(model: nn.Module) -> str | None:
    """What to say as training begins where PEFT has the method and `to_peft` will refuse these sites or settings."""
    reason = refusal(model)
    if reason is None or not _has_method(require_adaptation(model)):
        return None
    return f"the adapter cannot be exported to PEFT: {reason}"


def check(model: nn.Module, adaptation: Adaptation, bases: bool) -> None:
    """Raises SettingsError for whatever PEFT does not have."""
    _check_sites(model, adaptation)
    method = adaptation.method
    if not _has_method(adaptation):
        raise SettingsError(f"PEFT has no {method.name} that reads ours: merge the model and save it whole")
    if isinstance(method, VeRA):
        pairs = [(update.basis_A, update.basis_B) for _, update in updates_of(adaptation, VeRAUpdate)]
        if not bases:
            _check_peft_draws(pairs[0][0], method.basis)
        for one in zip(*pairs, strict=True) if bases else ():
            shared_matrix(one, method.basis)
    elif isinstance(method, RandLoRA):
        updates = updates_of(adaptation, RandLoRAUpdate)
        for site, update in updates:
            if (n := len(update.lambda_)) > math.ceil(site.small / method.rank):
                raise SettingsError(f"{site.name} has {n} bases; PEFT has at most {site.small} / {method.rank}")
        if not bases:
            _check_peft_draws(updates[0][1].basis_A, method.basis)
        elif method.basis != PEFT:
            _check_one_order(method.rank, updates)
    elif len({update.dropout for update in adaptation.updates.values() if isinstance(update, LowRankUpdate)}) > 1:
        raise SettingsError("the sites differ in dropout, and a LoRA of PEFT has one: merge instead")


def _has_method(adaptation: Adaptation) -> bool:
    """Whether PEFT has the method, or a LoRA that computes the same."""
    low_rank = all(isinstance(update, LowRankUpdate) for update in adaptation.updates.values())
    return low_rank or isinstance(adaptation.method, DoRA | RankedDoRA | VeRA | RandLoRA)


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


def _check_peft_draws(first: Basis, basis: str) -> None:
    """SettingsError unless PEFT can draw these bases from the seed."""
    if basis != PEFT or not first.reproducible:
        raise SettingsError(
            f"PEFT cannot draw the bases of basis={basis}: write them (bases=True) or train with basis=peft"
        )


def shared_matrix(bases: Sequence[Basis], basis: str) -> Tensor:
    """The one dense matrix of all sites."""
    first = bases[0]
    if any(other is not first for other in bases) or not isinstance(first, DenseBasis):
        raise SettingsError(
            f"PEFT has one dense matrix for all sites, unlike basis={basis}: merge the model and save it"
        )
    return first.block(*first.matrix.shape)


def updates_of(adaptation: Adaptation, expected: type[AnyUpdate]) -> list[tuple[Site, AnyUpdate]]:
    """The sites with their updates, all of the class that their method builds."""
    pairs = []
    for site in adaptation.sites:
        update = adaptation.updates[site.name]
        if not isinstance(update, expected):
            raise SettingsError(f"PEFT has no {type(update).__name__}: merge the model and save it whole")
        pairs.append((site, update))
    return pairs
