"""Start values, scales and augmentations as published: every expected value is written here with its source."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import randlora
from randlora.adapters.interface import describe, method_from
from randlora.data.images import image_transform
from randlora.methods import LoRA, Method, NoLA, RandLoRA, VeRA
from randlora.models import TextEncoder
from randlora.models.base import Pixels

OUT, INTO = 48, 30


def update_of(method: Method) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    linear = nn.Linear(INTO, OUT)
    model = nn.Sequential(linear)
    randlora.adapt(model, method, ["0"])
    return linear, model[0].updates[0]


def test_loras_first_factor_is_kaimings() -> None:
    """LoRA's code (microsoft/LoRA, loralib/layers.py): kaiming_uniform with a = √5, so U(-1/√in, 1/√in)."""
    _, update = update_of(LoRA(rank=200))
    assert update.A.abs().max() <= 1 / math.sqrt(INTO)
    assert update.A.std().item() == pytest.approx(1 / math.sqrt(3 * INTO), rel=0.03)
    assert update.A.mean().abs() < 0.005
    assert not update.B.any()


def test_loras_start_belongs_to_the_seed_and_the_site() -> None:
    """Recorded from the code of the day this test was written: the same seeds start from the same bits ever after."""
    model = nn.Sequential(OrderedDict(first=nn.Linear(3, 5), last=nn.Linear(3, 5)))
    randlora.adapt(model, LoRA(rank=2), ["first", "last"], seed=7)
    recorded = {
        "first": [[-0.3307915, -0.2158582, -0.1064616], [0.4263180, -0.3564031, -0.1907210]],
        "last": [[-0.4516095, 0.4895923, -0.4202093], [0.5010504, 0.1967137, -0.3731422]],
    }
    for site, start in recorded.items():
        torch.testing.assert_close(model.get_submodule(site).updates[0].A, torch.tensor(start), rtol=0, atol=6e-8)


def test_lora_draws_nothing_for_a_model_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randlora.methods.common.draw", None)
    model = nn.Sequential(nn.Linear(INTO, OUT, device="meta"))
    randlora.adapt(model, LoRA(rank=4), ["0"])
    shapes = {name: (p.shape, p.device.type) for name, p in model[0].updates[0].named_parameters()}
    assert shapes == {"A": ((4, INTO), "meta"), "B": ((OUT, 4), "meta")}


def test_loras_scale_is_alpha_over_rank() -> None:
    """Hu et al. 2021, section 4.1."""
    linear, update = update_of(LoRA(rank=4, alpha=6))
    nn.init.normal_(update.B)
    torch.testing.assert_close(update.delta(linear.weight), 6 / 4 * update.B @ update.A)


def test_veras_start_and_scale() -> None:
    """Kopiczko et al. 2023, section 3.2: A and B Kaiming uniform (gain √2, by fan-in), d = 0.1, b = 0."""
    linear, update = update_of(VeRA(rank=400))
    assert torch.equal(update.d, torch.full((400,), 0.1))
    assert not update.b.any()
    nn.init.ones_(update.b)
    nn.init.ones_(update.d)
    # B A has entries of variance 400 · (2 / in) · (2 / 400) over the draw of A and B.
    assert update.delta(linear.weight).std().item() == pytest.approx(math.sqrt(4 / INTO), rel=0.05)


def test_randloras_diagonals_start_as_in_peft_and_in_the_authors_code() -> None:
    """PEFT: λ = 0 and γ = 1/max(n, min(out, in)). The authors' vision code: γ = 0 and λ = 1/max(n, rank)."""
    _, update = update_of(RandLoRA(rank=7))  # n = ⌈30 / 7⌉ = 5
    assert update.lambda_.shape == (5, 7)
    assert not update.lambda_.any()
    assert torch.equal(update.gamma, torch.full((5, 30), 1 / 30))
    _, update = update_of(RandLoRA(rank=7, zero="gamma"))
    assert torch.equal(update.lambda_, torch.full((5, 7), 1 / 7))
    assert not update.gamma.any()
    _, update = update_of(RandLoRA(rank=2, zero="gamma"))  # n = 15 > rank
    assert torch.equal(update.lambda_, torch.full((15, 2), 1 / 15))


