"""Adapt a torch model of your own and train it with a torch loop; save, load, merge.

    python examples/plain_torch.py

A small network knows handwritten digits. The images are then turned upside down, and RandLoRA adapts it to that.
"""

import tempfile

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import randlora
from randlora.methods import RandLoRA


class Network(nn.Module):
    """Any torch model will do; targets are matched with the names of its linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.blocks = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))
        self.classify = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        for block in self.blocks:
            x = x + block(x).relu()
        return self.classify(x)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    """The optimiser gets what requires a gradient: everything before `adapt`, the updates after it."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return (model(x).argmax(-1) == y).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    upright, turned, seen, unseen = images.flatten(1), images.flip(1).flatten(1), slice(0, 1400), slice(1400, None)

    pretrained = Network()
    train(pretrained, upright[seen], labels[seen], steps=150)
    weights = pretrained.state_dict()
    print(f"upside down, before: {accuracy(pretrained, turned[unseen], labels[unseen]):.3f}")

    model = Network()
    model.load_state_dict(weights)
    report = randlora.adapt(model, RandLoRA(rank=8), targets=["first", "blocks.*"], seed=0)
    print(f"training {report.trainable_parameters:,} of {report.total_parameters:,} parameters")
    train(model, turned[seen], labels[seen], steps=150)
    print(f"upside down, after:  {accuracy(model, turned[unseen], labels[unseen]):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        print(f"the adapter has {randlora.save_adapter(model, folder):,} bytes")  # and no bases: they are drawn again
        fresh = Network()
        fresh.load_state_dict(weights)
        randlora.load_adapter(fresh, folder)

    randlora.merge(fresh)  # plain linear layers again
    torch.testing.assert_close(fresh(turned), model(turned), rtol=1e-4, atol=1e-4)
    print("saved, loaded and merged: the same outputs")


if __name__ == "__main__":
    main()
