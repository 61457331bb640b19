"""Where sites sit in a transformer, and what methods that depend on it count."""

import pytest
from torch import nn

from conftest import settings
from randlora.adapters import unfuse_attention
from randlora.adapters.positions import Position, attention_heads, position
from randlora.adapters.targets import places
from randlora.config import build
from randlora.experiment import Experiment
from randlora.plan import counts, memory_plan


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers.3", "q")),
        ("model.layers.11.self_attn.qkv_proj[v]", ("model.layers.11", "v")),
        ("model.layers.3.self_attn.o_proj", ("model.layers.3", "o")),
        ("encoder.layer.0.attention.self.key", ("encoder.layer.0", "k")),
        ("encoder.layer.0.attention.output.dense", ("encoder.layer.0", "o")),
        ("encoder.layer.0.output.dense", None),
        ("transformer.h.7.attn.c_attn[k]", ("transformer.h.7", "k")),
        ("transformer.h.7.attn.c_proj", ("transformer.h.7", "o")),
        ("transformer.h.7.mlp.c_proj", None),
        ("visual.transformer.resblocks.1.attn.in_proj[q]", ("visual.transformer.resblocks.1", "q")),
        ("visual.transformer.resblocks.1.attn.in_proj", None),
        ("transformer.resblocks.1.attn.out_proj", ("transformer.resblocks.1", "o")),
        ("stages.0.blocks.4.attn.proj", ("stages.0.blocks.4", "o")),
        ("model.layers.3.mlp.gate_proj", None),
        ("q_proj", None),
    ],
)
def test_positions(name: str, expected: tuple[str, str] | None) -> None:
    assert position(name) == (expected and Position(*expected))


def test_heads_are_those_of_the_nearest_module_that_says_or_of_the_configuration() -> None:
    block = nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(2, 2)}), "fc": nn.Linear(2, 2)})
    model = nn.ModuleDict({"block": block, "head": nn.Linear(2, 2)})
    sites = places(model, ["*"])
    assert attention_heads(model, sites) == {}
    model.config = type("Configuration", (), {"num_attention_heads": 7})  # type: ignore[assignment]
    block.num_heads, block["attn"].num_attention_heads = "many", 3
    assert attention_heads(model, sites) == {"block.attn.q": 3, "block.fc": 7, "head": 7}
    model.num_heads = 5  # type: ignore[assignment]
    assert attention_heads(model, sites) == {"block.attn.q": 3, "block.fc": 5, "head": 5}


@pytest.mark.parametrize(
    ("model", "heads"),
    [("clip_vit_b32", {8, 12}), ("roberta_base", {12}), ("gpt2_medium", {16}), ("llama3_8b", {32}), ("vit_s14", {6}),
     ("dinov2_vit_b14", {12}), ("phi3_mini", {32})],
)  # fmt: skip
def test_heads_of_the_models(model: str, heads: set[int]) -> None:
    """As their publishers state them; CLIP has two towers."""
    built = build(settings(f"model={model}")["model"])
    module = built.meta_model().module
    unfuse_attention(module)
    sites = places(module, ["*attention*" if model in ("roberta_base", "vit_s14") else "*attn*"])
    assert set(attention_heads(module, sites).values()) == heads
    assert len(attention_heads(module, sites)) == len(sites)


QKVO = "targets=['*.query','*.key','*.value','*.attention.output.dense']"
ALL = "targets=['*.query','*.key','*.value','*.output.dense','*.intermediate.dense']"
QVO = "targets=['*.query','*.value','*.output.dense']"
COUNTS = [
    ("roberta_base", "edora", QVO, 49_152),  # published: 49.2K
    ("roberta_base", "edora method.rank=32", QVO, 86_016),
    ("roberta_base", "lorta method.rank=4", QKVO, 3_440),
    ("roberta_large", "lorta method.rank=8", QKVO, 9_056),
    ("roberta_base", "melora method.rank=1", "targets=query_value", 36_864),  # published: 0.037M
    ("roberta_base", "loramini", "targets=query_value", 24 * 8 * 128),
    ("roberta_base", "increlora", ALL, 331_920),  # published for a model of these sizes: 0.33M
    ("roberta_base", "sora", ALL, 1_327_104 + 72 * 8),  # published: 1.33M before gates close
    ("llama3_8b", "mora method.rank=8", "targets=['*.q_proj']", 32 * 256**2),  # √(8 · 8192) = 256
]


@pytest.mark.parametrize(("model", "method", "targets", "expected"), COUNTS)
def test_counts_of_the_models(model: str, method: str, targets: str, expected: int) -> None:
    task = "arc_easy" if model == "llama3_8b" else "mrpc"
    overrides = (f"task={task}", f"model={model}", targets, *f"method={method}".split())
    plan = counts(Experiment.from_config(settings("dry_run=true", *overrides)))
    assert plan["trainable_parameters"] == expected


def test_the_plan_of_a_shared_tensor_counts_its_memory_once() -> None:
    plans = [
        memory_plan(Experiment.from_config(settings("dry_run=true", "task=mrpc", "model=minilm", f"method={m}", QKVO)))
        for m in ("linearprobe", "lorta")
    ]
    assert plans[1]["optimizer"] - plans[0]["optimizer"] == 12 * 8 * (384 + 32 + 12 + 6 + 4)


def test_the_plan_holds_the_gradients_of_a_growing_method() -> None:
    """Beside LoRA: the gradient of each ΔW, rank 2 for rank 8, λ of the ranks, and two running means."""
    plans = [
        memory_plan(Experiment.from_config(settings("dry_run=true", "task=mrpc", "model=minilm", f"method={m}", QKVO)))
        for m in ("lora", "increlora")
    ]
    sites, width = 6 * 4, 384
    expected = 4 * sites * (width**2 + 2 * (2 * width + 1) + 2 - 8 * 2 * width)
    assert plans[1]["weights"] - plans[0]["weights"] == expected


def test_the_plan_counts_edoras_factors_into_the_file() -> None:
    overrides = ("dry_run=true", "task=mrpc", "model=roberta_base", "method=edora", QVO)
    sizes = 12 * (3 * (768 + 768) + (3072 + 768))  # in + out of query, value and the two outputs
    assert counts(Experiment.from_config(settings(*overrides)))["adapter_bytes"] == 4 * (49_152 + 16 * sizes)
