"""The loop against an independent one: `reference_trainer`, with each update's formula written out, in float64."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import reference_trainer
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import randlora
from randlora.adapters.core import require_adaptation
from randlora.data.loader import Encoder, Split
from randlora.data.sources import Source
from randlora.methods import DoRA, FullFineTuning, LoRA, Method, NoLA, RandLoRA, RandLoRAa, VeRA
from randlora.tasks.base import Bound, Splits, Task
from randlora.training import Optimizer, Trainer

SHAPES = {"first": (20, 12), "last": (8, 20)}  # out × in: one update is tall, one is wide
STEPS, BATCH = 20, 6


class Rows:
    """Examples of the regression as a Table."""

    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (12, 8))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}

    def column(self, name: str) -> np.ndarray:
        return {"x": self.x, "y": self.y}[name].numpy()


class AsTheyAre(Encoder):
    def __call__(self, example):  # type: ignore[no-untyped-def]
        return example


@dataclass(frozen=True)
class Regression(Task):
    """Least squares; it notes every micro-batch that it is given, so that the reference sees the same ones."""

    kinds: ClassVar[tuple[str, ...]] = ("vision",)
    headline = "loss"
    source: Source | None = None  # type: ignore[assignment]  # its splits are given
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def bind(self, backbone: Any) -> Bound:
        raise AssertionError("the test binds")

    encoder = bind

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.seen.append((batch["x"], batch["y"]))
        return F.mse_loss(model(batch["x"]), batch["y"])

    def predict(self, model: nn.Module, batch: Any) -> dict[str, list]:
        return {"loss": F.mse_loss(model(batch["x"]), batch["y"], reduction="none").mean(1).tolist()}

    def score(self, columns: Any) -> dict[str, float]:
        return {"loss": float(np.mean(columns["loss"]))}


class Silent:
    """Hears all and says nothing."""

    def begin(self, log: Sequence[str]) -> None: ...

    def logged(self) -> Sequence[str]:
        return ()

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def say(self, text: str) -> None: ...

    def progress(self, step: int, steps: int, text: str) -> None: ...


# W' of one site from its frozen weight, its trained tensors and its fixed matrices: the papers' equations, alpha = 2r.


def lora(W: Tensor, p: dict[str, Tensor], update: Any) -> Tensor:
    return W + 2 * p["B"] @ p["A"]


def dora(W: Tensor, p: dict[str, Tensor], update: Any) -> Tensor:
    V = W + 2 * p["low_rank.B"] @ p["low_rank.A"]
    return (p["magnitude"] / V.norm(dim=1).detach())[:, None] * V  # the norm is a constant in backward (section 4.3)


def vera(W: Tensor, p: dict[str, Tensor], update: Any) -> Tensor:
    A, B = update.basis_A.matrix.double()[:, : W.shape[1]], update.basis_B.matrix.double()[: W.shape[0]]
    scale = math.sqrt(2 / W.shape[1]) * math.sqrt(2 / len(p["d"]))  # Kaiming's deviations of A and B
    return W + scale * p["b"][:, None] * B @ (p["d"][:, None] * A)


def randlora_sum(W: Tensor, p: dict[str, Tensor], update: Any) -> Tensor:
    (n, r), small, large = p["lambda_"].shape, min(W.shape), max(W.shape)
    A, B = update.basis_A.matrix.double()[:, :small], update.basis_B.matrix.double()[:large]
    terms = [B[:, j * r : (j + 1) * r] @ p["lambda_"][j].diag() @ A @ p["gamma"][j].diag() for j in range(n)]
    delta = 2 * torch.stack(terms).sum(0)
    return W + (delta if W.shape[0] >= W.shape[1] else delta.T)


def randlora_a(W: Tensor, p: dict[str, Tensor], update: Any) -> Tensor:
    (n, r), small, large = p["lambda_"].shape, min(W.shape), max(W.shape)
    A = update.basis_A.matrix.double()[:small, : n * r].view(small, n, r)
    B = update.basis_B.matrix.double()[:large, : n * r].view(large, n, r)
    left = sum(B[:, j] @ p["lambda_"][j].diag() for j in range(n))
    right = sum(A[:, j].T @ p["gamma"][j].diag() for j in range(n))
    return W + (2 * left @ right if W.shape[0] >= W.shape[1] else (2 * left @ right).T)


def nola(W: Tensor, p: dict[str, Tensor], update: Any) -> Tensor:
    (out, into), n, r = W.shape, len(p["alpha"]), 2
    A = update.bank_A.matrix.double()[:, : r * into].view(n, r, into)
    B = update.bank_B.matrix.double()[:, : r * out].view(n, out, r)
    fixed_A = update.fixed_A.matrix.double() / math.sqrt(3 * into)
    combined_A = fixed_A + sum(p["alpha"][j] * A[j] for j in range(n)) / math.sqrt(3 * n)
    combined_B = sum(p["beta"][j] * B[j] for j in range(n)) / math.sqrt(3 * n)
    return W + 2 * combined_B @ combined_A


def full(W: Tensor, p: dict[str, Tensor], update: Any) -> Tensor:
    return p["weight"]


METHODS: list[tuple[Method, Callable[[Tensor, dict[str, Tensor], Any], Tensor]]] = [
    (LoRA(rank=3), lora),
    (DoRA(rank=3), dora),
    (VeRA(rank=5), vera),
    (NoLA(rank=2, num_bases=7), nola),
    (RandLoRA(rank=5), randlora_sum),
    (RandLoRA(rank=4, num_bases="floor", zero="gamma"), randlora_sum),
    (RandLoRAa(rank=3, num_bases=4), randlora_a),
    (FullFineTuning(train="targets"), full),
]
SETTINGS = {
    "cosine with warm-up": {"schedule": "cosine", "warmup": 3, "final_rate": 0.1},
    "linear, micro-batches": {"schedule": "linear", "warmup": 0.1, "final_rate": 0.0, "micro_batch_size": 4},
    "constant, clipped": {"schedule": "constant", "max_grad_norm": 0.02},
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize(("method", "formula"), METHODS, ids=[formula.__name__ for _, formula in METHODS])
def test_twenty_steps_equal_the_reference(method: Method, formula: Any, case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(first=nn.Linear(12, 20), bend=nn.Tanh(), last=nn.Linear(20, 8)),
    )
    randlora.adapt(model, method, ["first", "last"])
    model.double()
    adaptation = require_adaptation(model)
    for name, update in adaptation.updates.items():
        if isinstance(method, DoRA):  # which keeps ‖W0‖² in float32
            update.squares = getattr(model, name).weight.square().sum(1)
    start = {name: value.detach().clone() for name, value in adaptation.trained().items()}
    frozen = {name: (getattr(model, name).weight.clone(), getattr(model, name).bias.clone()) for name in SHAPES}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        for name in SHAPES:
            own = {key.partition(":")[2]: p for key, p in parameters.items() if key.startswith(f"{name}:")}
            W, bias = frozen[name]
            x = x @ formula(W, own, adaptation.updates[name]).T + bias
            x = torch.tanh(x) if name == "first" else x
        return (x - y).square().mean()

    task = Regression(name="regression")
    table, settings = Rows(26), SETTINGS[case]
    split = Split(table, np.arange(26), AsTheyAre())
    trainer = Trainer(
        max_steps=STEPS, batch_size=BATCH, learning_rate=0.02, weight_decay=0.3, device="cpu",
        **({"max_grad_norm": None} | settings),  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit(
        task, Bound(model), Splits(split, split, split), seed=3, folder=tmp_path, observer=Silent(),
        accelerator=Accelerator(cpu=True), optimizer=Optimizer("AdamW", betas=[0.8, 0.95], eps=1e-7),
    )  # fmt: skip

    parts = math.ceil(BATCH / settings.get("micro_batch_size", BATCH))  # type: ignore[call-overload]
    steps = [task.seen[i : i + parts] for i in range(0, len(task.seen), parts)]
    assert len(steps) == STEPS
    assert all(sum(len(x) for x, _ in step) == BATCH for step in steps)
    expected = reference_trainer.train(
        start, loss, steps, rate=0.02, weight_decay=0.3, betas=(0.8, 0.95), epsilon=1e-7,
        max_norm=settings.get("max_grad_norm", math.inf), schedule=settings["schedule"],
        warmup={0.1: 2}.get(settings.get("warmup", 0), settings.get("warmup", 0)),
        final=settings.get("final_rate", 0.01),
    )  # fmt: skip
    for name, value in adaptation.trained().items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-10, atol=1e-10, msg=name)


class ByHand(Silent):
    """Notes each validation score beside what LoRA's equation gives on the validation and on the test rows."""

    def __init__(self, model: nn.Module, parts: dict[str, tuple[Tensor, Tensor]]):
        self.updates, self.parts = require_adaptation(model).updates, parts
        self.frozen = [(getattr(model, name).weight.clone(), getattr(model, name).bias.clone()) for name in SHAPES]
        self.scored: dict[int, float] = {}
        self.expected: dict[int, dict[str, float]] = {}

    @torch.no_grad()
    def log(self, metrics: dict[str, float], step: int) -> None:
        if "validation/loss" not in metrics:
            return
        (W1, b1), (W2, b2) = self.frozen
        V1, V2 = (W + 2 * self.updates[name].B @ self.updates[name].A for name, W in zip(SHAPES, (W1, W2), strict=True))
        self.scored[step] = metrics["validation/loss"]
        self.expected[step] = {
            part: ((torch.tanh(x @ V1.T + b1) @ V2.T + b2 - y) ** 2).mean().item()
            for part, (x, y) in self.parts.items()
        }


