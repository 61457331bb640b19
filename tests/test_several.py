"""Several adapters on one model. Oracle: a model of its own for each, and W0 + Σ w ΔW in float64."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import randlora
from conftest import TOY_TARGETS, Toy
from randlora.adapters.core import adapted_layers
from randlora.errors import SettingsError
from randlora.methods import DoRA, FullFineTuning, LoRA, Method, NoLA, RandLoRA, VeRA

METHODS: Mapping[str, Method] = {
    "lora": LoRA(rank=2),
    "randlora": RandLoRA(rank=4),
    "dora": DoRA(rank=2),
    "vera": VeRA(rank=8),
    "nola": NoLA(rank=2),
    "targets": FullFineTuning(train="targets"),
}


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def disturbed(method: Method, targets: list[str], seed: int = 1) -> Toy:
    """A model with the method's updates, none of them at its start."""
    model = toy()
    randlora.adapt(model, method, targets, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def inputs() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(5, 7, 24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, method) in enumerate(METHODS.items()):
        randlora.save_adapter(disturbed(method, TOY_TARGETS, seed), root / name)
    return {name: root / name for name in METHODS}


@pytest.fixture
def adapters(folders: dict[str, Path]) -> randlora.Adapters:
    adapters = randlora.Adapters(toy())
    for name, folder in folders.items():
        adapters.load(name, folder)
    return adapters


def alone(folder: Path) -> Toy:
    model = toy()
    randlora.load_adapter(model, folder)
    return model.eval()


@torch.no_grad()
def test_one_at_a_time_is_what_a_model_of_its_own_is(
    adapters: randlora.Adapters, folders: dict[str, Path], inputs: Tensor
) -> None:
    plain = adapters.model(inputs)
    torch.testing.assert_close(plain, toy()(inputs))
    outputs = []
    for name in [*METHODS, *reversed(METHODS)]:
        adapters.use(name)
        outputs.append(adapters.model(inputs))
        assert torch.equal(outputs[-1], alone(folders[name])(inputs))
        assert not torch.allclose(outputs[-1], plain)
    with adapters.using(None) as model:
        assert torch.equal(model(inputs), plain)
    assert adapters.weights == {"lora": 1}
    assert torch.equal(adapters.model(inputs), outputs[0])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """W' of the adapted modules, float64."""
    layers = adapted_layers(model)
    return {name: layer.merged_weight().double() for name, layer in layers.items()}


@torch.no_grad()
def test_weights(adapters: randlora.Adapters, folders: dict[str, Path], inputs: Tensor) -> None:
    chosen = {"lora": 0.5, "dora": -0.25, "vera": 2.0}
    adapters.use(chosen)
    start = {name: layer.weight.double() for name, layer in adapted_layers(adapters.model).items()}
    expected = {name: weight.clone() for name, weight in start.items()}
    for name, factor in chosen.items():
        for module, weight in weights_of(alone(folders[name])).items():
            expected[module] += factor * (weight - start[module])
    output = adapters.model(inputs)
    with randlora.merged(adapters.model):
        torch.testing.assert_close(adapters.model(inputs), output, rtol=1e-4, atol=1e-5)
    found = weights_of(adapters.model)
    model = adapters.merge()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(inputs), output, rtol=1e-4, atol=1e-5)
    assert {type(module) for module in model.modules()} == {type(module) for module in toy().modules()}
    assert adapters.names == []


@torch.no_grad()
def test_examples_of_one_batch_have_their_own(adapters: randlora.Adapters, inputs: Tensor) -> None:
    names = ["dora", None, "lora", "dora", "randlora"]
    adapters.use("vera")
    with adapters.each(names) as model:
        mixed = model(inputs)
        with pytest.raises(SettingsError, match="give one name for each example"):
            model(inputs[:2])
        with pytest.raises(SettingsError, match="cannot be merged"), randlora.merged(model):
            pass
    for index, name in enumerate(names):
        with adapters.using(name) as model:
            torch.testing.assert_close(mixed[index], model(inputs[index : index + 1])[0], rtol=1e-5, atol=1e-6)
    assert adapters.weights == {"vera": 1}


