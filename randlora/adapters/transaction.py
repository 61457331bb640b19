"""Changes of a model that are made whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from randlora.adapters.ties import TIED


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Whatever ends the code inside early, the model has its modules, parameters and `requires_grad` of before.

    Transformers' configurations say of ties what they said.
    """
    parts = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    configs = [config for module, _, _ in parts if hasattr(config := getattr(module, "config", None), TIED)]
    ties = [(config, getattr(config, TIED)) for config in configs]
    adapted = {id(module) for module in model.modules() if "_adaptation" in module.__dict__}
    try:
        yield
    except BaseException:
        for module, children, parameters in parts:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
            if id(module) not in adapted:
                module.__dict__.pop("_adaptation", None)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for config, tied in ties:
            setattr(config, TIED, tied)
        raise
