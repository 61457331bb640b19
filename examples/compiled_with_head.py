"""A new head on an adapted model, trained under torch.compile, and both saved and loaded together.

    python examples/compiled_with_head.py

The backbone has random weights, so that nothing is downloaded; RandLoRA and the head learn digits.
"""

import tempfile

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import randlora
from randlora.methods import RandLoRA


class Classifier(nn.Module):
    """A backbone, which stands for a pretrained model, and from `add_head` on a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same backbone every time
        self.backbone = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU())

    def add_head(self) -> None:
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def main() -> None:
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)

    model = Classifier()
    randlora.adapt(model, RandLoRA(rank=8), targets=["backbone.*"], seed=0)
    model.add_head()  # after adapt, which would have frozen it
    step = torch.compile(model, fullgraph=True)  # in one graph: updates do not break it
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(step(images[:1400]), labels[:1400])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()  # the model itself: what is compiled shares its parameters
    with torch.no_grad(), randlora.merged(model):
        right = model(images[1400:]).argmax(-1) == labels[1400:]
    print(f"accuracy on new digits: {right.float().mean():.3f}")

    with tempfile.TemporaryDirectory() as folder:
        randlora.save_adapter(model, folder, modules={"head": model.head})
        fresh = Classifier()
        fresh.add_head()
        randlora.load_adapter(fresh, folder)  # the updates, and the head by its name
    torch.testing.assert_close(fresh.eval()(images), model(images), rtol=1e-4, atol=1e-4)
    print("saved with its head and loaded: the same outputs")


if __name__ == "__main__":
    main()
