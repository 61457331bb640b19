"""How near each method comes to a given update with as many trained parameters: the paper's section on approximation.

Where the nearest is known it is taken (LoRA: Eckart and Young). Where a method is linear in each of two sets of
parameters, they are solved for in turn by their normal equations, from several random starts. Every other method is
fitted by L-BFGS. All but the first may end in a minimum that is not the lowest: they are upper bounds, and say whether
they have settled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from randlora.adapters import adapt
from randlora.adapters.core import adapted_layers, require_adaptation
from randlora.adapters.interface import Method
from randlora.adapters.quantization import dense
from randlora.budget import matched
from randlora.errors import SettingsError
from randlora.methods.lora import LoRAUpdate
from randlora.use.solvers import Fit, Fitted, solver

SITE = "site"


def errors(
    site: str,
    weight: Tensor,
    delta: Tensor,
    methods: Mapping[str, Method],
    parameters: int,
    fit: Fit | None = None,
) -> list[dict[str, Any]]:
    """What each method makes of one update.

    Args:
        site: Its name, for the rows.
        weight: W0, (out, in).
        delta: The update that is approximated, (out, in).
        methods: By name, for the rows; the setting of each that chooses how much is trained is set.
        parameters: Trained ones, as near as a method comes to them.
        fit: How closely is fitted.

    Returns:
        Rows with ``site``, ``method``, ``setting``, ``parameters``, ``error`` (‖ΔW - fit‖ / ‖ΔW‖), ``rounds`` and
        ``settled``.

    Raises:
        SettingsError: The update is zero, or a method has no such setting.
    """
    fit = fit or Fit()
    if not delta.any():
        raise SettingsError(f"{site}: its update is zero, which every method has")
    rows = []
    for name, method in methods.items():
        match = matched(_layer(weight.to("meta")), method, [SITE], parameters)
        fitted = nearest(weight, delta, match.method, fit)
        error = ((fitted.delta - delta.double()).norm() / delta.double().norm()).item()
        rows.append({
            "site": site, "method": name, "setting": match.override, "parameters": match.parameters,
            "error": error, "rounds": fitted.rounds, "settled": fitted.settled,
        })  # fmt: skip
    return rows


def updates_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """W0 and ΔW of every site of an adapted model, by name."""
    names = {id(update): name for name, update in require_adaptation(model).updates.items()}
    with torch.no_grad():
        return {
            names[id(update)]: (weight, update.delta(weight))
            for layer in adapted_layers(model).values()
            for rows, update in zip(layer.rows, layer.updates, strict=True)
            for weight in [dense(layer.weight)[rows]]
        }


def nearest(weight: Tensor, delta: Tensor, method: Method, fit: Fit | None = None) -> Fitted:
    """The update of `method`, beside W0, that is nearest to `delta` in the Frobenius norm, as far as it is found."""
    fit, target = fit or Fit(), delta.double()
    layer = _layer(weight)
    adapt(layer, method.grown(), [SITE], fit.seed)
    (update,) = require_adaptation(layer).updates.values()
    if type(update) is LoRAUpdate:  # those of methods that share its layout are not free
        return Fitted(truncated(target, update.A.shape[0]), 0, True)
    size = target.norm()
    generator = torch.Generator().manual_seed(fit.seed)
    search = solver(update, weight, target / size)
    found = [search(fit, generator) for _ in range(1 + fit.restarts)]
    best = min(found, key=lambda one: (one.delta - target / size).norm().item())
    return best._replace(delta=best.delta * size)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank (Eckart and Young, 1936)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def _layer(weight: Tensor) -> nn.ModuleDict:
    """A model of one site."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    return nn.ModuleDict({SITE: linear})