def test_validation_is_scored_on_the_validation_split_while_training(tmp_path: Path) -> None:
    """The test rows are the training rows, on which the best step is the last; the validation rows are others."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(first=nn.Linear(12, 20), bend=nn.Tanh(), last=nn.Linear(20, 8)))
    randlora.adapt(model, LoRA(rank=3), ["first", "last"])
    model.double()
    table, train, held = Rows(26), np.arange(18), np.arange(18, 26)
    listener = ByHand(model, {"validation": (table.x[18:], table.y[18:]), "test": (table.x[:18], table.y[:18])})
    trained, validation = Split(table, train, AsTheyAre()), Split(table, held, AsTheyAre())
    trainer = Trainer(
        max_steps=STEPS, batch_size=18, learning_rate=0.05, schedule="constant", evaluate_every=1, select="best",
        evaluation_batch_size=5, device="cpu",
    )  # fmt: skip
    fit = trainer.fit(
        Regression(name="regression"), Bound(model), Splits(trained, validation, trained),
        seed=3, folder=tmp_path, observer=listener, accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    assert [*listener.scored] == [*range(1, STEPS + 1)]
    losses = {part: [at[part] for at in listener.expected.values()] for part in ("validation", "test")}
    assert [*listener.scored.values()] == pytest.approx(losses["validation"], rel=1e-6)
    best = {part: 1 + int(np.argmin(values)) for part, values in losses.items()}
    assert best["validation"] < best["test"] == STEPS
    assert fit.selected_step == best["validation"]


class WithLoss(nn.Module):
    """As transformers' Trainer wants a model: the loss comes out of forward."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(self.net(x), y)}