@pytest.mark.parametrize(
    ("settings", "scale"), [({}, 2.0), ({"alpha": 21}, 3.0), ({"divide_by_root": True}, 2 / 5**0.5)]
)
def test_randloras_scale(settings: dict[str, Any], scale: float) -> None:
    """Albert et al. 2025, equation 4 with alpha / rank, and 2/√n in the language runs (appendix C.4); n = 5 here."""
    linear, update = update_of(RandLoRA(rank=7, **settings))
    nn.init.normal_(update.lambda_)
    nn.init.normal_(update.gamma)
    A, B = update.basis_A.matrix[:, :INTO], update.basis_B.matrix[:OUT]
    total = sum(B[:, 7 * j : 7 * j + 7] @ update.lambda_[j].diag() @ A @ update.gamma[j].diag() for j in range(5))
    torch.testing.assert_close(update.delta(linear.weight), scale * total, rtol=1e-4, atol=1e-4)


def coordinates(size: int = 96) -> Image.Image:
    """An image whose red channel is x and whose green channel is y, each from 0 to 255."""
    ramp = np.linspace(0, 255, size).round().astype(np.uint8)
    return Image.fromarray(
        np.dstack([np.tile(ramp, (size, 1)), np.tile(ramp, (size, 1)).T, np.zeros((size, size), np.uint8)])
    )


def views(augmentation: str, count: int = 400) -> Tensor:
    """(count, 3, 32, 32) with values of 0 to 1, so that each pixel says where in the image it comes from."""
    torch.manual_seed(0)
    transform = image_transform(Pixels(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), augmentation)
    image = coordinates()
    return torch.stack([transform(image) for _ in range(count)])


def areas(images: Tensor) -> Tensor:
    """The share of the whole image that each view shows: an edge pixel's centre lies half a pixel inside its edge."""
    x, y = images[:, 0, 16], images[:, 1, :, 16]
    spans = [(line[:, -1] - line[:, 0]).abs() * 32 / 31 for line in (x, y)]
    return spans[0] * spans[1]


CROP = "RandomResizedCrop(size=(60, 60), scale=({}, 1.0), ratio=(0.75, 1.3333), interpolation=bicubic, antialias=True)"
SIMCLR = [
    "RandomApply( p=0.8 ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4),",
    "hue=(-0.1, 0.1)) ) RandomGrayscale(p=0.2) RandomApply( p=0.5 GaussianBlur(kernel_size=(7, 7), sigma=(0.1, 2.0)) )",
]
STEPS = {
    "none": ["Resize(size=60, interpolation=bicubic, max_size=None, antialias=True) CenterCrop(size=(60, 60))"],
    "crop": [CROP.format(0.5)],
    "crop_flip": [CROP.format(0.5), "RandomHorizontalFlip(p=0.5)"],
    "clip": [CROP.format(0.9)],
    "strong": [CROP.format(0.2), *SIMCLR, "RandomHorizontalFlip(p=0.5)"],
}


@pytest.mark.parametrize("augmentation", STEPS)
def test_an_augmentations_steps(augmentation: str) -> None:
    """As torchvision prints them. The RandLoRA authors' src/finetune.py; strong: SimCLR."""
    transform = image_transform(Pixels(60, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), augmentation)
    steps = " ".join(
        ["Lambda()", *STEPS[augmentation], "ToTensor() Normalize(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))"]
    )
    assert " ".join(str(transform).split()) == f"Compose( {steps} )"


@pytest.mark.parametrize(("augmentation", "smallest"), [("crop", 0.5), ("crop_flip", 0.5), ("clip", 0.9)])
def test_crops_show_the_published_share_of_the_image(augmentation: str, smallest: float) -> None:
    """The RandLoRA authors' src/finetune.py crops to a scale of 0.5 to 1, its --base-augs (CLIP's own) to 0.9 to 1."""
    shares = areas(views(augmentation))
    assert smallest - 0.03 < shares.min() < smallest + 0.05
    assert 0.95 < shares.max() < 1.03


