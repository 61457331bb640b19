"""The benchmark of layers: every variant on two small blocks; the execution plans; where a step's time goes."""

import math

import pytest
import torch
from torch import nn

from randlora.analysis import plan_choice, step_profile
from randlora.analysis.layer_speed import VARIANTS, Trial, measure
from randlora.analysis.plan_choice import PLANS, SETTINGS, Choice, Layer
from randlora.analysis.workloads import WORKLOADS, Block, Workload
from randlora.methods import randlora as randlora_method

ATTENTION = ("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj")
BLOCKS = Workload(
    lambda: nn.Sequential(*(Block(64, heads=4, mlp=128) for _ in range(2))), [*ATTENTION, "*.up", "*.down"],
    (2, 5, 64), ATTENTION,
)  # fmt: skip
AT_LORAS_COUNT = (
    "dora", "edora", "mora", "mora_sharing", "melora", "loramini", "lorta", "sora", "increlora", "flatlora",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_takes_a_step(name: str) -> None:
    trial = Trial(BLOCKS, VARIANTS[name], CPU)
    before = [tensor.detach().clone() for tensor in trial.trained]
    trial.step()
    assert before == [] or any(not torch.equal(old, new) for old, new in zip(before, trial.trained, strict=True))
    trial.evaluate()
    assert trial.file_bytes() > 0 or name == "frozen"


@pytest.mark.parametrize("name", AT_LORAS_COUNT)
def test_neighbours_train_as_many_parameters_as_lora(name: str) -> None:
    """Oracle: rank · (in + out), with the rank that comes nearest to RandLoRA's n (r + d) of rank 6.

    At ViT-B's blocks; the narrow keys of LLaMA's bound the ranks of EDoRA and MoRA below it.
    """
    with torch.device("meta"):
        model = WORKLOADS["vit_b16"].build()
        shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
        target = sum(math.ceil(min(shape) / 6) * (6 + min(shape)) for shape in shapes)
        widths = sum(map(sum, shapes))
        adapted = VARIANTS[name].build(model, WORKLOADS["vit_b16"])
    trained = sum(tensor.numel() for tensor in adapted.parameters() if tensor.requires_grad)
    assert trained == pytest.approx(round(target / widths) * widths, rel=0.02)


def test_lorta_is_left_out_where_there_is_no_attention() -> None:
    single = WORKLOADS["linear_768x768_t64"]._replace(build=lambda: nn.Sequential(nn.Linear(64, 64)), shape=(8, 64))
    assert list(measure(single, ["lora", "lorta"], rounds=1, device=CPU)) == ["lora"]


def test_what_is_compiled_is_left_out_where_there_are_no_blocks() -> None:
    single = WORKLOADS["linear_768x768_t64"]._replace(build=lambda: nn.Sequential(nn.Linear(64, 64)), shape=(8, 64))
    assert list(measure(single, ["lora", "randlora_compiled"], rounds=1, device=CPU)) == ["lora"]


def test_layers_of_workloads_come_once() -> None:
    """Oracle: the shapes of ViT-B written out."""
    vit = {name: WORKLOADS[name] for name in ("vit_b16", "vit_12_blocks_b16", "linear_768x768_t64")}
    expected = [Layer(768, 768, 800), Layer(3072, 768, 800), Layer(768, 3072, 800), Layer(768, 768, 64)]
    assert plan_choice.layers(vit) == expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_plan_is_forced_in_its_turn(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the planner's own stands beside them. Oracle: the plans that the layer is given, and whether W' is kept."""
    taken, kept = [], []
    apply = randlora_method.UpdatedLinear.apply

    def noted(x, lambda_, gamma, weight, bias, ready, fixed, plan):  # type: ignore[no-untyped-def]
        taken.append("".join(way[0].upper() for way in plan[:3]))
        kept.append(ready is not None)
        return apply(x, lambda_, gamma, weight, bias, ready, fixed, plan)

    monkeypatch.setattr(randlora_method.UpdatedLinear, "apply", noted)
    choice = plan_choice.measured(Layer(48, 24, 7), setting, 1, CPU)
    assert taken == 2 * PLANS  # a round that does not count, and one that does
    assert kept == [setting == "dense, cached"] * 16
    assert choice.seconds.keys() == set(PLANS)
    assert min(choice.seconds.values()) > 0
    assert choice.chosen == "TTT"  # with so few tokens
    assert plan_choice.from_json(plan_choice.as_json([choice])) == [choice]


def test_regret_is_the_chosen_plans_time_over_the_least() -> None:
    seconds = dict.fromkeys(PLANS, 4.0) | {"TTT": 2.0, "WWT": 2.5}
    ours, best = (Choice(Layer(48, 24, 7), "dense", plan, seconds) for plan in ("WWT", "TTT"))
    assert (ours.regret, best.regret) == (1.25, 1.0)
    assert plan_choice.table([ours]).endswith("| 48 × 24 | 7 | 1.25 WWT / TTT |")
    assert plan_choice.table([best]).endswith("| 48 × 24 | 7 | 1.00 TTT |")
    vit = {"vit_b16": WORKLOADS["vit_b16"]}
    done = [Choice(layer, setting, "TTT", seconds) for layer in plan_choice.layers(vit) for setting in SETTINGS]
    assert list(plan_choice.choices(vit, 1, CPU, done)) == done  # nothing is measured again


def test_the_time_of_a_step_by_what_it_is_spent_on() -> None:
    ((name, seconds),) = step_profile.profiled(BLOCKS, ["randlora"], steps=2).items()
    assert name == "randlora"
    assert all(value > 0 for value in seconds.values())
    by_hand = {
        step_profile.PRODUCTS: 0.6,
        step_profile.ATTENTION: 0.2,
        step_profile.REST: 0.2,
        step_profile.COUNT: 72.0,
    }
    assert step_profile.table({"ours": by_hand}).endswith("| ours | 1000 | 72 | 60.0 % | 20.0 % | 20.0 % | 1.25 |")
