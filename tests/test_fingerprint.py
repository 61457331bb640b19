"""The fingerprint of frozen weights: its bytes as documented, and what it can tell and cannot."""

import base64
import hashlib

import torch
from torch import Tensor

from randlora.adapters.fingerprint import Difference, difference, fingerprint


def digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:2]


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "w": torch.randn(20, 10), "short": torch.randn(64), "half": torch.randn(5).half(), "steps": torch.arange(3),
        "coarse": torch.randn(2, 3).bfloat16(),
    }  # fmt: skip


def test_its_bytes_are_the_documented_ones() -> None:
    """Two of the SHA-256 of "name shape" and two of the values', as bfloat16 but for float16, by precision and name."""
    given = tensors()
    flat = given["w"].flatten()
    sampled = flat[[i * (200 // 64 + 1) % 200 for i in range(64)]]

    def entry(name: str, shape: str, values: Tensor) -> bytes:
        return digest(f"{name} {shape}".encode()) + digest(values.contiguous().view(torch.int16).numpy().tobytes())

    for whole in (False, True):
        w = flat if whole else sampled
        packed = {
            "float16": entry("half", "(5,)", given["half"]),
            "float32": entry("coarse", "(2, 3)", given["coarse"]) + entry("short", "(64,)", given["short"].bfloat16())
            + entry("w", "(20, 10)", w.bfloat16()),
            "quantised": digest(b"steps (3,)") + b"\0\0",
        }  # fmt: skip
        expected = {name: base64.b64encode(content).decode() for name, content in packed.items()}
        assert fingerprint(given, whole) == {"whole": whole, **expected}
    assert fingerprint(given) == fingerprint(given, whole=False)


def test_what_tells_models_apart() -> None:
    """Values that are looked at, names and shapes; not further tensors, rounding to bfloat16, or other precisions."""
    given = tensors()
    recorded, whole = fingerprint(given), fingerprint(given, whole=True)
    assert difference(recorded, given) == Difference(tensors=5, compared=4, missing=0, changed=[])
    assert difference(recorded, given | {"more": torch.ones(2)}) == Difference(5, 4, 0, [])
    cast = {name: t.bfloat16() if t.dtype == torch.float32 else t for name, t in given.items()}
    assert difference(recorded, cast) == Difference(5, 4, 0, [])
    assert difference(recorded, given | {"w": given["w"].half()}) == Difference(5, 3, 0, [])
    assert difference(recorded, {"w": given["w"]}) == Difference(5, 1, 4, [])
    assert difference(recorded, given | {"w": given["w"].T}) == Difference(5, 3, 1, [])
    assert difference(recorded, given | {"steps": torch.zeros(3, dtype=torch.int64)}) == Difference(5, 4, 0, [])
    for position, seen in ((0, True), (4, True), (1, False)):
        other = given["w"].clone()
        other.view(-1)[position] += 1
        assert difference(recorded, given | {"w": other}).changed == (["w"] if seen else [])
        assert difference(whole, given | {"w": other}).changed == ["w"]
