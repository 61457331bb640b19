"""Images with names: CLIP as a classifier, and its contrastive loss."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from randlora.data.sources import Digits
from randlora.errors import SettingsError
from randlora.models.base import Backbone, Pixels
from randlora.tasks import ImageCaptions, ImageClassification, LabelledCaptions
from randlora.tasks.base import Budget
from randlora.tasks.image_classification import ClipClassifier


def test_digits_are_scikit_learns_in_256_greys() -> None:
    """Oracle: the first image's first row as scikit-learn documents it, 0 to 16."""
    greys = [value * 255 // 16 for value in (0, 0, 5, 13, 9, 1, 0, 0)]
    table = Digits().open("train")
    assert np.asarray(table[0]["image"])[0].tolist() == greys
    assert (len(table), len(Digits().open("test"))) == (1400, 397)


class TwoTowers(nn.Module):
    """A CLIP of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 8), nn.Linear(3, 8)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def encode_image(self, images):  # type: ignore[no-untyped-def]
        return self.image(images)

    def encode_text(self, tokens):  # type: ignore[no-untyped-def]
        return self.text(tokens.float())


NAMES = ["a", "b", "c", "d"]


def towers() -> Backbone:
    torch.manual_seed(0)
    codes = {f"{t} {n}": torch.randn(3) for n in NAMES for t in ("x", "y")}
    return Backbone(
        TwoTowers(), "clip", 8, tokenizer=lambda: lambda texts: torch.stack([codes[text] for text in texts])
    )


def naive_logits(model: TwoTowers, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    texts = torch.stack([F.normalize(F.normalize(model.encode_text(row), dim=-1).mean(0), dim=-1) for row in tokens])
    return model.logit_scale.exp() * F.normalize(model.encode_image(images), dim=-1) @ texts.T


@pytest.mark.parametrize("templates", [["x {}"], ["x {}", "y {}"]])
def test_clip_classifies_by_the_ensemble_of_prompts(templates: list[str]) -> None:
    backbone = towers()
    classifier = ClipClassifier(backbone, NAMES, templates)
    images = torch.randn(5, 4)
    expected = naive_logits(backbone.module, images, classifier.tokens)
    torch.testing.assert_close(classifier(images), expected)
    torch.testing.assert_close(classifier.eval()(images), expected)


def test_prompts_are_no_part_of_a_models_state() -> None:
    """They move with the model, and are made anew for other names."""
    classifier = ClipClassifier(towers(), NAMES, ["x {}"])
    assert [name for name in classifier.state_dict() if "clip" not in name] == []
    assert dict(classifier.named_buffers())["tokens"].shape == (4, 1, 3)


def test_the_loss_within_the_batch_is_over_its_classes() -> None:
    backbone = towers()
    images, labels = torch.randn(5, 4), torch.tensor([3, 1, 3, 3, 1])
    whole = ImageClassification("t", Digits(), {}, class_names=NAMES, templates=["x {}"], classes="all")
    within = ImageClassification("t", Digits(), {}, class_names=NAMES, templates=["x {}"], classes="batch")
    batch = {"image": images, "label": labels}
    classifier = whole.bind(backbone).model
    logits = naive_logits(backbone.module, images, classifier.tokens)
    assert whole.loss(classifier, batch).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    # As published: image i against the texts of all images, its target the first of its class; up to a constant.
    few = F.cross_entropy(logits[:, labels], torch.tensor([0, 1, 0, 0, 1])) - labels.bincount()[labels].log().mean()
    bound = within.bind(backbone).model
    assert within.loss(bound, batch).item() == pytest.approx(few.item(), rel=1e-5)
    cached = {"features": bound.image_features(images), "label": labels}  # type: ignore[operator]
    assert within.loss(bound, cached).item() == pytest.approx(few.item(), rel=1e-5)


def test_the_published_scale_is_not_exponentiated() -> None:
    backbone, images = towers(), torch.randn(5, 4)
    options: dict = {"class_names": NAMES, "templates": ["x {}"]}
    defined, published = (
        ImageClassification("t", Digits(), {}, logit_scale=how, **options).bind(backbone).model(images)
        for how in ("exp", "raw")
    )
    scale = backbone.module.logit_scale
    torch.testing.assert_close(defined / scale.exp(), published / scale)


def test_a_bias_of_clips_is_added() -> None:
    """As SigLIP has one."""
    backbone, images = towers(), torch.randn(5, 4)
    clip: Any = backbone.module
    plain = ClipClassifier(backbone, NAMES, ["x {}"])(images)
    clip.logit_bias = nn.Parameter(torch.tensor(-3.0))
    torch.testing.assert_close(ClipClassifier(backbone, NAMES, ["x {}"])(images), plain - 3)


@pytest.mark.parametrize(("device", "names"), [("cpu", [*"0123456789"]), ("meta", [f"class {i}" for i in range(10)])])
def test_names_that_the_data_give_are_read_unless_there_are_no_values(device: str, names: list[str]) -> None:
    """A plan opens no data; the names only have to be as many."""
    asked: list[str] = []

    def tokenizer(texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return torch.zeros(len(texts), 3)

    backbone = Backbone(TwoTowers().to(device), "clip", 8, tokenizer=lambda: tokenizer)
    ImageClassification("t", Digits(), {}, class_names=10, templates=["a {}"]).bind(backbone)
    assert asked == [f"a {name}" for name in names]


@pytest.mark.parametrize("frozen", [True, False])
def test_texts_that_cannot_change_are_encoded_once(frozen: bool) -> None:
    """In evaluation, and in training where the text tower is frozen; anew when the model changes over."""
    backbone, calls = towers(), []
    clip: Any = backbone.module
    clip.text.requires_grad_(not frozen).register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    classifier, images, some = (
        ClipClassifier(backbone, NAMES, ["x {}", "y {}"]),
        torch.randn(3, 4),
        torch.tensor([3, 1]),
    )
    plain = naive_logits(clip, images, classifier.tokens)

    def encoded(*classes: torch.Tensor) -> list[int]:
        calls.clear()
        expected = plain[:, classes[0]] if classes else plain
        for _ in range(2):
            torch.testing.assert_close(classifier(images, classes=classes[0] if classes else None), expected)
        return [*calls]

    assert encoded(some) == ([4, 8] if frozen else [4, 4])  # what was asked first tells that all can be kept
    assert encoded() == ([] if frozen else [8, 8])
    classifier.eval()
    with torch.no_grad():
        assert (encoded(), encoded(some)) == ([8], [])
        clip.text.weight.mul_(2)
        classifier.eval()
        assert encoded() == []  # the mode is as before
        classifier.train()
        plain = naive_logits(clip, images, classifier.tokens)
        assert encoded() == [8]


def test_a_linear_head_is_the_papers_and_reads_what_it_is_asked_of() -> None:
    """Weights of deviation 0.01 and no bias; oracle: the linear map written out, in float32."""
    torch.manual_seed(0)
    backbone = Backbone(nn.Linear(4, 500), "vision", 500, features=lambda module, inputs: module(inputs).bfloat16())
    images = ImageClassification("t", Digits(), {}, class_names=[f"n{i}" for i in range(40)])
    bound, x, some = images.bind(backbone), torch.randn(3, 4), torch.tensor([7, 0])
    model, head = bound.model, bound.head
    assert isinstance(head, nn.Linear)
    assert head is model.head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.weight.mean().item() == pytest.approx(0, abs=5e-4)
    assert not head.bias.any()
    features = backbone.module(x).bfloat16()
    expected = features.float() @ head.weight.T
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(features=features, classes=some), expected[:, some])
    planned = images.bind(replace(backbone, module=nn.Linear(4, 500, device="meta"))).head
    assert planned is not None
    assert {parameter.device.type for parameter in planned.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("setting", "usual"),
    [({"prompts": "ensemble"}, "templates"), ({"classes": "batch"}, "all"), ({"logit_scale": "raw"}, "exp")],
)
def test_what_is_for_names_is_refused_where_a_head_reads_none(setting: dict, usual: str) -> None:
    ((name, value),) = setting.items()
    task = ImageClassification("t", Digits(), {}, class_names=NAMES, ensemble=["{}"], **setting)
    vision, clip = (type("M", (), {"kind": kind, "name": "m"})() for kind in ("vision", "clip"))
    task.check_model(clip)
    ImageClassification("t", Digits(), {}, class_names=NAMES).check_model(vision)
    with pytest.raises(SettingsError, match=rf"^task.{name}={value}: model=m has a linear head, .*; use {usual}, or a"):
        task.check_model(vision)
    with pytest.raises(SettingsError, match=r"^task=t needs a model of kind clip or vision; model=m is text$"):
        task.check_model(type("M", (), {"kind": "text", "name": "m"})())


def test_the_parts_of_a_budget_are_encoded_seeded_and_damaged_each_as_it_should_be() -> None:
    """The training part alone is augmented, by the budget's seed; of all a share may be unreadable."""
    task = ImageClassification("t", Digits(), None, class_names=10, validation_size=5, test_size=7, unreadable=0.25)
    backbone = Backbone(nn.Identity(), "vision", 4, pixels=Pixels(8, (0.0,) * 3, (1.0,) * 3))
    splits = task.splits(backbone, Budget(3, fraction=0.1))
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [round(0.1 * (1400 - 5)), 5, 7]
    assert [part.encode.random for part in parts] == [True, False, False]
    assert [part.augment_seed for part in parts] == [3, None, None]
    assert [part.tolerance for part in parts] == [0.25] * 3
    assert task.training_size(Budget(3, fraction=0.1)) == len(splits.train)
    assert task.training_size(Budget(3, fraction=1e-5)) == 1
    sample = task.sample(backbone, 2)
    assert (sample["image"].shape, sample["label"].shape, sample["label"].dtype) == ((2, 3, 8, 8), (2,), torch.int64)


def test_an_ensemble_must_be_there() -> None:
    with pytest.raises(SettingsError, match="lists no templates"):
        ImageClassification("t", Digits(), {}, class_names=NAMES, prompts="ensemble")


def test_a_frozen_text_tower_gives_the_same_loss_and_no_gradient() -> None:
    backbone = towers()
    within = ImageClassification("t", Digits(), {}, class_names=NAMES, templates=["x {}"], classes="batch")
    batch = {"image": torch.randn(5, 4), "label": torch.tensor([3, 1, 3, 3, 1])}
    trained = within.loss(within.bind(backbone).model, batch)
    backbone.module.text.requires_grad_(False)  # type: ignore[union-attr, operator]
    classifier = within.bind(backbone).model
    for _ in range(2):
        assert within.loss(classifier, batch).item() == pytest.approx(trained.item(), rel=1e-6)


def test_contrastive_loss_is_clips_when_all_captions_differ() -> None:
    """Oracle: CLIP's symmetric cross-entropy on the diagonal; true pairs off the diagonal are positives too."""
    pairs = ImageCaptions("t", Digits(), {}, class_names=NAMES)
    logits = torch.randn(4, 4)
    model = lambda images, tokens: logits  # noqa: E731
    batch = {
        "image": None,
        "tokens": None,
        "kind": torch.tensor([0, 0, 1, 2]),
        "general": torch.zeros(4, dtype=torch.bool),
    }
    labels = torch.arange(4)
    clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert pairs.loss(model, batch | {"label": labels}).item() == pytest.approx(clip.item(), rel=1e-5)
    # The caption of pair 1 names the kind alone, which image 0 shares: its column has two positives, and row 0 too.
    general = torch.tensor([False, True, False, False])
    mixed = pairs.loss(model, batch | {"label": labels, "general": general})
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    to_text = rows.diagonal().clone()
    to_text[0] = (rows[0, 0] + rows[0, 1]) / 2
    to_image = columns.diagonal().clone()
    to_image[1] = (columns[0, 1] + columns[1, 1]) / 2
    assert mixed.item() == pytest.approx(-(to_text + to_image).mean().item() / 2, rel=1e-5)


def test_a_plan_has_as_many_classes_as_a_batch_may() -> None:
    """Of a loss within the batch, whose classes are not known before: no more than examples, and no more than all."""
    within, whole = (ImageClassification("t", Digits(), {}, class_names=NAMES, classes=c) for c in ("batch", "all"))  # type: ignore[arg-type]
    assert whole.planned(3) is whole
    for size, names in ((3, ["class 0", "class 1", "class 2"]), (9, ["class 0", "class 1", "class 2", "class 3"])):
        planned = within.planned(size)
        assert (planned.classes, planned.class_names) == ("all", names)


def test_predictions_are_over_all_classes_and_losses_per_image() -> None:
    torch.manual_seed(0)
    images = ImageClassification("t", Digits(), {}, class_names=NAMES, classes="batch")
    logits, labels = torch.randn(5, 4), torch.tensor([3, 1, 3, 0, 1])
    model = lambda images, features: (logits if features is None else features).bfloat16()  # noqa: E731
    rounded = logits.bfloat16().double()
    losses = rounded.exp().sum(1).log() - rounded[range(5), labels]
    columns = images.predict(model, {"image": None, "label": labels})  # type: ignore[arg-type]
    assert columns == {
        "predicted": rounded.argmax(1).tolist(), "label": [3, 1, 3, 0, 1],
        "loss": pytest.approx(losses.tolist(), rel=1e-5),
    }  # fmt: skip
    again = images.predict(model, {"features": -logits, "label": labels})  # type: ignore[arg-type]
    assert again["predicted"] == rounded.argmin(1).tolist()
    assert images.score(columns | {"predicted": [3, 1, 2, 2, 2]}) == {
        "accuracy": 0.4, "loss": pytest.approx(losses.mean().item(), rel=1e-5),
    }  # fmt: skip


CAPTIONS = ["a {name}", "a {name}, a kind of {kind}", "some {kind}"]


def captioned() -> tuple[ImageCaptions, Backbone]:
    """Four classes, of which b and d are of one kind; texts are three letters long, so tokens can be read."""
    torch.manual_seed(0)
    pixels = Pixels(2, (0.0,) * 3, (1.0,) * 3)
    codes: dict[str, int] = {}

    def tokens(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[codes.setdefault(text, len(codes)), 0, 0] for text in texts])

    pairs = ImageCaptions(
        "t", Digits(), {}, class_names=NAMES, templates=["x {}"], captions=CAPTIONS, kinds_of={"fish": ["b", "d"]}
    )
    backbone = Backbone(TwoTowers(), "clip", 8, pixels=pixels, tokenizer=lambda: tokens)
    backbone.codes = codes  # type: ignore[attr-defined]
    return pairs, backbone


