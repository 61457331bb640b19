"""Images to tensors, with the paper's augmentations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

    from randlora.models.base import Pixels

Augmentation = Literal["none", "crop", "crop_flip", "clip", "strong"]
AUGMENTATIONS = get_args(Augmentation)

Transform: TypeAlias = "Callable[[PIL.Image.Image], Tensor]"  # to float32 (3, size, size)


def image_transform(pixels: Pixels, augmentation: str) -> Transform:
    """What makes a tensor of an image; the random ones draw from torch's generator.

    Args:
        pixels: the size and normalisation that the model wants.
        augmentation: one of these.

    Augmentations:

    * ``none``: short side to `size`, central square: CLIP's transform for evaluation.
    * ``crop``: RandomResizedCrop with scale 0.5 to 1, bicubic; for digits and signs, which a flip would change.
    * ``crop_flip``: the same and a horizontal flip, the paper's default (its code, src/finetune.py).
    * ``clip``: RandomResizedCrop with scale 0.9 to 1, as CLIP was trained (its --base-augs).
    * ``strong``: SimCLR-like, crop from 0.2, colour jitter, grey, blur, flip (its --strong-augs).
    """
    from torchvision import transforms as T

    bicubic = T.InterpolationMode.BICUBIC
    begin, finish = T.Lambda(rgb), [T.ToTensor(), T.Normalize(pixels.mean, pixels.std)]
    if augmentation == "none":
        return T.Compose([begin, T.Resize(pixels.size, bicubic), T.CenterCrop(pixels.size), *finish])
    smallest = {"crop": 0.5, "crop_flip": 0.5, "clip": 0.9, "strong": 0.2}[augmentation]
    steps: list[Any] = [begin, T.RandomResizedCrop(pixels.size, scale=(smallest, 1.0), interpolation=bicubic)]
    if augmentation == "strong":
        steps += [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), T.RandomGrayscale(0.2)]
        width = pixels.size // 20 * 2 + 1  # a tenth of the side, odd (SimCLR)
        steps.append(T.RandomApply([T.GaussianBlur(width, sigma=(0.1, 2.0))], p=0.5))
    if augmentation in ("crop_flip", "strong"):
        steps.append(T.RandomHorizontalFlip())
    return T.Compose([*steps, *finish])


def rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Grey, palette, CMYK and 16-bit images as RGB, before anything is interpolated: a palette's indices cannot be."""
    if image.mode.startswith("I"):  # 16 bits: convert() would clip at 255 instead of scaling
        from PIL import Image

        values = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
