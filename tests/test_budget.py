"""Settings for one number of trained parameters. Oracle: the closed forms of the papers."""

import re
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from conftest import BLOCK_TARGETS, REPOSITORY, Blocks, settings
from randlora.adapters.core import adaptation_of
from randlora.budget import Match, matched, parameters
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.methods import (
    DoRA,
    EDoRA,
    FullFineTuning,
    GeLoRA,
    IncreLoRA,
    LoRA,
    LoRTA,
    MELoRA,
    Method,
    MoRA,
    NoLA,
    RandLoRA,
    RankedLoRA,
    VeRA,
)

METHODS = [
    "lora", "dora", "vera", "nola", "randlora", "randlora_a", "edora", "mora", "melora", "loramini", "lorta", "sora",
    "increlora", "gelora", "flatlora",
]  # fmt: skip


def layers(*shapes: tuple[int, int]) -> nn.Module:
    with torch.device("meta"):
        return nn.ModuleList(nn.Linear(columns, rows) for rows, columns in shapes)


def nearest(counts: Sequence[tuple[int, int]], target: int) -> int:
    """The value whose count is nearest, of (value, count)."""
    return min(counts, key=lambda pair: (abs(pair[1] - target), pair[1], pair[0]))[0]


SQUARES = [(64, 64), (64, 64), (128, 64)]
RISING = [
    (LoRA(), lambda r: 448 * r), (DoRA(), lambda r: 448 * r + 256), (VeRA(), lambda r: 3 * r + 256),
    (NoLA(), lambda n: 6 * n), (EDoRA(), lambda r: 3 * r * r + 256), (MELoRA(parts=4), lambda r: 448 * r),
    (IncreLoRA(), lambda r: 451 * r),
]  # fmt: skip


@pytest.mark.parametrize(("method", "closed_form"), RISING, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("target", [700, 1000, 5003, 40_000])
def test_the_nearest_setting_is_found(method: Method, closed_form, target: int) -> None:  # type: ignore[no-untyped-def]
    largest = 64 if isinstance(method, EDoRA) else 20_000  # singular values of a matrix whose smaller side is 64
    expected = nearest([(value, closed_form(value)) for value in range(1, largest + 1)], target)
    match = matched(layers(*SQUARES), method, ["*"], target)
    assert getattr(match.method, str(method.budget_setting)) == expected
    assert match.parameters == closed_form(expected)
    assert match.within == (abs(closed_form(expected) - target) <= 0.02 * target)
    assert match.override == f"method.{method.budget_setting}={expected}"


@pytest.mark.parametrize("target", [400, 1000, 5003, 8000])
def test_a_count_that_falls_in_steps_is_searched_whole(target: int) -> None:
    """RandLoRA's n (r + d) with n = d / r rounded up: not monotone in r."""
    counts = [(r, 3 * -(-64 // r) * (r + 64)) for r in range(1, 65)]
    match = matched(layers(*SQUARES), RandLoRA(), ["*"], target)
    assert abs(match.error) <= min(abs(count / target - 1) for _, count in counts)


def test_other_settings_are_kept_and_the_model_is_as_before() -> None:
    model = layers(*SQUARES)
    match = matched(model, LoRA(alpha=3, dropout=0.5), ["*"], 448 * 7)
    assert match == Match(LoRA(rank=7, alpha=3, dropout=0.5), 448 * 7, 448 * 7)
    assert adaptation_of(model) is None
    assert all(type(layer) is nn.Linear for layer in model)
    assert parameters(model, LoRA(rank=2), ["*"]) == 896


def test_shared_factors_blocks_and_refused_values() -> None:
    """LoRTA counts its tensor once; GeLoRA by its mean rank; MoRA has no matrix larger than a site."""
    with torch.device("meta"):
        blocks = Blocks()
    assert matched(blocks, LoRTA(), BLOCK_TARGETS, 40 * 9 + 3).method == LoRTA(rank=9)
    assert matched(blocks, GeLoRA(), BLOCK_TARGETS, 7 * 48 * 3).method.mean_rank == 3  # the blocks have 4 and 3 sites
    largest = matched(layers((64, 64)), MoRA(), ["*"], 10**6)
    assert (largest.parameters, largest.within) == (64 * 64, False)


@pytest.mark.parametrize("method", [FullFineTuning(), RankedLoRA({"0": 1})], ids=lambda method: method.name)
def test_methods_without_such_a_setting_are_refused(method: Method) -> None:
    with pytest.raises(SettingsError, match=f"{method.name} has no setting that chooses how much is trained"):
        matched(layers((8, 8)), method, ["*"], 100)
    with pytest.raises(SettingsError, match="divide"):
        matched(layers((9, 9)), MELoRA(parts=2), ["*"], 100)


@pytest.fixture(scope="module")
def minilm() -> nn.Module:
    return Experiment.from_config(settings("experiment=related/lora", "dry_run=true")).model.meta_model().module


@pytest.mark.parametrize("name", METHODS)
def test_the_related_experiments_are_at_one_budget(name: str, minilm: nn.Module) -> None:
    """The files say what they train, and the two that no setting brings within 2 % say how far they are."""
    experiment = Experiment.from_config(settings(f"experiment=related/{name}", "dry_run=true"))
    assert experiment.method.name == name
    trained = parameters(minilm, experiment.method, experiment.patterns)
    text = (REPOSITORY / "configs" / "experiment" / "related" / f"{name}.yaml").read_text()
    assert f"# {trained:,} parameters" in text
    remark = re.search(r", ([\d.]+) % (fewer|more):", text)
    if remark is None:
        assert abs(trained / 55_296 - 1) <= 0.02
    else:
        assert round(100 * abs(trained / 55_296 - 1), 1) == float(remark[1])
    folder = REPOSITORY / "configs" / "experiment" / "related"
    assert sorted(path.stem for path in folder.iterdir()) == sorted(METHODS)


def test_the_script_prints_a_line_for_each_method(program, capsys: pytest.CaptureFixture) -> None:  # type: ignore[no-untyped-def]
    arguments = ["55296", "--only", "lora,dora,full", "model=minilm", "task=mrpc", "targets=attention_with_output"]
    assert program(REPOSITORY / "scripts" / "budget.py", *arguments) == 0
    lora, dora, full = capsys.readouterr().out.splitlines()
    assert re.split(r"\s+", lora) == ["method=lora", "method.rank=3", "55,296", "+0.0%"]
    assert dora.endswith("46,080  -16.7%  the nearest: none comes within 2 %")
    assert "full has no setting" in full