def test_an_image_comes_with_one_of_its_classs_captions() -> None:
    """Any of the three; a class without a kind is its own; the third caption speaks of the kind alone."""
    pairs, backbone = captioned()
    encoder, seen = pairs.encoder(backbone, training=True), set()
    assert encoder.random
    image = Image.new("RGB", (2, 2), (255, 0, 0))
    for _ in range(40):
        for label, name, kind in ((0, "a", "a"), (1, "b", "fish"), (3, "d", "fish")):
            item = encoder({"image": image, "label": label})
            text = {code: text for text, code in backbone.codes.items()}[int(item["tokens"][0])]  # type: ignore[attr-defined]
            assert text in [caption.format(name=name, kind=kind) for caption in CAPTIONS]
            assert bool(item["general"]) == text.startswith("some ")
            assert (item["label"], int(item["kind"])) == (label, {"a": 0, "fish": 1}[kind])
            assert item["image"][0].eq(1).all()
            seen.add(text)
    assert len(seen) == 8  # the two fish have "some fish" in common
    plain = pairs.encoder(backbone, training=False)
    assert not plain.random
    assert set(plain({"image": image, "label": 1})) == {"image", "label"}
    planned = pairs.sample(backbone, 5)
    batch = encoder.collate([encoder({"image": image, "label": 1})] * 5)
    assert {key: (value.shape, value.dtype) for key, value in planned.items()} == {
        key: (value.shape, value.dtype) for key, value in batch.items()
    }


