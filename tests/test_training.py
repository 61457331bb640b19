"""The loop: accumulation, schedules, resuming, several processes, and what it says when things go wrong."""

import math
import os
import re
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import randlora
from randlora.adapters.core import require_adaptation
from randlora.adapters.interface import Step
from randlora.data.loader import Encoder, Split, loader, training_keys
from randlora.data.sources import ArrayImages, Source
from randlora.data.subsets import few_shot, split_validation, subsample
from randlora.errors import SettingsError
from randlora.methods import (
    DoRA,
    EDoRA,
    FlatLoRA,
    FullFineTuning,
    IncreLoRA,
    LoRA,
    LoRAMini,
    MELoRA,
    Method,
    MoRA,
    NoLA,
    RandLoRA,
    RandLoRAa,
    SoRA,
    VeRA,
)
from randlora.records.metrics import Row
from randlora.rng import integer
from randlora.signals import StopRequest
from randlora.tasks.base import Bound, Budget, Splits, Task
from randlora.tasks.mixins import UnequalExamples
from randlora.training import Diverged, Fit, Interrupted, Optimizer, Trainer, checkpoint, loop, watch
from randlora.training.best_step import BestStep
from randlora.training.evaluate import evaluate, norms, prefixed, to_device
from randlora.training.loop import Loop
from randlora.training.out_of_memory import out_of_memory
from randlora.training.schedule import rate_factor
from randlora.training.watch import LossWatch


class Pixels8(Encoder):
    def __call__(self, example):  # type: ignore[no-untyped-def]
        pixels = torch.from_numpy(np.asarray(example["image"], dtype=np.float32)).flatten() / 255
        return {"image": pixels + 0.01 * torch.rand(16), "label": example["label"]}


@dataclass(frozen=True)
class Bars(Task):
    """4 × 4 images whose brightest column is their class; learnable in seconds."""

    kinds: ClassVar[tuple[str, ...]] = ("vision",)

    headline: ClassVar[str] = "accuracy"

    source: Source | None = None  # type: ignore[assignment]

    def bind(self, backbone):  # type: ignore[no-untyped-def]
        return Bound(backbone.module)

    def encoder(self, backbone, training):  # type: ignore[no-untyped-def]
        return Pixels8()

    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        return F.cross_entropy(model(batch["image"]), batch["label"])

    def predict(self, model, batch):  # type: ignore[no-untyped-def]
        return {"predicted": model(batch["image"]).argmax(-1).tolist(), "label": batch["label"].tolist()}

    def score(self, columns):  # type: ignore[no-untyped-def]
        return {
            "accuracy": float(np.mean(np.equal(columns["predicted"], columns["label"]))),
            "count": len(columns["label"]),
        }


def splits(validation: int = 5) -> Splits:
    """30 examples to train on, `validation` (up to 10) and 60 others to test on."""
    rows = np.arange(100)
    labels = rows % 4
    images = np.random.default_rng(0).integers(0, 60, (100, 4, 4)).astype(np.uint8)
    images[rows, :, labels] += 190
    table = ArrayImages(images, labels)
    return Splits(
        Split(table, rows[:30], Pixels8(), augment_seed=0),
        Split(table, rows[30:40][:validation], Pixels8()),
        Split(table, rows[40:], Pixels8()),
    )


class Quiet:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.metrics: list[dict] = []

    def begin(self, log: Sequence[str]) -> None:
        pass

    def logged(self) -> Sequence[str]:
        return ()

    def log(self, metrics: dict, step: int) -> None:
        self.metrics.append(metrics | {"step": step})

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, step: int, steps: int, text: str) -> None:
        pass


TASK = Bars("bars", None, {"train": 30, "test": 5})  # type: ignore[arg-type]


def model(method=None, dropout: float = 0.0) -> nn.Module:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 4))
    randlora.adapt(net, method or RandLoRA(rank=3), ["0", "3"])
    return net


def fit(  # type: ignore[no-untyped-def]
    net: nn.Module,
    folder: Path,
    observer: Quiet | None = None,
    data: Splits | None = None,
    optimizer: Optimizer | None = None,
    task: Task | None = None,
    **changes,
) -> Fit:
    trainer = trainer_of(**changes)
    return trainer.fit(
        task or TASK, Bound(net, getattr(net, "head", None)), data or splits(), seed=1, folder=folder,
        observer=observer or Quiet(), accelerator=trainer.accelerator(), optimizer=optimizer,
    )  # fmt: skip


def trainer_of(**changes) -> Trainer:  # type: ignore[no-untyped-def]
    return Trainer(**{"max_steps": 20, "batch_size": 8, "learning_rate": 0.05, "device": "cpu"} | changes)


def scores(net: nn.Module, data: Splits | None = None) -> dict[str, float]:
    """Of the validation and the test split, named as in records."""
    data, trainer = data or splits(), trainer_of()
    accelerator = trainer.accelerator()
    validation, test = (
        trainer.evaluate(TASK, net, part, Quiet(), accelerator) for part in (data.validation, data.test)
    )
    return prefixed("validation", validation) | prefixed("test", test)


def flattened(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters() if p.requires_grad])


