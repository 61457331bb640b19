"""PEFT's format both ways, and training side by side with it. Oracle throughout: PEFT itself."""

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import randlora
from conftest import BLOCK_TARGETS, REPOSITORY, Blocks
from randlora.adapters.core import require_adaptation
from randlora.errors import SettingsError
from randlora.methods import (
    DoRA,
    EDoRA,
    GeLoRA,
    IncreLoRA,
    LoRA,
    LoRAMini,
    LoRTA,
    MELoRA,
    Method,
    NoLA,
    RandLoRA,
    RankedDoRA,
    RankedLoRA,
    SoRA,
    VeRA,
)
from randlora.peft import refusal

peft = pytest.importorskip("peft", reason="PEFT is a development dependency")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about Conv1D and bases that are not stored
TARGETS = ["square", "tall", "wide", "conv"]


class Net(nn.Module):
    """Square, tall, wide and transposed maps; the smaller sides differ where `narrow` is not 24."""

    def __init__(self, narrow: int = 24):
        super().__init__()
        torch.manual_seed(0)
        self.square, self.tall, self.wide = nn.Linear(24, 24), nn.Linear(24, 60), nn.Linear(60, narrow)
        self.conv, self.untouched = Conv1D(40, narrow), nn.Linear(40, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.untouched(self.conv(self.wide(self.tall(self.square(x)).tanh())))


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def assert_same(ours: nn.Module, theirs: nn.Module, rounding: float = 1) -> None:
    x = torch.randn(9, 24)
    modes = [(model, model.training) for model in (ours, theirs)]
    expected, found = theirs.eval()(x).detach(), ours.eval()(x)
    assert (found - expected).abs().max() <= rounding * 2e-6 * expected.abs().max()
    for model, training in modes:
        model.train(training)


@pytest.mark.parametrize(
    ("method", "bases", "narrow"),
    [
        (LoRA(rank=4, alpha=3, dropout=0.1), True, 16),
        (DoRA(rank=4, alpha=3, dropout=0.1), True, 16),
        (MELoRA(rank=3, parts=2, alpha=5), True, 16),
        (MELoRA(rank=2, parts=4, permuted=True), True, 16),
        (LoRAMini(rank=3, inner_in=8, inner_out=6), True, 16),
        (VeRA(rank=7), True, 16),
        (VeRA(rank=7, basis="sparse"), True, 16),
        (VeRA(rank=7, basis="peft"), False, 16),
        (RandLoRA(rank=5), True, 24),
        (RandLoRA(rank=5, num_bases="floor", basis="normal"), True, 24),
        (RandLoRA(rank=6, num_bases=2), True, 24),
        (RandLoRA(rank=5, basis="kronecker"), True, 24),
        (RandLoRA(rank=5, divide_by_root=True), True, 24),
        (RandLoRA(rank=5, basis="peft"), True, 16),
        (RandLoRA(rank=5, basis="peft"), False, 16),
    ],
    ids=str,
)
def test_peft_reads_what_we_write(method: Method, bases: bool, narrow: int, tmp_path: Path) -> None:
    ours = Net(narrow)
    randlora.adapt(ours, method, TARGETS, seed=5)
    randomise(ours)
    assert refusal(ours, bases) is None
    written = randlora.to_peft(ours, tmp_path, bases=bases)
    assert written == sum(file.stat().st_size for file in tmp_path.iterdir())
    theirs = peft.PeftModel.from_pretrained(Net(narrow), tmp_path)
    assert_same(ours.eval(), theirs.eval())


def test_peft_reads_a_tensors_slices_as_loras(tmp_path: Path) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Blocks())
    ours, plain = models
    randlora.adapt(ours, LoRTA(rank=5), BLOCK_TARGETS[:4])
    randomise(ours)
    randlora.to_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [SoRA(rank=3), IncreLoRA(rank=3, start=3)], ids=["sora", "increlora"])