def test_images_and_captions_are_compared_pair_by_pair_and_scored_by_class() -> None:
    """Oracle: CLIP's similarity, scale times the cosine, written out; scores are the classifier's on its templates."""
    pairs, backbone = captioned()
    model = pairs.bind(backbone).model
    images, tokens, labels = torch.randn(5, 4), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 3])
    clip = backbone.module
    rows = [F.normalize(part, dim=-1) for part in (clip.encode_image(images), clip.encode_text(tokens))]  # type: ignore[operator]
    torch.testing.assert_close(model(images, tokens), clip.logit_scale.exp() * rows[0] @ rows[1].T)  # type: ignore[operator, union-attr]
    plain = ImageClassification("t", Digits(), {}, class_names=NAMES, templates=["x {}"])
    batch = {"image": images, "label": labels}
    assert pairs.predict(model, batch) == plain.predict(plain.bind(backbone).model, batch)


def test_a_head_learns_what_has_no_caption() -> None:
    """Oracle: torch's cross-entropy of a linear map of the embedding, and the loss of the captioned pairs alone."""
    pairs, backbone = captioned()
    both = LabelledCaptions(
        "t", Digits(), {}, class_names=NAMES, templates=["x {}"], captions=CAPTIONS, kinds_of=pairs.kinds_of,
        uncaptioned=["drawings"],
    )  # fmt: skip
    bound = both.bind(backbone)
    model, head = bound.model, bound.head
    assert isinstance(head, torch.nn.Linear)
    assert head is model.head
    image = Image.new("RGB", (2, 2))
    encoder = both.encoder(backbone, training=True)
    flags = [encoder({"image": image, "label": 1, "set": name})["captioned"] for name in ("photos", "drawings")]
    assert flags == [True, False]
    batch = {
        "image": torch.randn(4, 4), "tokens": torch.randn(4, 3), "label": torch.tensor([0, 1, 3, 2]),
        "kind": torch.tensor([0, 1, 1, 2]), "general": torch.tensor([False, True, False, False]),
        "captioned": torch.tensor([True, True, True, False]),
    }  # fmt: skip
    embedded = backbone.module.encode_image(batch["image"])  # type: ignore[operator]
    logits = embedded @ head.weight.T + head.bias
    captions = ImageCaptions.loss(pairs, model, {name: tensor[:3] for name, tensor in batch.items()})
    expected = F.cross_entropy(logits, batch["label"]) + captions
    assert both.loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    sample = both.sample(replace(backbone, pixels=Pixels(6, (0, 0, 0), (1, 1, 1))), 2)
    assert sample["image"].shape == (2, 3, 6, 6)
    assert (sample["captioned"].tolist(), sample["captioned"].dtype) == ([True, True], torch.bool)
    assert model(batch["image"], batch["tokens"]).shape == (4, 4)  # without being asked for classes, of pairs alone
    on_meta = both.bind(replace(backbone, module=TwoTowers().to("meta"))).head
    assert on_meta is not None
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}
    none = batch | {"captioned": torch.zeros(4, dtype=torch.bool)}
    assert both.loss(model, none).item() == pytest.approx(F.cross_entropy(logits, batch["label"]).item(), rel=1e-5)
    assert both.predict(model, batch)["predicted"] == logits.argmax(1).tolist()