@pytest.mark.parametrize(("augmentation", "flipped"), [("crop", 0.0), ("clip", 0.0), ("crop_flip", 0.5)])
def test_half_of_the_views_are_mirrored_where_flips_are_asked_for(augmentation: str, flipped: float) -> None:
    images = views(augmentation)
    mirrored = images[:, 0, 16, 0] > images[:, 0, 16, -1]
    assert mirrored.float().mean().item() == pytest.approx(flipped, abs=0.1)
    assert not (images[:, 1, 0, 16] > images[:, 1, -1, 16]).any()  # never upside down


def test_mean_pooling_leaves_padding_out() -> None:
    """Oracle: the mean over the real tokens of transformers' last hidden states, by a loop."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    configuration = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    module = BertModel(configuration, add_pooling_layer=False).eval()
    backbone = TextEncoder("tiny", pooling="mean")._backbone(module)
    ids = torch.randint(1, 50, (3, 9))
    lengths = [9, 4, 1]
    mask = torch.tensor([[1] * length + [0] * (9 - length) for length in lengths])
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert backbone.features is not None
    pooled = backbone.features(module, inputs)
    states = module(**inputs).last_hidden_state
    for row, length in enumerate(lengths):
        torch.testing.assert_close(pooled[row], sum(states[row, i] for i in range(length)) / length)


def test_nola_starts_as_in_its_authors_code() -> None:
    """github.com/UCDvision/NOLA: a fixed Kaiming A (U(±1/√in)), zero coefficients, bases U(-1, 1) over √num_bases."""
    linear, update = update_of(NoLA(rank=300, num_bases=64, alpha=300))
    assert not update.alpha.any()
    assert not update.beta.any()
    A, B = update.factors(OUT, INTO)
    assert A.abs().max() <= 1 / math.sqrt(INTO)
    assert A.std().item() == pytest.approx(1 / math.sqrt(3 * INTO), rel=0.03)
    assert not B.any()
    start = A.clone()
    with torch.no_grad():
        update.alpha[5] = update.beta[5] = 1.0
    A, B = update.factors(OUT, INTO)
    for moved, count in ((A - start, 300 * INTO), (B, 300 * OUT)):
        # One basis of U(-1, 1) over √64: within 1/8, of variance 1/3 · 1/64.
        assert moved.numel() == count
        assert moved.abs().max() <= 1 / 8 + 1e-6
        assert moved.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.03)
    torch.testing.assert_close(update.delta(linear.weight), B @ A)


def test_nola_starts_as_in_the_randlora_authors_code() -> None:
    """Their vision code: both coefficients 1/num_bases, banks of deviation 1, so that ΔW is not zero at the start."""
    linear, update = update_of(NoLA(rank=1, num_bases=64, alpha=1, start="reciprocal"))
    A = update.bank_A.matrix[:, :INTO].mean(0)
    B = update.bank_B.matrix[:, :OUT].mean(0)
    torch.testing.assert_close(update.delta(linear.weight), torch.outer(B, A), rtol=1e-4, atol=1e-5)
    assert update.bank_A.matrix.std().item() == pytest.approx(1, rel=0.05)


def test_nola_with_coefficients_of_one_starts_like_lora() -> None:
    """Our own option: A is a sum of 64 bases with LoRA's deviation at its start, 1/√(3·in); a basis of B has 1/√64."""
    _, update = update_of(NoLA(rank=300, num_bases=64, alpha=300, start="ones"))
    A, B = update.factors(OUT, INTO)
    assert A.std().item() == pytest.approx(1 / math.sqrt(3 * INTO), rel=0.03)
    assert not B.any()
    with torch.no_grad():
        update.beta[5] = 1.0
    assert update.factors(OUT, INTO)[1].std().item() == pytest.approx(1 / 8, rel=0.03)


def test_adapters_of_nola_from_before_its_start_was_a_setting_keep_their_meaning() -> None:
    description = describe(NoLA(num_bases=8, start="ones"))
    del description["start"]
    assert method_from(description) == NoLA(num_bases=8, start="ones")
