"""torch.compile of the blocks of a model, for the steps of a training."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn

from randlora.adapters.layer import AdaptedLinear
from randlora.errors import SettingsError

BACKEND = "inductor"
RECOMPILATIONS = 1000  # torch gives up after 8; methods with a constant for each layer need as many graphs as layers


class CompiledBlocks:
    """A context inside which the blocks of a model run compiled, each as one graph; outside they run as they were.

    Blocks that are alike share a graph, so that a deep model compiles in the time of a shallow one. Scoring is left
    outside: its batches have other shapes, and it forms W'.

    Args:
        model: Adapted.

    Raises:
        SettingsError: The model has no blocks.
    """

    def __init__(self, model: nn.Module):

        self.blocks = blocks(model)
        if not self.blocks:
            raise SettingsError("trainer.compile=true: the model has no list of blocks to compile; leave it out")
        self._calls: list[Any] = []
        for block in self.blocks:
            block.compile(fullgraph=True, backend=BACKEND)
            self._calls.append(block._compiled_call_impl)
            block._compiled_call_impl = None

    def __enter__(self) -> None:
        self._limit = torch._dynamo.config.patch(
            recompile_limit=RECOMPILATIONS, accumulated_recompile_limit=RECOMPILATIONS
        )
        self._limit.__enter__()
        for block, call in zip(self.blocks, self._calls, strict=True):
            block._compiled_call_impl = call

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self.blocks:
            block._compiled_call_impl = None
        self._limit.__exit__(kind, error, trace)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members with adapted layers of the outermost lists of modules, such as the layers of a transformer."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
            found += [block for block in child if any(isinstance(module, AdaptedLinear) for module in block.modules())]
        else:
            found += blocks(child)
    return found
