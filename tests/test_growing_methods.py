"""The neighbours of RandLoRA whose ranks are chosen or change: each against its paper's rule, written out."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_related_methods import SHAPES, agree, site
from torch import Tensor, nn

import randlora
from conftest import BLOCK_TARGETS, Blocks, Toy, settings
from randlora.adapters.calibration import States
from randlora.adapters.core import adapted_layers, require_adaptation
from randlora.adapters.identity import TENSORS
from randlora.adapters.interface import Step
from randlora.adapters.layer import AdaptedLinear
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.methods import (
    GeLoRA,
    IncreLoRA,
    RankedLoRA,
    SoRA,
    gelora,
)  # fmt: skip
from randlora.methods.gelora import intrinsic_dimension
from randlora.methods.growing import GrowingUpdate
from randlora.methods.sora import soft_threshold
from randlora.plan import dry_run, table

# GeLoRA


@pytest.mark.parametrize(("dimension", "examples"), [(2, 400), (5, 1000), (10, 1000)])
def test_twonn_finds_the_dimension_of_a_plane(dimension: int, examples: int) -> None:
    """Gaussian points on a plane in 768 dimensions, some of them twice."""
    rng = torch.Generator().manual_seed(dimension)
    plane = torch.randn(dimension, 768, generator=rng)
    points = torch.randn(examples, dimension, generator=rng) @ plane
    estimate = intrinsic_dimension(torch.cat([points, points[:50]]))
    assert estimate == pytest.approx(dimension, rel=0.12)
    assert estimate == intrinsic_dimension(points)


def test_twonn_is_its_formula() -> None:
    """Four points on a line: neighbours by hand, the largest ratio left out."""
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # distances 1, 3; 1, 2; 2, 3; 4, 6
    ratios, F = [1.5, 1.5, 2.0], [0.25, 0.5, 0.75]
    slope = sum(-math.log(1 - f) * math.log(mu) for f, mu in zip(F, ratios, strict=True))
    assert intrinsic_dimension(points, 0.1) == pytest.approx(slope / sum(math.log(mu) ** 2 for mu in ratios))
    x, y = torch.tensor([1.5, 2.0]).log(), -torch.tensor([2 / 3, 1 / 3]).log()  # of 0, 1 and 3; 3 is left out
    assert intrinsic_dimension(points[:3]) == pytest.approx(float(x @ y / (x @ x)))
    with pytest.raises(SettingsError, match="2 different examples are too few"):
        intrinsic_dimension(points[[0, 1, 0, 1, 0]])


class Widening(nn.Module):
    """Blocks whose states have known dimensions: 2 enter, 6 leave the first, 3 the second, padding is noise."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(24, 24)}) for _ in range(2))
        self.maps = [torch.randn(size, 24, generator=rng) for size in (2, 6, 3)]
        self.calls = 0

    def forward(self, coordinates: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls += 1
        states = [coordinates[:, :, : len(A)] @ A for A in self.maps]
        for layer, states_in, states_out in zip(self.layers, states, states[1:], strict=False):
            self.block(layer, states_in, states_out)
        return states[-1]

    def block(self, layer: nn.Module, entering: Tensor, leaving: Tensor) -> None:
        layer.forward = lambda hidden_states: (leaving, None)  # as blocks of transformers return
        layer(hidden_states=entering)


def widening_batches(count: int) -> list[dict[str, Tensor]]:
    """Texts of two tokens and one of padding, whose states reach all dimensions."""
    rng = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 0]]).expand(100, 3)
    return [{"coordinates": torch.randn(100, 3, 6, generator=rng), "attention_mask": mask} for _ in range(count)]


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_gelora_gives_ranks_by_the_growth_of_dimensions(pooling: str, tmp_path: Path) -> None:
    """Oracle: TwoNN on the states written out; a file needs no data."""
    model, batches, targets = Widening(), widening_batches(6), ["layers.*.mlp"]
    chosen = randlora.calibrate(model, GeLoRA(pooling=pooling), targets, batches, lambda batch: model(**batch))
    coordinates = torch.cat([batch["coordinates"] for batch in batches])
    pooled = coordinates[:, :2].mean(1) if pooling == "mean" else coordinates[:, 0]
    two, six, three = (intrinsic_dimension(pooled[:, : len(A)] @ A) for A in model.maps)
    assert (two, six, three) == pytest.approx((2, 6, 3), rel=0.15)
    assert chosen == GeLoRA(pooling=pooling, ranks={"layers.0": math.ceil(six - two) + 1, "layers.1": 1})
    assert model.calls == 6
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert randlora.calibrate(model, chosen, targets, batches, lambda batch: model(**batch)) is chosen
    assert model.calls == 6  # ranks that are there need no data

    plain = lambda: nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(24, 24)}) for _ in "12")})  # noqa: E731
    torch.manual_seed(0)
    first, second = plain(), plain()
    with pytest.raises(SettingsError, match="GeLoRA has no ranks yet"):
        randlora.adapt(first, GeLoRA(), targets)
    second.load_state_dict(first.state_dict())
    report = randlora.adapt(first, chosen, targets)
    assert [site.trainable_parameters for site in report.sites] == [48 * rank for rank in chosen.ranks.values()]
    assert {layer.updates[0].scale for layer in adapted_layers(first).values()} == {32.0}
    randlora.save_adapter(first, tmp_path)
    assert json.loads((tmp_path / "adapter.json").read_text())["method"]["ranks"] == chosen.ranks
    randlora.load_adapter(second, tmp_path)
    assert require_adaptation(second).method == chosen


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, [5, 1]), ({"rounding": "down"}, [4, 1]), ({"rounding": "nearest"}, [5, 1]), ({"largest": 3}, [3, 1]),
        ({"mean_rank": 4}, [6, 2]), ({"mean_rank": 1}, [1, 1]), ({"mean_rank": 2.5}, [4, 1]),
    ],
)  # fmt: skip
def test_geloras_options(settings: dict, ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block grows by 3.6, the second shrinks."""
    dimensions = {f"layers.{i}": States(*map(torch.tensor, sizes)) for i, sizes in enumerate([(2.0, 5.6), (5.0, 1.0)])}
    monkeypatch.setattr(gelora, "hidden_states", lambda *_: dimensions)
    monkeypatch.setattr(gelora, "intrinsic_dimension", lambda points, _: float(points))
    chosen = GeLoRA(**settings).calibrated(nn.Module(), ["layers.0.mlp", "layers.1.mlp"], [])
    assert list(chosen.ranks.values()) == ranks


def test_gelora_refuses_sites_and_blocks_that_it_has_no_rank_for(toy: Toy) -> None:
    with pytest.raises(SettingsError, match="square is in no numbered block"):
        randlora.adapt(toy, GeLoRA(ranks={"layers.0": 2}), ["square"])
    with pytest.raises(SettingsError, match=r"no layers\.1, the block of layers\.1\.attn.*; it has layers\.0"):
        randlora.adapt(Blocks(), GeLoRA(ranks={"layers.0": 2}), BLOCK_TARGETS)


def test_a_plan_of_gelora_says_what_it_counts() -> None:
    def plan(*overrides: str) -> dict:
        return dry_run(Experiment.from_config(settings("dry_run=true", "task=mrpc", "model=minilm", *overrides)))

    largest, even, lora = plan("method=gelora"), plan("method=gelora", "method.mean_rank=8"), plan("method=lora")
    assert largest["trainable_parameters"] == 8 * lora["trainable_parameters"]
    assert even["trainable_parameters"] == lora["trainable_parameters"]
    assert "for rank 64 everywhere" in table(largest)
    assert "for equal ranks of mean 8" in table(even)
    assert "remark" not in lora


# SoRA


@pytest.mark.parametrize("shape", SHAPES)
def test_sora_is_lora_with_gates_and_folds_to_lora(shape: tuple[int, int]) -> None:
    layer, update, weight = site(SoRA(rank=5, alpha=10), *shape)
    with torch.no_grad():
        update.gates[[1, 3]] = 0
    expected = weight + 2.0 * update.B @ torch.diag(update.gates) @ update.A
    agree(layer, update, expected.detach())
    assert update.fold() == 3
    assert {name: p.shape for name, p in update.named_parameters()} == {"A": (3, shape[1]), "B": (shape[0], 3)}
    assert update.scale == pytest.approx(10 / 3)  # as in a LoRA of rank 3 and alpha 10
    agree(layer, update, expected.detach())


def test_soft_thresholds() -> None:
    z = torch.tensor([1.5, 2.5, -0.5, -1.9, -2.5, 0.5])
    assert soft_threshold(z, 1.0).tolist() == pytest.approx([0.5, 1.5, 0, -0.9, -1.5, 0])
    assert soft_threshold(z, 1.0, hard_gap=True).tolist() == pytest.approx([0, 1.5, 0, 0, -1.5, 0])
    assert torch.equal(soft_threshold(z, 0.0, hard_gap=True), z)


def test_soras_threshold_is_the_rate_times_the_sparsity_of_the_stage() -> None:
    method = SoRA(rank=4, sparsity=1.0, final_sparsity=7.0, stages=4)
    assert [method.sparsity_at(Step(n, 8, 1.0, 0)) for n in range(8)] == [1, 1, 3, 3, 5, 5, 7, 7]
    _, update, _ = site(method, 24, 24)
    with torch.no_grad():
        update.gates.copy_(torch.tensor([1.0, -1.0, 0.2, -0.35]))
    method.after_step([update], Step(3, 8, 0.1, 0))
    assert update.gates.tolist() == pytest.approx([0.7, -0.7, 0, -0.05])


def test_soras_gates_start_normal_and_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(24, 24))
    randlora.adapt(model, SoRA(rank=4000), ["0"])
    trained = randlora.adapters.core.require_adaptation(model).trained()
    gates = trained["0:gates"]
    assert (gates.mean().item(), gates.std().item()) == (pytest.approx(0, abs=0.05), pytest.approx(1, abs=0.05))
    others, of_gates = SoRA().parameter_groups(trained, 0.1, 0.3)
    assert [id(p) for p in others["params"]] == [id(trained["0:A"]), id(trained["0:B"])]
    assert ([id(p) for p in of_gates["params"]], of_gates["weight_decay"]) == ([id(gates)], 0.0)
    assert others["weight_decay"] == 0.3


def test_a_finished_sora_is_a_lora_on_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """One site loses a rank, one loses all of them."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model, x = Toy(), torch.randn(2, 5, 24)
    randlora.adapt(model, SoRA(rank=3), ["square", "tall", "wide"])
    adaptation = randlora.adapters.core.require_adaptation(model)
    with torch.no_grad():
        for update in adaptation.updates.values():
            update.B.normal_()
        adaptation.updates["tall"].gates[0] = 0
        adaptation.updates["wide"].gates.zero_()
    expected = model(x)
    adaptation.method = adaptation.method.finish(adaptation.updates)
    assert adaptation.method == RankedLoRA({"square": 3, "tall": 2, "wide": 0}, 16.0)
    torch.testing.assert_close(model(x), expected)
    randlora.save_adapter(model, tmp_path)
    sizes = {name: tensor.numel() for name, tensor in load_file(tmp_path / TENSORS).items()}
    assert sizes == {"A": 3 * 24 + 2 * 24, "B": 3 * 24 + 2 * 60}
    torch.manual_seed(0)
    other = Toy()
    randlora.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(randlora.merge(other)(x), expected, rtol=1e-4, atol=1e-4)


def test_ranked_lora_names_every_site(toy: Toy) -> None:
    with pytest.raises(SettingsError, match=r"RankedLoRA.ranks has no tall: name every site"):
        randlora.adapt(toy, RankedLoRA({"square": 2}), ["square", "tall"])
    with pytest.raises(SettingsError, match=r"RankedLoRA.alpha has no tall: name every site"):
        randlora.adapt(toy, RankedLoRA({"square": 2, "tall": 3}, {"square": 4}), ["square", "tall"])


# IncreLoRA


def grown(shape: tuple[int, int]) -> tuple[AdaptedLinear, GrowingUpdate, Tensor]:
    """A site of three ranks and two in advance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).double()
    randlora.adapt(model, IncreLoRA(rank=4, alpha=6, gain=2), ["0"], seed=5)
    model.double()
    layer = model[0]
    update = layer.updates[0]
    update.advance(2, 1)
    update.grow(2, 7)
    update.advance(2, 7)
    with torch.no_grad():
        for parameter in update.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer, update, layer.weight


@pytest.mark.parametrize("shape", SHAPES)
def test_increlora_is_its_ranks_and_those_in_advance(shape: tuple[int, int]) -> None:
    layer, update, weight = grown(shape)
    a, b, values = ([*each.values()] for each in (update.a, update.b, update.lambda_))
    assert (len(a), len(b), len(values)) == (5, 5, 3)
    ranks = sum(values[i] * b[i] @ a[i] for i in range(3))
    advance = sum(1e-5 * b[i] @ a[i] for i in (3, 4))
    expected = (weight + 2.0 * (ranks + advance)).detach()  # alpha 6 over three ranks
    torch.testing.assert_close(weight + update.delta(weight), expected, rtol=0, atol=1e-12)
    agree(layer, update, expected)
    plain = (weight + 2.0 * ranks).detach()
    assert update.fold() == 3
    torch.testing.assert_close(weight + update.delta(weight), plain, rtol=0, atol=1e-12)
    assert {name: p.shape for name, p in update.named_parameters()} == {"A": (3, shape[1]), "B": (shape[0], 3)}


def test_increloras_ranks_start_as_its_authors_do() -> None:
    """N(0, 0.02²), other ones for every rank, and as many of them whatever has grown before."""
    _, update, _ = site(IncreLoRA(rank=2), 400, 500)
    update.advance(2, 9)
    first, second = update.a["9_0"], update.a["9_1"]
    assert first.std().item() == pytest.approx(0.02, rel=0.1)
    assert update.b["9_0"].std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(torch.corrcoef(torch.cat([first, second]))[0, 1]) < 0.2
    _, other, _ = site(IncreLoRA(rank=2), 400, 500)
    other.advance(1, 4)
    other.advance(1, 9)
    assert torch.equal(other.a["9_0"], first)


def test_increloras_score_is_that_of_the_whole_steps_gradient() -> None:
    """Two steps of two micro-batches, one of them checkpointed. Oracle: ∂L/∂ΔW by autograd on an explicit ΔW."""
    layer, update, weight = grown((24, 60))
    layer.train()
    means = [0.0, 0.0]
    for _ in range(2):
        x, g = torch.randn(2, 9, 60, dtype=torch.float64), torch.randn(2, 9, 24, dtype=torch.float64)
        (layer(x[0]) * g[0]).sum().backward()
        (torch.utils.checkpoint.checkpoint(layer, x[1], use_reentrant=False) * g[1]).sum().backward()
        delta = update.delta(weight).detach().requires_grad_()
        ((x @ (weight + delta).T + layer.bias) * g).sum().backward()
        score = (delta * delta.grad).abs().mean().item()
        means[0] = 0.9 * means[0] + 0.1 * score
        means[1] = 0.9 * means[1] + 0.1 * abs(score - means[0])
        update.take_score(0.9)
        assert update.importance.tolist() == pytest.approx(means)
        assert update.score == pytest.approx(means[0] * means[1])
    with torch.no_grad():
        layer(x[0])
    layer.eval()(x[0]).sum().backward()
    assert not update.gradient.any()


def test_the_sites_of_the_highest_scores_grow() -> None:
    torch.manual_seed(0)
    model, method = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), IncreLoRA(rank=3, top=2, interval=5)
    randlora.adapt(model, method, ["0", "1", "2", "3"])
    updates = [layer.updates[0] for layer in adapted_layers(model).values()]
    assert method.after_backward(updates, Step(0, 100, 1.0, 0))
    for number in (1, 5, 9, 11):  # the first interval passes without a round
        assert not method.after_backward(updates, Step(number, 100, 1.0, 0))
    for update, value in zip(updates, (1.0, 4.0, 2.0, 3.0), strict=True):
        update.importance.fill_(value)
    assert method.after_backward(updates, Step(10, 100, 1.0, 0))
    assert [update.rank for update in updates] == [1, 2, 1, 2]
    assert [len(update.a) for update in updates] == [2, 3, 2, 3]  # one in advance each


def test_increloras_factors_are_drawn_towards_orthogonal_rows() -> None:
    _, update, _ = grown((24, 60))
    A = torch.cat([*update.a.values()]).detach().numpy()
    B = torch.cat([*update.b.values()], 1).detach().numpy()
    distances = [np.linalg.norm(A @ A.T - np.eye(5)), np.linalg.norm(B.T @ B - np.eye(5))]
    assert IncreLoRA(orthogonality=0.3).penalty([update]).item() == pytest.approx(0.3 * np.mean(distances))
    assert IncreLoRA(orthogonality=0.0).penalty([update]) is None
