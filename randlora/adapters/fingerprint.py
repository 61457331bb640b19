"""Whether a model is the one that an adapter was trained on, from a few bytes for each of its tensors.

A tensor's fingerprint is 16 bits of a SHA-256 of its name and shape, and 16 bits of one of its values: of 64 of them, a
fixed stride apart, or of all on request. A change of other values than these goes unnoticed unless all are read.

Values are compared as bfloat16, so float32 weights and the same ones cast to bfloat16 agree. Between float16 and these
nothing can be said, since rounding twice differs from rounding once, and weights in 8 or 4 bits are compared by name
and shape alone: an adapter moves freely between a base and its quantised form, and what is not quantised (embeddings,
norms, biases) still tells another base.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randlora.adapters.quantization import is_quantised, recognise

SAMPLES = 64
_BYTES = 2  # of either digest


@dataclass(frozen=True)
class Difference:
    """How a model differs from the one of a fingerprint.

    Args:
        tensors: Of the fingerprint.
        compared: Those of them whose values could be compared.
        missing: Those of them of which the model has none of that name and shape.
        changed: Names of the model's tensors that have other values.
    """

    tensors: int
    compared: int
    missing: int
    changed: list[str]


def fingerprint(tensors: Mapping[str, Tensor], whole: bool = False) -> dict[str, Any]:
    """The fingerprint of tensors by name, as plain data; of all values if `whole`."""
    packed: dict[str, bytes] = {}
    for name, tensor in sorted(tensors.items()):
        precision = _precision(tensor)
        packed[precision] = packed.get(precision, b"") + _place(name, tensor) + _values(tensor, precision, whole)
    return {"whole": whole} | {key: base64.b64encode(content).decode() for key, content in sorted(packed.items())}


def difference(recorded: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Difference:
    """What tells `tensors` from those of which `fingerprint` gave `recorded`; further tensors do not matter.

    Raises ValueError where `recorded` is no fingerprint.
    """
    here: dict[bytes, list[str]] = {}
    for name, tensor in tensors.items():
        here.setdefault(_place(name, tensor), []).append(name)
    count = compared = missing = 0
    changed: list[str] = []
    for precision, text in recorded.items():
        if precision == "whole":
            continue
        packed = base64.b64decode(text, validate=True)
        for start in range(0, len(packed), 2 * _BYTES):
            place, values = packed[start : start + _BYTES], packed[start + _BYTES : start + 2 * _BYTES]
            count += 1
            missing += place not in here
            names = [name for name in here.get(place, []) if _precision(tensors[name]) == precision != "quantised"]
            compared += bool(names)
            if names and all(_values(tensors[name], precision, recorded["whole"]) != values for name in names):
                changed.append(names[0])
    return Difference(count, compared, missing, changed)


def _precision(tensor: Tensor) -> str:
    recognise(tensor)
    if is_quantised(tensor) or not tensor.is_floating_point():
        return "quantised"
    return "float16" if tensor.dtype == torch.float16 else "float32"


def _place(name: str, tensor: Tensor) -> bytes:
    return hashlib.sha256(f"{name} {tuple(tensor.shape)}".encode()).digest()[:_BYTES]


@torch.no_grad()
def _values(tensor: Tensor, precision: str, whole: bool) -> bytes:
    if precision == "quantised":
        return bytes(_BYTES)
    values = tensor.detach().reshape(-1)
    if not whole and len(values) > SAMPLES:
        # One more than the even stride, so that the samples of a matrix are not all in one column.
        positions = torch.arange(SAMPLES, device=tensor.device) * (len(values) // SAMPLES + 1) % len(values)
        values = values[positions]
    if precision != "float16":
        values = values.to(torch.bfloat16)
    return hashlib.sha256(values.cpu().contiguous().view(torch.int16).numpy().tobytes()).digest()[:_BYTES]
