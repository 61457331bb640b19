"""The choice between exact ways to compute, against their costs added up operation by operation."""

import itertools

import pytest
import torch
from torch import nn

import randlora
from randlora.methods import RandLoRA, VeRA
from randlora.methods.common import COSTS
from randlora.methods.kernels import TOKENS, WEIGHT, choose_plan
from randlora.methods.vera import merging_pays

RATE = {"elementwise": 3.0, "low_precision": 0.4, "small_products": 2.5, "sparse_products": 5.0}  # told apart easily
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "slow", RATE)


def update_of(method: RandLoRA | VeRA, shape: tuple[int, int]):  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    randlora.adapt(model, method, ["0"])
    return model[0].updates[0]


@pytest.mark.parametrize("shape", [(48, 48), (120, 48), (48, 120)])
@pytest.mark.parametrize("basis", ["uniform", "kronecker", "very_sparse"])
def test_the_cheapest_plan_is_taken(shape: tuple[int, int], basis: str) -> None:
    """Every operation once, named by what it makes, so that what serves two products has one name."""
    B = update_of(RandLoRA(rank=5, basis=basis), shape).fixed().B  # type: ignore[arg-type]
    D, d, tall = max(shape), min(shape), shape[0] >= shape[1]
    if basis == "very_sparse":
        B = update_of(RandLoRA(rank=5, basis="sparse", sparsity=30.0), shape).fixed().B
    vector = {"uniform": D * B.columns, "kronecker": 2.5 * B.multiplications()}.get(basis, 5.0 * B.multiplications())

    def price(ways: tuple[str, ...], tokens: int, by_token: float, by_weight: float, kept: bool) -> float:
        output, input_gradient, gradient = ways
        operations: dict[str, float] = {}
        form = d * vector * by_weight + 2 * D * d * 3.0
        for name, way in (("output", output), ("input gradient", input_gradient)):
            if way == WEIGHT:
                operations["W'" if kept else f"W' for the {name}"] = form
            else:
                operations[f"M for the {name}"] = tokens * B.columns * d * by_token
        if gradient == TOKENS:
            operations["gradient of M"] = tokens * B.columns * d * by_token
        else:
            operations["g x"] = tokens * D * d * by_token
            operations["B of it"] = d * vector * by_weight
        # What goes through B: of a tall one the output's own product, and the gradient g, which M's gradient needs too;
        # of a wide one the tokens x, which M's gradient needs too, and the input gradient's own product.
        alone, common = (output, input_gradient) if tall else (input_gradient, output)
        if alone == TOKENS:
            operations["B, alone"] = tokens * vector * by_token
        if TOKENS in (common, gradient):
            operations["B, in common"] = tokens * vector * by_token
        return sum(operations.values())

    seen = set()
    for compute, delta, kept, tokens in itertools.product(
        DTYPES, DTYPES, (False, True), (1, 8, 20, 40, 60, 90, 150, 400, 3000)
    ):
        by_weight = 0.4 if delta == torch.bfloat16 else 1.0
        by_token = 0.4 if torch.bfloat16 in (compute, delta) else 1.0
        plan = choose_plan(tokens, shape, B, compute, delta, "slow", kept)
        prices = {w: price(w, tokens, by_token, by_weight, kept) for w in itertools.product((TOKENS, WEIGHT), repeat=3)}
        assert prices[plan[:3]] == pytest.approx(min(prices.values()), rel=1e-12)
        assert plan[3:] == (compute, delta)
        seen.add(plan[:3])
    assert len(seen) > 2


@pytest.mark.parametrize("basis", ["uniform", "kronecker"])
@pytest.mark.parametrize("compute", DTYPES)
def test_vera_merges_from_the_count_of_tokens_on_that_pays_for_two_merges(basis: str, compute: torch.dtype) -> None:
    """W' twice: A·B over in, A over out, eight passes; else each product of the tokens two or three times."""
    out, into, rank = 120, 48, 40
    fixed = update_of(VeRA(rank=rank, basis=basis), (out, into)).fixed(torch.empty(out, into))  # type: ignore[arg-type]
    low = 0.4 if compute == torch.bfloat16 else 1.0
    more = 1.0 if basis == "uniform" else 2.5
    A, B = more * fixed.A.multiplications(), more * fixed.B.multiplications()
    if basis == "uniform":
        assert (rank * into, out * rank) == (A, B)
    twice = 2 * into * B + out * A + 8 * 3.0 * out * into
    per_token = low * (2 if basis == "uniform" else 3) * (A + B) - low * out * into
    merges = [merging_pays(tokens, fixed, compute, "slow") for tokens in range(1, 500)]
    assert merges == [twice < per_token * tokens for tokens in range(1, 500)]
    assert set(merges) == {False, True}


def test_devices_without_figures_take_the_cpus() -> None:
    fixed = update_of(VeRA(rank=20), (120, 48)).fixed(torch.empty(120, 48))
    B = update_of(RandLoRA(rank=5), (120, 48)).fixed().B
    for tokens in (1, 50, 100, 1000):
        assert merging_pays(tokens, fixed, torch.float32, "toaster") == merging_pays(
            tokens, fixed, torch.float32, "cpu"
        )
        plans = [
            choose_plan(tokens, (120, 48), B, *[torch.float32] * 2, device, False) for device in ("toaster", "cpu")
        ]
        assert plans[0] == plans[1]