def test_peft_reads_a_finished_method_of_ranks_of_its_own(method: Method, tmp_path: Path) -> None:
    """A site loses a rank and another all of them; written from the training and from a file of ours."""
    ours = Net(16)
    randlora.adapt(ours, method, TARGETS, seed=5)
    randomise(ours)
    adaptation = require_adaptation(ours)
    if isinstance(method, SoRA):
        first, second = list(adaptation.updates.values())[:2]
        with torch.no_grad():
            first.gates[0] = 0
            second.gates.zero_()
    adaptation.method = method.finish(adaptation.updates)
    randlora.to_peft(ours, tmp_path / "peft")
    assert_same(ours.eval(), peft.PeftModel.from_pretrained(Net(16), tmp_path / "peft").eval())
    randlora.save_adapter(ours, tmp_path / "ours")
    loaded = Net(16)
    randlora.load_adapter(loaded, tmp_path / "ours")
    randlora.to_peft(loaded, tmp_path / "again")
    assert_same(ours, peft.PeftModel.from_pretrained(Net(16), tmp_path / "again").eval())


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, init_lora_weights="eva", target_modules=TARGETS
    ),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, lora_dropout=0.2, init_lora_weights="gaussian", target_modules=TARGETS
    ),
    "lora of patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"w..e": 2, "^tall": 5}, alpha_pattern={"tall|conv": 3}, target_modules=TARGETS,
        init_lora_weights=False,
    ),
    "rslora of patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"wide": 2}, alpha_pattern={"tall": 3}, target_modules=TARGETS,
        lora_dropout=0.2, init_lora_weights="orthogonal",
    ),
    "dora of patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, rank_pattern={"wide": 2}, alpha_pattern={"tall": 3}, target_modules=TARGETS,
        lora_dropout=0.2,
    ),
    "vera": lambda: peft.VeraConfig(r=7, target_modules=TARGETS, projection_prng_key=3),
    "vera without bases": lambda: peft.VeraConfig(
        r=7, target_modules=TARGETS, save_projection=False, d_initial=0.3, vera_dropout=0.2
    ),
    "randlora": lambda: peft.RandLoraConfig(r=5, randlora_alpha=15, target_modules=TARGETS, projection_prng_key=3),
    "randlora without bases": lambda: peft.RandLoraConfig(
        r=5, randlora_alpha=15, target_modules=TARGETS, save_projection=False, randlora_dropout=0.2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_we_read_what_peft_writes(name: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Net(16), CONFIGS[name]())
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = Net(16)
    report = randlora.from_peft(ours, tmp_path)
    assert report.trainable_parameters == theirs.get_nb_trainable_parameters()[0]
    assert_same(ours, theirs)
    again = Net(16)
    randlora.save_adapter(ours, tmp_path / "ours")
    randlora.load_adapter(again, tmp_path / "ours")
    assert_same(again, theirs)


def test_files_without_repeated_bases(tmp_path: Path) -> None:
    """As PEFT writes them after 0.21 (its pull request 3714): the bases once, at the model; so do we.

    The installed PEFT is the oracle for the outputs; the file is its own without what is repeated at every site.
    """
    theirs = peft.get_peft_model(Net(16), CONFIGS["randlora"]())
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    once = {
        name: tensor for name, tensor in tensors.items() if not re.match(r"base_model\.model\..*randlora_[AB]$", name)
    }
    assert {name for name in once if name.endswith(("_A", "_B"))} == {"base_model.randlora_A", "base_model.randlora_B"}
    save_file(once, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    ours = Net(16)
    randlora.from_peft(ours, tmp_path)
    assert_same(ours, theirs)
    randlora.to_peft(ours, tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == once.keys()


def test_bases_that_no_seed_gives_are_kept(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Net(16), CONFIGS["randlora"]())
    randomise(theirs)
    for stored in (theirs.base_model.randlora_A, theirs.base_model.randlora_B):
        stored["default"].mul_(1.5)
    theirs.save_pretrained(tmp_path)
    ours = Net(16)
    randlora.from_peft(ours, tmp_path)
    assert_same(ours, theirs)
    with pytest.raises(SettingsError, match="no seed gives them"):
        randlora.save_adapter(ours, tmp_path / "ours")
    randlora.to_peft(ours, tmp_path / "again")
    assert_same(ours, peft.PeftModel.from_pretrained(Net(16), tmp_path / "again"))


class Even(nn.Module):
    """Sites of one input size and one number of bases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.square, self.tall, self.untouched = nn.Linear(24, 24), nn.Linear(24, 60), nn.Linear(60, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.untouched(self.tall(self.square(x).tanh()))


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "even": (Even, TARGETS[:2]), "one smaller side": (Net, TARGETS), "uneven": (partial(Net, 16), TARGETS),
}  # fmt: skip


def train(model: nn.Module, seed: int) -> None:
    """Twenty steps of AdamW on a random regression, with the dropout of a seed."""
    torch.manual_seed(seed)
    data = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        x, target = torch.randn(32, 24, generator=data), torch.randn(32, 8, generator=data)
        optimiser.zero_grad()
        (model(x) - target).square().mean().backward()
        optimiser.step()


def apart(ours: nn.Module, theirs: nn.Module, folder: Path) -> float:
    """How far a further twenty steps take the two from each other, in parameters as PEFT names them."""
    train(ours, 3), train(theirs, 3)
    randlora.to_peft(ours, folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    a, b = (load_file(folder / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    trained = [name for name in a if name.startswith("base_model.model.")]
    return max(float((a[name] - b[name]).abs().max()) for name in trained)


@pytest.mark.parametrize(
    ("net", "method", "bases"),
    [
        ("uneven", LoRA(rank=4, alpha=3, dropout=0.2), True),
        ("uneven", DoRA(rank=4, alpha=3, dropout=0.2), True),
        ("uneven", RankedLoRA({"square": 3, "tall": 0, "wide": 2, "conv": 3}, 5.0), True),
        ("uneven", RankedDoRA({"square": 3, "tall": 0, "wide": 2, "conv": 3}, 5.0), True),
        ("even", VeRA(rank=7), True),
        ("even", VeRA(rank=7, basis="sparse"), True),
        ("uneven", VeRA(rank=7, d_initial=0.3, dropout=0.2, basis="peft"), False),
        ("one smaller side", RandLoRA(rank=5, alpha=7, dropout=0.2), True),
        ("one smaller side", RandLoRA(rank=5, divide_by_root=True), True),
        ("one smaller side", RandLoRA(rank=5, num_bases="floor", divide_by_root=True), True),
        ("one smaller side", RandLoRA(rank=5, basis="kronecker", divide_by_root=True), True),
        ("one smaller side", RandLoRA(rank=5, basis="peft", divide_by_root=True), False),
        ("uneven", RandLoRA(rank=5, basis="peft"), True),
    ],
    ids=str,
)
def test_what_we_write_trains_on_in_peft(net: str, method: Method, bases: bool, tmp_path: Path) -> None:
    build, targets = NETS[net]
    ours = build()
    randlora.adapt(ours, method, targets, seed=5)
    train(ours, 2)
    randlora.to_peft(ours, tmp_path, bases=bases)
    assert not (tmp_path / "INFERENCE_ONLY.txt").exists()
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    assert apart(ours, theirs, tmp_path) <= 1e-6
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_writes_trains_on_here(name: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Net(16), CONFIGS[name]())
    train(theirs, 2)
    theirs.save_pretrained(tmp_path)
    ours = Net(16)
    randlora.from_peft(ours, tmp_path)
    rounding = 10 if "dora" in name else 1  # its norms are summed otherwise there
    assert apart(ours, theirs, tmp_path) <= rounding * 1e-6
    assert_same(ours, theirs, rounding)


@pytest.mark.parametrize("method", [VeRA(rank=7), RandLoRA(rank=5, basis="peft", divide_by_root=True)], ids=str)
def test_what_would_train_otherwise_says_that_it_is_for_inference(method: Method, tmp_path: Path) -> None:
    build, targets = NETS["uneven"]
    ours = build()
    randlora.adapt(ours, method, targets)
    train(ours, 2)
    with pytest.warns(UserWarning, match=f"{tmp_path}: This adapter is for inference .* scale of {method.name}"):
        randlora.to_peft(ours, tmp_path)
    assert "is for inference" in (tmp_path / "INFERENCE_ONLY.txt").read_text()
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    assert_same(ours, theirs)
    assert apart(ours, theirs, tmp_path) > 1e-3
    fresh = build()
    randlora.adapt(fresh, LoRA(rank=2), targets)
    randlora.to_peft(fresh, tmp_path)
    assert not (tmp_path / "INFERENCE_ONLY.txt").exists()


@pytest.mark.parametrize(
    ("method", "bases", "why"),
    [
        (NoLA(num_bases=8), True, "PEFT has no nola"),
        (EDoRA(rank=4), True, "PEFT has no edora"),
        (RandLoRA(rank=5), False, "cannot draw"),
        (VeRA(rank=7), False, "cannot draw"),
        (RandLoRA(rank=5), True, r"method\.basis=peft"),
        (VeRA(rank=7, basis="kronecker"), True, "one dense matrix"),
        (RandLoRA(rank=5, num_bases=9), True, "PEFT has at most"),
        (RandLoRA(rank=5, basis="very_sparse"), True, r"method\.basis=peft"),
        (RandLoRA(rank=11, num_bases="floor"), True, r"method\.basis=peft"),
    ],
    ids=str,
)
def test_what_peft_cannot_hold_is_refused(method: Method, bases: bool, why: str, tmp_path: Path) -> None:
    model = Net(16)
    randlora.adapt(model, method, TARGETS)
    with pytest.raises(SettingsError, match=why):
        randlora.to_peft(model, tmp_path / "out", bases=bases)
    assert not (tmp_path / "out").exists()
    assert re.search(why, refusal(model, bases) or "")
    with torch.device("meta"):
        shapes = Net(16)
    randlora.adapt(shapes, method, TARGETS)
    assert refusal(shapes, bases) == refusal(model, bases)


class Fused(nn.Module):
    """A fused projection as GPT-2's, and a fused attention as CLIP's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c_attn, self.attention = Conv1D(72, 24), nn.MultiheadAttention(24, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(*self.c_attn(x).chunk(3, dim=-1))[0]


@pytest.mark.parametrize("method", [LoRA(3), DoRA(3), VeRA(3, basis="peft"), RandLoRA(3, basis="peft")], ids=str)
def test_fused_matrices_are_written_whole_and_neither_sliced_nor_in_attention(method: Method, tmp_path: Path) -> None:
    """As PEFT has them: VeRA and RandLoRA have no layer there for nn.MultiheadAttention, LoRA has one for all of it."""
    ours = Fused()
    randlora.adapt(ours, method, ["c_attn"])
    randomise(ours)
    randlora.to_peft(ours, tmp_path)
    assert_same(ours, peft.PeftModel.from_pretrained(Fused(), tmp_path))
    for target, why in (
        ("c_attn[q]", r"c_attn\[q\] is a slice of a fused matrix, and PEFT adapts matrices whole"),
        ("attention.in_proj", r"in_proj lies inside nn\.MultiheadAttention, which PEFT does not unfuse"),
        ("attention.in_proj[v]", r"in_proj\[v\] lies inside nn\.MultiheadAttention"),
        ("attention.out_proj", r"out_proj lies inside nn\.MultiheadAttention"),
    ):
        ours = Fused()
        randlora.adapt(ours, method, [target])
        with pytest.raises(SettingsError, match=why):
            randlora.to_peft(ours, tmp_path)
    if not isinstance(method, LoRA | DoRA):
        config = peft.VeraConfig if isinstance(method, VeRA) else peft.RandLoraConfig
        with pytest.raises(ValueError, match="No layers types compatible"):
            peft.get_peft_model(Fused(), config(r=3, target_modules=["attention"]))


def test_attention_that_peft_has_adapted_is_refused(tmp_path: Path) -> None:
    """An update of out_proj alone is a thing that PEFT never uses, as it says itself."""
    for target, why in (("attention", "which PEFT adapts as one layer"), ("out_proj", "never uses the update")):
        theirs = peft.get_peft_model(Fused(), peft.LoraConfig(r=3, target_modules=[target]))
        before = theirs(torch.ones(5, 24)).detach()
        randomise(theirs)
        assert torch.equal(theirs(torch.ones(5, 24)), before) == (target == "out_proj")
        theirs.save_pretrained(tmp_path)
        with pytest.raises(SettingsError, match=why):
            randlora.from_peft(Fused(), tmp_path)


def test_what_we_cannot_read_is_refused(tmp_path: Path) -> None:
    def saved(config, name: str, **options) -> Path:  # type: ignore[no-untyped-def]
        peft.get_peft_model(Net(), config).save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    broken, listed = saved(CONFIGS["lora"](), "broken"), saved(CONFIGS["lora"](), "listed")
    for folder, patterns in ((broken, {"(": 2}), (listed, ["wide"])):
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": patterns}))
    ia3 = saved(peft.IA3Config(target_modules=["square"], feedforward_modules=[]), "ia3")
    pickled = saved(CONFIGS["lora"](), "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    other = saved(CONFIGS["lora"](), "other")
    pissa = saved(peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=TARGETS[:3]), "pissa")
    rankless, extra = saved(CONFIGS["lora"](), "rankless"), saved(CONFIGS["lora"](), "extra")
    settings = json.loads((rankless / "adapter_config.json").read_text())
    (rankless / "adapter_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "r"}))
    tensors = load_file(extra / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.square.lora_C": torch.ones(2)}, extra / "adapter_model.safetensors")
    for folder, why in (
        (broken, "patterns that give no ranks or alphas"),
        (listed, "patterns that give no ranks or alphas"),
        (ia3, "IA3"),
        (pickled, "pickle"),
        (tmp_path / "no", "no PEFT"),
        (pissa, "init_lora_weights='pissa'"),
        (rankless, "has no r"),
        (extra, "square has lora_C"),
    ):
        model = Net()
        with pytest.raises(SettingsError, match=why):
            randlora.from_peft(model, folder)
        assert isinstance(model.square, nn.Linear)
    with pytest.raises(SettingsError, match="match"):
        randlora.from_peft(nn.Sequential(nn.Linear(3, 3)), other)


@pytest.mark.parametrize("name", ["rslora", "vera without bases", "randlora without bases"])
def test_modules_to_save_travel_and_train_on(name: str, tmp_path: Path) -> None:
    """Both ways; the two then train alike."""
    config = CONFIGS[name]()
    config.modules_to_save = ["untouched"]
    theirs = peft.get_peft_model(Net(), config)
    train(theirs, 2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Net()
    randlora.from_peft(ours, tmp_path / "theirs")
    assert_same(ours, theirs)
    train(ours, 3), train(theirs, 3)
    assert_same(ours, theirs)
    randlora.to_peft(ours, tmp_path / "ours", "without" not in name, modules={"untouched": ours.untouched})
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours", is_trainable=True)
    assert_same(ours, again)
    train(ours, 4), train(again, 4)
    assert_same(ours, again)
    with pytest.raises(SettingsError, match="head is not the name of this module"):
        randlora.to_peft(ours, tmp_path / "named", modules={"head": ours.untouched})
    without = Net()
    del without.untouched
    with pytest.raises(SettingsError, match=r"untouched\.(weight|bias), and this model has no module for it"):
        randlora.from_peft(without, tmp_path / "theirs")
    without.untouched = nn.Linear(40, 9)
    with pytest.raises(SettingsError, match="untouched needs"):
        randlora.from_peft(without, tmp_path / "theirs")
    assert isinstance(without.square, nn.Linear)


SIZE = {"num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
WORDS = torch.arange(40).view(2, 20)


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.3, **SIZE)
    return LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    return model(WORDS).logits.detach()


def assert_same_logits(*models: nn.Module) -> None:
    first, *others = map(logits, models)
    for other in others:
        torch.testing.assert_close(other, first, rtol=2e-5, atol=2e-5)


def train_words(model: nn.Module) -> None:
    """Twenty steps of AdamW towards the next word."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        optimiser.zero_grad()
        model(WORDS, labels=WORDS.roll(7, 1)).loss.backward()
        optimiser.step()


def test_an_update_of_the_output_layer(tmp_path: Path) -> None:
    """Both ways, with twenty further steps; PEFT stores the frozen matrix under it, and embeddings if asked to."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    theirs = peft.get_peft_model(llama(tied=False), config)
    train_words(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in stored
    ours = llama(tied=False)
    randlora.from_peft(ours, tmp_path / "theirs")
    assert_same_logits(ours, theirs)
    train_words(ours), train_words(theirs)
    assert_same_logits(ours, theirs)
    randlora.to_peft(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(tied=False), tmp_path / "ours", is_trainable=True)
    train_words(ours), train_words(again)
    assert_same_logits(ours, again)
    other = llama(tied=False)
    with torch.no_grad():
        other.lm_head.weight[3, 5] += 1e-3
    with pytest.raises(SettingsError, match=r"lm_head\.weight with other values"):
        randlora.from_peft(other, tmp_path / "theirs")
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "tied")
    with pytest.raises(SettingsError, match=r"lm_head and model\.embed_tokens share one weight"):
        randlora.from_peft(llama(), tmp_path / "tied")


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_modules_to_save_that_are_tied_become_modules_of_their_own(saved: list[str], tmp_path: Path) -> None:
    """As PEFT, which trains a copy; read, trained on, kept as ours, among several, written back and merged."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    theirs = peft.get_peft_model(llama(), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama()
    randlora.from_peft(ours, tmp_path / "theirs")
    assert_same_logits(ours, theirs)
    train_words(ours), train_words(theirs)
    assert_same_logits(ours, theirs)
    names = {"lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}
    modules = {names[name]: ours.get_submodule(names[name]) for name in saved}
    randlora.to_peft(ours, tmp_path / "written", modules=modules)
    assert_same_logits(ours, peft.PeftModel.from_pretrained(llama(), tmp_path / "written").eval())
    randlora.save_adapter(ours, tmp_path / "ours", modules)
    again = llama()
    randlora.load_adapter(again, tmp_path / "ours")
    assert_same_logits(ours, again)
    several = llama()
    adapters = randlora.Adapters(several, {name: several.get_submodule(name) for name in modules})
    adapters.load("a", tmp_path / "written", randlora.from_peft)
    adapters.load("b", tmp_path / "ours")
    assert_same_logits(several, llama())
    for name in ("a", "b"):
        with adapters.using(name):
            assert_same_logits(several, ours)
    randlora.merge(again).save_pretrained(tmp_path / "merged")
    assert_same_logits(ours, LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval())


def test_what_is_trained_as_tied_stays_tied_or_is_refused(tmp_path: Path) -> None:
    ours = llama()
    randlora.adapt(ours, LoRA(rank=2), ["q_proj"])
    ours.lm_head.requires_grad_(True)
    randomise(ours)
    with pytest.raises(SettingsError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        randlora.to_peft(ours, tmp_path / "peft", modules={"lm_head": ours.lm_head})
    randlora.save_adapter(ours, tmp_path / "ours", {"lm_head": ours.lm_head})
    again, untied = llama(), llama(tied=False)
    randlora.load_adapter(again, tmp_path / "ours")
    assert_same_logits(ours, again)
    with pytest.raises(SettingsError, match="load a model that ties them"):
        randlora.load_adapter(untied, tmp_path / "ours", base="any")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "own")
    several = llama()
    adapters = randlora.Adapters(several, {"lm_head": several.lm_head})
    adapters.load("tied", tmp_path / "ours")
    with pytest.raises(SettingsError, match="tied was trained with it tied"):
        adapters.load("own", tmp_path / "own", randlora.from_peft)
    assert adapters.names == ["tied"]
    assert several.lm_head.weight is several.model.embed_tokens.weight
    assert several.config.tie_word_embeddings
    assert_same_logits(several, llama())
    several = llama()
    with pytest.raises(SettingsError, match=r"has lm_head\.weight, too"):
        randlora.Adapters(several).load("own", tmp_path / "own", randlora.from_peft)
    assert_same_logits(several, llama())


@pytest.mark.parametrize(("name", "which"), [("lora", "all"), ("dora", "only"), ("vera", "only"), ("randlora", "all")])
def test_biases_are_trained_beside(name: str, which: str, tmp_path: Path) -> None:
    """Read, trained on, kept as ours and written back."""
    config = CONFIGS[name]()
    config.target_modules = set(TARGETS[:3])
    config.bias = which if which == "all" else f"{config.peft_type.value.lower()}_only"
    config.modules_to_save = ["untouched"] if name == "lora" else None
    theirs = peft.get_peft_model(Net(16), config)
    train(theirs, 2)
    theirs.save_pretrained(tmp_path / "read")
    ours = Net(16)
    report = randlora.from_peft(ours, tmp_path / "read")
    modules = {"untouched": ours.untouched} if name == "lora" else {}
    beside = sum(p.numel() for module in modules.values() for p in module.parameters())
    assert report.trainable_parameters + beside == theirs.get_nb_trainable_parameters()[0]
    assert_same(ours, theirs)
    rounding = 10 if name == "dora" else 1
    train(ours, 3), train(theirs, 3)
    assert_same(ours, theirs, rounding)
    randlora.to_peft(ours, tmp_path / "written", modules=modules)
    again = peft.PeftModel.from_pretrained(Net(16), tmp_path / "written", is_trainable=True)
    assert again.peft_config["default"].bias == config.bias
    assert_same(ours, again, rounding)
    randlora.save_adapter(ours, tmp_path / "ours", modules)
    kept = Net(16)
    assert randlora.load_adapter(kept, tmp_path / "ours") == report
    assert_same(ours, kept)
    for module in modules:
        kept.get_submodule(module).requires_grad_(True)
    train(again, 4), train(kept, 4)
    assert_same(kept, again, rounding)
    with pytest.raises(SettingsError, match=r"has square\.bias, too|has more of the model"):
        randlora.Adapters(Net(16), {"untouched": Net(16).untouched}).load("a", tmp_path / "read", randlora.from_peft)
    randlora.to_peft(kept, tmp_path / "kept", modules=modules and {"untouched": kept.untouched})
    assert_same(randlora.merge(kept), peft.PeftModel.from_pretrained(Net(16), tmp_path / "kept").eval(), rounding)


def test_biases_that_are_not_those_of_peft_are_refused(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Net(16), peft.LoraConfig(r=2, target_modules=["square"], bias="all"))
    theirs.save_pretrained(tmp_path / "all")
    path = tmp_path / "all" / "adapter_config.json"
    other = Net(16)
    other.tall.bias = None
    with pytest.raises(SettingsError, match=r"tall\.bias as \(60,\), and in this model it is None"):
        randlora.from_peft(other, tmp_path / "all")
    ours = Net(16)
    randlora.from_peft(ours, tmp_path / "all")
    randlora.save_adapter(ours, tmp_path / "ours")
    with pytest.raises(SettingsError, match=r"trained with tall\.bias, and this model has none"):
        randlora.load_adapter(other, tmp_path / "ours")
    with pytest.raises(SettingsError, match="has more of the model than matrices"):
        randlora.Adapters(Net(16)).load("a", tmp_path / "ours")
    require_adaptation(ours).unfrozen.pop("tall.bias")
    with pytest.raises(SettingsError, match="neither all biases of the model nor those of its sites"):
        randlora.to_peft(ours, tmp_path / "no")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": "some"}))
    with pytest.raises(SettingsError, match="has bias='some'"):
        randlora.from_peft(Net(16), tmp_path / "all")


OPTIONS = re.findall(
    r"^\| `(\w+)` \| [^|]* \| (read|no effect|refused)(?:: )?([^|]*) \|",
    (REPOSITORY / "docs/peft.md").read_text(),
    re.M,
)
GIVEN: dict[str, object] = {"layer_replication": [[0, 2]], "trainable_token_indices": [1]}


def test_the_page_has_every_option_of_peft() -> None:
    configs = (peft.LoraConfig, peft.VeraConfig, peft.RandLoraConfig)
    assert {name for name, _, _ in OPTIONS} >= {
        field.name for config in configs for field in dataclasses.fields(config)
    }


WHY = {name: why for name, what, why in OPTIONS if what == "refused"} | {"of_the_next_version": "it is not known"}


@pytest.mark.parametrize("option", WHY)
def test_what_the_page_calls_refused_is_refused_with_the_reason_there(option: str, tmp_path: Path) -> None:
    peft.get_peft_model(Net(), CONFIGS["lora"]()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: GIVEN.get(option, {"some": 1})}))
    assert WHY[option]
    with pytest.raises(SettingsError, match=f"has {option}=.*{re.escape(WHY[option])}"):
        randlora.from_peft(Net(), tmp_path)


def test_what_the_page_calls_without_effect_has_none(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Net(), CONFIGS["lora"]())
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    others = {name: "another" for name, what, _ in OPTIONS if what == "no effect"}
    path.write_text(json.dumps(json.loads(path.read_text()) | others))
    ours = Net()
    randlora.from_peft(ours, tmp_path)
    assert_same(ours, theirs)


class Nested(nn.Module):
    """A site whose name ends as another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({"square": nn.Linear(24, 24)})
        self.square, self.tall = nn.Linear(24, 24), nn.Linear(24, 60)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tall(self.square(self.inner["square"](x).tanh()))


def test_ranks_and_scales_of_each_site_are_patterns_of_peft(tmp_path: Path) -> None:
    """The last site has what most have not; one site has no rank left, and one shares the end of its name."""
    ours = Nested()
    randlora.adapt(ours, LoRA(rank=3), ["inner.square", "square", "tall"])
    randomise(ours)
    kept, none, last = (layer.updates[0] for layer in (ours.square, ours.inner["square"], ours.tall))
    for update, ranks in ((none, 0), (last, 2)):
        update.A, update.B = nn.Parameter(update.A[:ranks].detach()), nn.Parameter(update.B[:, :ranks].detach())
    kept.scale, last.scale = 0.5, 1.25
    randlora.to_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    x = torch.randn(9, 24)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x), rtol=1e-6, atol=1e-6)
    found = {name: (m.r["default"], m.scaling["default"]) for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    expected = {"inner.square": (1, 2.0), "square": (3, 0.5), "tall": (2, 1.25)}
    assert found == {f"base_model.model.{name}": value for name, value in expected.items()}
    again = Nested()
    randlora.from_peft(again, tmp_path)
    torch.testing.assert_close(again(x), ours(x), rtol=1e-6, atol=1e-6)
    ranks, alphas = ({name: pair[i] for name, pair in expected.items()} for i in (0, 1))
    assert require_adaptation(again).method == RankedLoRA(ranks, {name: alphas[name] * ranks[name] for name in ranks})


def test_geloras_ranks_are_patterns_and_train_on_in_peft(tmp_path: Path) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(24, 24)}) for _ in range(2))}))
    ours, plain = models
    randlora.adapt(ours, GeLoRA(scale=3, ranks={"h.0": 2, "h.1": 5}), ["h.*.fc"])
    randomise(ours)
    randlora.to_peft(ours, tmp_path)
    assert not (tmp_path / "INFERENCE_ONLY.txt").exists()
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).base_model.model
    x = torch.randn(9, 24)
    for own, other in zip(ours["h"], theirs["h"], strict=True):
        assert_close(own["fc"](x), other["fc"](x))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_dora_with_gradient_through_its_norm_is_for_inference(tmp_path: Path) -> None:
    ours = Net(16)
    randlora.adapt(ours, DoRA(rank=4, detach_norm=False), TARGETS)
    with pytest.warns(UserWarning, match=r"takes the norm as a constant in backward"):
        randlora.to_peft(ours, tmp_path)


def test_values_that_are_not_finite_are_refused_and_the_model_stays(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Net(16), CONFIGS["lora"]())
    with torch.no_grad():
        next(p for name, p in theirs.named_parameters() if "lora_B" in name)[0, 0] = float("inf")
    theirs.save_pretrained(tmp_path)
    ours = Net(16)
    before = [(name, id(p), p.requires_grad) for name, p in ours.named_parameters()]
    with pytest.raises(SettingsError, match="values that are not finite"):
        randlora.from_peft(ours, tmp_path)
    assert [(name, id(p), p.requires_grad) for name, p in ours.named_parameters()] == before
