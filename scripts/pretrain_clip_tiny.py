"""Makes the embedded clip_tiny: pretrains it, stores it inside the package, and writes its model card.

    python scripts/pretrain_clip_tiny.py data_root=FOLDER

Arguments are overrides of the experiment pretrain_clip_tiny; FOLDER holds tiny_imagenet and cifar10. An interrupted
pretraining goes on where it was; a finished one is only exported.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors.torch import save_file

from randlora.adapters import load_adapter, merge
from randlora.config import build, settings
from randlora.experiment import Experiment
from randlora.models import OpenClip
from randlora.models.open_clip import EMBEDDED
from randlora.records import Result
from randlora.run import run
from randlora.tasks import Budget, Task
from randlora.training.evaluate import evaluate

CARD = """# clip_tiny

A CLIP of {parameters:,} parameters, {tower_parameters:,} of them beside the token embedding, for 64-pixel images. It
exists so that the same code path as CLIP ViT-B/32 (open_clip, two towers of nn.MultiheadAttention, prompts, zero-shot
classification) runs on real pretrained weights without a download. It knows what Tiny-ImageNet shows and little else.

| | |
|---|---|
| weights | `clip_tiny.safetensors`, float16, {megabytes:.1f} MB; architecture `clip_tiny.json` |
| command | `python scripts/pretrain_clip_tiny.py data_root=FOLDER` (configs/experiment/pretrain_clip_tiny.yaml) |
| data | Tiny-ImageNet: {train:,} training images at 64 × 64, captions from class names and everyday kinds |
| training | {steps:,} steps of 256 pairs from random weights, bf16 autocast, two CPU cores, {seconds:,.0f} s |
| zero-shot, Tiny-ImageNet's official validation images (not trained on) | {tiny_imagenet:.1%} of 10,000, chance 0.5 % |
| zero-shot by class name, CIFAR-10's test images (data set never seen) | {cifar10:.1%} of 10,000, chance 10 % |

Scores are of the stored float16 weights, with the prompts of configs/task. The images are from ImageNet and come with
its terms: use the weights for research and tests. Captions call a Chihuahua "a kind of dog"; of CIFAR-10's class
names, {known} occur in them, the others do not, which bounds the zero-shot score.
"""


def zero_shot(task: Task, model: OpenClip, accelerator: Accelerator) -> float:
    """Accuracy on the task's test split, without training."""
    backbone = model.load()
    split = task.splits(backbone, Budget(seed=0)).test
    return evaluate(task, task.bind(backbone).model, split, accelerator, workers=1)["accuracy"]


def main() -> int:
    config = settings("experiment=pretrain_clip_tiny", *sys.argv[1:])
    root = f"data_root={config['data_root']}"
    others: dict[str, Any] = {
        name: build(settings(f"task={name}", root)["task"]) for name in ("tiny_imagenet", "cifar10")
    }
    experiment = Experiment.from_config(config)
    code = run(experiment, OmegaConf.to_yaml(config)).code
    if code:
        return code

    backbone = experiment.model.load()
    module = backbone.module
    load_adapter(module, experiment.folder / "adapter")
    weights = merge(module).state_dict()
    path = EMBEDDED / "clip_tiny.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, path)

    result, accelerator = Result.read(experiment.folder / "result.json"), experiment.trainer.accelerator()
    embedded = OpenClip(name="clip_tiny", architecture="clip_tiny", pretrained="embedded")
    captions = " ".join(experiment.config["task"]["kinds_of"]).lower()
    card = CARD.format(
        parameters=result.total_parameters,
        tower_parameters=(result.total_parameters or 0) - weights["token_embedding.weight"].numel(),
        megabytes=path.stat().st_size / 1e6,
        train=len(experiment.task.splits(backbone, experiment.budget).train),
        steps=result.steps,
        seconds=result.train_seconds,
        known=", ".join(name for name in others["cifar10"].class_names if name in captions.split()),
        **{name: zero_shot(task, embedded, accelerator) for name, task in others.items()},
    )
    (EMBEDDED / "README.md").write_text(card)
    print(card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
