"""Image classification: by class names with CLIP, by a linear head with a vision transformer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bounds import Share, Template
from randlora.data.images import Augmentation, image_transform
from randlora.data.labels import Names, check_names, class_names, described, labelled
from randlora.data.loader import Encoder, Item
from randlora.data.sources import Table, check_columns
from randlora.errors import SettingsError
from randlora.models.base import Backbone, Model, Pixels
from randlora.tasks.base import Batch, Bound, Task
from randlora.tasks.mixins import Classifies, FrozenFeatures, KnownShapes


@dataclass(frozen=True)
class ImageClassification(Classifies, KnownShapes, FrozenFeatures, Task):
    """Columns `image` and `label`; top-1 accuracy.

    `class_names` are in the order of the labels; a number is how many the data must name themselves, None takes the
    data's (see randlora.data.labels).
    CLIP's prompts are made from `templates` or, with ``prompts=ensemble``, from those published for the data set; {}
    stands for the class name, and several are averaged on the unit sphere. `classes` says what a training step
    compares an image with: the classes of its micro-batch (``batch``, the paper's loss, cheaper when there are many),
    or ``all``. Evaluation always compares with all. `logit_scale` is how CLIP's trained scale multiplies similarities:
    ``exp`` of it, as CLIP defines it, or ``raw``, as in the published code (4.6 instead of 100). `unreadable` is the
    largest share of a split's images that may be damaged and left out; beyond it the run stops.
    """

    kinds: ClassVar[tuple[str, ...]] = ("clip", "vision")
    headline: ClassVar[str] = "accuracy"
    zero_shot: ClassVar[bool] = True

    class_names: Names = None
    templates: Sequence[Template] = ("An image of {}",)
    ensemble: Sequence[Template] = ()
    prompts: Literal["templates", "ensemble"] = "templates"
    classes: Literal["batch", "all"] = "all"
    logit_scale: Literal["exp", "raw"] = "exp"
    augmentation: Augmentation = "crop_flip"
    unreadable: Share = 0.0

    def __post_init__(self) -> None:
        check_names(self.name, self.class_names)
        super().__post_init__()
        if not getattr(self, self.prompts):
            raise SettingsError(f"task.prompts={self.prompts}: task {self.name} lists no templates there")
        if self.class_names is not None and not self.class_names:
            raise SettingsError(f"task {self.name}: class_names must be at least one, or null for the data's own")

    def check_model(self, model: Model) -> None:
        super().check_model(model)
        if model.kind == "vision":
            for name, usual in (("prompts", "templates"), ("classes", "all"), ("logit_scale", "exp")):
                if (value := getattr(self, name)) != usual:
                    raise SettingsError(
                        f"task.{name}={value}: model={model.name} has a linear head, which reads no class names; "
                        f"use {usual}, or a model of kind clip"
                    )

    def class_count(self) -> int:
        return self.class_names if isinstance(self.class_names, int) else len(self.names())

    def names(self) -> Sequence[str]:
        """The class names in the order of the labels, from the data where the settings do not list them."""
        return class_names(self.name, self.source, self.class_names)

    def bind(self, backbone: Backbone) -> Bound:
        if backbone.kind == "clip":
            templates = getattr(self, self.prompts)
            return Bound(ClipClassifier(backbone, self._known_names(backbone), templates, self.logit_scale == "exp"))
        model = LinearClassifier(backbone, self.class_count())
        return Bound(model, model.head)

    def _known_names(self, backbone: Backbone) -> Sequence[str]:
        """The class names; on the meta device numbered ones, where the data would have to be read for them."""
        if next(backbone.module.parameters()).is_meta and isinstance(self.class_names, int):
            return [f"class {label}" for label in range(self.class_names)]
        return self.names()

    def open(self) -> dict[str, Table]:
        tables = super().open()
        check_columns(tables, ["image", "label"])
        tables = labelled(self.name, self.source, self.class_names, tables)
        missing = sorted(set(range(self.class_count())) - set(tables["train"].column("label").tolist()))
        if missing:
            raise SettingsError(f"{self.name}: class {missing[0]} has no training image ({len(missing)} such)")
        return tables

    def remark(self) -> str | None:
        return described(self.names()) if self.class_names is None else None

    def encoder(self, backbone: Backbone, training: bool) -> ImageEncoder:
        assert backbone.pixels is not None
        return ImageEncoder(backbone.pixels, self.augmentation if training else "none")

    def sample(self, backbone: Backbone, size: int) -> Batch:
        assert backbone.pixels is not None
        side = backbone.pixels.size
        return {"image": torch.zeros(size, 3, side, side), "label": torch.zeros(size, dtype=torch.int64)}

    def planned(self, size: int) -> Self:
        if self.classes == "all":
            return self
        return replace(self, classes="all", class_names=[f"class {i}" for i in range(min(size, self.class_count()))])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.classes == "all":
            logits, targets = model(batch.get("image"), features=batch.get("features")), batch["label"]
        else:
            present, targets, counts = batch["label"].unique(return_inverse=True, return_counts=True)
            logits = model(batch.get("image"), features=batch.get("features"), classes=present)
            # As if every image had brought its text: a class counts as often as it occurs.
            logits = logits + counts.log()
        return F.cross_entropy(logits.float(), targets)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.get("image"), features=batch.get("features")).float()

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, list]:
        logits = self.outputs(model, batch)
        losses = F.cross_entropy(logits, batch["label"], reduction="none")
        return {"predicted": logits.argmax(-1).tolist(), "label": batch["label"].tolist(), "loss": losses.tolist()}

    def score(self, columns: Mapping[str, list]) -> dict[str, float]:
        right = sum(p == y for p, y in zip(columns["predicted"], columns["label"], strict=True))
        count = len(columns["label"])
        return {"accuracy": right / count, "loss": sum(columns["loss"]) / count}

    def frozen_part(self, model: nn.Module) -> Callable[[Batch], dict[str, Tensor]] | None:
        if not isinstance(model, ImageClassifier):  # of a task that binds its own
            return None
        tower = model.tower()
        if any(parameter.requires_grad for parameter in tower.parameters()) or _drops(tower):
            return None
        return lambda batch: {"features": model.image_features(batch["image"]), "label": batch["label"]}


class ImageEncoder(Encoder):
    """image (3, size, size) float32 and label."""

    def __init__(self, pixels: Pixels, augmentation: Augmentation):
        self.transform, self.random = image_transform(pixels, augmentation), augmentation != "none"

    def __call__(self, example: Item) -> dict[str, Any]:
        return {"image": self.transform(example["image"]), "label": int(example["label"])}


class ImageClassifier(nn.Module):
    """Logits of images by the features of an image tower."""

    @abstractmethod
    def tower(self) -> nn.Module:
        """The module whose parameters the features depend on."""

    @abstractmethod
    def image_features(self, images: Tensor) -> Tensor:
        """Features (B, width) of images (B, 3, size, size)."""

    @abstractmethod
    def classify(self, features: Tensor, classes: Tensor | None) -> Tensor:
        """Logits of features (B, width); see `forward`."""

    def forward(
        self, images: Tensor | None = None, *, features: Tensor | None = None, classes: Tensor | None = None
    ) -> Tensor:
        """Logits (B, classes).

        Args:
            images: (B, 3, size, size); not read where `features` are given.
            features: What `image_features` gives, (B, width).
            classes: The labels that are compared with, int64 (classes,); None for all.
        """
        return self.classify(self.image_features(images) if features is None else features, classes)  # type: ignore[arg-type]


def _drops(module: nn.Module) -> bool:
    """Whether the module draws anything in training: dropout of activations, paths or patches."""
    return any("Drop" in type(m).__name__ and (getattr(m, "p", 0) or getattr(m, "prob", 0)) for m in module.modules())


class ClipClassifier(ImageClassifier):
    """Cosine similarity of images to the texts of the class names, times CLIP's scale.

    Texts go through the text tower once per step, not once per image. Features that cannot change (a frozen tower in
    training, any tower in evaluation) are made once.
    """

    tokens: Tensor

    def __init__(self, backbone: Backbone, names: Sequence[str], templates: Sequence[Template], exp_scale: bool = True):
        super().__init__()
        assert backbone.tokenizer is not None
        self.clip, self.exp_scale = backbone.module, exp_scale
        texts = [template.format(name) for name in names for template in templates]
        tokens = backbone.tokenizer()(texts)  # (classes · templates, length)
        self.register_buffer("tokens", tokens.unflatten(0, (len(names), len(templates))), persistent=False)
        self._kept: Tensor | None = None

    def train(self, mode: bool = True) -> ClipClassifier:
        if mode != self.training:
            self._kept = None
        return super().train(mode)

    def tower(self) -> nn.Module:
        return self.clip.visual  # type: ignore[return-value]

    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_image(images), dim=-1)

    def classify(self, features: Tensor, classes: Tensor | None) -> Tensor:
        return self.similarity(features, self.text_features(classes))

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits (B, classes) of unit features of images (B, width) and of texts (classes, width)."""
        scale = self.clip.logit_scale.exp() if self.exp_scale else self.clip.logit_scale
        logits = scale * images @ texts.T.to(images.dtype)
        bias = getattr(self.clip, "logit_bias", None)
        return logits if bias is None else logits + bias

    def text_features(self, classes: Tensor | None = None) -> Tensor:
        """Unit text features (classes, width) of all classes, or of those given."""
        if self._kept is not None:
            return self._kept if classes is None else self._kept[classes]
        tokens = self.tokens if classes is None else self.tokens[classes]
        features = F.normalize(self.clip.encode_text(tokens.flatten(0, 1)), dim=-1)
        features = F.normalize(features.unflatten(0, tokens.shape[:2]).mean(1), dim=-1)
        if not features.requires_grad:
            if classes is not None:
                with torch.no_grad():
                    return self.text_features()[classes]
            self._kept = features
        return features


class LinearClassifier(ImageClassifier):
    """A linear head on the image features: weights N(0, 0.01), as the paper's DINOv2 head, and a bias."""

    def __init__(self, backbone: Backbone, classes: int):
        super().__init__()
        assert backbone.features is not None
        self.backbone, self.features = backbone.module, backbone.features
        self.head = nn.Linear(backbone.width, classes, device=next(backbone.module.parameters()).device)
        if self.head.weight.device.type != "meta":
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def tower(self) -> nn.Module:
        return self.backbone

    def image_features(self, images: Tensor) -> Tensor:
        return self.features(self.backbone, images)

    def classify(self, features: Tensor, classes: Tensor | None) -> Tensor:
        logits = self.head(features.float())
        return logits if classes is None else logits[:, classes]
