"""Makes an embedded model: pretrains it, stores it inside the package, and writes its model card.

    python scripts/pretrain_clip_tiny.py data_root=FOLDER
    python scripts/pretrain_clip_tiny.py experiment=pretrain_clip_tiny_v2 data_root=FOLDER

The first makes clip_tiny, the second, from that, clip_tiny_v2. Arguments are overrides of the experiment; FOLDER holds
tiny_imagenet and cifar10. An interrupted pretraining goes on where it was; a finished one is only exported.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors.torch import save_file

from randlora.adapters import load_adapter, merge
from randlora.config import build, settings
from randlora.experiment import Experiment
from randlora.models import OpenClip
from randlora.models.open_clip import EMBEDDED, embedded_weights
from randlora.records import Result
from randlora.run import run
from randlora.tasks import Budget, Task
from randlora.training.evaluate import evaluate

CARD = """# {name}

A CLIP of {parameters:,} parameters, {tower_parameters:,} of them beside the token embedding, for 64-pixel images. It
exists so that the same code path as CLIP ViT-B/32 (open_clip, two towers of nn.MultiheadAttention, prompts, zero-shot
classification) runs on real pretrained weights without a download. {knows}

| | |
|---|---|
| weights | `{name}.safetensors`, float16, {megabytes:.1f} MB{shared}; architecture `clip_tiny.json` |
| command | `python scripts/pretrain_clip_tiny.py {command}data_root=FOLDER` (configs/experiment/pretrain_{name}.yaml) |
| data | {data} |
| training | {steps:,} steps of 256 pairs from {start}, bf16 autocast, {cores}, {seconds:,.0f} s |
| zero-shot, Tiny-ImageNet's official validation images (not trained on) | {tiny_imagenet:.1%} of 10,000, chance 0.5 % |
| zero-shot by class name, CIFAR-10's test images (data set never seen) | {cifar10:.1%} of 10,000, chance 10 % |

Scores are of the stored float16 weights, with the prompts of configs/task. The images are from ImageNet and come with
its terms: use the weights for research and tests. Captions call a Chihuahua "a kind of dog"; of CIFAR-10's class
names, {known} occur in them, the others do not, which bounds the zero-shot score.
"""


class Made(NamedTuple):
    """What the card of a model says beside what its run measured."""

    pretrained: str  # the weights' name in configs
    file: str  # of the card
    knows: str
    shared: str
    command: str
    data: str
    start: str
    cores: str


MODELS = {
    "clip_tiny": Made(
        "embedded", "README.md", "It knows what Tiny-ImageNet shows and little else.", "", "",
        "Tiny-ImageNet: {images:,} training images at 64 × 64, captions from class names and everyday kinds",
        "random weights", "two CPU cores",
    ),
    "clip_tiny_v2": Made(
        "embedded_v2", "clip_tiny_v2.md",
        "It knows what Tiny-ImageNet shows, and written shapes. Digits it has\nnever seen, printed or written: "
        "letters drawn like 0, 1 or 3 are left out, too, though some, such as S and Z, are near one.",
        " beside clip_tiny's, with which it shares the token embedding", "experiment=pretrain_clip_tiny_v2 ",
        "{images:,} training examples, half Tiny-ImageNet's images as for clip_tiny, half drawings of 471 letters and "
        "symbols from the fonts of matplotlib (DejaVu, STIX) and Hershey-Fonts (randlora/data/glyphs.py)",
        "clip_tiny's weights", "one thread of two shared CPU cores",
    ),
}  # fmt: skip


def zero_shot(task: Task, model: OpenClip, accelerator: Accelerator) -> float:
    """Accuracy on the task's test split, without training."""
    backbone = model.load()
    split = task.splits(backbone, Budget(seed=0)).test
    return evaluate(task, task.bind(backbone).model, split, accelerator, workers=1)["accuracy"]


def main() -> int:
    chosen = [argument for argument in sys.argv[1:] if argument.startswith("experiment=")]
    name = (chosen or ["experiment=pretrain_clip_tiny"])[-1].removeprefix("experiment=pretrain_")
    made = MODELS[name]
    config = settings(f"experiment=pretrain_{name}", *(other for other in sys.argv[1:] if other not in chosen))
    root = f"data_root={config['data_root']}"
    others: dict[str, Any] = {
        task: build(settings(f"task={task}", root)["task"]) for task in ("tiny_imagenet", "cifar10")
    }
    experiment = Experiment.from_config(config)
    code = run(experiment, OmegaConf.to_yaml(config)).code
    if code:
        return code

    backbone = experiment.model.load()
    module = backbone.module
    load_adapter(module, experiment.folder / "adapter")
    weights = {key: tensor.half().contiguous() for key, tensor in merge(module).state_dict().items()}
    count = sum(tensor.numel() for tensor in weights.values())
    if name != "clip_tiny":
        first = embedded_weights("embedded")
        weights = {key: tensor for key, tensor in weights.items() if not torch.equal(tensor, first[key])}
    path = EMBEDDED / f"{name}.safetensors"
    save_file(weights, path)

    result, accelerator = Result.read(experiment.folder / "result.json"), experiment.trainer.accelerator()
    embedded = OpenClip(name=name, architecture="clip_tiny", pretrained=made.pretrained)
    captions = " ".join(experiment.config["task"]["kinds_of"]).lower()
    images = len(experiment.task.splits(backbone, experiment.budget).train)
    card = CARD.format(
        name=name,
        **made._asdict() | {"data": made.data.format(images=images)},
        parameters=count,
        tower_parameters=count - backbone.module.token_embedding.weight.numel(),
        megabytes=path.stat().st_size / 1e6,
        steps=result.steps,
        seconds=result.train_seconds,
        known=", ".join(known for known in others["cifar10"].class_names if known in captions.split()),
        **{task: zero_shot(others[task], embedded, accelerator) for task in others},
    )
    (EMBEDDED / made.file).write_text(card)
    print(card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
