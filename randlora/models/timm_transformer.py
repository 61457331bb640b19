"""Vision transformers of timm, whose attention has one fused projection, as the paper's DINOv2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from randlora.bounds import ImageSize
from randlora.errors import SettingsError
from randlora.models.base import Backbone, Model, Pixels, Source, require_a_patch


@dataclass(frozen=True)
class TimmTransformer(Model):
    """A vision transformer whose features are the class token after the last norm.

    Args:
        architecture: timm's name of it, with its tag.
        pretrained: ``hub`` for the weights that timm lists for it, a checkpoint's path, or None for random weights
            drawn from torch's seed.
        image_size: the side of the images in pixels; position embeddings are interpolated to it.
    """

    kind: ClassVar[str] = "vision"

    pretrained: str | None = "hub"
    image_size: ImageSize = 224

    def check(self) -> None:
        if self.pretrained not in (None, "hub") and not Path(self.pretrained).is_file():
            raise SettingsError(f"model.pretrained={self.pretrained}: give hub, null or a checkpoint's path")

    def source(self) -> Source:
        import timm

        name = f"timm's `{self.architecture}`"
        if self.pretrained is None:
            return Source(f"{name} with random weights")
        if self.pretrained != "hub":
            return Source(name, local=f"model.pretrained={self.pretrained}")
        known = timm.get_pretrained_cfg(str(self.architecture))
        return Source(name, hub=known.hf_hub_id if known else None)

    def meta_model(self) -> Backbone:
        with torch.device("meta"):
            return self._backbone(self._create())

    def load(self) -> Backbone:
        self.check()
        return self._backbone(self._create(self.pretrained))

    def save(self, backbone: Backbone, folder: Path, head: nn.Module | None, names: Sequence[str]) -> bool:
        """As timm does for the hub, a linear head as its classifier: `timm.create_model("local-dir:FOLDER")`."""
        from timm.models import save_for_hf

        module: Any = backbone.module
        if head is not None:
            module.reset_classifier(len(head.weight), global_pool="token")  # type: ignore[arg-type]
            module.head.load_state_dict(head.state_dict())
        data = {"input_size": (3, self.image_size, self.image_size), "crop_pct": 1.0}
        save_for_hf(module, str(folder), {"label_names": list(names)}, safe_serialization=True, data_config=data)
        return True

    def _create(self, weights: str | None = None) -> nn.Module:
        import timm

        if self.architecture is None or not timm.is_model(self.architecture):
            raise SettingsError(f"architecture={self.architecture!r} is not one that timm knows")
        try:
            module = timm.create_model(
                self.architecture,
                pretrained=weights is not None,
                pretrained_cfg_overlay=None if weights in (None, "hub") else {"file": weights},
                num_classes=0,
                img_size=self.image_size,
            )
            module.set_grad_checkpointing(self.gradient_checkpointing)
            return module
        except Exception as error:  # the hub client raises many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SettingsError(f"cannot load {self.architecture} with pretrained={weights}: {reason}") from error

    def _backbone(self, module: Any) -> Backbone:
        require_a_patch(self.image_size, max(module.patch_embed.patch_size), self.architecture)
        known = module.pretrained_cfg
        return Backbone(
            module=module,
            kind=self.kind,
            width=module.num_features,
            pixels=Pixels(self.image_size, known["mean"], known["std"]),
            features=_class_token,
        )


def _class_token(module: Any, images: Tensor) -> Tensor:
    return module.forward_features(images)[:, 0]
