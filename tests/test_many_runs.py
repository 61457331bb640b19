"""The trial of several runs in one batch. Oracle: the same runs alone, in float64."""

import pytest
import torch
from torch import nn

from randlora.analysis.many_runs import AFTER, EACH, ONCE, Run, Together, Trunk, gain, measured, table
from randlora.analysis.workloads import Block
from randlora.methods import DoRA, LoRA, Method, RandLoRA


def trunk() -> Trunk:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(24, heads=4, mlp=48) for _ in range(2)))
    return Trunk(
        blocks, lambda module, x: module(x).mean(1), 24, ["*_proj", "*.up", "*.down"], lambda n: torch.randn(n, 5, 24)
    )


@pytest.mark.parametrize(
    ("method", "once"),
    [
        (RandLoRA(rank=5), False), (RandLoRA(rank=5), True), (RandLoRA(rank=5, basis="kronecker"), True),
        (LoRA(rank=3), False), (DoRA(rank=3), False),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_in_the_batch_is_the_run_alone(method: Method, once: bool) -> None:
    shared = trunk()
    runs = [Run(shared, method, number, 3, torch.float64) for number in range(3)]
    together = Together(runs, once)
    before = [tensor.clone() for tensor in runs[0].trained]
    for _ in range(4):
        assert together.step() == pytest.approx([run.step() for run in runs], rel=1e-10)
    for run, own in zip(runs, together.trained, strict=True):
        assert len(run.trained) == len(own)
        for one, other in zip(run.trained, own, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-10)
    assert any(not torch.equal(old, new) for old, new in zip(before, runs[0].trained, strict=True))
    assert not torch.equal(runs[0].trained[0], runs[1].trained[0])


def test_gains_are_medians_of_ratios_within_rounds() -> None:
    seconds = measured(trunk(), RandLoRA(rank=5), size=2, counts=(1, 2), rounds=3)
    assert seconds.keys() == {f"{count}: {way}" for count in (1, 2) for way in (AFTER, EACH, ONCE)}
    by_hand = {f"2: {AFTER}": [6.0, 8.0, 30.0], f"2: {EACH}": [3.0, 8.0, 10.0]}
    assert gain(by_hand, 2, EACH) == 2.0
    assert "| ours | 2 | 4000 | 2.00 |  |" in table({"ours": {"counts": [2], "seconds": by_hand}})
