"""Vision transformers of transformers: ViT and DINOv2."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from randlora.bounds import Colours, ImageSize
from randlora.models.base import Backbone, Pixels, require_a_patch
from randlora.models.pretrained import Pretrained, named_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    def save(self, backbone: Backbone, folder: Path, head: nn.Module | None, names: Sequence[str]) -> bool:
        """As `save_pretrained` does, with the image processor that does what `augmentation=none` does here."""
        from transformers import CLIPImageProcessor

        whole = super().save(backbone, folder, head, names)
        side = {"height": self.image_size, "width": self.image_size}
        CLIPImageProcessor(
            size={"shortest_edge": self.image_size},
            crop_size=side,
            image_mean=list(self.mean),
            image_std=list(self.std),
        ).save_pretrained(folder)
        return whole

    def _with_head(self, module: Any, head: nn.Module, names: Sequence[str]) -> PreTrainedModel | None:
        if module.config.model_type != "vit":  # DINOv2's classifier also reads the mean of the patches
            return None
        from transformers import ViTForImageClassification

        whole = ViTForImageClassification(named_outputs(module.config, names, head.out_features))  # type: ignore[arg-type]
        whole.vit.load_state_dict(module.state_dict())
        whole.classifier.load_state_dict(head.state_dict())
        return whole.to(module.dtype)

    def _backbone(self, module: Any) -> Backbone:
        require_a_patch(self.image_size, module.config.patch_size, self.name)
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
