"""The contract that every method keeps, on square, tall, wide, fused and transposed sites."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import randlora
from conftest import BLOCK_TARGETS, TOY_TARGETS, Blocks, Toy
from randlora.adapters.core import adapted_layers, relative_norms
from randlora.adapters.interface import Frozen, Site, Update
from randlora.bases import DenseBasis
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
    RankedDoRA,
    RankedLoRA,
    SoRA,
    VeRA,
)

METHODS = [
    LoRA(rank=4),
    DoRA(rank=4),
    DoRA(rank=4, detach_norm=False),
    VeRA(rank=16),
    VeRA(rank=16, basis="ternary"),
    VeRA(rank=16, basis="kronecker"),
    VeRA(rank=30, basis="very_sparse"),
    NoLA(num_bases=32, rank=2),
    NoLA(num_bases=32, rank=2, start="ones"),
    NoLA(num_bases=32, rank=2, basis="kronecker"),
    NoLA(num_bases=32, rank=2, basis="binary"),
    RandLoRA(rank=5),
    RandLoRA(rank=5, num_bases="floor", basis="normal"),
    RandLoRA(rank=4, num_bases=3, zero="gamma", basis="ternary", sparsity=6.0),
    RandLoRA(rank=4, num_bases=0.5, divide_by_root=True),
    RandLoRA(rank=5, basis="kronecker"),
    RandLoRA(rank=5, num_bases="floor", basis="kronecker"),
    RandLoRAa(rank=4, budget_rank=5),
    RandLoRAa(rank=4, num_bases=3, basis="ternary", sparsity=6.0),
    FullFineTuning(train="targets"),
    EDoRA(rank=5),
    MoRA(rank=4),
    MoRA(rank=4, surplus="drop"),
    MoRA(rank=4, compression="decoupled"),
    MoRA(rank=4, compression="sharing"),
    MoRA(rank=4, compression="grouped"),
    MELoRA(rank=2, parts=4),
    MELoRA(rank=2, parts=3, permuted=True),
    LoRAMini(rank=3, inner_in=8, inner_out=6),
    LoRTA(rank=5),
    LoRTA(rank=5, head_side="output"),
    LoRTA(rank=5, head_side="input"),
    FlatLoRA(rank=4),
    GeLoRA(ranks={"layers.0": 5, "layers.1": 2}),
    SoRA(rank=5),
    IncreLoRA(rank=4, start=3),
    RankedLoRA({name: rank for rank, name in enumerate(TOY_TARGETS, 1)}),
    RankedDoRA({name: rank for rank, name in enumerate(TOY_TARGETS, 1)}),
]
NAMES = [f"{type(m).__name__}-{i}" for i, m in enumerate(METHODS)]
every_method = pytest.mark.parametrize("method", METHODS, ids=NAMES)


def closed_form(method: Method, site: Site) -> int:
    """Trained parameters of a site, by the papers' formulas."""
    small, total = min(site.out_features, site.in_features), site.out_features + site.in_features
    if isinstance(method, LoRA | FlatLoRA):
        return method.rank * total
    if isinstance(method, GeLoRA):
        return {"0": 5, "1": 2}[site.name.split(".")[1]] * total
    if isinstance(method, SoRA):
        return method.rank * (total + 1)
    if isinstance(method, IncreLoRA):  # at the start
        return method.start * (total + 1)
    if isinstance(method, RankedLoRA):
        return method.ranks[site.name] * total + isinstance(method, RankedDoRA) * site.out_features
    if isinstance(method, DoRA):
        return method.rank * total + site.out_features
    if isinstance(method, VeRA):
        return method.rank + site.out_features
    if isinstance(method, NoLA):
        return 2 * method.num_bases
    if isinstance(method, RandLoRAa):
        budget = small // method.budget_rank * (method.budget_rank + small)
        return (method.num_bases or budget // (method.rank + small)) * (method.rank + small)
    if isinstance(method, EDoRA):
        return method.rank**2 + site.out_features
    if isinstance(method, MoRA):
        size = round(math.sqrt(method.rank * total))
        return (size - size % 2 if method.compression == "rotation" else size) ** 2
    if isinstance(method, MELoRA):
        return method.rank * total
    if isinstance(method, LoRAMini):
        return method.rank * (method.inner_in + method.inner_out)
    if isinstance(method, LoRTA):  # all of the tensor at the first site: width, head width, heads, layers, roles
        return method.rank * (24 + 6 + 4 + 2 + 4) if site.name == BLOCK_TARGETS[0] else 0
    if isinstance(method, RandLoRA):
        rounded = {"ceil": math.ceil(small / method.rank), "floor": small // method.rank}
        n = rounded.get(method.num_bases, method.num_bases)  # type: ignore[arg-type, call-overload]
        n = n if isinstance(n, int) else int(n * rounded["floor"])
        return n * (method.rank + small)
    return site.out_features * site.in_features


def claimed_rank(method: Method, site: Site) -> int:
    """The rank of ΔW for trained parameters in general position."""
    small = min(site.out_features, site.in_features)
    if isinstance(method, LoRA | DoRA | NoLA | RandLoRAa | EDoRA | LoRAMini | LoRTA | FlatLoRA | SoRA):
        return min(method.rank, small)
    if isinstance(method, GeLoRA):
        return closed_form(method, site) // (site.out_features + site.in_features)
    if isinstance(method, VeRA):
        return min(method.rank, small)
    if isinstance(method, IncreLoRA):
        return method.start
    if isinstance(method, RankedLoRA):
        return method.ranks[site.name]
    if isinstance(method, MELoRA):
        return min(method.rank * method.parts, small)
    if isinstance(method, MoRA) and method.compression in ("sharing", "grouped"):
        return math.isqrt(closed_form(method, site))
    if isinstance(method, RandLoRA):
        return min(method.rank * (closed_form(method, site) // (method.rank + small)), small)
    return small


def plain(method: Method) -> Toy | Blocks:
    """A model that the method can adapt."""
    torch.manual_seed(0)
    return Blocks() if isinstance(method, LoRTA | GeLoRA) else Toy()


def targets_of(method: Method) -> list[str]:
    return BLOCK_TARGETS if isinstance(method, LoRTA | GeLoRA) else TOY_TARGETS


def adapted(method: Method, dtype: torch.dtype = torch.float64) -> tuple[Toy | Blocks, randlora.adapters.Report]:
    model = plain(method)
    report = randlora.adapt(model, method, targets_of(method), seed=3)
    return model.to(dtype), report


def randomise(model: nn.Module) -> None:
    """Trained numbers away from their start, as after a training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@every_method
def test_starts_at_the_base(method: Method) -> None:
    model = plain(method)
    x = torch.randn(2, 5, 24)
    before = model(x)
    randlora.adapt(model, method, targets_of(method))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    assert set(relative_norms(model).values()) == {0.0}


@every_method
def test_counts_are_the_closed_form(method: Method) -> None:
    model, report = adapted(method)
    assert [site.name for site in report.sites] == targets_of(method)
    for site in report.sites:
        assert site.trainable_parameters == closed_form(method, site), site
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", [*METHODS, RandLoRA(5, basis="peft"), VeRA(16, basis="peft")], ids=str)
def test_a_dry_run_has_every_tensor_of_a_run(method: Method) -> None:
    """Oracle: the same model with values: shapes and dtypes of parameters and fixed matrices."""

    def tensors(model: nn.Module) -> dict[str, tuple]:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in named.items()}

    real, _ = adapted(method, torch.float32)
    with torch.device("meta"):
        planned = plain(method)
    randlora.adapt(planned, method, targets_of(method), seed=3)
    assert tensors(planned) == tensors(real)
    assert all(tensor.is_meta for tensor in (*planned.parameters(), *planned.buffers()))


@every_method
def test_rank_is_the_claimed_one(method: Method) -> None:
    model, report = adapted(method)
    randomise(model)
    updates = {site.name: update for site, update in zip(report.sites, all_updates(model), strict=True)}
    for site in report.sites:
        weight = torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
        assert torch.linalg.matrix_rank(updates[site.name].delta(weight)) == claimed_rank(method, site), site


def test_very_sparse_bases_leave_columns_without_an_update() -> None:
    """A of rank rows has columns without a sign, a share (1 - 2/√d)^rank of them, and ΔW is zero there."""
    model = nn.Sequential(nn.Linear(400, 400))
    randlora.adapt(model, RandLoRA(rank=4, basis="very_sparse"), ["0"])
    randomise(model)
    update = model[0].updates[0]
    reached = update.fixed().A.abs().sum(0) > 0
    assert (~reached).float().mean().item() == pytest.approx(0.9**4, abs=0.08)
    assert torch.equal(update.delta(model[0].weight).abs().sum(0) > 0, reached)


@pytest.mark.parametrize(
    ("options", "sparsity"), [({"basis": "sparse", "sparsity": 8.0}, 8.0), ({"basis": "very_sparse"}, 10.0)]
)
@pytest.mark.parametrize("method", [VeRA, NoLA, RandLoRA, RandLoRAa])
def test_bases_are_as_sparse_as_asked(method: type, options: dict, sparsity: float) -> None:
    """A share 1 - 2/s of zeros and entries ±√(s/2); very sparse: s is the root of the smaller side, here 100."""
    model = nn.Sequential(nn.Linear(100, 400), nn.Tanh(), nn.Linear(400, 100))
    randlora.adapt(model, method(rank=20, **options), ["0"])
    bases = {id(m): m for m in model.modules() if isinstance(m, DenseBasis) and "A0" not in m.name}.values()
    assert len(bases) == 2
    for basis in bases:
        entries = basis.block(*basis.matrix.shape)
        assert (entries == 0).float().mean().item() == pytest.approx(1 - 2 / sparsity, abs=0.02)
        assert entries.abs().max().item() == pytest.approx(math.sqrt(sparsity / 2))


def all_updates(model: nn.Module) -> list:
    return [update for layer in adapted_layers(model).values() for update in layer.updates]


@every_method
@pytest.mark.parametrize("tokens", [1, 7, 400])
def test_forward_and_gradients_equal_the_naive_formula(method: Method, tokens: int) -> None:
    """Oracle: x (W0 + ΔW)ᵀ + b through autograd in float64, with ΔW from `delta`."""
    model, _ = adapted(method)
    randomise(model)
    for layer in adapted_layers(model).values():
        for rows, update in zip(layer.rows, layer.updates, strict=True):
            base = layer.frozen(rows)
            x = torch.randn(tokens, layer.in_features, dtype=torch.float64, requires_grad=True)
            trained = list(update.parameters())
            fast = update(x, base)
            slow = Frozen(base.weight + update.delta(base.weight), base.bias)(x)
            torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
            weights = torch.randn_like(fast)
            ours = torch.autograd.grad((fast * weights).sum(), [x, *trained])
            theirs = torch.autograd.grad((slow * weights).sum(), [x, *trained])
            for mine, oracle in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, oracle, rtol=1e-11, atol=1e-11)


LINEAR = [m for m in METHODS if not isinstance(m, DoRA | EDoRA | RankedDoRA)]
OF_ALPHA = [m for m in LINEAR if hasattr(m, "rank") and getattr(m, "alpha", 0) is None]


@pytest.mark.parametrize("method", OF_ALPHA, ids=str)
def test_alpha_over_rank_multiplies_the_update(method: Method) -> None:
    """And is 2 where no alpha is given. Those with a magnitude of their own have tests of their own."""
    deltas = []
    for alpha in (None, 3.0):
        model, _ = adapted(dataclasses.replace(method, alpha=alpha))  # type: ignore[call-arg]
        randomise(model)
        deltas.append(
            [
                update.delta(layer.frozen(rows).weight)
                for layer in adapted_layers(model).values()
                for rows, update in zip(layer.rows, layer.updates, strict=True)
            ]
        )
    for default, given in zip(*deltas, strict=True):
        torch.testing.assert_close(given, default * (3.0 / method.rank / 2.0), rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]


def test_an_update_with_a_delta_alone_has_an_output() -> None:
    """The least that a method of one's own gives. Oracle: x (W0 + ΔW)ᵀ + b."""

    class Twice(Update):
        def delta(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.float()

    weight, bias, x = torch.randn(5, 3), torch.randn(5), torch.randn(2, 4, 3)
    torch.testing.assert_close(Twice()(x, Frozen(weight, bias)), x @ (2 * weight).T + bias)
    half = Twice()(x.bfloat16(), Frozen(weight.bfloat16(), None))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), x @ (2 * weight).T, rtol=0.05, atol=0.05)


@every_method
def test_every_trained_tensor_of_every_site_receives_gradient(method: Method) -> None:
    model, _ = adapted(method)
    randomise(model)
    model(torch.randn(2, 5, 24, dtype=torch.float64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@every_method
def test_every_trained_tensor_receives_gradient_by_the_second_step(method: Method) -> None:
    """From the true start, where a factor that is zero may keep gradients from the others."""
    model, _ = adapted(method)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 5, 24, dtype=torch.float64)).pow(3).sum().backward()
        optimizer.step()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@every_method
def test_the_base_stays_bit_identical(method: Method) -> None:
    model = plain(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    randlora.adapt(model, method, targets_of(method))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(2, 5, 24)).square().sum().backward()
        optimizer.step()
        with randlora.merged(model), torch.no_grad():
            model(torch.randn(1, 5, 24))
    randlora.adapters.unload(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter), name


@every_method
def test_save_load_and_merge_keep_the_outputs(method: Method, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, _ = adapted(method, torch.float32)
    randomise(model)
    x = torch.randn(2, 5, 24)
    expected = model(x).detach()
    with randlora.merged(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    randlora.save_adapter(model, tmp_path)

    other = plain(method)
    modules = [(name, type(module)) for name, module in other.named_modules()]
    randlora.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(x), expected, rtol=1e-6, atol=1e-6)
    randlora.merge(other)
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert [(name, type(module)) for name, module in other.named_modules()] == modules


@every_method
def test_a_low_precision_base_trains_float32_parameters(method: Method) -> None:
    model = plain(method).bfloat16()
    randlora.adapt(model, method, targets_of(method))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = model(torch.randn(2, 5, 24, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()


@every_method
def test_autocast_stays_near_float32(method: Method) -> None:
    model, _ = adapted(method, torch.float32)
    x = torch.randn(2, 5, 24)
    for tokens in (x, x.repeat(40, 1, 1)):
        expected = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(tokens).float(), expected, rtol=0.05, atol=0.05)


DROPPING = [
    LoRA(4, dropout=0.5), VeRA(8, dropout=0.5), NoLA(dropout=0.5), RandLoRA(4, dropout=0.5), EDoRA(4, dropout=0.5),
    MoRA(4, dropout=0.5), MELoRA(2, dropout=0.5), LoRAMini(4, dropout=0.5), LoRTA(4, dropout=0.5),
    FlatLoRA(4, dropout=0.5), GeLoRA(dropout=0.5, ranks={"layers.0": 5, "layers.1": 2}),
    SoRA(4, dropout=0.5), IncreLoRA(4, dropout=0.5), VeRA(8, dropout=0.5, basis="kronecker"),
    RandLoRAa(4, dropout=0.5),
]  # fmt: skip


@pytest.mark.parametrize("tokens", [7, 900])  # for which other plans are the cheapest
@pytest.mark.parametrize("method", [m for m in DROPPING if not isinstance(m, EDoRA)])
def test_dropout_is_on_the_inputs_of_the_update(method: Method, tokens: int) -> None:
    """Oracle: x W0ᵀ + b + drop(x) ΔWᵀ with one mask. EDoRA's acts on the base too and has a test of its own."""
    model, _ = adapted(method)
    randomise(model)
    for layer in adapted_layers(model).values():
        for rows, update in zip(layer.rows, layer.updates, strict=True):
            base, x = layer.frozen(rows), torch.randn(3, tokens, layer.in_features, dtype=torch.float64)
            torch.manual_seed(4)
            ours = update.train()(x, base)
            torch.manual_seed(4)
            dropped = torch.dropout(x, 0.5, True)
            torch.testing.assert_close(ours, base(x) + dropped @ update.delta(base.weight).T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", DROPPING)
def test_dropout_acts_on_the_update_alone_and_only_in_training(method: Method) -> None:
    model, x = plain(method), torch.randn(300, 5, 24)
    before = model(x)
    randlora.adapt(model, method, targets_of(method))
    torch.testing.assert_close(model(x), before)  # the update is zero, the base is not dropped
    randomise(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_bases_are_shared_between_sites_and_not_saved(toy: Toy) -> None:
    randlora.adapt(toy, RandLoRA(rank=4), TOY_TARGETS)
    pointers = {update.basis_B.matrix.data_ptr() for update in all_updates(toy)}
    assert len(pointers) == 1
    assert not [name for name in toy.state_dict() if "basis" in name]


@pytest.mark.parametrize("basis", ["uniform", "sparse", "very_sparse", "kronecker"])
def test_a_sites_slice_does_not_depend_on_which_others_are_adapted(basis: str) -> None:
    alone, all_of_them = Toy(), Toy()
    randlora.adapt(alone, RandLoRA(rank=4, basis=basis), ["square"])
    randlora.adapt(all_of_them, RandLoRA(rank=4, basis=basis), TOY_TARGETS)
    (few_A, few_B), (many_A, many_B) = (all_updates(names)[0].fixed()[:2] for names in (alone, all_of_them))
    assert torch.equal(few_A, many_A)
    assert torch.equal(few_B.matrix(), many_B.matrix())


def test_full_fine_tuning_trains_everything_else_too(toy: Toy) -> None:
    total = sum(p.numel() for p in toy.parameters())
    report = randlora.adapt(toy, FullFineTuning(), TOY_TARGETS)
    assert report.trainable_parameters == report.total_parameters == total
    assert toy.norm.weight.requires_grad


def test_full_fine_tuning_trains_all_rows_of_a_matrix_with_targeted_slices(toy: Toy, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """c_attn is a Conv1D, of which q and v alone are targets, as in GPT-2. Oracle: AdamW on a copy's own matrix."""
    plain, (x, y) = copy.deepcopy(toy), torch.randn(2, 4, 5, 24)
    randlora.adapt(toy, FullFineTuning(), ["c_attn[q]", "c_attn[v]"])
    for model in (toy, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    before = toy.c_attn.weight
    after = toy.c_attn.merged_weight()
    torch.testing.assert_close(after, plain.c_attn.weight.T)
    for rows in (slice(0, 24), slice(24, 48), slice(48, 72)):
        assert (after[rows] - before[rows]).abs().mean() > 0.01
    randlora.save_adapter(toy, tmp_path)
    torch.manual_seed(0)
    loaded = Toy()
    randlora.load_adapter(loaded, tmp_path)
    torch.testing.assert_close(loaded(x), plain(x))


@pytest.mark.parametrize(("train", "rows"), [("targets", 48), (["c_attn.*"], 72), (["norm.*"], 48)])
def test_full_fine_tuning_leaves_other_slices_where_they_are_not_asked_for(toy: Toy, train, rows: int) -> None:  # type: ignore[no-untyped-def]
    report = randlora.adapt(toy, FullFineTuning(train=train), ["c_attn[q]", "c_attn[v]"])
    beside = {"targets": 0, "c_attn.*": 72, "norm.*": 48}[train if isinstance(train, str) else train[0]]
    assert report.trainable_parameters == 24 * rows + beside  # c_attn's bias, norm's scale and shift


def test_full_fine_tuning_of_a_part(toy: Toy) -> None:
    report = randlora.adapt(toy, FullFineTuning(train=["norm.*"]), ["square"])
    assert report.trainable_parameters == toy.square.weight.numel() + sum(p.numel() for p in toy.norm.parameters())


def test_full_fine_tuning_of_nothing_is_refused_and_leaves_the_model(toy: Toy) -> None:
    before = [name for name, _ in toy.named_modules()]
    with pytest.raises(ValueError, match=r"'nrom\.\*' matches no parameter"):
        randlora.adapt(toy, FullFineTuning(train=["nrom.*"]), ["square"])
    assert [name for name, _ in toy.named_modules()] == before
    randlora.adapt(toy, FullFineTuning(), ["square"])


def test_full_fine_tuning_refuses_a_low_precision_model(toy: Toy) -> None:
    with pytest.raises(ValueError, match="float32"):
        randlora.adapt(toy.bfloat16(), FullFineTuning(), ["square"])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (LoRA, {"rank": 0}), (LoRA, {"rank": 2.5}), (LoRA, {"alpha": 0}), (LoRA, {"dropout": 1.0}),
        (LoRA, {"rank": True}),
        (VeRA, {"rank": -1}), (VeRA, {"d_initial": 0}), (NoLA, {"num_bases": 0}),
        (NoLA, {"basis": "x"}), (NoLA, {"start": "x"}),
        (RandLoRA, {"rank": 0}), (RandLoRA, {"num_bases": "round"}), (RandLoRA, {"num_bases": 0}),
        (RandLoRA, {"zero": "both"}), (RandLoRA, {"start": 0.0}), (FullFineTuning, {"train": "some"}),
        (EDoRA, {"rank": 0}), (EDoRA, {"start": -1.0}), (MoRA, {"compression": "cut"}), (MoRA, {"surplus": "cut"}),
        (MELoRA, {"parts": 0}), (MELoRA, {"permuted": 3}), (LoRAMini, {"inner_in": 7}), (LoRAMini, {"inner_out": 0}),
        (LoRTA, {"head_side": "o"}), (LoRTA, {"alpha": -1}), (FlatLoRA, {"sigma": -0.1}), (GeLoRA, {"scale": 0}),
        (GeLoRA, {"examples": 2}), (GeLoRA, {"pooling": "last"}), (GeLoRA, {"rounding": "x"}), (GeLoRA, {"discard": 1}),
        (GeLoRA, {"largest": 0}), (GeLoRA, {"mean_rank": 0.5}), (GeLoRA, {"ranks": {"layers.0": 0}}),
        (SoRA, {"rank": 0}), (SoRA, {"sparsity": -1}), (SoRA, {"final_sparsity": 0.1}), (SoRA, {"stages": 1}),
        (SoRA, {"hard_gap": 2}), (IncreLoRA, {"start": 3}), (IncreLoRA, {"gain": 0}), (IncreLoRA, {"memory": 1}),
        (IncreLoRA, {"interval": 0.5}), (IncreLoRA, {"orthogonality": -1}), (RankedLoRA, {"ranks": {"a": -1}}),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(method: type, settings: dict) -> None:
    with pytest.raises(ValueError, match=method.__name__ + "|basis"):
        method(**settings)
