"""What is frozen stays frozen, to the bit, through steps in bf16 and merged evaluations, by every method.

`python tests/test_frozen.py 1000` does so for 1,000 steps and prints a line for each method.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from test_processes import ADAPTED, METHODS, Net, method_of
from test_training import TASK, Quiet, splits

import randlora
from randlora.tasks.base import Bound
from randlora.training import Trainer


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hashes(name: str, steps: int, folder: Path) -> tuple[str, str, int]:
    """Of every frozen parameter before and after, and how many these are; what is trained must have changed."""
    torch.manual_seed(0)
    net = Net()
    randlora.adapt(net, method_of(name), ADAPTED)
    net.head.requires_grad_(True)
    frozen = {key: tensor for key, tensor in net.named_parameters() if not tensor.requires_grad}
    trained = {key: tensor for key, tensor in net.named_parameters() if tensor.requires_grad}
    before, start = sha256(frozen), sha256(trained)
    trainer = Trainer(
        max_steps=steps, batch_size=4, micro_batch_size=2, learning_rate=0.01, precision="bf16", device="cpu",
        evaluate_every=max(1, steps // 3),
    )  # fmt: skip
    bound = Bound(net, None if name == "full" else net.head)
    trainer.fit(
        TASK, bound, splits(), seed=1, folder=folder, observer=Quiet(), accelerator=trainer.accelerator()
    )  # fmt: skip
    assert sha256(trained) != start
    return before, sha256(frozen), sum(tensor.numel() for tensor in frozen.values())


@pytest.mark.parametrize("name", METHODS)
def test_frozen_weights_are_as_they_were(name: str, tmp_path: Path) -> None:
    before, after, count = hashes(name, 20, tmp_path)
    assert before == after
    assert count >= 4 * 64 * 64


if __name__ == "__main__":
    for method in METHODS:
        old, new, size = hashes(method, int(sys.argv[1]), Path(tempfile.mkdtemp()))
        print(
            f"{method:12} {size:6,} frozen parameters: {'unchanged' if old == new else 'CHANGED'} {new[:12]}",
            flush=True,
        )