@torch.no_grad()
def test_heads_belong_to_their_adapters(tmp_path: Path) -> None:
    def model() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(6, 6), "score": nn.Linear(6, 3)})

    for seed, name in enumerate("ab"):
        trained = model()
        randlora.adapt(trained, LoRA(rank=2), ["body"], seed=seed)
        trained["score"].weight += seed + 1
        trained["score"].bias[:] = torch.tensor([1e8, -1e-8, 0.1]) * (seed + 1)
        randlora.save_adapter(trained, tmp_path / name, modules={"score": trained["score"]})
    several = model()
    start = several["score"].weight.clone()
    adapters = randlora.Adapters(several, modules={"score": several["score"]})
    for name in "ab":
        adapters.load(name, tmp_path / name)
        assert torch.equal(several["score"].weight, start)
    adapters.use("b")
    assert torch.equal(several["score"].weight, start + 2)
    assert torch.equal(several["score"].bias, 2 * torch.tensor([1e8, -1e-8, 0.1]))  # which no sum of others gives
    adapters.use({"a": 0.5, "b": 0.25})
    torch.testing.assert_close(several["score"].weight, start + 1)
    with pytest.raises(SettingsError, match=r"a has score\.\w+ of its own"), adapters.each(["a", None]):
        pass
    adapters.use(None)
    assert torch.equal(several["score"].weight, start)
    with pytest.raises(SettingsError, match="has score, too: name it among the `modules`"):
        randlora.Adapters(model()).load("a", tmp_path / "a")


@torch.no_grad()
def test_what_cannot_be_is_refused_and_changes_nothing(
    adapters: randlora.Adapters, folders: dict[str, Path], inputs: Tensor, tmp_path: Path
) -> None:
    adapters.use({"lora": 0.5})
    before = adapters.model(inputs)
    whole = disturbed(FullFineTuning(), TOY_TARGETS)
    randlora.save_adapter(whole, tmp_path / "whole")
    other = Toy()
    randlora.adapt(other, LoRA(rank=2), TOY_TARGETS)
    randlora.save_adapter(other, tmp_path / "other")
    for name, folder, said in (
        ("lora", folders["lora"], "cannot be named 'lora'; names taken: lora, randlora, "),
        ("whole", tmp_path / "whole", "more of the model than matrices"),
        ("other", tmp_path / "other", "frozen"),
        ("none", tmp_path, "no adapter can be read"),
    ):
        with pytest.raises(SettingsError, match=said):
            adapters.load(name, folder)
        assert torch.equal(adapters.model(inputs), before)
    assert adapters.names == [*METHODS]
    with pytest.raises(SettingsError, match="no adapter is named 'x'; there are lora, "):
        adapters.use("x")
    with pytest.raises(SettingsError, match="the weight of vera is nan"):
        adapters.use({"vera": float("nan")})
    with pytest.raises(SettingsError, match="lora is in use"):
        adapters.remove("lora")
    adapters.remove("vera")
    assert "vera" not in adapters.names
    assert torch.equal(adapters.model(inputs), before)
    with pytest.raises(SettingsError, match="adapted already"):
        randlora.Adapters(alone(folders["lora"]))


@torch.no_grad()
def test_adapters_from_peft(folders: dict[str, Path], inputs: Tensor, tmp_path: Path) -> None:
    model = disturbed(LoRA(rank=2), ["square", "tall", "wide"])
    expected = model(inputs)
    randlora.to_peft(model, tmp_path)
    adapters = randlora.Adapters(toy())
    adapters.load("own", folders["randlora"])
    adapters.load("peft", tmp_path, reader=randlora.from_peft)
    adapters.use("peft")
    torch.testing.assert_close(adapters.model(inputs), expected)
