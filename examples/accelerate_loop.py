"""A loop with accelerate: any number of processes, accumulation, mixed precision; and PEFT's files.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py

The backbone has random weights, so that nothing is downloaded; LoRA's updates and a new head on it learn digits.
"""

import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import randlora
from randlora.methods import LoRA


def backbone() -> nn.Module:
    """Stands for a pretrained model: the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU())


def main() -> None:
    # The buffers are fixed bases, which every process draws alike: no need to send them.
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(gradient_accumulation_steps=2, kwargs_handlers=[handler])

    adapted = backbone()
    report = randlora.adapt(adapted, LoRA(rank=8), targets=["1", "3"], seed=0)  # freezes what it does not train
    model = nn.Sequential(adapted, nn.Linear(256, 10))  # the head is new and comes after
    accelerator.print(f"{len(report.sites)} sites, {report.trainable_parameters:,} trained parameters")

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=50, shuffle=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(10):
        for batch, target in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch), target)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

    trained = accelerator.unwrap_model(model).eval()
    with torch.no_grad(), randlora.merged(trained):  # evaluation at the base's cost
        right = trained(images[1400:].to(accelerator.device)).argmax(-1).cpu() == labels[1400:]
    accelerator.print(f"accuracy on new digits: {right.float().mean():.3f}")

    if accelerator.is_main_process:
        adapted, fresh = adapted.cpu(), backbone()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            randlora.to_peft(adapted, folder)  # adapter_config.json and adapter_model.safetensors
            randlora.from_peft(fresh, folder)
            torch.testing.assert_close(fresh(images), adapted(images), rtol=1e-4, atol=1e-4)
        print("written for PEFT and read again: the same features")
    accelerator.end_training()


if __name__ == "__main__":
    main()
