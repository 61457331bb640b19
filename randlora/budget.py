"""Settings of different methods for one number of trained parameters, on given sites of a given model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from randlora.adapters import Method, adapt
from randlora.adapters.core import unload
from randlora.errors import SettingsError, check_count

TOLERANCE = 0.02  # of the target; what is farther from it is said to be
LARGEST = 2**17  # of a setting that is tried


@dataclass(frozen=True)
class Match:
    """The nearest that a method comes to a target: its settings, what they train, and what was wished for."""

    method: Method
    parameters: int
    target: int

    @property
    def error(self) -> float:
        """How far the parameters are from the target, as a share of it; negative where they are fewer."""
        return self.parameters / self.target - 1

    @property
    def within(self) -> bool:
        """Whether that is within TOLERANCE."""
        return abs(self.error) <= TOLERANCE

    @property
    def override(self) -> str:
        """The setting that was chosen, as the command line takes it."""
        name = str(self.method.budget_setting)
        return f"method.{name}={getattr(self.method, name)}"


def parameters(model: nn.Module, method: Method, targets: Sequence[str]) -> int:
    """What `method` trains on the sites of `model` in the end; the model is as before, best without values (meta)."""
    trained = adapt(model, method.grown(), targets).trainable_parameters
    unload(model)
    return trained


def matched(model: nn.Module, method: Method, targets: Sequence[str], target: int) -> Match:
    """The method with its `budget_setting` chosen for `target` trained parameters, all others kept.

    Of two that are equally near, the one with fewer parameters.

    Args:
        model: not adapted; on the meta device nothing is computed.
        method: with the settings that are kept.
        targets: the sites, as for `adapt`.
        target: trained parameters, a head not counted.

    Raises:
        SettingsError: the method has no such setting, or cannot adapt these sites at all.
    """
    check_count("target", target)
    name = method.budget_setting
    if name is None or name not in {field.name for field in fields(method)}:  # type: ignore[arg-type]
        raise SettingsError(f"{method.name} has no setting that chooses how much is trained: leave it out")
    counts: dict[int, int | SettingsError] = {}

    def count(value: int) -> int | None:
        """What a value of the setting trains; None where the method refuses it."""
        if value not in counts:
            try:
                changes: dict[str, Any] = {name: value}
                counts[value] = parameters(model, replace(method, **changes), targets)  # type: ignore[type-var]
            except SettingsError as error:
                counts[value] = error
        known = counts[value]
        return known if isinstance(known, int) else None

    def at_target(value: int) -> bool:
        """Whether the count has crossed the target on the way from 1, or the method refuses more."""
        trained = count(value)
        return trained is None or (trained >= target) != starts_above

    first = count(1)
    if first is None:
        raise counts[1]  # type: ignore[misc]
    starts_above, high = first >= target, 2
    while high < LARGEST and not at_target(high):
        if starts_above and counts[high // 2] < counts[high]:
            break  # counts rise again, so the fewest are near
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at_target(middle) else (middle, high)
    # Counts that fall as the setting rises do so in steps, and rise a little within each.
    around = max(2, min(low, 512)) if starts_above else 2
    for value in range(max(1, low - around), high + around):
        count(value)
    trained = {value: known for value, known in counts.items() if isinstance(known, int)}
    best = min(trained, key=lambda value: (abs(trained[value] - target), trained[value], value))
    changes: dict[str, Any] = {name: best}
    return Match(replace(method, **changes), trained[best], target)  # type: ignore[type-var]
