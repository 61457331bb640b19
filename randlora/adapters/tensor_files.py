"""Safetensors files: how tensors get into one, and what it holds, from its header alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from randlora.integrity import Damaged

# What safetensors calls the dtypes.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor's dtype, as safetensors calls it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by name, wherever they are and however they lie in memory."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def entry(tensor: Tensor) -> Entry:
    """What the header would say of `tensor`."""
    return Entry(_DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, without reading them; Damaged where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Entry(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
