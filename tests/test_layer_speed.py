"""The benchmark of layers: every variant on two small blocks."""

import math

import pytest
import torch
from torch import nn

from randlora.analysis.layer_speed import VARIANTS, Trial, measure
from randlora.analysis.workloads import WORKLOADS, Block, Workload

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
