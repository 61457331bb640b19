"""The neighbours of RandLoRA that train fixed shapes: each against its paper's formula, written out in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from conftest import BLOCK_TARGETS, TOY_TARGETS, Blocks, Toy
from randlora.adapters.core import adapted_layers, require_adaptation
from randlora.adapters.identity import TENSORS
from randlora.adapters.interface import Step, Update
from randlora.adapters.layer import AdaptedLinear
from randlora.bases import draw
from randlora.errors import SettingsError
from randlora.methods import (
    EDoRA,
    FlatLoRA,
    LoRAMini,
    LoRTA,
    MELoRA,
    Method,
    MoRA,
)  # fmt: skip
from randlora.rng import permutation

SHAPES = [(24, 24), (60, 24), (24, 60), (72, 24)]  # (out, in)


def site(method: Method, out_features: int, in_features: int) -> tuple[AdaptedLinear, Update, Tensor]:
    """An adapted linear in float64 with its parameters away from the start, its update and its W0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_features, out_features)).double()
    randlora.adapt(model, method, ["0"], seed=5)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    layer = model[0]
    assert isinstance(layer, AdaptedLinear)
    return layer, layer.updates[0], layer.weight  # type: ignore[return-value]


def agree(layer: AdaptedLinear, update: Update, expected: Tensor) -> None:
    """W0 + ΔW and the output for any input are those of the expected weight."""
    torch.testing.assert_close(layer.weight + update.delta(layer.weight), expected, rtol=1e-6, atol=1e-6)
    x = torch.randn(3, 7, layer.in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ expected.T + layer.bias, rtol=1e-5, atol=1e-5)


# EDoRA


def edora_weight(update: EDoRA, weight: Tensor, scale: float) -> Tensor:
    V = weight + scale * update.U @ update.R @ update.A
    return update.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_edora_is_doras_formula_between_singular_vectors(shape: tuple[int, int]) -> None:
    layer, update, weight = site(EDoRA(rank=5, alpha=10), *shape)
    agree(layer, update, edora_weight(update, weight, 2.0))
    torch.testing.assert_close(update.U.T @ update.U, torch.eye(5).double(), rtol=0, atol=1e-6)
    U, values, V = np.linalg.svd(weight.detach().numpy(), full_matrices=False)
    best = torch.from_numpy(U[:, :5] * values[:5] @ V[:5])
    torch.testing.assert_close(update.U @ update.A, best, rtol=0, atol=1e-5)  # decomposed in float32
    with torch.no_grad():
        update.U.add_(0.1 * torch.randn_like(update.U))  # as from a file whose factors are less exact
    agree(layer, update, edora_weight(update, weight, 2.0))


def test_edora_with_dropout_is_exact() -> None:
    """The published forward: W0 x + b + (c - 1) ∘ W0 drop(x) + c ∘ s U R A drop(x), with one mask."""
    layer, update, weight = site(EDoRA(rank=4, alpha=8, dropout=0.4), 60, 24)
    x = torch.randn(9, 24, dtype=torch.float64)
    torch.manual_seed(1)
    ours = layer.train()(x)
    torch.manual_seed(1)
    dropped = torch.dropout(x, 0.4, True)
    moved = 2.0 * update.U @ update.R @ update.A
    c = update.magnitude / (weight + moved).norm(dim=1)
    expected = x @ weight.T + layer.bias + (c - 1) * (dropped @ weight.T) + c * (dropped @ moved.T)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_edora_norms_are_a_constant_in_backward() -> None:
    layer, update, weight = site(EDoRA(rank=4, alpha=4), 24, 60)
    x, g = torch.randn(6, 60, dtype=torch.float64), torch.randn(6, 24, dtype=torch.float64)
    (layer(x) * g).sum().backward()
    with torch.no_grad():
        V = weight + update.U @ update.R @ update.A
        c, change = update.magnitude / V.norm(dim=1), g.T @ x
        torch.testing.assert_close(update.R.grad, update.U.T @ (c[:, None] * change) @ update.A.T, rtol=1e-5, atol=1e-5)
        direction = (change * V).sum(1) / V.norm(dim=1)
        torch.testing.assert_close(update.magnitude.grad, direction, rtol=1e-5, atol=1e-5)


