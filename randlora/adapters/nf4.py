"""Frozen weights as 4-bit NormalFloats (QLoRA: Dettmers et al. 2023, arXiv 2305.14314), packed by bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # weights of a row that share a scale, bitsandbytes' default; the scales are not quantised again


class NF4Weight(Tensor):
    """A frozen matrix (out, in) that keeps its shape and dtype and is stored in half a byte a weight.

    F.linear computes with it, rows can be sliced, and `dequantize` gives the numbers; other operations are errors.

    Args:
        packed: two weights a byte, (out, in / 2), uint8.
        scales: the largest absolute weight of every block, (out, in / BLOCK), float32.
        dtype: of the numbers that it stands for.
    """

    packed: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> NF4Weight:
        shape = packed.shape[0], 2 * packed.shape[1]
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)

    def __init__(self, packed: Tensor, scales: Tensor, dtype: torch.dtype):
        self.packed, self.scales = packed, scales

    def __repr__(self) -> str:  # type: ignore[override]
        return f"NF4Weight({self.shape[0]} × {self.shape[1]}, {self.dtype})"

    @classmethod
    def of(cls, weight: Tensor) -> NF4Weight:
        """A matrix (out, in) in fewer bits; ImportError without bitsandbytes, ValueError where `in` has no blocks."""
        from bitsandbytes.functional import quantize_4bit

        out_features, in_features = weight.shape
        if in_features % BLOCK:
            raise ValueError(f"rows of {in_features} weights have no blocks of {BLOCK}")
        packed, state = quantize_4bit(weight.detach().contiguous(), blocksize=BLOCK, quant_type="nf4")
        return cls(packed.view(out_features, -1), state.absmax.view(out_features, -1), weight.dtype)

    def dequantize(self) -> Tensor:
        """The numbers that it stands for, (out, in)."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        code = get_4bit_type("nf4", device=self.device)
        state = QuantState(self.scales.flatten(), self.shape, code, BLOCK, "nf4", self.dtype)
        return dequantize_4bit(self.packed.view(-1, 1), state)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Of torch's operators those that leave the numbers as they are."""
        (weight, *rest), kwargs = args, kwargs or {}
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return weight._with(lambda part: part)
        if func is aten.clone.default:
            return weight._with(torch.clone)
        if func is aten._to_copy.default:
            moved = weight._with(lambda part: part.to(kwargs.get("device", part.device), copy=True))
            return NF4Weight(moved.packed, moved.scales, kwargs.get("dtype") or weight.dtype)
        if func is aten.slice.Tensor and rest[:1] == [0]:
            return weight._with(lambda part: func(part, *rest))
        raise NotImplementedError(f"{func} of a weight in NF4: ask for its numbers by dequantize()")

    def _with(self, change: Callable[[Tensor], Tensor]) -> NF4Weight:
        return NF4Weight(change(self.packed), change(self.scales), self.dtype)

    def _stable_hash_for_caching(self) -> str:  # for compilers, as are the next two
        return repr(self)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["packed", "scales"], self.dtype

    @staticmethod
    def __tensor_unflatten__(parts: Mapping[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> NF4Weight:
        return NF4Weight(parts["packed"], parts["scales"], dtype)


def _linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, in autocast's dtype where it is on."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = _Product.apply(x, weight.packed, weight.scales, weight)
    return y if bias is None else y + bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ, which keeps the bits for backward in place of the numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, weight: NF4Weight) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.dtype = weight.dtype
        return F.linear(x, weight.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scales = ctx.saved_tensors
        weight = NF4Weight(packed, scales, ctx.dtype)
        return gradient @ weight.dequantize().to(gradient.dtype), None, None, None