METHODS = [
    LoRA(rank=3), DoRA(rank=3), VeRA(rank=12), NoLA(rank=3, num_bases=32), RandLoRA(rank=3), RandLoRAa(rank=3),
    EDoRA(rank=4), MoRA(rank=1), MELoRA(rank=2, parts=2), LoRAMini(rank=3), FullFineTuning(), SoRA(rank=3),
    IncreLoRA(rank=3, top=1), FlatLoRA(rank=3),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_method_learns(method: Method, tmp_path: Path) -> None:
    net = model(method)
    before = scores(net)["test/accuracy"]
    fit(net, tmp_path, max_steps=60)
    assert before < 0.6 < 0.9 < scores(net)["test/accuracy"]


def test_a_run_reports(tmp_path: Path) -> None:
    observer = Quiet()
    net = model(LoRA(rank=3))
    result = fit(net, tmp_path, observer, max_steps=60, evaluate_every=30)
    metrics = scores(net)
    assert (metrics["validation/count"], metrics["test/count"]) == (5, 60)
    assert result.steps == 60
    assert 0 < result.seconds_per_step * 60 == pytest.approx(result.train_seconds)
    (midway,) = (line for line in observer.metrics if "validation/accuracy" in line)  # the end is scored by who asked
    assert midway["step"] == 30
    assert midway["update/relative_norm_max"] >= midway["update/relative_norm_mean"] > 0
    assert {"train/loss", "train/learning_rate", "train/gradient_norm"} <= set(observer.metrics[0])


@pytest.mark.parametrize("micro", [1, 3, 4, 7])
def test_micro_batches_add_up_to_the_whole_batch(tmp_path: Path, micro: int) -> None:
    whole, parts = model(), model()
    fit(whole, tmp_path / "a")
    fit(parts, tmp_path / "b", micro_batch_size=micro)
    torch.testing.assert_close(flattened(parts), flattened(whole), rtol=1e-4, atol=1e-5)


def test_noise_on_the_weight_is_one_for_all_micro_batches_comes_again_and_stays_out_of_it(tmp_path: Path) -> None:
    method = FlatLoRA(rank=3, sigma=0.5)
    whole, parts, broken, resumed, plain = (model(m, dropout=0.3) for m in [method] * 4 + [LoRA(rank=3)])
    untouched = whole[0].base.weight.clone()
    fit(whole, tmp_path / "whole")
    assert torch.equal(whole[0].base.weight, untouched)
    with pytest.raises(Interrupted):
        fit(broken, tmp_path / "broken", StopsAt(7))
    fit(resumed, tmp_path / "broken")
    assert torch.equal(flattened(resumed), flattened(whole))
    fit(plain, tmp_path / "plain")
    assert (flattened(plain) - flattened(whole)).abs().max() > 0.01
    whole, parts = model(method), model(method)
    fit(whole, tmp_path / "without dropout")
    fit(parts, tmp_path / "parts", micro_batch_size=3)
    torch.testing.assert_close(flattened(parts), flattened(whole), rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Small(Bars):
    """Bars in a memory of three examples, from a call of the loss on."""

    calls: ClassVar[list[int]] = []
    begins: int = 0
    error: Exception = torch.OutOfMemoryError("CUDA out of memory.")  # noqa: RUF009

    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        self.calls.append(len(batch["label"]))
        if len(self.calls) > self.begins and len(batch["label"]) > 3:
            raise self.error
        return super().loss(model, batch)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_step_that_does_not_fit_is_taken_again_in_smaller_parts(tmp_path: Path, error: Exception) -> None:
    """Oracle: the run that has the smaller micro-batch from the start; with dropout."""
    Small.calls.clear()
    lowered, smaller, observer = model(dropout=0.3), model(dropout=0.3), Quiet()
    task = Small("bars", None, error=error)  # type: ignore[arg-type]
    result = fit(lowered, tmp_path / "a", observer, task=task, auto_batch=True, workers=int(error is ERRORS[0]))
    assert Small.calls[:3] == [8, 4, 2]
    assert observer.said == [f"step 0: out of memory; from here on trainer.micro_batch_size={size}" for size in (4, 2)]
    assert result.micro_batch_size == 2
    assert fit(smaller, tmp_path / "b", micro_batch_size=2).micro_batch_size is None
    assert torch.equal(flattened(lowered), flattened(smaller))


def test_memory_that_runs_out_in_the_middle_of_a_step_of_the_middle(tmp_path: Path) -> None:
    """The second half of step 6 does not fit: its first half's gradient must not count twice."""
    Small.calls.clear()
    lowered, whole = model(), model()
    task = Small("bars", None, begins=13)  # type: ignore[arg-type]
    assert fit(lowered, tmp_path / "a", task=task, micro_batch_size=4, auto_batch=True).micro_batch_size == 2
    assert Small.calls[11:18] == [4, 4, 4, 2, 2, 2, 2]
    fit(whole, tmp_path / "b")
    torch.testing.assert_close(flattened(lowered), flattened(whole), rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_ends_a_run_that_may_not_lower_or_cannot(tmp_path: Path) -> None:
    alone = {"auto_batch": True, "micro_batch_size": 1, "batch_size": 1}
    for error, changes in (
        (ERRORS[0], {}), (ERRORS[1], alone), (ZeroDivisionError("memory"), {"auto_batch": True}),
        (RuntimeError("no memory of it"), {"auto_batch": True}),
    ):  # fmt: skip
        task, observer = Never("bars", None, error=error), Quiet()  # type: ignore[arg-type]
        with pytest.raises(type(error), match="memory"):
            fit(model(), tmp_path, observer, task=task, **changes)
        assert observer.said == []


@dataclass(frozen=True)
class Never(Bars):
    """Bars whose loss is an error."""

    error: Exception = ERRORS[0]

    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        raise self.error


@dataclass(frozen=True)
class Precise(Bars):
    """Bars that notes the dtypes of its model's outputs and of attention on float32, in and out of training."""

    seen: ClassVar[set[tuple]] = set()

    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        self._note(model, batch)
        return super().loss(model, batch)

    def predict(self, model, batch):  # type: ignore[no-untyped-def]
        self._note(model, batch)
        return super().predict(model, batch)

    def _note(self, model, batch):  # type: ignore[no-untyped-def]
        qkv = [torch.ones(1, 1, 2, 4)] * 3
        self.seen.add((model.training, model(batch["image"]).dtype, F.scaled_dot_product_attention(*qkv).dtype))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_steps_and_scores_have_the_precision_that_is_asked_for(
    precision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Attention is in float32 on a CPU."""
    Precise.seen.clear()
    data, task = splits(), Precise("bars", None)  # type: ignore[arg-type]
    about = {"max_steps": 2, "micro_batch_size": 4, "evaluate_every": 1, "select": "best", "precision": precision}
    fit(model(), tmp_path, data=replace(data, labelled=data.train), task=task, **about)
    assert Precise.seen == {(training, dtype, torch.float32) for training in (True, False)}


def test_what_micro_batches_of_a_step_share_is_kept_between_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, cached = [], loop.cached
    monkeypatch.setattr(loop, "cached", lambda net: kept.append(net) or cached(net))
    net = model()
    for size, count in ((8, 0), (7, 3), (4, 3)):
        kept.clear()
        fit(net, tmp_path / str(size), micro_batch_size=size, max_steps=3)
        assert kept == [net] * count


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    first, second = model(dropout=0.3), model(dropout=0.3)
    fit(first, tmp_path / "a")
    fit(second, tmp_path / "b", workers=2)
    assert torch.equal(flattened(first), flattened(second))


class StopsAt(Quiet):
    def __init__(self, step: int):
        super().__init__()
        self.at = step

    def progress(self, step: int, steps: int, text: str) -> None:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    unbroken, broken = model(dropout=0.3), model(dropout=0.3)
    fit(unbroken, tmp_path / "a")
    with pytest.raises(Interrupted, match="step 7 of 20"):
        fit(broken, tmp_path / "b", StopsAt(7))
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["step_0000007"]
    resumed, observer = model(dropout=0.3), Quiet()
    result = fit(resumed, tmp_path / "b", observer)
    assert observer.said == ["going on from step 7 of 20"]
    assert torch.equal(flattened(resumed), flattened(unbroken))
    assert result.steps == 20


CHANGING = {
    "grows": (IncreLoRA(rank=4, top=1, gain=2, interval=3, dropout=0.2), [1, 7, 10]),
    "closes gates": (SoRA(rank=4, sparsity=1.0, final_sparsity=8.0, dropout=0.2), [7, 12]),
    "louder noise": (FlatLoRA(rank=4, sigma=0.5, dropout=0.2), [7]),
}


@pytest.mark.parametrize(("method", "stops"), CHANGING.values(), ids=CHANGING)
def test_a_method_that_changes_in_training_resumes_to_the_same_bits(
    method: Method, stops: list[int], tmp_path: Path
) -> None:
    """Growth is in steps 0, 6, 9 and 12: stopped after the first, in the middle and right after a round."""
    unbroken = model(method, dropout=0.3)
    fit(unbroken, tmp_path / "a")
    for stop in stops:
        with pytest.raises(Interrupted, match=f"step {stop} of 20"):
            fit(model(method, dropout=0.3), tmp_path / "b", StopsAt(stop))
    resumed = model(method, dropout=0.3)
    fit(resumed, tmp_path / "b")
    ends = [require_adaptation(net).method for net in (unbroken, resumed)]
    assert ends[0] == ends[1]
    assert torch.equal(flattened(resumed), flattened(unbroken))
    assert torch.equal(resumed.eval()(torch.ones(1, 16)), unbroken.eval()(torch.ones(1, 16)))


@pytest.mark.parametrize(
    ("top", "gain", "rounds"),
    [(1, 1, 4), (2, 1, 2), (1, 3, 2), (2, 2, 1), (2, 3, 1), (9, 4, 1)],
)
def test_ranks_end_exactly_at_the_target(top: int, gain: int, rounds: int, tmp_path: Path) -> None:
    """Two sites of rank 1, to a rank of 3 on average: 4 to gain, which a round of several need not divide."""
    method, ranks = IncreLoRA(rank=3, top=top, gain=gain, interval=2), []
    net = model(method)

    class Ranks(Quiet):
        def progress(self, step: int, steps: int, text: str) -> None:
            ranks.append(sum(update.rank for update in updates))

    updates = [*require_adaptation(net).updates.values()]
    result = fit(net, tmp_path, Ranks(), max_steps=14)
    expected = [2, 2, 2, 2]  # a round in step 4, 6, 8 …, when as many have been taken
    for _ in range(rounds):
        expected += 2 * [min(6, expected[-1] + top * gain)] if top < 2 else 2 * [min(6, expected[-1] + 2 * gain)]
    assert ranks == (expected + 14 * [6])[:14]
    chosen = require_adaptation(net).method.ranks
    assert sum(chosen.values()) == 6
    assert result.trainable_parameters == chosen["0"] * (16 + 12 + 1) + chosen["3"] * (12 + 4 + 1)
    assert [*(p.shape for p in net.parameters() if p.requires_grad)] == [
        (chosen["0"], 16), (12, chosen["0"]), (chosen["3"], 12), (4, chosen["3"]),
    ]  # fmt: skip


def test_what_is_born_later_has_a_warm_up_and_moments_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites, one round in step 4: λ of the ranks that step 0 began in advance are born in step 5, a and b in 1."""
    rates: dict[int, dict[int, float]] = {}
    taken: list[Loop] = []
    plain_at = Loop.at

    def at(self: Loop, step: int) -> Step:
        where = plain_at(self, step)
        for group in self.optimizer.param_groups:
            rates.setdefault(group["born"], {})[step] = group["lr"]
        taken[:] = [self]
        return where

    monkeypatch.setattr(Loop, "at", at)
    net = model(IncreLoRA(rank=2, top=2, gain=1, interval=2))
    update, ages = require_adaptation(net).updates["0"], {}

    class Ages(Quiet):
        def progress(self, step: int, steps: int, text: str) -> None:
            state = taken[0].optimizer.state
            ages[step] = {name: int(state[p]["step"]) for name, p in update.named_parameters() if p in state}

    fit(net, tmp_path, Ages(), max_steps=12, warmup=2, learning_rate=0.1, final_rate=0.0)
    cosine = lambda done: 0.05 * (1 + math.cos(math.pi * done))  # noqa: E731
    for born, end in ((0, 11), (1, 11), (5, 11)):
        steps = [0.05, 0.1, *(cosine(k / (10 - born)) for k in range(10 - born))]
        assert rates[born] == pytest.approx(dict(zip(range(born, end + 1), steps, strict=True)))
    assert ages[4] == {"a.0_0": 4, "b.0_0": 4, "lambda_.0_0": 4, "a.1_0": 3, "b.1_0": 3}
    assert ages[11] == {
        "a.0_0": 11, "a.1_0": 10, "b.0_0": 11, "b.1_0": 10, "lambda_.0_0": 11, "lambda_.5_0": 6,
    }  # fmt: skip


def test_a_run_too_short_to_grow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"after 4 rounds of 1 sites, one every 4 steps .* the run has 20: lower"):
        fit(model(IncreLoRA(rank=3, top=1, interval=4)), tmp_path)
    net = model(IncreLoRA(rank=3, top=1))  # a third of 30 steps for a start and four rounds: one in 2 steps
    fit(net, tmp_path / "third", max_steps=30)
    assert sum(require_adaptation(net).method.ranks.values()) == 6


def test_the_best_step_of_a_method_that_grows_has_the_ranks_of_its_time(tmp_path: Path) -> None:
    """The validation loss is lowest while the sites have gained but the first ranks."""
    net = model(IncreLoRA(rank=5, top=1, gain=1, interval=1))
    observer = Quiet()
    result = select_best(net, tmp_path, observer)
    ranks = require_adaptation(net).method.ranks
    assert sum(ranks.values()) == min(10, 2 + max(0, result.selected_step - 2)) < 10
    images = torch.stack([splits().validation[row, row]["image"] for row in range(5)])
    labels = torch.tensor([splits().validation[row, row]["label"] for row in range(5)])
    loss = F.cross_entropy(net(images), labels).item()
    said = [line for line in observer.said if line.startswith(f"selected step {result.selected_step} of 15")]
    assert loss == pytest.approx(float(said[0].split()[-1]), rel=0.01)  # without the ranks in advance


def test_a_decomposition_that_comes_out_otherwise_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EDoRA's singular vectors have other signs on another machine; the checkpoint brings those it began with."""
    from randlora.methods import EDoRA, edora

    unbroken, broken = model(EDoRA(rank=4)), model(EDoRA(rank=4))
    fit(unbroken, tmp_path / "a")
    with pytest.raises(Interrupted, match="step 7 of 20"):
        fit(broken, tmp_path / "b", StopsAt(7))
    svd, signs = edora.truncated_svd, torch.tensor([-1.0, 1.0, -1.0, 1.0])
    monkeypatch.setattr(edora, "truncated_svd", lambda *args: (svd(*args)[0] * signs, svd(*args)[1] * signs[:, None]))
    resumed = model(EDoRA(rank=4))
    fit(resumed, tmp_path / "b")
    assert torch.equal(flattened(resumed), flattened(unbroken))


OPTIMIZERS = {
    "AdamW": {"betas": [0.8, 0.99]},
    "SGD": {},  # without momentum it keeps nothing
    "Adafactor": {"d": 1.0},
    "Muon": {},
}


@pytest.mark.parametrize("algorithm", OPTIMIZERS)
def test_every_optimizer_trains_as_torchs_own_and_resumes_to_the_same_bits(algorithm: str, tmp_path: Path) -> None:
    """Oracle: the class of torch.optim in a loop by hand; exact."""
    optimizer, changes = Optimizer(algorithm, **OPTIMIZERS[algorithm]), {"learning_rate": 0.02, "max_steps": 6}
    unbroken, broken = model(), model()
    fit(unbroken, tmp_path / "a", optimizer=optimizer, **changes)
    with pytest.raises(Interrupted, match="step 3 of 6"):
        fit(broken, tmp_path / "b", StopsAt(3), optimizer=optimizer, **changes)
    resumed = model()
    fit(resumed, tmp_path / "b", optimizer=optimizer, **changes)
    assert torch.equal(flattened(resumed), flattened(unbroken))

    by_hand, data = model(), splits()
    trained = [p for p in by_hand.parameters() if p.requires_grad]
    theirs = getattr(torch.optim, algorithm)(trained, lr=0.02, weight_decay=0.1, **OPTIMIZERS[algorithm])
    for step, (batch,) in enumerate(loader(data.train, training_keys(30, 8, range(6), seed=1), 0)):
        theirs.param_groups[0]["lr"] = 0.02 * rate_factor(step, 6, "cosine", 0.0, 0.01)
        TASK.loss(by_hand, batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        theirs.step()
        theirs.zero_grad()
    assert torch.equal(flattened(by_hand), flattened(unbroken))


TORCHS = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and cls is not torch.optim.Optimizer and name not in ("LBFGS", "SparseAdam")
)


@pytest.mark.parametrize("algorithm", TORCHS)
def test_an_optimizers_bytes_are_those_that_torch_keeps(algorithm: str) -> None:
    """Oracle: the state of a step on real tensors."""
    parameters = [nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(40, 3))]
    if algorithm != "Muon":  # which takes matrices alone
        parameters.append(nn.Parameter(torch.randn(6)))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    theirs = getattr(torch.optim, algorithm)(parameters, lr=0.01)
    theirs.step()
    kept = [value for state in theirs.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    expected = sum(value.nbytes for value in kept if value.dim())
    assert Optimizer(algorithm).state_bytes(parameters) == expected
    assert Optimizer(algorithm).state_bytes([parameter.bfloat16() for parameter in parameters]) == expected


def test_an_optimizers_bytes_of_a_single_number_and_groups_without_a_decay() -> None:
    """Oracle: Adam's two float32 moments; torch's own default, no decay."""
    number = nn.Parameter(torch.tensor(1.0))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # which changes nothing: what is trained is float32
    try:
        assert Optimizer("AdamW").state_bytes([number]) == 8
    finally:
        torch.set_default_dtype(default)
    (group,) = Optimizer("Rprop", etas=[0.4, 1.3]).over([{"params": [number], "lr": 0.2}]).param_groups
    assert (group["params"], group["lr"], group["etas"]) == ([number], 0.2, (0.4, 1.3))


@pytest.mark.parametrize(
    ("optimizer", "decay", "says"),
    [
        (Optimizer("Rprop"), 0.1, "trainer.weight_decay=0.1: torch.optim.Rprop has none; use 0"),
        (Optimizer("AdamW", betas=[0.5, 1.5]), 0.0, "optimizer=AdamW: Invalid beta parameter at index 1: 1.5"),
        (Optimizer("SparseAdam"), 0.0, r"optimizer=SparseAdam: cannot take a step on dense gradients alone \(Sparse"),
        (Optimizer("LBFGS"), 0.0, "optimizer=LBFGS: "),
    ],
)
def test_an_optimiser_is_tried_before_a_run(optimizer: Optimizer, decay: float, says: str) -> None:
    with pytest.raises(SettingsError, match=f"^{says}"):
        optimizer.check(decay)
    for fine in ("Rprop", "Muon"):
        Optimizer(fine).check(0.0)


def test_a_stop_is_asked_for_by_a_signal_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.came
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.came
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_validation_that_a_signal_to_another_process_ends_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal has come here; the checkpoint says that its step is not scored, and the next start scores it."""
    net, resumed, observer = model(), model(), Quiet()

    def ended(self, done):  # type: ignore[no-untyped-def]
        raise Interrupted("stopped by a signal to another process")

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "validate", ended)
        with pytest.raises(Interrupted, match="at step 4 of 6"):
            fit(net, tmp_path, evaluate_every=4, max_steps=6)
    fit(resumed, tmp_path, observer, evaluate_every=4, max_steps=6)
    assert [row["step"] for row in observer.metrics if "validation/accuracy" in row] == [4]


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / ".draft_0000009").mkdir()
    (tmp_path / "step_0000009").mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        net[0].base.weight[0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"step 0: the loss is nan .* learning rate 0.05; last good checkpoint: none"):
        fit(net, tmp_path)


class Steep(torch.autograd.Function):
    """Nothing, with a gradient that is infinite."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient * float("inf")


@dataclass(frozen=True)
class SteepBars(Bars):
    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        return Steep.apply(super().loss(model, batch))


def test_a_gradient_that_is_not_a_number_stops_the_run_though_its_loss_is_one(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step 0: the loss is 1\.\d+ and the gradient's norm (nan|inf) at "):
        fit(model(), tmp_path, task=SteepBars("bars", None))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Empty(Bars, UnequalExamples):
    def terms(self, batch):  # type: ignore[no-untyped-def]
        return 0


def test_a_step_of_examples_without_a_term_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^step 0: its examples have nothing to learn; are they cut too short"):
        fit(model(), tmp_path, task=Empty("bars", None))  # type: ignore[arg-type]


def test_a_training_says_what_the_watch_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossWatch, "add", lambda watch, loss: "it rises")
    observer = Quiet()
    fit(model(), tmp_path, observer, max_steps=2)
    assert observer.said == ["step 1: it rises", "step 2: it rises"]


def test_the_rows_that_are_tested_are_drawn_by_the_tasks_name() -> None:
    """Oracle: the sample of that name alone."""
    table, few = splits().test.table, replace(TASK, test_size=3)
    assert few.test_rows(table).tolist() == subsample(len(table), 3, few.name).tolist()
    assert few.test_rows(table).tolist() != subsample(len(table), 3, "another").tolist()


def test_norms_of_updates_are_relative_to_the_frozen_weights() -> None:
    """Oracle: LoRA's ΔW, 2 B A, by hand."""
    net = model(LoRA(rank=2))
    with torch.no_grad():
        for update in require_adaptation(net).updates.values():
            update.B.normal_()
    ratios = [
        float((2 * update.B @ update.A).detach().norm() / net.get_submodule(name).base.weight.norm())
        for name, update in require_adaptation(net).updates.items()
    ]
    expected = {"update/relative_norm_mean": sum(ratios) / 2, "update/relative_norm_max": max(ratios)}
    assert norms(net) == pytest.approx(expected)


def test_a_split_is_scored_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}

    def predictions(*given, **options):  # type: ignore[no-untyped-def]
        asked.update(options, given=given)
        return {"predicted": [1, 2], "label": [1, 3]}

    monkeypatch.setattr("randlora.training.evaluate.predictions", predictions)
    options = {"batch_size": 3, "workers": 2, "precision": "bf16", "say": print}
    assert evaluate(TASK, "model", "split", "accelerator", **options) == {"accuracy": 0.5, "count": 2}  # type: ignore[arg-type]
    assert asked == options | {"given": (TASK, "model", "split", "accelerator")}
    evaluate(TASK, "model", "split", "accelerator")  # type: ignore[arg-type]
    usual = Trainer()
    options = {"batch_size": usual.evaluation_batch_size, "workers": usual.workers, "precision": usual.precision}
    assert asked == options | {"say": print, "given": (TASK, "model", "split", "accelerator")}


class Moved(torch.Tensor):
    """Tells where it goes, and how."""

    def to(self, *where, **how):  # type: ignore[no-untyped-def]
        return where, how


def test_batches_go_to_their_device_without_waiting_for_it() -> None:
    tensor, meta = torch.ones(2).as_subclass(Moved), torch.device("meta")
    there = (meta,), {"non_blocking": True}
    assert to_device(tensor, meta) == there
    batch = {"inputs": {"ids": tensor}, "names": ["a"], "label": tensor}
    assert to_device(batch, meta) == {"inputs": {"ids": there}, "names": ["a"], "label": there}


def test_a_split_without_examples_has_no_scores() -> None:
    data = splits()
    empty = Split(data.test.table, data.test.rows[:0], Pixels8())
    bound = Bound(model())
    assert evaluate(TASK, bound.model, empty, trainer_of().accelerator()) == {}


def test_a_loss_above_its_start_is_said_aloud_once() -> None:
    watch = LossWatch(window=4)
    said = [watch.add(loss) for loss in [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.0]]
    assert [text is not None for text in said] == [False, False, False, True, False, False, False]
    assert "above its start, 1" in said[3]  # type: ignore[operator]
    calm = LossWatch(window=4)
    assert not any(calm.add(loss) for loss in [1.0, 1.2, 0.9, 0.8, 0.7])


def test_a_training_is_as_long_as_its_epochs_or_as_asked(tmp_path: Path) -> None:
    """30 examples in batches of 10, twice."""
    result = fit(model(LoRA(2)), tmp_path, max_steps=None, epochs=2, batch_size=10)
    assert result.steps == 6
    assert result.seconds_per_step == pytest.approx(result.train_seconds / 6)


@pytest.mark.parametrize(
    ("examples", "changes", "steps"),
    [
        (30, {"epochs": 2}, 8),  # 7.5, and the even one of 7 and 8
        (30, {"epochs": 2.2}, 8),
        (30, {"epochs": 2, "min_steps_per_epoch": 10}, 20),
        (30, {"epochs": 2, "min_steps_per_epoch": 3}, 8),
        (3, {"epochs": 0.1}, 1),
        (30, {"epochs": 2, "max_steps": 5}, 5),
        (30, {"max_steps": 5, "warmup": 5}, 5),
        (30, {"max_steps": 5, "warmup": 0.99}, 5),
        (2, {"epochs": 1, "batch_size": 1}, 2),
        (10**8 - 1, {"epochs": 1, "batch_size": 1}, 10**8 - 1),
        (10**8, {"epochs": 1, "batch_size": 1}, "trainer.epochs=1: makes 1e+08 steps of 100,000,000 examples, and a"),
        (30, {"max_steps": 5, "warmup": 6}, "trainer.warmup=6: the run has 5 steps; give at most so many, or a part"),
        (30, {"max_steps": 1, "warmup": 1.5}, "trainer.warmup=1.5: the run has 1 steps; give at most so many"),
    ],
)
def test_lengths(examples: int, changes: dict, steps: int | str) -> None:
    """Oracle: epochs · examples / 8 by hand, rounded; a length that cannot be is a sentence."""
    trainer = trainer_of(**{"max_steps": None} | changes)
    if isinstance(steps, int):
        assert trainer.steps(examples) == steps
    else:
        with pytest.raises(SettingsError, match=f"^{re.escape(steps)}"):
            trainer.steps(examples)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("x"), True), (MemoryError(), True), (RuntimeError("CUDA out of memory. Tried"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes differ"), False), (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_errors_of_memory(error: Exception, is_one: bool) -> None:
    """As torch words them."""
    assert out_of_memory(error) == is_one


def test_schedules() -> None:
    """Oracle: the closed forms at their ends and middle."""
    steps = 100
    assert rate_factor(0, steps, "cosine", 0.1, 0.01) == pytest.approx(0.1)
    assert rate_factor(9, steps, "cosine", 10, 0.01) == pytest.approx(1.0)
    assert rate_factor(55, steps, "cosine", 0.1, 0.0) == pytest.approx(0.5)
    assert rate_factor(100, steps, "cosine", 0.0, 0.01) == pytest.approx(0.01)
    assert rate_factor(50, steps, "linear", 0.0, 0.0) == pytest.approx(0.5)
    assert rate_factor(99, steps, "constant", 0.0, 0.0) == 1.0
    assert rate_factor(0, steps, "linear", 1, 0.0) == 1.0  # a warm-up of one step, not of all
    assert rate_factor(10, 10, "linear", 9, 0.25) == pytest.approx(0.25)
    assert rate_factor(10, 10, "linear", 10, 0.25) == 1.0  # where the warm-up is all of it
    assert [trainer_of(warmup=4).rate_factor(step, 20, born=6) for step in (6, 9, 10)] == [0.25, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schedule": "step"}, "trainer.schedule='step': choose one of cosine, linear, constant"),
        ({"warmup": -1}, "trainer.warmup=-1: must be a number of at least 0"),
        ({"final_rate": 1.1}, "trainer.final_rate=1.1: must be a number of at least 0 and at most 1"),
        ({"final_rate": -0.1}, "trainer.final_rate=-0.1: must be a number of at least 0 and at most 1"),
    ],
)
def test_schedules_that_cannot_be_followed_are_a_sentence(changes: dict, sentence: str) -> None:
    trainer_of(warmup=0, final_rate=1.0)
    with pytest.raises(SettingsError) as caught:
        trainer_of(**changes)
    assert str(caught.value) == sentence


def test_head_and_updates_have_rates_of_their_own(tmp_path: Path) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model()
            self.head = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    slow, still = Headed(), Headed()
    still.load_state_dict(slow.state_dict())
    before = slow.head.weight.detach().clone()
    fit(slow, tmp_path / "a", head_learning_rate=1e-9, weight_decay=0.0)
    assert (slow.head.weight - before).abs().max() < 1e-6
    assert flattened(slow.body).abs().max() > 0.01
    fit(still, tmp_path / "b")
    assert (still.head.weight - before).abs().max() > 1e-3


@dataclass(frozen=True)
class Hooked(LoRA):
    """A method that asks for everything a trainer offers."""

    calls: ClassVar[list[str]] = []
    steps: ClassVar[list[Step]] = []

    def parameter_groups(self, trained, rate, decay):  # type: ignore[no-untyped-def]
        self.calls.append("groups")
        return [{"params": [p], "lr": rate, "weight_decay": 0.0} for p in trained.values()]

    def before_step(self, updates, step):  # type: ignore[no-untyped-def]
        assert all(update.A.grad is None for update in updates)
        self.calls.append(f"before_step {step.number}")

    def penalty(self, updates):  # type: ignore[no-untyped-def]
        self.calls.append("penalty")
        return sum(update.A.square().sum() for update in updates)

    def after_backward(self, updates, step):  # type: ignore[no-untyped-def]
        assert all(update.A.grad is not None for update in updates)
        self.calls.append("after_backward")
        return False

    def after_step(self, updates, step):  # type: ignore[no-untyped-def]
        self.calls.append("after_step")
        self.steps.append(step)

    def finish(self, updates):  # type: ignore[no-untyped-def]
        self.calls.append("finish")
        assert list(updates) == ["0", "3"]
        return LoRA(rank=1)


def test_the_trainer_knows_the_six_calls_of_a_method(tmp_path: Path) -> None:
    net = model(Hooked(rank=2))
    fit(net, tmp_path, max_steps=2, micro_batch_size=4, warmup=2)
    each = ["penalty", "after_backward", "after_step"]
    assert Hooked.calls == ["groups", "before_step 0", *each, "before_step 1", *each, "finish"]
    assert Hooked.steps == [Step(0, 2, 0.025, 1), Step(1, 2, 0.05, 1)]
    assert require_adaptation(net).method == LoRA(rank=1)  # as the adapter's file has it


@dataclass(frozen=True)
class WithLoss(Bars):
    """Bars whose validation has a loss."""

    def predict(self, model, batch):  # type: ignore[no-untyped-def]
        losses = F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")
        return super().predict(model, batch) | {"loss": losses.tolist()}

    def score(self, columns):  # type: ignore[no-untyped-def]
        return super().score(columns) | {"loss": sum(columns["loss"]) / len(columns["loss"])}


def select_best(net: nn.Module, folder: Path, observer: Quiet | None = None, task: Task | None = None) -> Fit:
    """With a rate so high that the validation loss goes up and down."""
    trainer = trainer_of(evaluate_every=2, select="best", learning_rate=1.0, schedule="constant", max_steps=15)
    return trainer.fit(
        task or WithLoss("bars", None), Bound(net), splits(), seed=1, folder=folder,  # type: ignore[arg-type]
        observer=observer or Quiet(), accelerator=trainer.accelerator(),
    )  # fmt: skip


def test_the_best_step_is_that_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    """Oracle: every run of 2, 4, … 14 and 15 steps by itself, and the loss of its parameters by hand."""
    net, observer, losses, parameters = model(), Quiet(), {}, {}
    result = select_best(net, tmp_path / "best", observer)
    images = torch.stack([splits().validation[row, row]["image"] for row in range(5)])
    labels = torch.tensor([splits().validation[row, row]["label"] for row in range(5)])
    for steps in (2, 4, 6, 8, 10, 12, 14, 15):
        alone = model()
        fit(alone, tmp_path / str(steps), learning_rate=1.0, schedule="constant", max_steps=steps)
        losses[steps], parameters[steps] = F.cross_entropy(alone(images), labels).item(), flattened(alone)
    best = min(losses, key=lambda steps: losses[steps])
    assert best == 8  # where the last step would not do
    assert result.selected_step == best
    assert torch.equal(flattened(net), parameters[best])
    assert fit(model(), tmp_path / "last").selected_step is None
    assert any(said.startswith(f"selected step {best} of 15") for said in observer.said)
    assert [row["step"] for row in observer.metrics if "validation/loss" in row] == [*losses]


@pytest.mark.parametrize("stop", [5, 13])
def test_the_best_step_is_the_same_in_a_resumed_run(tmp_path: Path, stop: int) -> None:
    """Before the best step and after it, when the best parameters are in no checkpoint."""
    unbroken, resumed = model(dropout=0.3), model(dropout=0.3)
    result = select_best(unbroken, tmp_path / "a")
    with pytest.raises(Interrupted, match=f"step {stop} of 15"):
        select_best(model(dropout=0.3), tmp_path / "b", StopsAt(stop))
    assert select_best(resumed, tmp_path / "b").selected_step == result.selected_step
    assert torch.equal(flattened(resumed), flattened(unbroken))


def test_a_best_step_is_refused_where_nothing_can_choose_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"trainer.select=best: give trainer.evaluate_every"):
        trainer_of(select="best")
    with pytest.raises(SettingsError, match=r"no validation example; raise task.validation_size"):
        fit(model(), tmp_path, data=splits(validation=0), select="best", evaluate_every=2)
    with pytest.raises(SettingsError, match="the validation set is scored by accuracy, count and has no loss"):
        select_best(model(), tmp_path, task=TASK)


@dataclass(frozen=True)
class Lost(Bars):
    """Bars whose validation loss is not a number."""

    def score(self, columns):  # type: ignore[no-untyped-def]
        return {"loss": math.nan}


def test_a_best_step_must_have_a_finite_loss_and_is_the_first_of_equals(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"^trainer.select=best: the validation loss was never finite"):
        select_best(model(), tmp_path, task=Lost("bars", None))  # type: ignore[arg-type]
    weight = nn.Parameter(torch.ones(2))
    first = BestStep().or_now(3, {"loss": 0.5}, {"w": weight})
    with torch.no_grad():
        weight.zero_()
    for loss in (0.5, math.nan, math.inf):
        assert first.or_now(4, {"loss": loss}, {"w": weight}) is first
    lower = first.or_now(5, {"loss": 0.4}, {"w": weight})
    assert [(best.step, best.loss, best.parameters["w"].tolist()) for best in (first, lower)] == [
        (3, 0.5, [1, 1]), (5, 0.4, [0, 0]),
    ]  # fmt: skip
    assert not first.parameters["w"].requires_grad
    moved = BestStep().or_now(1, {"loss": 0.1}, {"w": torch.ones(2).as_subclass(Moved)}).parameters  # type: ignore[dict-item]
    assert moved == {"w": (("cpu",), {"copy": True})}


def test_a_training_draws_with_replacement_where_it_is_asked_to(tmp_path: Path) -> None:
    """Oracle: the rows of `training_keys`, which a test of its own holds to what sampling is."""
    for sampling in ("permutation", "replacement"):
        Seen.rows.clear()
        data = splits()
        table = ArrayImages(data.train.table.images, np.arange(100))  # type: ignore[attr-defined]
        data = replace(data, train=Split(table, data.train.rows, Pixels8()))
        fit(model(), tmp_path / sampling, data=data, task=Seen("bars", None), sampling=sampling, max_steps=4)  # type: ignore[arg-type]
        keys = training_keys(30, 8, range(4), seed=1, replacement=sampling == "replacement")
        assert Seen.rows == [[row for row, _ in step] for step in keys]


@dataclass(frozen=True)
class Seen(Bars):
    """Bars that notes the labels it is given, which are the rows here."""

    rows: ClassVar[list[list[int]]] = []

    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        self.rows.append(batch["label"].tolist())
        return model(batch["image"]).square().mean()


def test_sampling_with_replacement_draws_every_position_anew() -> None:
    """Oracle: of `count` draws a row is missing with probability (1 - 1/count)^count, about 1/e."""
    keys = [key for step in training_keys(1000, 50, range(40), seed=3, replacement=True) for key in step]
    rows, positions = np.array(keys).T
    assert (positions == np.arange(2000)).all()
    for epoch in rows.reshape(2, 1000):
        assert abs(len(np.unique(epoch)) / 1000 - (1 - np.exp(-1))) < 0.04
        assert 0 <= epoch.min() <= epoch.max() <= 999
    assert (rows[:1000] != rows[1000:]).any()
    late = [key for step in training_keys(1000, 50, range(30, 40), seed=3, replacement=True) for key in step]
    assert late == keys[1500:]  # so that a resumed run draws the same


def test_an_optimiser_has_no_settings_that_are_the_trainers() -> None:
    with pytest.raises(SettingsError, match=r"^optimizer.betas='none': "):
        Optimizer("AdamW", betas="none")
    assert Optimizer("AdamW", betas=[0.8, 0.9]).describe() == {"algorithm": "AdamW", "betas": (0.8, 0.9)}
    for name in ("params", "lr", "weight_decay", "beta"):
        with pytest.raises(SettingsError, match=rf"optimizer.{name}: torch.optim.AdamW has betas, eps, amsgrad, "):
            Optimizer("AdamW", **{name: 1})


@pytest.mark.parametrize("name", ["Adan", "lr_scheduler", "Parameter", 3, None])
def test_an_optimiser_is_a_class_of_torch_optim(name: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, a module, and a class that is no optimiser are not."""
    monkeypatch.setattr(torch.optim, "Parameter", nn.Parameter, raising=False)
    with pytest.raises(SettingsError, match=rf"^optimizer.algorithm={name!r}: not a class of torch.optim, such as"):
        Optimizer(name)  # type: ignore[arg-type]


def test_the_head_is_a_group_of_its_own() -> None:
    net, head = model(LoRA(rank=2)), nn.Linear(4, 3)
    adaptation = require_adaptation(net)
    for given, rate in ((None, 0.05), (0.2, 0.2)):
        settings = trainer_of(head_learning_rate=given, weight_decay=0.3)
        *groups, last = settings.parameter_groups(adaptation, head)
        assert last == {"params": [*head.parameters()], "lr": rate, "weight_decay": 0.3}
        assert groups == [*settings.parameter_groups(adaptation, None)]
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.05, 0.3)] * len(groups)


def test_the_noise_of_a_step_is_seeded_by_its_purpose_the_seed_and_the_step(tmp_path: Path) -> None:
    """Oracle: randlora.rng's function of the three; of other purposes it is another number."""
    net, seeds = model(), []
    net.register_forward_hook(lambda *_: seeds.append(torch.initial_seed()) if net.training else None)
    fit(net, tmp_path, max_steps=3)
    assert seeds == [integer("noise", 1, step, 0) for step in range(3)]


def test_a_training_that_pauses_has_its_scores_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """At its own step, asked again, past the step that is asked for, and after it."""
    whole, parts, observer = model(dropout=0.3), model(dropout=0.3), Quiet()
    fit(whole, tmp_path / "whole")
    paused = fit(parts, tmp_path / "parts", observer, stop_at=6)
    (scored,) = [metrics for metrics in observer.metrics if "validation/accuracy" in metrics]
    assert paused.paused == {key: scored[key] for key in ("validation/accuracy", "validation/count")}
    assert (paused.steps, scored["step"]) == (6, 6)
    assert paused.seconds_per_step == pytest.approx(paused.train_seconds / 6)
    assert (paused.trainable_parameters, paused.micro_batch_size) == (len(flattened(parts)), None)
    for stop_at in (6, 4):
        observer.metrics.clear()
        again = fit(model(dropout=0.3), tmp_path / "parts", observer, stop_at=stop_at)
        assert (again.steps, again.paused, again.train_seconds) == (6, paused.paused, paused.train_seconds)
        assert [metrics["step"] for metrics in observer.metrics] == [6]
    last = model(dropout=0.3)
    observer.metrics.clear()
    assert fit(last, tmp_path / "parts", observer).paused is None
    assert not [metrics for metrics in observer.metrics if "validation/accuracy" in metrics]
    assert torch.equal(flattened(last), flattened(whole))


class Logging(Quiet):
    """Keeps what is logged in lines, as a record does."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def begin(self, log: Sequence[str]) -> None:
        self.lines = [*log]

    def logged(self) -> Sequence[str]:
        return self.lines

    def log(self, metrics: dict, step: int) -> None:
        super().log(metrics, step)
        self.lines.append(Row(step, 0.0, metrics).line())


def test_the_scores_of_a_pause_are_in_its_checkpoint(tmp_path: Path) -> None:
    """Those of its own step alone, without scoring again."""
    first, again = Logging(), Logging()
    about = {"stop_at": 6, "evaluate_every": 3, "log_every": 1}
    paused = fit(model(), tmp_path, first, **about)
    assert [row["step"] for row in first.metrics if "validation/accuracy" in row] == [3, 6]
    assert fit(model(), tmp_path, again, **about).paused == paused.paused
    assert again.metrics == []
    assert again.lines == first.lines


def test_a_pause_needs_examples_to_be_scored_by_and_a_training_does_not(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^trainer.stop_at=2: there is no validation example to score a paused"):
        fit(model(), tmp_path, data=splits(validation=0), stop_at=2)
    assert fit(model(), tmp_path, data=splits(validation=0), max_steps=2).steps == 2


def test_a_pause_tells_what_memory_has_left_of_the_micro_batch(tmp_path: Path) -> None:
    Small.calls.clear()
    paused = fit(model(), tmp_path, task=Small("bars", None), auto_batch=True, stop_at=1)  # type: ignore[arg-type]
    assert (paused.steps, paused.micro_batch_size) == (1, 2)


def test_steps_alone_run_compiled_and_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of compiled blocks, which have tests of their own, it is told when one is inside."""
    inside, seen = [], []

    class Blocks(nullcontext):
        def __init__(self, net: nn.Module):
            inside.append(net)

        def __enter__(self) -> None:
            inside.append("in")

        def __exit__(self, *error: object) -> None:
            inside.remove("in")

    monkeypatch.setattr(loop, "CompiledBlocks", Blocks)
    for asked in (False, True):
        net = model()
        net.register_forward_hook(lambda net, *_: seen.append((net.training, "in" in inside)))
        fit(net, tmp_path / str(asked), compile=asked, max_steps=4, micro_batch_size=4, evaluate_every=2)
        assert set(seen) == {(True, asked), (False, False)}
        assert inside == [net] * asked
        seen.clear()


def test_the_seconds_of_a_training_are_those_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a second passes on with every look: a step is looked at when it begins and when it ends."""
    looks = iter(range(10**6))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(looks)))
    with pytest.raises(Interrupted):
        fit(model(), tmp_path, StopsAt(3), max_steps=8)
    result = fit(model(), tmp_path, max_steps=8)
    assert (result.train_seconds, result.seconds_per_step) == (8, 1)


@pytest.mark.parametrize(
    ("came", "late", "loss", "stopping", "saving"),
    [(0, 0, 1.5, False, False), (1, 0, 1.5, True, False), (0, 1, 1.5, False, True), (2, 2, 1.5, True, True)],
)
def test_all_processes_stop_and_save_when_one_is_to(
    came: int, late: int, loss: float, stopping: bool, saving: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the same step, whose loss is the sum of their parts. The other process is sums that are made up."""
    net, asked = model(), []
    monkeypatch.setattr(loop, "summed", lambda accelerator, *values: asked.append(values) or [loss, came, late])
    trainer = trainer_of()
    one = Loop(trainer, TASK, Bound(net), splits(), 1, tmp_path, Quiet(), trainer.accelerator(), Optimizer())
    part = net(torch.ones(2, 16)).square().mean()
    part.backward()
    monkeypatch.setattr(one, "accelerator", Namespace(num_processes=2, device=torch.device("cpu")))
    (read,) = one.stepped(part.detach(), one.at(4))
    assert asked == [(part.item(), False, False)]
    assert (one.stopping, one.save_due) == (stopping, saving)
    assert (read.done, read.loss, read.rate) == (5, loss, one.at(4).rate)


def test_what_cannot_be_read_in_a_training_is_said(tmp_path: Path) -> None:
    class Torn(ArrayImages):
        def __getitem__(self, index: int) -> dict:
            if index == 3:
                raise OSError("cut")
            return {**super().__getitem__(index)}

    data, observer = splits(), Quiet()
    table = Torn(data.train.table.images, data.train.table.labels)  # type: ignore[attr-defined]
    data = replace(data, train=Split(table, data.train.rows, Pixels8(), augment_seed=0, tolerance=0.1))
    net, trainer, sentence = model(), trainer_of(), "example 3 cannot be read (OSError: cut) and is left out: 1 of 30"
    fit(net, tmp_path, observer, data, max_steps=4)
    assert observer.said == [f"{sentence} so far"]
    scored = Split(table, data.train.rows, Pixels8(), tolerance=0.1)
    assert trainer.evaluate(TASK, net, scored, observer, trainer.accelerator())["count"] == 29
    assert observer.said == [f"{sentence} so far"] * 2


class CountScalars(TorchDispatchMode):
    """Counts the numbers that are read from tensors one by one: float(), int(), bool(), item()."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_device_is_waited_for_where_a_loss_is_logged_scored_or_kept_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same training on the CPU, which reads every loss; here the CPU stands for a device that is slow."""
    plain, seen = model(), Quiet()
    about = {"log_every": 5, "evaluate_every": 8, "save_every": 7, "max_steps": 12}
    plainly = Optimizer("SGD", momentum=0.9)  # AdamW counts its steps on the CPU, and reads that
    fit(plain, tmp_path / "plain", seen, optimizer=plainly, **about)
    monkeypatch.setattr(loop, "_waits", lambda device: True)
    reads, scalars = [], CountScalars()
    number, step = watch._numbers, loop.Loop.step
    inside = False  # a step, whose time is taken
    monkeypatch.setattr(watch, "_numbers", lambda values: reads.append((len(values), inside)) or number(values))

    def counted(self, at):  # type: ignore[no-untyped-def]
        nonlocal inside
        inside = True
        with scalars:
            read = step(self, at)
        inside = False
        return read

    monkeypatch.setattr(loop.Loop, "step", counted)
    waiting, observer = model(), Quiet()
    fit(waiting, tmp_path / "waiting", observer, optimizer=plainly, **about)
    assert reads[::2] == [(count, True) for count in (1, 4, 2, 1, 2, 2)]  # after steps 1, 5, 7, 8, 10 and 12
    assert scalars.count == 0
    assert observer.metrics == seen.metrics
    assert torch.equal(flattened(waiting), flattened(plain))

    rest, last, whole = {"log_every": 9, "max_steps": 6, "save_minutes": None}, model(), model()
    reads.clear()
    with pytest.raises(Interrupted, match="step 4 of 6"):
        fit(model(), tmp_path / "stopped", task=StopsIn("bars", None, calls=[], at=4), optimizer=plainly, **rest)  # type: ignore[arg-type]
    assert reads[::2] == [(1, True), (3, True)]
    fit(last, tmp_path / "stopped", optimizer=plainly, **rest)
    fit(whole, tmp_path / "whole", optimizer=plainly, **rest)
    assert torch.equal(flattened(last), flattened(whole))
    reads.clear()
    looks = iter(range(1000))  # a minute passes with each
    monkeypatch.setattr(loop.time, "monotonic", lambda: 60.0 * next(looks))
    fit(model(), tmp_path / "timed", optimizer=plainly, **rest | {"save_minutes": 2})
    assert reads[::2] == [(1, True), (2, True), (3, True)]  # after steps 1, 3 and 6


def test_losses_are_read_as_precisely_as_they_are_known() -> None:
    """Those of several processes are sums, Python's numbers; those of one are on its device, in float32."""
    losses = watch.Losses()
    losses.add(1, 0.1, 1 / 3, torch.tensor(2.0))
    losses.add(2, 0.2, torch.tensor(0.5), torch.tensor(3.0))
    assert losses.read() == [(1, 0.1, 1 / 3, 2.0), (2, 0.2, 0.5, 3.0)]
    assert losses.read() == []


def test_only_a_device_that_works_beside_this_process_is_waited_for() -> None:
    assert [loop._waits(torch.device(name)) for name in ("cpu", "cuda", "cuda:1", "mps")] == [False, True, True, True]


@dataclass(frozen=True)
class StopsIn(Bars):
    """Bars in whose step `at` a signal comes."""

    calls: list[int] = field(default_factory=list)
    at: int = 0

    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        self.calls.append(1)
        if len(self.calls) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(model, batch)


def test_a_loss_that_is_read_late_names_the_step_that_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what came after it is kept."""
    monkeypatch.setattr(loop, "_waits", lambda device: True)
    step = loop.Loop.gradients
    monkeypatch.setattr(
        loop.Loop, "gradients", lambda self, *about: step(self, *about) * (float("nan") if about[1].number == 5 else 1)
    )
    with pytest.raises(Diverged, match=r"step 5: the loss is nan .* last good checkpoint: .*step_0000004"):
        fit(model(), tmp_path, save_every=4, max_steps=12)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000004"]


def test_the_best_step_is_of_the_labelled_validation_set_where_there_is_one(tmp_path: Path) -> None:
    """Oracle: the loss of each step's parameters, by torch, on examples whose labels are turned round."""
    data, net, observer = splits(), model(), Quiet()
    table = data.validation.table
    turned = ArrayImages(table.images, 3 - table.labels)  # type: ignore[attr-defined]
    data = replace(data, labelled=Split(turned, data.validation.rows, Pixels8()))
    about = {"evaluate_every": 3, "select": "best", "max_steps": 9}
    result = fit(net, tmp_path, observer, data, **about)
    losses = {row["step"]: row["validation/loss"] for row in observer.metrics if "validation/loss" in row}
    assert result.selected_step == min(losses, key=losses.__getitem__)
    batch = next(iter(loader(data.labelled, iter([[(i, i) for i in range(5)]]), 0)))[0]  # type: ignore[arg-type]
    with torch.no_grad():
        expected = F.cross_entropy(net.eval()(batch["image"]), batch["label"]).item()
    assert min(losses.values()) == pytest.approx(expected, rel=0.01)  # Pixels8 adds a little noise
    fit(model(), tmp_path / "last", observer := Quiet(), data, **about | {"select": "last"})
    assert not [row for row in observer.metrics if "validation/loss" in row]  # which nothing asks for


class Shown(Source):
    """A source of one table, for every split."""

    def __init__(self, table: ArrayImages):
        self.table = table

    def open(self, split: str) -> ArrayImages:
        return self.table


class FourBars(Bars):
    def class_count(self) -> int:
        return 4


def test_few_shots_are_drawn_by_the_seed() -> None:
    """Oracle: few_shot with the budget's own numbers, of the rows that validation leaves."""
    images, labels = np.zeros((40, 4, 4), np.uint8), np.arange(40) % 4
    bars = FourBars("bars", Shown(ArrayImages(images, labels)), validation_size=4)
    rows = {seed: bars.splits(None, Budget(seed, shots=2)).train.rows for seed in (0, 1)}  # type: ignore[arg-type]
    left, _ = split_validation(40, 4, "bars")
    for seed, drawn in rows.items():
        assert drawn.tolist() == left[few_shot(labels[left], 2, seed)].tolist()
    assert rows[0].tolist() != rows[1].tolist()


class WithValidation(Shown):
    def available(self) -> Sequence[str]:
        return ["train", "validation", "test"]


def test_of_a_validation_split_as_many_are_scored_as_is_asked() -> None:
    """Oracle: subsample by the task's name; all of training is trained on."""
    table = ArrayImages(np.zeros((40, 4, 4), np.uint8), np.arange(40) % 4)
    parts = FourBars("bars", WithValidation(table), validation_size=7).splits(None, Budget(0))  # type: ignore[arg-type]
    assert parts.validation.rows.tolist() == subsample(40, 7, "bars").tolist() != subsample(40, 7, "x").tolist()
    assert parts.train.rows.tolist() == list(range(40))