def test_edora_files_hold_the_factors(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A decomposition that comes out with other signs elsewhere must not change what a file means."""
    from safetensors.torch import load_file

    from randlora.methods import edora

    torch.manual_seed(0)
    model, x = Toy(), torch.randn(2, 5, 24)
    report = randlora.adapt(model, EDoRA(rank=4), TOY_TARGETS)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.updates[0].R.normal_(std=0.1)
    expected = model(x)
    randlora.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    sizes = [(s.out_features, s.in_features) for s in report.sites]
    assert {name: tensor.numel() for name, tensor in tensors.items()} == {
        "R": len(sizes) * 16,
        "magnitude": sum(rows for rows, _ in sizes),
        "U": 4 * sum(rows for rows, _ in sizes),
        "A": 4 * sum(columns for _, columns in sizes),
    }
    assert report.saved_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.trainable_parameters == tensors["R"].numel() + tensors["magnitude"].numel()

    svd, signs = edora.truncated_svd, torch.tensor([-1.0, 1.0, -1.0, -1.0])
    monkeypatch.setattr(edora, "truncated_svd", lambda *args: (svd(*args)[0] * signs, svd(*args)[1] * signs[:, None]))
    torch.manual_seed(0)
    other = Toy()
    randlora.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-6)


def test_edora_can_start_as_its_authors_do() -> None:
    """R of standard deviation 1e-5: W' is near W0, not W0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    randlora.adapt(model, EDoRA(rank=16, start=1e-5), ["0"])
    change = model[0].updates[0].delta(model[0].weight).norm() / model[0].weight.norm()
    R = model[0].updates[0].R.detach()
    assert R.std().item() == pytest.approx(1e-5, rel=0.15)
    assert kstest(R.flatten().numpy() / 1e-5, "norm").pvalue > 0.01
    assert R.abs().max() > 2e-5  # which no uniform matrix of this deviation has
    assert 0 < change < 1e-4


# MoRA


def mora_weight(M: Tensor, out_features: int, in_features: int, method: MoRA) -> Tensor:
    """ΔW entry by entry."""
    M, size = M.detach(), M.shape[0]
    delta = torch.zeros(out_features, in_features, dtype=torch.float64)
    count = math.ceil(in_features / size)
    if method.compression == "grouped":
        group = lambda width: sorted(i % size for i in range(width))  # noqa: E731  # neighbours, the larger first
        for i, row in enumerate(group(out_features)):
            for j, column in enumerate(group(in_features)):
                delta[i, j] = M[row, column]
        return delta
    if method.compression == "sharing":
        for i in range(out_features):
            for j in range(count * size):
                delta[i, j % in_features] += M[i % size, j % size]
        return delta
    long = torch.zeros(count * size, in_features, dtype=torch.float64)  # before outputs are copied, added or cut
    for piece in range(count):
        turn = torch.eye(size, dtype=torch.float64)
        for pair in range(size // 2 if method.compression == "rotation" else 0):
            angle, a, b = piece * 10000.0 ** (-2 * pair / size), pair, pair + size // 2
            turn[a, a] = turn[b, b] = math.cos(angle)
            turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        for column in range(size):
            long[piece * size : (piece + 1) * size, (piece * size + column) % in_features] += (M @ turn)[:, column]
    held = math.ceil(out_features / size) * size
    for row in range(count * size):
        if method.surplus == "add":
            if row % held < out_features:
                delta[row % held] += long[row]
        elif row < out_features:
            delta[row] = long[row]
    for row in range(count * size, out_features):
        delta[row] = delta[row - count * size]
    return delta


MORAS = [
    MoRA(rank=rank, compression=compression, surplus=surplus)
    for rank in (2, 3, 4)
    for compression in ("sharing", "grouped", "decoupled", "rotation")
    for surplus in ("add", "drop")
]


@pytest.mark.parametrize("method", MORAS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (24, 72), (48, 96)])
def test_mora_is_its_maps_entry_by_entry(method: MoRA, shape: tuple[int, int]) -> None:
    layer, update, weight = site(method, *shape)
    delta = mora_weight(update.M, *shape, method)
    agree(layer, update, weight + delta)
    if method.surplus == "add":
        assert (delta.abs().sum(0) > 0).all()  # no input is left out


def test_moras_published_rule_leaves_inputs_out() -> None:
    """A down projection of four times the width: pieces past the outputs are cut off with all they read."""
    reached = {}
    for surplus in ("add", "drop"):
        _, update, weight = site(MoRA(rank=8, surplus=surplus), 48, 192)
        reached[surplus] = int((update.delta(weight).abs().sum(0) > 0).sum())
    assert reached == {"add": 192, "drop": 88}  # q = 44: two of five pieces


def test_mora_refuses_a_matrix_larger_than_the_site(toy: Toy) -> None:
    with pytest.raises(SettingsError, match=r"rank=16 makes a 28 × 28 matrix for square, whose smaller side is 24"):
        randlora.adapt(toy, MoRA(rank=16, compression="sharing"), ["square"])


# MELoRA


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("permuted", [False, True])
def test_melora_is_small_loras_side_by_side(shape: tuple[int, int], permuted: bool) -> None:
    layer, update, weight = site(MELoRA(rank=2, parts=4, alpha=3, permuted=permuted), *shape)
    (rows, columns), n = shape, 4
    outputs, inputs = np.arange(rows), np.arange(columns)
    if permuted:
        inputs, outputs = permutation(columns, "melora.inputs", "0", 5), permutation(rows, "melora.outputs", "0", 5)
    expected = weight.detach().clone()
    for part in range(n):
        small = 1.5 * (update.B[part] @ update.A[part]).detach()
        for i in range(rows // n):
            for j in range(columns // n):
                row = int(np.flatnonzero(outputs == part * (rows // n) + i)[0])
                expected[row, inputs[part * (columns // n) + j]] += small[i, j]
    agree(layer, update, expected)


def uniform_within(values: Tensor, bound: float) -> None:
    assert values.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert values.abs().max() <= bound * (1 + 1e-6)
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_meloras_parts_start_as_loras_of_their_own_width() -> None:
    """Kaiming with a = √5 and the fan-in of a part, other values in each."""
    model = nn.Sequential(nn.Linear(400, 300))
    randlora.adapt(model, MELoRA(rank=8, parts=4), ["0"])
    A = model[0].updates[0].A
    uniform_within(A, 1 / math.sqrt(100))
    assert abs(torch.corrcoef(A.flatten(1)).fill_diagonal_(0)).max() < 0.15


def test_melora_refuses_widths_that_the_parts_do_not_divide(toy: Toy) -> None:
    with pytest.raises(SettingsError, match=r"parts=8 does not divide the widths 60 × 24 of tall: .* divisor of 12"):
        randlora.adapt(toy, MELoRA(parts=8), ["square", "tall"])
    assert isinstance(toy.square, nn.Linear)


# LoRA-Mini


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_mini_is_four_factors(shape: tuple[int, int]) -> None:
    layer, update, weight = site(LoRAMini(rank=3, inner_in=8, inner_out=6, alpha=9), *shape)
    C = draw(8, shape[1], "loramini.C 0", 5).double() / math.sqrt(shape[1])
    D = draw(shape[0], 6, "loramini.D 0", 5).double() / math.sqrt(6)
    agree(layer, update, weight + 3.0 * D @ update.B @ update.A @ C)


def test_lora_mini_draws_for_every_site_and_saves_the_inner_factors_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400))
    randlora.adapt(model, LoRAMini(rank=4, inner_in=100), ["0", "1"])
    first, second = (layer.updates[0] for layer in adapted_layers(model).values())
    assert not torch.equal(first.basis_C.matrix, second.basis_C.matrix)
    inner, _ = first.low_rank()
    assert inner.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.1)  # as LoRA's A
    randlora.save_adapter(model, tmp_path)
    assert {name: t.numel() for name, t in load_file(tmp_path / TENSORS).items()} == {"A": 2 * 4 * 100, "B": 2 * 4 * 64}


# LoRTA


def lorta_deltas(tensor: nn.Module, scale: float, side: str) -> list[Tensor]:
    """ΔW (out, in) of every site of `Blocks`, head by head."""
    deltas = []
    for layer, roles in ((0, (0, 1, 2, 3)), (1, (0, 2, 3))):  # q, k, v, o are roles 0 to 3
        for role in roles:
            heads = []
            for head in range(4):
                mixed = torch.diag(tensor.H[head] * tensor.L[layer] * tensor.M[role])
                heads.append(tensor.A @ mixed @ tensor.B)  # (d, d_h)
            joined = scale * torch.cat(heads, 1)  # (d, heads · d_h)
            outputs = side == "output" or (side == "role" and role != 3)
            deltas.append(joined.T if outputs else joined)
    return deltas


@pytest.mark.parametrize("side", ["role", "output", "input"])
def test_lorta_is_a_tensor_with_the_heads_on_their_side(side: str) -> None:
    torch.manual_seed(0)
    model = Blocks()
    report = randlora.adapt(model, LoRTA(rank=3, alpha=6, head_side=side), BLOCK_TARGETS)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn_like(parameter)
    sites = [(layer, *pair) for layer in adapted_layers(model).values() for pair in zip(layer.rows, layer.updates)]  # noqa: B905
    expected = lorta_deltas(sites[0][2].tensor, 2.0, side)
    assert len(sites) == len(expected) == len(report.sites) == 7
    for (layer, rows, update), delta in zip(sites, expected, strict=True):
        base = layer.frozen(rows)
        torch.testing.assert_close(update.delta(base.weight), delta, rtol=1e-10, atol=1e-10)
        x = torch.randn(2, 9, 24, dtype=torch.float64)
        torch.testing.assert_close(update(x, base), x @ (base.weight + delta).T + base.bias, rtol=1e-10, atol=1e-10)


def test_lorta_starts_as_its_authors_code() -> None:
    """And in the first step B alone has gradient."""
    model, rank = Blocks(), 2000
    randlora.adapt(model, LoRTA(rank=rank), BLOCK_TARGETS)
    tensor = adapted_layers(model)[BLOCK_TARGETS[0]].updates[0].tensor
    uniform_within(tensor.A, 1 / math.sqrt(rank))
    for factor in (tensor.H, tensor.L, tensor.M):
        uniform_within(factor, math.sqrt(6 / rank))
    assert not tensor.B.any()
    model(torch.randn(2, 5, 24)).square().sum().backward()
    assert [name for name, p in tensor.named_parameters() if p.grad.any()] == ["B"]


def test_lortas_tensor_is_counted_trained_and_saved_once(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file

    model, total = Blocks(), 4 * (24 + 6 + 4 + 2 + 4)
    size = sum(p.numel() for p in model.parameters())
    report = randlora.adapt(model, LoRTA(rank=4), BLOCK_TARGETS)
    assert report.trainable_parameters == report.saved_parameters == total
    assert report.total_parameters == size + total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total
    trained = randlora.adapters.core.require_adaptation(model).trained()
    assert sorted(name.rpartition(":")[2] for name in trained) == [f"tensor.{name}" for name in "ABHLM"]
    randlora.save_adapter(model, tmp_path)
    assert sum(tensor.numel() for tensor in load_file(tmp_path / TENSORS).values()) == total


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["layers.0.attn.*_proj", "norm_proj"], "norm_proj is not the q, k, v or o projection of a numbered block"),
        (["layers.1.attn.c_attn"], r"c_attn is not the q, k, v or o .* name the slices of a fused projection"),
        (
            ["layers.0.attn.q_proj", "layers.2.attn.k_proj"],
            "k_proj has width 24 and 4 heads of 3, but layers.0.attn.q_proj has",
        ),
        (["layers.3.attn.q_proj"], "the 22 features of layers.3.attn.q_proj cannot be split in 4 heads"),
        (["layers.4.q_proj"], "the 24 features of layers.4.q_proj cannot be split in unknown heads"),
        (["layers.5.*.q_proj"], "a block has two attentions"),
    ],
)
def test_lorta_refuses_sites_off_its_grid(targets: list[str], reason: str) -> None:
    model = Blocks()
    narrow, odd, bare, double = Blocks().layers[0], Blocks().layers[0], nn.Module(), Blocks().layers[0]
    narrow["attn"].k_proj, odd["attn"].q_proj = nn.Linear(24, 12), nn.Linear(24, 22)
    bare.q_proj, double["cross"] = nn.Linear(24, 24), Blocks().layers[0]["attn"]
    model.layers.extend([narrow, odd, bare, double])
    model.norm_proj = nn.Linear(24, 24)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(SettingsError, match=reason):
        randlora.adapt(model, LoRTA(), targets)
    assert [name for name, _ in model.named_modules()] == names


# Flat-LoRA


def flat(sigma: float = 0.2, dropout: float = 0.0, name: str = "0", seed: int = 5) -> nn.Module:
    """A map 300 × 400 in float64 with parameters away from their start."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(400, 300)})
    randlora.adapt(model, FlatLoRA(rank=4, alpha=2, sigma=sigma, dropout=dropout), [name], seed)
    model.double()
    with torch.no_grad():
        model[name].updates[0].B.normal_(std=0.1)
    return model


def at_step(model: nn.Module, number: int, total: int = 10) -> AdaptedLinear:
    """The one layer, ready for training in that step."""
    adaptation = require_adaptation(model)
    adaptation.method.before_step(adaptation.updates.values(), Step(number, total, 1e-3, 0))
    return next(iter(adapted_layers(model.train()).values()))


def noise(layer: AdaptedLinear) -> Tensor:
    """ε, from the images of the unit vectors."""
    with torch.no_grad():
        return (layer(torch.eye(400, dtype=torch.float64)) - layer.bias).T - layer.merged_weight()


def test_flat_loras_noise_has_its_law() -> None:
    """Rows of standard deviation σ_t ‖W'_i‖ / √in, independent entries, mean zero; σ_t from 0 to sigma by a cosine."""
    model = flat()
    assert noise(at_step(model, 0)).abs().max() < 1e-12
    for number, share in ((5, 0.5), (8, (1 - math.cos(0.8 * math.pi)) / 2)):
        layer = at_step(model, number)
        rows = 0.2 * share * layer.merged_weight().norm(dim=1, keepdim=True) / 20
        z = noise(layer) / rows
        assert abs(z.mean()) < 4 / math.sqrt(z.numel())
        assert z.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / z.numel()))
        assert z.square().mean(1).sub(1).abs().max() < 5 * math.sqrt(2 / 400)
        assert z.pow(4).mean().item() == pytest.approx(3, abs=0.15)
        assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4 / math.sqrt(z.numel())
        assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(z.numel())


def test_flat_loras_noise_depends_on_seed_step_and_site_alone() -> None:
    first = noise(at_step(flat(), 5))
    torch.manual_seed(77)
    later = flat()
    torch.randn(5)
    assert torch.equal(noise(at_step(later, 5)), first)  # as after resuming, whatever torch's own generator says
    for other in (at_step(flat(), 6), at_step(flat(name="1"), 5), at_step(flat(seed=6), 5)):
        assert abs((noise(other) * first).mean()) < 0.02 * noise(other).std() * first.std()
    before = torch.get_rng_state()
    noise(at_step(later, 7))
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws what it would draw without noise


def test_flat_lora_evaluates_merges_and_ends_without_noise() -> None:
    model, x = flat(), torch.randn(5, 400, dtype=torch.float64)
    layer = at_step(model, 5)
    without = x @ layer.merged_weight().T + layer.bias
    assert (layer(x) - without).abs().max() > 0.01
    torch.testing.assert_close(layer.eval()(x), without)
    with randlora.merged(model.train()):
        torch.testing.assert_close(layer(x), without)
    adaptation = require_adaptation(model)
    assert adaptation.method.finish(adaptation.updates) is adaptation.method
    torch.testing.assert_close(layer.train()(x), without)


def test_flat_loras_gradients_are_those_at_the_noisy_weight() -> None:
    """Oracle: autograd through x (W0 + ε + s B A)ᵀ with ε a constant; forward draws it again in a checkpoint."""
    layer = at_step(flat(), 5)
    update, epsilon = layer.updates[0], noise(layer)
    x, g = torch.randn(2, 7, 400, dtype=torch.float64, requires_grad=True), torch.randn(2, 7, 300, dtype=torch.float64)
    trained = [x, update.A, update.B]
    y = x @ (layer.weight + epsilon + 0.5 * update.B @ update.A).T + layer.bias
    expected = torch.autograd.grad((torch.tanh(y) * g).sum(), trained)
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.testing.assert_close(call(x), y, rtol=1e-12, atol=1e-12)
        ours = torch.autograd.grad((torch.tanh(call(x)) * g).sum(), trained)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_flat_lora_compiles_with_its_noise_and_takes_a_new_one_without_compiling_again() -> None:
    torch.compiler.reset()
    model, x = flat(), torch.randn(5, 400, dtype=torch.float64)
    compiled, outputs = torch.compile(at_step(model, 5), backend="aot_eager", fullgraph=True), []
    for step in (5, 6):
        layer = at_step(model, step)
        with torch.compiler.set_stance("default" if step == 5 else "fail_on_recompile"):
            outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], layer(x), rtol=1e-10, atol=1e-10)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


@pytest.mark.parametrize("half_base", [False, True])
def test_flat_loras_noise_in_half_precision(half_base: bool) -> None:
    """The same noise as in float64, to what bfloat16 can say, and a gradient in float32."""
    layer, x = at_step(flat(), 5), torch.randn(9, 400, dtype=torch.float64)
    expected, without = layer(x), layer.eval()(x)
    layer.train().float()
    if half_base:
        layer.base.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.1 * (expected - without).norm()
    y.float().square().sum().backward()
    assert layer.updates[0].A.grad.dtype == torch.float32