def test_a_kind_of_an_unknown_class_is_refused() -> None:
    _, backbone = captioned()
    pairs = ImageCaptions("t", Digits(), {}, class_names=NAMES, kinds_of={"fish": ["b", "trout"]})
    with pytest.raises(SettingsError, match=r"task\.kinds_of\.fish: 'trout' is no class of t, whose first is 'a'"):
        pairs.encoder(backbone, training=True)


class PatchDropout(nn.Module):
    """As open_clip's, which says how much it drops by `prob`."""

    def __init__(self, prob: float):
        super().__init__()
        self.prob = prob


@pytest.mark.parametrize(
    ("part", "still"),
    [
        (nn.Identity(), True), (nn.Dropout(0.0), True), (nn.Dropout(0.1), False), (PatchDropout(0.5), False),
        (PatchDropout(0.0), True), (nn.Linear(2, 2), True),
    ],
)  # fmt: skip
def test_features_are_cached_of_a_frozen_tower_that_draws_nothing(part: nn.Module, still: bool) -> None:
    backbone = towers()
    clip: Any = backbone.module
    clip.visual = nn.Sequential(nn.Linear(4, 8), part).requires_grad_(False)
    bound = ImageClassification("t", Digits(), {}, class_names=NAMES, templates=["x {}"]).bind(backbone).model
    task = ImageClassification("t", Digits(), {}, class_names=NAMES, templates=["x {}"])
    frozen, batch = task.frozen_part(bound), {"image": torch.randn(3, 4), "label": torch.arange(3)}
    assert (frozen is not None) == still
    if frozen is not None:
        assert frozen(batch)["label"] is batch["label"]
        torch.testing.assert_close(frozen(batch)["features"], F.normalize(clip.image(batch["image"]), dim=-1))
    next(clip.visual.parameters()).requires_grad_(True)
    assert task.frozen_part(bound) is None
