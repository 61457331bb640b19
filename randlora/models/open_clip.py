"""CLIP models through open_clip: any architecture and tag, or a local checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from randlora.bounds import ImageSize, Share
from randlora.errors import SettingsError
from randlora.models.base import Backbone, Model, Pixels, Source, require_a_patch

WEIGHTS = "open_clip_model.safetensors"  # what open_clip looks for in a folder
EMBEDDED = Path(__file__).parent / "clip_tiny"


@dataclass(frozen=True)
class OpenClip(Model):
    """A CLIP with both towers.

    Args:
        architecture: a name that open_clip knows; clip_tiny, shipped here, is added to them.
        pretrained: one of open_clip's tags for it, a checkpoint's path, ``embedded`` for the weights shipped here, or
            None for random weights drawn from torch's seed.
        patch_dropout: the share of image patches left out while training (FLIP); None is the architecture's own.
        image_size: the side of the images in pixels, to which position embeddings are interpolated; None is the
            architecture's own.
    """

    kind: ClassVar[str] = "clip"

    architecture: str | None = "clip_tiny"
    pretrained: str | None = "embedded"
    patch_dropout: Share | None = None
    image_size: ImageSize | None = None

    def check(self) -> None:
        if self.pretrained == "embedded" and not self._embedded().is_file():
            raise SettingsError(f"no weights for {self.architecture} are embedded; give pretrained a tag or a path")

    def source(self) -> Source:
        import open_clip

        name = f"open_clip's `{self.architecture}`"
        if self.pretrained is None:
            return Source(f"{name} with random weights")
        if self.pretrained == "embedded":
            return Source(f"`{self.architecture}`, whose weights are in randlora")
        if Path(self.pretrained).exists():
            return Source(name, local=f"model.pretrained={self.pretrained}")
        known = open_clip.get_pretrained_cfg(self.architecture, self.pretrained) or {}
        repository = os.path.split(known.get("hf_hub", ""))[0]  # OWNER/NAME/FILE, as open_clip reads it
        return Source(f"{name} with its weights `{self.pretrained}`", hub=repository or None)

    def meta_model(self) -> Backbone:
        with torch.device("meta"):
            return self._backbone(self._create(self.image_size, None, "meta"))

    def load(self) -> Backbone:
        import open_clip

        _add_architectures()
        weights = str(self._embedded()) if self.pretrained == "embedded" else self.pretrained
        if weights is not None and not Path(weights).is_file():
            tags = open_clip.list_pretrained_tags_by_model(self.architecture)
            if weights not in tags:
                raise SettingsError(
                    f"pretrained={weights!r}: neither a file nor a tag of {self.architecture}, "
                    f"which has {', '.join(tags) or 'none'}"
                )
            self._require_same_gelu(weights)
        module = self._create(self.image_size if weights is None else None, weights, "cpu")
        if weights is not None and self.image_size is not None:
            module = self._resized(module)
        return self._backbone(module)

    def save(self, backbone: Backbone, folder: Path, head: nn.Module | None, names: Sequence[str]) -> bool:
        """As open_clip does for the hub: `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""
        import open_clip
        from open_clip.push_to_hf_hub import save_config_for_hf
        from safetensors.torch import save_file

        module = self._both_towers(backbone)
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / WEIGHTS)
        config = open_clip.get_model_config(self.architecture)
        config["vision_cfg"]["image_size"] = backbone.pixels.size
        save_config_for_hf(module, folder / "open_clip_config.json", config)
        return head is None

    def _both_towers(self, backbone: Backbone) -> nn.Module:
        """The whole CLIP."""
        return backbone.module

    def _resized(self, module: nn.Module) -> nn.Module:
        """The model for images of another size. As it loads weights, open_clip cannot do it in half precision."""
        from open_clip.model import resize_pos_embed

        resized, state = self._create(self.image_size, None, "cpu"), module.state_dict()
        resize_pos_embed(state, resized)
        resized.load_state_dict(state)
        return resized

    def _create(self, image_size: int | None, weights: str | None, device: str) -> nn.Module:
        import open_clip

        _add_architectures()
        if self.architecture not in open_clip.list_models():
            raise SettingsError(f"architecture={self.architecture!r} is not one that open_clip knows")
        try:
            with _quiet():
                module = open_clip.create_model(
                    self.architecture,
                    pretrained=weights,
                    pretrained_text=False,
                    force_patch_dropout=self.patch_dropout,
                    force_image_size=image_size,
                    device=device,
                )
        except (RuntimeError, OSError) as error:
            raise SettingsError(f"cannot load {self.architecture} with pretrained={weights!r}: {error}") from error
        if image_size is not None:
            require_a_patch(image_size, max(getattr(module.visual, "patch_size", (1, 1))), self.architecture)
        module.set_grad_checkpointing(self.gradient_checkpointing)
        return module

    def _embedded(self) -> Path:
        return EMBEDDED / f"{self.architecture}.safetensors"

    def _require_same_gelu(self, tag: str) -> None:
        """open_clip warns and computes the wrong thing when OpenAI's weights meet an exact GELU."""
        import open_clip

        wanted = bool((open_clip.get_pretrained_cfg(self.architecture, tag) or {}).get("quick_gelu", False))
        built = bool((open_clip.get_model_config(self.architecture) or {}).get("quick_gelu", False))
        if wanted != built:
            name = self.architecture.removesuffix("-quickgelu")
            raise SettingsError(
                f"pretrained={tag} was trained {'with' if wanted else 'without'} QuickGELU and {self.architecture} is "
                f"{'with' if built else 'without'} it: set architecture={name}{'-quickgelu' if wanted else ''}"
            )

    def _backbone(self, module: nn.Module) -> Backbone:
        import open_clip

        preprocess = open_clip.get_model_preprocess_cfg(module)
        size = preprocess["size"]
        return Backbone(
            module=module,
            kind=self.kind,
            width=int(module.visual.output_dim),  # type: ignore[arg-type]
            pixels=Pixels(size if isinstance(size, int) else size[0], preprocess["mean"], preprocess["std"]),
            tokenizer=lambda: open_clip.get_tokenizer(self.architecture),
        )


@dataclass(frozen=True)
class OpenClipVision(OpenClip):
    """The image tower of a CLIP alone, for tasks that train a head of their own; the text tower is dropped.

    Features are the image embedding (B, width), not normalised. With class names for a head, take OpenClip and the
    targets ``vision``.
    """

    kind: ClassVar[str] = "vision"

    def _both_towers(self, backbone: Backbone) -> nn.Module:
        both = (
            OpenClip(self.name, self.architecture, self.targets, pretrained=self.pretrained, image_size=self.image_size)
            .load()
            .module
        )
        both.visual = backbone.module
        return both

    def module_names(self) -> list[str] | None:
        names = super().module_names()
        return names and [name.removeprefix("visual.") for name in names if name.startswith("visual.")]

    def _backbone(self, module: nn.Module) -> Backbone:
        both = super()._backbone(module)
        tower = module.visual
        return Backbone(tower, self.kind, both.width, both.pixels, features=lambda tower, images: tower(images))  # type: ignore[arg-type]


def _add_architectures() -> None:
    import open_clip

    if "clip_tiny" not in open_clip.list_models():
        open_clip.add_model_config(EMBEDDED)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs to the root logger that weights are random; here that is asked for."""
    import logging

    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
