"""Compiled steps. Oracle: the same steps without torch.compile, and torch itself, which may not compile anew."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_training import Quiet, fit
from torch import nn
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

import randlora
from conftest import Attention, settings
from randlora.adapters.core import require_adaptation
from randlora.adapters.interface import Step
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.methods import (
    DoRA,
    EDoRA,
    FlatLoRA,
    FullFineTuning,
    GeLoRA,
    IncreLoRA,
    LoRA,
    LoRAMini,
    LoRTA,
    MELoRA,
    Method,
    MoRA,
    NoLA,
    RandLoRA,
    RandLoRAa,
    SoRA,
    VeRA,
)
from randlora.training import compilation
from randlora.training.compilation import CompiledBlocks

METHODS = [
    LoRA(rank=4), DoRA(rank=4), VeRA(rank=16), NoLA(num_bases=32, rank=2), RandLoRA(rank=5),
    RandLoRA(rank=5, basis="kronecker"), RandLoRAa(rank=4), FullFineTuning(train="targets"), EDoRA(rank=5),
    MoRA(rank=4), MELoRA(rank=2, parts=4), LoRAMini(rank=3, inner_in=8, inner_out=6), LoRTA(rank=5),
    FlatLoRA(rank=4), GeLoRA(ranks={"layers.0": 5, "layers.1": 2, "layers.2": 2}), SoRA(rank=5), IncreLoRA(rank=4),
]  # fmt: skip


class Deep(nn.Module):
    """Three blocks of attention that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(24, fused=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs as torch.compile makes them, without the machine code, which takes a C++ compiler many seconds."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def losses(model: nn.Module, inputs: Callable[[int], object], compiled: bool) -> list[float]:
    """Of four steps of plain gradient descent; from the third on, compiling anew is an error."""
    adaptation, found = require_adaptation(model), []
    blocks = CompiledBlocks(model) if compiled else None
    for number in range(4):
        if compiled and number == 2:
            torch.compiler.set_stance("fail_on_recompile")
        adaptation.method.before_step(adaptation.updates.values(), Step(number, 4, 0.1, 0))
        if blocks:
            with blocks:
                loss = _loss(model, inputs(number))
        else:
            loss = _loss(model, inputs(number))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
                    parameter.grad = None
        found.append(loss)
    torch.compiler.set_stance("default")
    return found


def _loss(model: nn.Module, inputs: object) -> float:
    output = model(inputs)
    output = getattr(output, "logits", getattr(output, "last_hidden_state", output))
    loss = (output - 1).square().mean()
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_compiles_into_whole_graphs_and_once(method: Method) -> None:
    def built() -> nn.Module:
        torch.manual_seed(0)
        model = Deep()
        randlora.adapt(model, method, ["layers.*"])
        return model.train()

    inputs = [torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    expected = losses(built(), inputs.__getitem__, compiled=False)
    assert len(set(expected)) == 4
    assert losses(built(), inputs.__getitem__, compiled=True) == pytest.approx(expected, rel=1e-5)
    assert counters["stats"]["unique_graphs"] > 0


SIZE = {"num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **SIZE)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZE), add_pooling_layer=False),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_transformers_compile(family: str) -> None:
    def built() -> nn.Module:
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()  # no dropout, which a compiled graph draws otherwise
        randlora.adapt(model, RandLoRA(rank=4), ["re:.*(layer|layers|h)[.]\\d.*"])
        return model

    texts = [torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    expected = losses(built(), texts.__getitem__, compiled=False)
    assert losses(built(), texts.__getitem__, compiled=True) == pytest.approx(expected, rel=1e-5)


def test_clip_compiles_for_its_two_towers() -> None:
    """Their layers share open_clip's code and differ in size, so that the number of tokens becomes a variable."""

    def built() -> nn.Module:
        backbone = Experiment.from_config(settings("model=clip_tiny")).model.load()
        randlora.adapt(backbone.module, RandLoRA(rank=6), ["*resblocks.[01].attn.in_proj", "*resblocks.[01].mlp.c_fc"])
        return Towers(backbone.module)

    inputs = [torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    expected = losses(built(), inputs.__getitem__, compiled=False)
    assert losses(built(), inputs.__getitem__, compiled=True) == pytest.approx(expected, rel=1e-4)


class Towers(nn.Module):
    """Both towers of a CLIP at once."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_image(images) @ self.clip.encode_text(torch.arange(48).view(2, 24)).T


def test_a_training_is_compiled_in_its_steps_alone(tmp_path: Path) -> None:
    """Oracle: the same training without. Scoring between steps, micro-batches of two sizes."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)))
        randlora.adapt(net, RandLoRA(rank=3), ["*"])
        observer, seen = Quiet(), counters["stats"]["unique_graphs"]
        how = {"micro_batch_size": 3, "evaluate_every": 2, "log_every": 1}
        fit(net, tmp_path / str(compiled), observer, max_steps=4, compile=compiled, **how)
        assert (counters["stats"]["unique_graphs"] > seen) is compiled
        assert all(block._compiled_call_impl is None for block in net.modules())
        found.append(observer.metrics)
    for plain, other in zip(*found, strict=True):
        assert other == pytest.approx(plain, rel=1e-5)


def test_a_model_without_blocks_is_refused(toy: nn.Module) -> None:
    randlora.adapt(toy, LoRA(rank=2), ["square"])
    with pytest.raises(SettingsError, match=r"trainer\.compile=true: the model has no list of blocks"):
        CompiledBlocks(toy)
