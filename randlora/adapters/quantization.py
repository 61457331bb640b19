"""Frozen weights in 8 or 4 bits, by torchao or bitsandbytes: the linear maps of a model, but for its output head."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from randlora.adapters.nf4 import BLOCK, NF4Weight
from randlora.errors import SettingsError

BITS = {"int8": 8, "int4": 4, "nf4": 4}
GROUP = 128  # weights that share a scale in int4; a row does in int8


def quantise(module: nn.Module, quantization: str) -> None:
    """Replaces the weights of the quantised maps in place.

    Args:
        module: the model.
        quantization: int8 (a scale for each row), int4 (a scale for each group of 128 weights), or nf4 (of 64).

    Raises:
        SettingsError: torchao or bitsandbytes is missing, or something that it needs here, or a matrix does not fit.
    """
    load_library(quantization)
    chosen = quantised_maps(module)
    try:
        if quantization == "nf4":
            for linear in chosen.values():
                linear.weight = nn.Parameter(NF4Weight.of(linear.weight), requires_grad=False)
        else:
            _to_integers(module, chosen, quantization)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"model.quantization={quantization} does not work here ({reason}): use int8, or null"
        ) from error
    for name, linear in chosen.items():  # torchao passes over what does not fit, without a word
        recognise(linear.weight)
        if not is_quantised(linear.weight):
            shape = " × ".join(map(str, linear.weight.shape))
            raise SettingsError(
                f"model.quantization={quantization} does not work here: {name} is {shape}, in groups of {GROUP}"
            )


def load_library(quantization: str) -> None:
    """Imports what quantises so; SettingsError where it is missing."""
    package, extra = ("bitsandbytes", "nf4") if quantization == "nf4" else ("torchao", "quant")
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise SettingsError(
            f"model.quantization={quantization} needs the package {package}: pip install 'randlora[{extra}]'"
        ) from error


def _to_integers(module: nn.Module, chosen: Mapping[str, nn.Linear], quantization: str) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    configuration = Int8WeightOnlyConfig() if quantization == "int8" else Int4WeightOnlyConfig(group_size=GROUP)
    quantize_(module, configuration, filter_fn=lambda linear, name: name in chosen)


def quantised_maps(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps that are quantised, by name: those inside numbered blocks. Output heads are left.

    SettingsError where there are none, as in GPT-2, whose maps are of another class.
    """
    maps = {
        name: linear
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and any(part.isdigit() for part in name.split("."))
    }
    if not maps:
        raise SettingsError("model.quantization: the model has no linear maps in its blocks; use null")
    return maps


def stored_bytes(linear: nn.Linear, quantization: str) -> int:
    """What a quantised weight and its scales take."""
    rows, columns = linear.weight.shape
    scale = linear.weight.dtype.itemsize
    scales = {"int8": rows * scale, "int4": 2 * rows * -(-columns // GROUP) * scale, "nf4": rows * columns // BLOCK * 4}
    return rows * columns * BITS[quantization] // 8 + scales[quantization]


_types: tuple[type, ...] = ()  # of quantised weights, as they are met


def is_quantised(weight: Tensor) -> bool:
    """Whether `recognise` has met weights of this type; a compiler can follow it."""
    return isinstance(weight, _types)


def recognise(weight: Tensor) -> None:
    """Notes the type of a weight that torchao, or `quantise`, has quantised, here or elsewhere."""
    global _types
    ours = isinstance(weight, NF4Weight)
    if (ours or type(weight).__module__.startswith("torchao.")) and type(weight) not in _types:
        _types = (*_types, type(weight))


def dense(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The plain matrix that a quantised weight stands for; another weight as it is."""
    plain = weight.dequantize() if is_quantised(weight) else weight
    return plain if dtype is None else plain.to(dtype)
