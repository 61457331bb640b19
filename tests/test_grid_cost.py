"""What the paper's grid costs. Oracles: torch's counter on a step with values, and matrix products counted by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import settings
from randlora.analysis import grid_cost
from randlora.analysis.grid_cost import Table, costs, step_operations
from randlora.experiment import Experiment
from randlora.plan import lengths

SMALL = ("model=clip_tiny", "method=lora", "trainer.batch_size=8", "dry_run=true")


def planned(*overrides: str) -> Experiment:
    return Experiment.from_config(settings(*SMALL, *overrides))


def of_classes(experiment: Experiment, count: int) -> Experiment:
    names = [f"class {number}" for number in range(count)]
    return replace(experiment, task=replace(experiment.task, classes="all", class_names=names))


def test_operations_are_those_of_a_step_with_values() -> None:
    experiment = planned("trainer.micro_batch_size=4")
    backbone = experiment.model.load()
    experiment.adapt(backbone)
    model = experiment.bind(backbone).model.train()
    batch = {"image": torch.randn(4, 3, 64, 64), "label": torch.arange(4)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        experiment.task.loss(model, batch).backward()
    assert step_operations(experiment) == 2 * counter.get_total_flops() > 0


def test_a_frozen_tower_costs_what_its_matrices_say() -> None:
    """Forward alone, of images whose tower is frozen: 64 patches, and 65 tokens in six blocks of width 192.

    What is left is that of the trained text tower, which has no images: it is the same for any number of them.
    """
    one, two = (step_operations(planned("targets=text", f"trainer.batch_size={size}")) for size in (1, 2))
    tokens, width = 65, 192
    block = 2 * tokens * width * 12 * width + 2 * 2 * tokens * tokens * width  # four products, and attention's two
    patches, projection = 2 * 64 * 3 * 8 * 8 * width, 2 * width * 128
    similarity = 2 * 2 * 128 * 10  # with ten texts, forward, and backward for the texts alone
    assert two - one == 6 * block + patches + projection + similarity


def test_operations_are_linear_in_the_texts() -> None:
    one, six, eleven = (step_operations(of_classes(planned(), count)) for count in (1, 6, 11))
    assert eleven - six == six - one > 0


def test_a_row_adds_up_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of data sets of 47 and 211 classes by hand, where a step has 128 images and a text costs 7 operations."""
    monkeypatch.setattr(grid_cost, "step_operations", lambda run: 1000.0 + 7 * len(run.task.names()))
    monkeypatch.setattr(grid_cost, "memory_plan", lambda run: {"total": run.task.class_count()})
    table = Table(11, ["clip_b32/lora"], ("dtd", "country211"), shots=(1, 2), fractions=(0.5,))
    runs = [*table.runs("clip_b32/lora")]
    assert [(run.task.name, run.budget.shots, run.budget.fraction) for run in runs] == [
        (task, *budget) for task in ("dtd", "country211") for budget in ((1, None), (2, None), (None, 0.5))
    ]
    steps = [int(lengths(run)["steps"]) for run in runs]
    assert steps[:2] == [100, 100]
    (cost,) = costs(table)
    assert (cost.table, cost.row, cost.parameters) == (11, "clip_b32/lora", 6_881_280)
    assert (cost.runs, cost.steps, cost.memory) == (6, sum(steps), 211)
    assert cost.largest == pytest.approx(1000 + 7 * 128)
    assert cost.operations == pytest.approx(sum(steps[:3]) * (1000 + 7 * 47) + sum(steps[3:]) * (1000 + 7 * 128))
    assert cost.hours(2.0, 0.25) == pytest.approx(cost.operations / 1800)
