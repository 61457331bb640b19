"""Contrastive pretraining on images and captions made from their class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Len
from torch import Tensor, nn

from randlora.data.loader import Item
from randlora.errors import SettingsError
from randlora.models.base import Backbone
from randlora.tasks.base import Batch, Bound
from randlora.tasks.image_classification import ClipClassifier, ImageClassification, ImageEncoder


@dataclass(frozen=True)
class ImageCaptions(ImageClassification):
    """As ImageClassification, trained with the symmetric contrastive loss over the pairs of a batch.

    A caption is one of `captions`, drawn per example, with {name} filled in, and {kind}, the everyday word that
    `kinds_of` lists the class under. Every pair in a batch whose caption is true of the image is a positive (UniCL,
    Yang et al. 2022, arXiv 2204.03610): pairs of one class, or of one kind where the caption names the kind alone.
    Scored by zero-shot classification.
    """

    kinds: ClassVar[tuple[str, ...]] = ("clip",)

    captions: Annotated[Sequence[str], Len(1)] = ("a photo of a {name}",)
    kinds_of: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def bind(self, backbone: Backbone) -> Bound:
        return Bound(ContrastiveClip(ClipClassifier(backbone, self.names(), self.templates)))

    def encoder(self, backbone: Backbone, training: bool) -> ImageEncoder:
        images = super().encoder(backbone, training)
        if not training:
            return images
        assert backbone.tokenizer is not None
        tokenizer, kind_of = backbone.tokenizer(), self._kind_of()
        tokens = [
            tokenizer([caption.format(name=name, kind=kind_of[name]) for caption in self.captions])
            for name in self.names()
        ]
        general = torch.tensor(["{name}" not in caption for caption in self.captions])
        words = list(dict.fromkeys(kind_of.values()))
        kinds = torch.tensor([words.index(kind_of[name]) for name in self.names()])
        return PairEncoder(images, torch.stack(tokens), general, kinds)

    def _kind_of(self) -> dict[str, str]:
        """Every class's kind; the name itself where none is given. SettingsError for a kind of an unknown class."""
        kinds = {name: name for name in self.names()}
        given = {name: kind for kind, names in self.kinds_of.items() for name in names}
        unknown = next((name for name in given if name not in kinds), None)
        if unknown is not None:
            raise SettingsError(
                f"task.kinds_of.{given[unknown]}: {unknown!r} is no class of {self.name}, "
                f"whose first is {next(iter(kinds))!r}"
            )
        return kinds | given

    def sample(self, backbone: Backbone, size: int) -> Batch:
        assert backbone.tokenizer is not None
        tokens = torch.zeros_like(backbone.tokenizer()([""])).expand(size, -1)
        general, kind = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.int64)
        return {**super().sample(backbone, size), "tokens": tokens, "general": general, "kind": kind}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().outputs(model.classifier, batch)  # type: ignore[arg-type]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.contrast(model(batch["image"], batch["tokens"]).float(), batch)

    @staticmethod
    def contrast(logits: Tensor, batch: Batch) -> Tensor:
        """The loss of similarities of images and captions (B, B), given what the captions are true of."""
        same_class = batch["label"][:, None] == batch["label"]
        same_kind = batch["kind"][:, None] == batch["kind"]
        true = torch.where(batch["general"], same_kind, same_class).float()
        to_text = (true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)
        to_image = (true / true.sum(0) * logits.log_softmax(0)).sum(0)
        return -(to_text + to_image).mean() / 2


@dataclass(frozen=True)
class LabelledCaptions(ImageCaptions):
    """As ImageCaptions, while a linear head on the image features learns all classes by cross-entropy.

    A small text tower tells apart few names; the head tells the image tower what the captions cannot. Scored by the
    head, which is saved beside the parameters and is no part of the model.

    Args:
        uncaptioned: the names of sources, of a Union, whose images have no captions: the head alone learns them.
    """

    uncaptioned: Sequence[str] = ()

    def bind(self, backbone: Backbone) -> Bound:
        device = next(backbone.module.parameters()).device
        head = nn.Linear(backbone.width, self.class_count(), device=device)
        return Bound(ContrastiveClip(ClipClassifier(backbone, self.names(), self.templates), head), head)

    def encoder(self, backbone: Backbone, training: bool) -> ImageEncoder:
        encoder = super().encoder(backbone, training)
        if isinstance(encoder, PairEncoder):
            encoder.uncaptioned = tuple(self.uncaptioned)
        return encoder

    def sample(self, backbone: Backbone, size: int) -> Batch:
        return {**super().sample(backbone, size), "captioned": torch.ones(size, dtype=torch.bool)}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model.head(model.classifier.clip.encode_image(batch["image"])).float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, classes = model(batch["image"], batch["tokens"], classify=True)
        loss = F.cross_entropy(classes.float(), batch["label"])
        kept = batch["captioned"]
        if kept.any():
            names = {name: batch[name][kept] for name in ("label", "kind", "general")}
            loss = loss + self.contrast(logits[kept][:, kept].float(), names)
        return loss


class PairEncoder(ImageEncoder):
    """An image with one of its class's captions: tokens (classes, captions, length), and what they speak of."""

    random = True  # the caption is drawn
    uncaptioned: tuple[str, ...] = ()

    def __init__(self, images: ImageEncoder, tokens: Tensor, general: Tensor, kinds: Tensor):
        self.transform = images.transform
        self.tokens, self.general, self.kinds = tokens, general, kinds

    def __call__(self, example: Item) -> dict[str, Any]:
        item = super().__call__(example)
        label, caption = item["label"], int(torch.randint(self.tokens.shape[1], ()))
        tokens, general = self.tokens[label, caption], self.general[caption]
        item |= {"tokens": tokens, "general": general, "kind": self.kinds[label]}
        return {**item, "captioned": example.get("set") not in self.uncaptioned} if self.uncaptioned else item


class ContrastiveClip(nn.Module):
    """Compares every image of a batch with every caption of it; `classifier` is the same model as a classifier.

    A `head` on the image embedding is for labels that need no caption.
    """

    def __init__(self, classifier: ClipClassifier, head: nn.Linear | None = None):
        super().__init__()
        self.classifier, self.head = classifier, head

    def forward(self, images: Tensor, tokens: Tensor, classify: bool = False) -> Any:
        """Logits (B, B) of images (B, 3, size, size) and tokens (B, length).

        With a head and `classify` also the head's (B, classes).
        """
        texts = F.normalize(self.classifier.clip.encode_text(tokens), dim=-1)
        embedded = self.classifier.clip.encode_image(images)
        logits = self.classifier.similarity(F.normalize(embedded, dim=-1), texts)
        return logits if self.head is None or not classify else (logits, self.head(embedded))