def test_lora_trains_as_in_transformers_trainer_with_peft(tmp_path: Path) -> None:
    """Oracle: transformers' Trainer on PEFT's LoRA, given the same start and the same micro-batches in order."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    ours = nn.Sequential(OrderedDict(first=nn.Linear(12, 20), bend=nn.Tanh(), last=nn.Linear(20, 8)))
    plain = WithLoss(copy.deepcopy(ours))
    randlora.adapt(ours, LoRA(rank=3, alpha=5), ["first", "last"])
    updates = require_adaptation(ours).updates
    theirs: Any = get_peft_model(plain, LoraConfig(r=3, lora_alpha=5, target_modules=["first", "last"]))  # type: ignore[arg-type]
    layers = {name: getattr(theirs.base_model.model.net, name) for name in SHAPES}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(updates[name].A)
            layer.lora_B["default"].weight.copy_(updates[name].B)

    table = Rows(24)
    table.x, table.y = table.x.float(), table.y.float()
    task = Regression(name="regression")
    split = Split(table, np.arange(24), AsTheyAre())
    trainer = Trainer(
        max_steps=STEPS, batch_size=BATCH, micro_batch_size=3, learning_rate=0.02, weight_decay=0.3, schedule="linear",
        final_rate=0.0, max_grad_norm=0.05, device="cpu",
    )  # fmt: skip
    trainer.fit(
        task, Bound(ours), Splits(split, split, split), seed=3, folder=tmp_path, observer=Silent(),
        accelerator=Accelerator(cpu=True), optimizer=Optimizer("AdamW", betas=[0.8, 0.95]),
    )  # fmt: skip

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    examples = [{"x": x[i], "y": y[i]} for x, y in task.seen for i in range(len(x))]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "theirs"), max_steps=STEPS, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        learning_rate=0.02, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, max_grad_norm=0.05,
        lr_scheduler_type="linear", warmup_steps=0, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
        logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    InOrder(theirs, arguments, train_dataset=examples).train()  # type: ignore[arg-type]
    for name, layer in layers.items():
        assert updates[name].B.abs().max() > 0.01
        torch.testing.assert_close(updates[name].A, layer.lora_A["default"].weight, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(updates[name].B, layer.lora_B["default"].weight, rtol=1e-6, atol=1e-6)
