"""Parameter counts of the paper's models, from the shipped architectures alone (reference, section B).

Sources: RandLoRA's paper (arXiv 2502.00987, Tables 8, 9 and 15) and the shapes of its authors' code. `ceil` and
`floor` are the rounding of d / rank: the paper's n and percentages fit floor, PEFT and the language code take ceil.
"""

import json
import re
from collections.abc import Callable

import pytest

from conftest import settings
from randlora.experiment import Experiment
from randlora.models.base import ARCHITECTURES, expand
from randlora.plan import counts, dry_run, lengths, table

CLIP = "task=cifar10"
GLUE = "task=mrpc"
LM = "task=arc_easy"

COUNTS = [
    # CLIP, both towers; LoRA: the code's counts, printed in Table 8 as 6.9, 15.1 and 29.4 M.
    (CLIP, "clip_vit_b32", "lora rank=32", 6_881_280),
    (CLIP, "clip_vit_l14", "lora rank=32", 15_138_816),
    (CLIP, "clip_vit_h14", "lora rank=32", 29_360_128),
    (CLIP, "clip_vit_b32", "nola", 147_456),
    (CLIP, "clip_vit_l14", "nola", 221_184),
    (CLIP, "clip_vit_h14", "nola", 344_064),
    # The paper's floor: 36 sites of 128 · (6 + 768) and 36 of 85 · (6 + 512). The code took floor + 1: 5,198,184.
    (CLIP, "clip_vit_b32", "randlora rank=6 num_bases=floor", 36 * 128 * 774 + 36 * 85 * 518),
    (CLIP, "clip_vit_l14", "randlora rank=8 num_bases=floor", 72 * 128 * 1032 + 36 * 96 * 776),
    (CLIP, "clip_vit_h14", "randlora rank=10 num_bases=floor", 96 * 128 * 1290 + 72 * 102 * 1034),
    # VeRA as its authors define it, rank + out; the RandLoRA code's rank + in would be 110,592.
    (CLIP, "clip_vit_b32", "vera rank=256", 12 * (3 * 256 + 2304 + 3072 + 768) + 12 * (3 * 256 + 1536 + 2048 + 512)),
    (CLIP, "clip_vit_b32", "full", 151_277_313),
    # GLUE
    (GLUE, "roberta_base", "lora rank=4", 663_552),
    (GLUE, "roberta_base", "randlora rank=64", 718_848),
    (GLUE, "roberta_base", "vera rank=256", 101_376),
    (GLUE, "roberta_base", "vera rank=1024", 156_672),
    (GLUE, "roberta_large", "lora rank=4", 1_769_472),
    (GLUE, "roberta_large", "randlora rank=100", 1_780_416),
    (GLUE, "roberta_large", "vera rank=256", 258_048),
    # Language models; RandLoRA with ceil: 28.78, 56.63 and 112.72 M for LLaMA-3, 5.96 and 11.84 M for Qwen2 in the
    # reference.
    (LM, "llama3_8b", "lora rank=16", 28_311_552),
    (LM, "llama3_8b", "lora rank=32", 56_623_104),
    (LM, "llama3_8b", "lora rank=64", 113_246_208),
    (LM, "llama3_8b", "randlora rank=60", 32 * (3 * 69 * 4156 + 2 * 18 * 1084)),
    (LM, "llama3_8b", "randlora rank=30", 32 * (3 * 137 * 4126 + 2 * 35 * 1054)),
    (LM, "llama3_8b", "randlora rank=15", 32 * (3 * 274 * 4111 + 2 * 69 * 1039)),
    (LM, "qwen2_0_5b", "lora rank=16", 5_898_240),
    (LM, "qwen2_0_5b", "lora rank=32", 11_796_480),
    (LM, "qwen2_0_5b", "randlora rank=10", 24 * (3 * 90 * 906 + 2 * 13 * 138)),
    (LM, "qwen2_0_5b", "randlora rank=5", 24 * (3 * 180 * 901 + 2 * 26 * 133)),
    (LM, "phi3_mini", "lora rank=16", 22_020_096),
    (LM, "phi3_mini", "randlora rank=40", 23_003_904),
    (LM, "gpt2_medium", "lora rank=16", 5_505_024),
    (LM, "gpt2_medium", "randlora rank=20", 24 * 4 * 52 * 1044),
    (LM, "gpt2_large", "lora rank=16", 36 * 16 * (2 * 2560 + 2 * 6400)),
    (LM, "gpt2_large", "randlora rank=20", 36 * 4 * 64 * 1300),
]


