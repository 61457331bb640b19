"""Which linear maps are adapted: patterns to places."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from randlora.adapters.layer import AdaptedLinear, linear_weight
from randlora.errors import SettingsError

ALL_LINEAR = "all-linear"  # PEFT's word
HEADS = ("lm_head", "embed_out", "score", "classifier")  # of transformers: what ALL_LINEAR leaves out, as PEFT does
REGULAR = "re:"  # begins a regular expression

_SLICED = re.compile(r"(.+)\[(\w+)\]")


class Place(NamedTuple):
    """A linear module and the rows of it that make one site (None: all)."""

    site: str
    module: str
    rows: slice | None


@dataclass(frozen=True)
class Pattern:
    """What a target says of module names, with the name of a slice where it ends in one: ``*.c_attn[q]``.

    It is an fnmatch pattern, a name or the end of one (``q_proj``), ``all-linear``, or ``re:`` and a regular one.
    """

    modules: str
    part: str | None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Of a target as users write it."""
        sliced = None if text.startswith(REGULAR) else _SLICED.fullmatch(text)
        return cls(sliced[1], sliced[2]) if sliced else cls(text, None)

    def among(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that it means; the end of a name only where none is it as a whole."""
        if self.modules == ALL_LINEAR:
            return [name for name in names if name.rpartition(".")[2] not in HEADS]
        if self.modules.startswith(REGULAR):
            try:
                expression = re.compile(self.modules.removeprefix(REGULAR))
            except re.error as error:
                raise SettingsError(f"target {self.modules!r} is no regular expression: {error}") from error
            return [name for name in names if expression.fullmatch(name)]
        whole = [name for name in names if fnmatchcase(name, self.modules)]
        return whole or [name for name in names if name.endswith(f".{self.modules}")]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or transformers' Conv1D (recognised by name: importing transformers takes seconds)."""
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    )


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """All linear modules by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def match(names: Sequence[str], patterns: Sequence[str]) -> list[tuple[str, str | None]]:
    """(module, slice) pairs that the patterns name, in the order of `names`.

    Raises SettingsError when a pattern names no linear map, or names a matrix both whole and in slices.
    """
    if isinstance(patterns, str) or not patterns:
        raise SettingsError(f"targets={patterns!r}: give a list of at least one pattern, such as ['*.q_proj']")
    wanted: dict[str, list[str | None]] = {name: [] for name in names}
    for text in patterns:
        pattern = Pattern.parse(text)
        hits = pattern.among(names)
        if not hits:
            raise SettingsError(f"target {text!r} matches no linear map; {_near(names, pattern.modules)}")
        for name in hits:
            if pattern.part not in wanted[name]:
                wanted[name].append(pattern.part)
    for name, parts in wanted.items():
        if None in parts and len(parts) > 1:
            raise SettingsError(f"targets name {name} both whole and as {name}[{parts[1] or parts[0]}]: choose one")
    return [(name, part) for name in names for part in wanted[name]]


def _near(names: Sequence[str], pattern: str) -> str:
    if not names:
        return "the model has none"
    generic = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
    close = difflib.get_close_matches(pattern, generic, n=3, cutoff=0.4) or generic[:8]
    return "there are " + ", ".join(close)


def places(model: nn.Module, patterns: Sequence[str]) -> list[Place]:
    """The sites that the patterns name in `model`, in the model's order; SettingsError for a bad pattern."""
    maps = linear_maps(model)
    chosen = []
    for name, part in match(list(maps), patterns):
        if part is None:
            chosen.append(Place(name, name, None))
        else:
            parts = named_slices(name, maps[name], getattr(model, "config", None))
            if part not in parts:
                known = ", ".join(f"{name}[{p}]" for p in parts) or "none: it is not a fused matrix that is known"
                raise SettingsError(f"{name} has no slice {part!r}; it has {known}")
            chosen.append(Place(f"{name}[{part}]", name, parts[part]))
    _refuse_shared(model, maps, {place.module for place in chosen})
    return chosen


def completed(model: nn.Module, chosen: Sequence[Place], wanted: Callable[[str], bool]) -> list[Place]:
    """The places with the other slices of their fused matrices, of those whose weight's name is `wanted`."""
    maps, complete = linear_maps(model), list(chosen)
    for name in dict.fromkeys(place.module for place in chosen if place.rows is not None):
        if wanted(f"{name}.weight"):
            parts = named_slices(name, maps[name], getattr(model, "config", None))
            every = [Place(f"{name}[{part}]", name, rows) for part, rows in parts.items()]
            complete += [place for place in every if place not in chosen]
    order = list(maps)
    return sorted(complete, key=lambda place: order.index(place.module))


def named_slices(name: str, module: nn.Module, config: object = None) -> Mapping[str, slice]:
    """The row ranges of a fused projection by name: q, k, v of an attention, gate and up of an MLP.

    `config` is the transformers configuration, needed where keys and values have fewer heads than queries.
    """
    out_features = linear_weight(module).shape[0]
    role = name.rpartition(".")[2]
    if role == "gate_up_proj":
        sizes = {"gate": out_features // 2, "up": out_features // 2}
    elif role in ("in_proj", "c_attn", "qkv", "qkv_proj"):
        heads = getattr(config, "num_attention_heads", None) or 1
        groups = getattr(config, "num_key_value_heads", None) or heads
        unit = out_features // (heads + 2 * groups)
        sizes = {"q": heads * unit, "k": groups * unit, "v": groups * unit}
    else:
        return {}
    if sum(sizes.values()) != out_features:
        return {}
    starts = [sum(list(sizes.values())[:i]) for i in range(len(sizes))]
    return {key: slice(start, start + size) for (key, size), start in zip(sizes.items(), starts, strict=True)}


def _refuse_shared(model: nn.Module, maps: Mapping[str, nn.Module], chosen: set[str]) -> None:
    """A matrix that two modules share cannot be adapted in one of them: the other would not follow."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or isinstance(module, AdaptedLinear):
            continue
        other = owners.setdefault(id(weight), name)
        if other != name and chosen & {name, other}:
            raise SettingsError(f"{name} and {other} share one weight: leave both out of the targets")
