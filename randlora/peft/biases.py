"""PEFT's `bias`: the biases of the model that are trained beside the updates."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from randlora.adapters.attention import UnfusedAttention
from randlora.adapters.core import adapted_layers

NONE, ALL, ONLY = "none", "all", "_only"  # the last after the type: lora_only, those of the adapted layers


def biases(model: nn.Module, which: str, sites: Collection[str], saved: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """The biases that PEFT means by `which`, by their names in the plain model, without those of `saved` modules."""
    if which == NONE:
        return {}
    beside = {parameter for module in saved for parameter in module.parameters()}
    layers = adapted_layers(model)
    found = {}
    for name, module in model.named_modules():
        parent, _, child = name.rpartition(".")
        plain = parent if parent in layers and child == "base" else name
        bias = module._parameters.get("bias")
        # PEFT sees a fused attention, whose in_proj_bias is none of the name.
        fused = child == "in_proj" and isinstance(model.get_submodule(parent), UnfusedAttention)
        if bias is not None and bias not in beside and not fused and (which == ALL or plain in sites):
            found[f"{plain}.bias".lstrip(".")] = bias
    return found