# Which plans say that PEFT cannot have the adapter, by what PEFT has: no slices, no attention of torch's, one smaller
# side for RandLoRA's bases; and what PEFT has under no settings says nothing.
NOT_EXPORTED = [
    ("clip", "lora|randlora|vera", "inside nn.MultiheadAttention"),
    ("clip", "nola|full", ""),
    ("gpt2", "", "a slice of a fused matrix"),
    ("llama3_8b|qwen2_0_5b", "randlora", "train with method.basis=peft"),
    ("llama3_8b|qwen2_0_5b", "lora", ""),
    ("roberta|phi3", "", ""),
]


def plan_of(task: str, model: str, method: str, plan: Callable = counts) -> dict:
    name, *values = method.split()
    overrides = [task, f"model={model}", f"method={name}", *(f"method.{value}" for value in values)]
    return plan(Experiment.from_config(settings("dry_run=true", *overrides)))


@pytest.mark.parametrize(("task", "model", "method", "expected"), COUNTS)
def test_trainable_parameters(task: str, model: str, method: str, expected: int) -> None:
    plan = plan_of(task, model, method)
    assert plan["trainable_parameters"] == expected
    (why,) = [why for models, methods, why in NOT_EXPORTED if re.match(models, model) and re.match(methods, method)]
    assert ("export" in plan) == bool(why)
    assert why in plan.get("export", "")


TOTALS = {
    "clip_vit_b32": 151_277_313,
    "clip_vit_l14": 427_616_513,
    "clip_vit_h14": 986_109_441,
    "llama3_8b": 8_030_261_248,
    "qwen2_0_5b": 494_032_768,
    "phi3_mini": 3_821_079_552,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "smollm2_135m": 134_515_008,
}


@pytest.mark.parametrize(("model", "expected"), TOTALS.items())
def test_totals_are_the_published_models(model: str, expected: int) -> None:
    """Sizes as the models' publishers state them, without what is trained."""
    task = CLIP if model.startswith("clip") else LM
    plan = plan_of(task, model, "lora rank=1")
    assert plan["total_parameters"] - plan["trainable_parameters"] == expected


@pytest.mark.parametrize(("rank", "percent"), [(16, 0.35), (32, 0.70), (64, 1.40)])
def test_the_papers_percentages(rank: int, percent: float) -> None:
    """Table 15, LLaMA-3-8B: trained over base and trained."""
    plan = plan_of(LM, "llama3_8b", f"lora rank={rank}")
    assert round(100 * plan["trainable_parameters"] / plan["total_parameters"], 2) == pytest.approx(percent, abs=0.011)


def test_a_plan_has_the_promised_keys_and_reads_as_a_table() -> None:
    plan = plan_of(CLIP, "clip_vit_b32", "randlora", dry_run)
    assert list(plan) == [
        "sites", "trainable_parameters", "head_parameters", "total_parameters", "adapter_bytes", "export",
        "steps", "epochs", "memory",
    ]  # fmt: skip
    json.dumps(plan)
    assert "visual.transformer.resblocks.*.attn.in_proj     12  2304 × 768" in table(plan)


def test_a_linear_head_is_counted_apart() -> None:
    plan = plan_of(CLIP, "dinov2_vit_b14", "lora")
    assert plan["head_parameters"] == 768 * 10 + 10


def test_steps_follow_the_budget() -> None:
    def steps(*overrides: str) -> int:
        return lengths(Experiment.from_config(settings("dry_run=true", CLIP, "trainer.epochs=10", *overrides)))["steps"]

    assert steps() == round(10 * 45_000 / 128)
    assert steps("fraction=0.5") == round(10 * 22_500 / 128)
    assert steps("shots=16") == 10 * 10  # 160 / 128 is less than the ten steps an epoch has at least
    assert steps("shots=16", "trainer.max_steps=7") == 7


def test_module_names_are_the_models() -> None:
    """The names that wrong targets are checked against are those of the modules on the meta device."""
    from randlora.adapters import unfuse_attention
    from randlora.adapters.targets import linear_maps
    from randlora.config import build

    for choice in (
        "clip_tiny",
        "clip_vit_b32",
        "dinov2_vit_b14",
        "roberta_base",
        "gpt2_medium",
        "phi3_mini",
        "llama3_8b",
    ):
        model = build(settings(f"model={choice}")["model"])
        module = model.meta_model().module
        unfuse_attention(module)
        module_names = json.loads((ARCHITECTURES / "module_names" / f"{model.architecture}.json").read_text())
        assert sorted(expand(module_names)) == sorted(linear_maps(module)), choice
