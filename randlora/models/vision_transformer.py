"""Vision transformers of transformers: ViT and DINOv2."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from randlora.bounds import Colours, ImageSize
from randlora.models.base import Backbone, Pixels
from randlora.models.pretrained import Pretrained


@dataclass(frozen=True)
class VisionTransformer(Pretrained):
    """A vision transformer whose features are the class token after the last norm.

    Args:
        image_size: the side of the images in pixels; position embeddings are interpolated to it.
        mean: of the pixels' red, green and blue, from 0 to 1; ImageNet's unless the model was trained with others.
        std: of the same.
    """

    kind: ClassVar[str] = "vision"

    image_size: ImageSize = 224
    mean: Colours = (0.485, 0.456, 0.406)
    std: Colours = (0.229, 0.224, 0.225)

    def _backbone(self, module: Any) -> Backbone:
        options = {}
        if "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
            options["interpolate_pos_encoding"] = True  # ViT asks for it; DINOv2 always does
        return Backbone(
            module=module,
            kind=self.kind,
            width=module.config.hidden_size,
            pixels=Pixels(self.image_size, tuple(self.mean), tuple(self.std)),  # type: ignore[arg-type]
            features=partial(_class_token, options),
        )


def _class_token(options: dict[str, Any], module: nn.Module, images: Tensor) -> Tensor:
    return module(pixel_values=images, **options).last_hidden_state[:, 0]
