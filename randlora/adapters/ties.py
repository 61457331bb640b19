"""Parameters that a module shares with the rest of its model, as a tied output layer does with the embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

TIED = "tie_word_embeddings"  # in transformers' configurations


def shared(model: nn.Module, module: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters of `module` that `model` also has outside of it, each with a name that it has there."""
    inside = set(module.modules())
    outside = {
        parameter: f"{name}.{key}".lstrip(".")
        for name, other in model.named_modules()
        if other not in inside
        for key, parameter in other._parameters.items()
        if parameter is not None
    }
    return {parameter: outside[parameter] for parameter in module.parameters() if parameter in outside}


def separate(model: nn.Module, module: nn.Module) -> None:
    """Gives `module` equal parameters of its own in place of those that it has, which stay as they are.

    Where it shared some with the rest of `model`, transformers' configurations say from here on that embeddings are
    not tied, or the model, once written, would be read with them tied again.
    """
    if shared(model, module):
        for part in model.modules():
            if getattr(config := getattr(part, "config", None), TIED, False):
                setattr(config, TIED, False)
    replace_parameters(
        module, {old: nn.Parameter(old.detach().clone(), old.requires_grad) for old in module.parameters()}
    )


def replace_parameters(model: nn.Module, others: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Puts other parameters in the place of some of `model`'s, wherever it has them."""
    for part in model.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and parameter in others:
                part._parameters[key] = others[parameter]
