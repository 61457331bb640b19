"""Images to tensors: one evaluation transform, and the paper's augmentations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from randlora.errors import check_choice

if TYPE_CHECKING:
    from torch import Tensor

    from randlora.models.base import Pixels

AUGMENTATIONS = ("none", "crop", "crop_flip", "strong")

Transform = Callable[[Any], "Tensor"]  # PIL image -> float32 (3, size, size)


def check_augmentation(name: str) -> None:
    check_choice("augmentation", name, AUGMENTATIONS)


def evaluation_transform(pixels: Pixels) -> Transform:
    """Short side to `size`, central square, normalised: CLIP's evaluation transform."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    resize = Resize(pixels.size, InterpolationMode.BICUBIC, antialias=True)
    return Compose([resize, CenterCrop(pixels.size), *_to_tensor(pixels)])


def training_transform(pixels: Pixels, augmentation: str) -> Transform:
    """With random augmentation from torch's generator.

    * ``none``: the evaluation transform.
    * ``crop``: RandomResizedCrop with scale 0.5 to 1, bicubic; for digits and signs, which a flip would change.
    * ``crop_flip``: the same and a horizontal flip, the paper's default (its code, src/finetune.py).
    * ``strong``: SimCLR-like, crop from 0.2, colour jitter, grey, flip (its --strong-augs).
    """
    from torchvision.transforms import (
        ColorJitter,
        Compose,
        InterpolationMode,
        RandomApply,
        RandomGrayscale,
        RandomHorizontalFlip,
        RandomResizedCrop,
    )

    if augmentation == "none":
        return evaluation_transform(pixels)
    smallest = 0.2 if augmentation == "strong" else 0.5
    steps: list[Any] = [
        RandomResizedCrop(pixels.size, scale=(smallest, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    ]
    if augmentation == "strong":
        steps += [RandomApply([ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), RandomGrayscale(0.2)]
    if augmentation != "crop":
        steps.append(RandomHorizontalFlip())
    return Compose([*steps, *_to_tensor(pixels)])


def _to_tensor(pixels: Pixels) -> list[Any]:
    from torchvision.transforms import Lambda, Normalize, ToTensor

    return [Lambda(_to_rgb), ToTensor(), Normalize(pixels.mean, pixels.std)]


def _to_rgb(image: Any) -> Any:
    return image.convert("RGB")
