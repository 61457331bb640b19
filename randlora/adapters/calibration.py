"""A look at training data before updates are built, for methods that choose by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from randlora.adapters.attention import fuse_attention, unfuse_attention
from randlora.adapters.interface import Method
from randlora.adapters.targets import places

Batch = TypeVar("Batch")
Pooling = Callable[[Tensor, Tensor | None], Tensor]  # (B, L, d), and where no padding is (B, L) if known, to (B, d)


def calibrate(
    model: nn.Module,
    method: Method,
    targets: Sequence[str],
    batches: Iterable[Batch],
    forward: Callable[[Batch], object],
) -> Method:
    """The method with what it chooses from training data, to be given to `adapt`; itself where it chooses nothing.

    Args:
        model: not adapted; left in evaluation mode.
        method: what is going to build the updates.
        targets: of the model, as for `adapt`.
        batches: of training examples, `method.calibration_examples` in all; unread where that is 0.
        forward: runs the model over a batch; what it returns is not used.

    Raises:
        SettingsError: a pattern matches nothing, or the method cannot choose from these data.
    """
    if not method.calibration_examples:
        return method
    unfuse_attention(model)
    try:
        sites = [place.site for place in places(model, targets)]
    finally:
        fuse_attention(model)
    model.eval()
    with torch.no_grad():
        return method.calibrated(model, sites, (forward(batch) for batch in batches))


class States(NamedTuple):
    """The hidden states of examples that enter and that leave a block, pooled over their tokens: (N, d) each."""

    entering: Tensor
    leaving: Tensor


def hidden_states(
    model: nn.Module, blocks: Sequence[str], passes: Iterable[object], pooling: Pooling
) -> dict[str, States]:
    """What enters and leaves modules of the model while `passes` is iterated; float32, on the CPU.

    Args:
        model: what is run.
        blocks: names of modules whose first argument and (first) output are hidden states (B, L, d), (B, H, W, d) or
            (B, d).
        passes: getting an item runs the model once.
        pooling: what becomes of states (B, L, d). The mask is the two-dimensional `attention_mask` that the block or a
            module around it was called with, where there is one.
    """
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in blocks}
    masks: dict[str, Tensor] = {}

    def note_mask(module: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
        mask = options.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            masks["latest"] = mask

    def keep(states: list[Tensor], hidden: Tensor) -> None:
        if hidden.dim() > 2:
            hidden, mask = hidden.flatten(1, -2).float(), masks.get("latest")
            hidden = pooling(hidden, mask if mask is not None and mask.shape == hidden.shape[:2] else None)
        states.append(hidden.float().cpu())

    with ExitStack() as hooks:
        around = {name[:end] for name in blocks for end, letter in enumerate(name) if letter == "."}
        for name in sorted({"", *around}):
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(note_mask, with_kwargs=True))
        for name, (entering, leaving) in seen.items():
            module = model.get_submodule(name)

            def enters(module: nn.Module, arguments: Any, options: Any, states: list[Tensor] = entering) -> None:
                keep(states, next(value for value in (*arguments, *options.values()) if isinstance(value, Tensor)))

            def leaves(module: nn.Module, arguments: Any, output: Any, states: list[Tensor] = leaving) -> None:
                keep(states, output if isinstance(output, Tensor) else output[0])

            hooks.enter_context(module.register_forward_pre_hook(enters, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leaves))
        for _ in passes:
            pass
    return {name: States(torch.cat(entering), torch.cat(leaving)) for name, (entering, leaving) in seen.items()}
