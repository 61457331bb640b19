"""Runs beside each other. Oracles: float64 formulas written out naively, numpy's decompositions, scipy's minimiser, and
what records and unadapted models say.
"""

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch import nn

import randlora
from conftest import REPOSITORY, settings
from letters import Letters, llama
from randlora.adapters.core import adapted_layers, require_adaptation
from randlora.errors import FINISHED, WRONG_SETTINGS, SettingsError
from randlora.experiment import Experiment
from randlora.finetune import keep_adapter
from randlora.methods import DoRA, IncreLoRA, LoRA, MELoRA, Method, NoLA, RandLoRA, RandLoRAa, SoRA, VeRA
from randlora.records import Result
from randlora.records.kept import first_at
from randlora.records.metrics import Row
from randlora.records.signature import signature
from randlora.run import run
from randlora.training import Trainer
from randlora.use.analysis_commands import forgetting_command
from randlora.use.approximate import Fit, _layer, errors, nearest, truncated
from randlora.use.cka import cka, gram_matrices, hsic
from randlora.use.figures import draw
from randlora.use.forgetting import forgetting, token_loss
from randlora.use.landscape import CLAMP, Grid, Plane, Surface, barriers, changed, landscape
from randlora.use.retention import SENTENCES
from randlora.use.sample import BASE, Sample, asked, batches
from randlora.use.trained import Trained

BF16 = ("task=digits", "task.test_size=16", "task.validation_size=8", "shots=1", "trainer.precision=bf16")
SHORT = ("trainer.batch_size=8", "task.test_size=16", "task.validation_size=8", "shots=1", "predictions=false")


def finished(root: Path, *overrides: str) -> Path:
    experiment = Experiment.from_config(settings(f"run_root={root}", *SHORT, *overrides))
    assert run(experiment, "as: given\n").code == FINISHED
    return experiment.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of clip_tiny on digits by three methods, with learning rates that take them far from where they began."""
    root = tmp_path_factory.mktemp("runs")
    steps = ("model=clip_tiny", "trainer.max_steps=2")
    return [
        finished(root, *steps, "method=full", "trainer.learning_rate=1e-3"),
        finished(root, *steps, "method=lora", "method.rank=4", "trainer.learning_rate=2e-2"),
        finished(root, *steps, "method=randlora", "method.rank=24", "trainer.learning_rate=2e-2"),
    ]


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("head"), "model=clip_tiny_vision", "trainer.max_steps=1")


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# CKA


def naive_hsic(K: np.ndarray, L: np.ndarray) -> float:
    """The estimator as a sum over distinct indices: (i, j) (i, j) - 2 (i, j) (i, q) + (i, j) (q, r), Song et al."""
    n = len(K)
    distinct = range(n)
    pairs = sum(K[i, j] * L[i, j] for i in distinct for j in distinct if i != j)
    triples = sum(K[i, j] * L[i, q] for i in distinct for j in distinct for q in distinct if len({i, j, q}) == 3)
    fours = sum(
        K[i, j] * L[q, r] for i in distinct for j in distinct for q in distinct for r in distinct
        if len({i, j, q, r}) == 4
    )  # fmt: skip
    return pairs / math.perm(n, 2) - 2 * triples / math.perm(n, 3) + fours / math.perm(n, 4)


def test_hsic_is_the_sum_over_distinct_indices() -> None:
    features = matrix(2, 7, 3), matrix(2, 7, 5, seed=1)
    K, L = (X @ X.mT for X in features)
    expected = [naive_hsic(K[b].numpy(), L[b].numpy()) for b in range(2)]
    assert hsic(K, L).tolist() == pytest.approx(expected, rel=1e-10)
    means = [np.mean([naive_hsic(A[b].numpy(), B[b].numpy()) for b in range(2)]) for A, B in ((K, L), (K, K), (L, L))]
    assert cka(K, L) == pytest.approx(means[0] / math.sqrt(means[1] * means[2]), rel=1e-10)


def test_cka_is_that_of_the_centred_features_when_examples_are_many() -> None:
    """Kornblith et al. (2019): ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features, which one large batch comes near to."""
    X = matrix(1000, 6) + 3
    Y = X[:, :4] @ matrix(4, 5, seed=1) + 0.5 * matrix(1000, 5, seed=2)
    x, y = ((Z - Z.mean(0)).numpy() for Z in (X, Y))
    expected = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert cka((X @ X.T)[None], (Y @ Y.T)[None]) == pytest.approx(expected, abs=5e-3)
    turned = X @ torch.linalg.qr(matrix(6, 6, seed=3))[0] * 7 - 2  # turned, stretched and moved
    assert cka((X @ X.T)[None], (turned @ turned.T)[None]) == pytest.approx(1, abs=1e-9)


def test_cka_is_torch_ckas() -> None:
    """Oracle: the package torch-cka (0.21), of three batches through two networks, in float32."""
    from torch_cka import CKA

    torch.manual_seed(0)
    one, other = (torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)) for _ in range(2))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(30, 6)), batch_size=10)
    peer = CKA(one, other, "one", "other", model1_layers=["0", "2"], model2_layers=["0", "2"])
    with torch.no_grad():
        peer.compare(loader, loader)
        seen = [[part(x).double() for part in (net[0], net) for (x,) in loader] for net in (one, other)]
    grams = [[torch.stack([x @ x.T for x in of_net[start : start + 3]]) for start in (0, 3)] for of_net in seen]
    ours = [[cka(K, L) for L in grams[1]] for K in grams[0]]
    torch.testing.assert_close(torch.tensor(ours), peer.export()["CKA"], atol=1e-4, rtol=0)
    assert len({round(value, 3) for row in ours for value in row}) == 4


def by_hand(subject: Trained, layer: str) -> torch.Tensor:
    """Gram matrices of the features of a layer of the merged model, of three batches of five images."""
    module, seen = randlora.merge(subject.backbone.module), []
    module.get_submodule(layer).register_forward_hook(lambda *call: seen.append(call[2].flatten(1).double()))
    with torch.no_grad():
        for batch in batches(subject, Sample(batch_size=5))[:3]:  # the last has one
            module.encode_image(batch["image"])
    return torch.stack([x @ x.T for x in seen])


def test_cka_of_runs_is_that_of_hooked_features(runs: list[Path], tmp_path: Path, program: Callable) -> None:
    """Features of one layer of the merged models, taken here by hand."""
    into, layer = tmp_path / "cka.csv", "visual.transformer.resblocks.3.mlp.c_fc"
    given = ["--batch", "5", "--figure", tmp_path / "cka.svg", "--into", into]
    assert program(REPOSITORY / "train.py", "cka", *runs, *given) == FINISHED
    rows = list(csv.DictReader(into.open()))
    assert {row["run"] for row in rows} == {"lora", "randlora", BASE}
    assert {row["against"] for row in rows} == {"full"}
    assert len(rows) == 3 * 18  # the image tower's layers; the text tower sees class names, not examples
    assert "randlora" in (tmp_path / "cka.svg").read_text()
    kept = [by_hand(Trained.load(folder), layer) for folder in runs[:2]]
    (said,) = [float(row["cka"]) for row in rows if row["run"] == "lora" and row["layer"] == layer]
    assert said == pytest.approx(cka(*kept), rel=1e-5)
    assert said < 0.9999


def test_padding_says_nothing() -> None:
    """The Gram matrix of a batch of texts is that of each text read by itself."""
    subject = language(LoRA(rank=2))
    texts = ["abc", "a longer one", "xy"]
    items = [{"input_ids": (ids := Letters()(text)["input_ids"]), "attention_mask": [1] * len(ids)} for text in texts]
    encoder = subject.experiment.task.encoder(subject.backbone, training=True)
    whole = encoder.collate([{**item, "labels": item["input_ids"]} for item in items])
    name = "model.layers.0.self_attn.q_proj"
    grams = gram_matrices(subject, [{**whole, "row": torch.arange(3)}], [name])[name][0]
    seen: list[torch.Tensor] = []
    hook = subject.backbone.module.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        for item in items:
            subject.backbone.module(torch.tensor([item["input_ids"]]))
    hook.remove()
    for i in range(3):
        for j in range(3):
            least = min(seen[i].shape[1], seen[j].shape[1])
            expected = (seen[i][0, :least].double() * seen[j][0, :least].double()).sum()
            assert grams[i, j].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


# Landscapes


def test_places_and_shares_of_a_plane() -> None:
    """The frame keeps distances and angles; a point's shares give it back."""
    a, b, c = matrix(3, 9)
    plane = Plane.through(*(float(v) for v in ((b - a) @ (b - a), (c - a) @ (c - a), (b - a) @ (c - a))))
    corners = torch.tensor(plane.corners, dtype=torch.float64)
    torch.testing.assert_close(torch.cdist(corners, corners), torch.cdist(*[torch.stack([a, b, c])] * 2))
    for x, y in [*plane.corners, (0.3, -0.7)]:
        alpha, beta, gamma = plane.shares(x, y)
        assert alpha + beta + gamma == pytest.approx(1)
        point = alpha * a + beta * b + gamma * c
        assert (point - a).norm().item() == pytest.approx(math.hypot(x, y))
    with pytest.raises(SettingsError, match="lie on one line"):
        Plane.through(4.0, 9.0, 6.0)


def test_corners_are_the_models_losses_and_the_plane_is_between(runs: list[Path], tmp_path: Path) -> None:
    rows = landscape(runs, Grid(points=3, margin=0.5, steps=3), Sample("test"))
    parts = {part: [row for row in rows if row["part"] == part] for part in ("model", "line", "plane")}
    recorded = [Result.read(folder / "result.json").metrics["test/loss"] for folder in runs]
    assert [row["loss"] for row in parts["model"]] == pytest.approx(recorded, rel=1e-5)
    assert len({round(loss, 3) for loss in recorded}) == 3
    assert len(parts["line"]) == len(parts["plane"]) == 9
    ends = {(row["run"], row["to"], row["t"]): row["loss"] for row in parts["line"]}
    assert [ends["full", "lora", 0.0], ends["lora", "randlora", 1.0]] == pytest.approx([recorded[0], recorded[2]])
    # A point in the middle of a line, by the state dicts of plain merged models.
    states = []
    for folder in runs[:2]:
        subject = Trained.load(folder)
        randlora.merge(subject.backbone.module)
        states.append({name: tensor.double() for name, tensor in subject.bound.model.state_dict().items()})
    plain = Trained.before(runs[0], True)
    middle = {name: (0.5 * (states[0][name] + states[1][name])) for name in states[0]}
    plain.bound.model.load_state_dict(middle)
    total = 0.0
    with asked(plain) as model:
        for batch in batches(plain, Sample("test")):
            logits = model(batch["image"]).double()
            total += nn.functional.cross_entropy(logits, batch["label"], reduction="sum").item()
    assert ends["full", "lora", 0.5] == pytest.approx(total / 16, rel=1e-5)
    # The plane is sampled where its rows say it is: its distances are those of the weights.
    distance = math.sqrt(sum((states[0][n] - states[1][n]).square().sum().item() for n in states[0]))
    assert parts["model"][1]["x"] == pytest.approx(distance, rel=1e-6)
    heights = barriers(rows)
    line = [ends["full", "lora", t] for t in (0.0, 0.5, 1.0)]
    assert heights["full", "lora"] == pytest.approx(max(0.0, line[1] - (line[0] + line[2]) / 2))
    draw(rows, tmp_path / "a.svg", tmp_path / "b.png", tmp_path / "c.pdf")
    assert f"at most {CLAMP * max(recorded):.2f}" in (tmp_path / "a.svg").read_text()


def test_two_runs_have_a_line_and_a_head_is_interpolated(with_head: Path) -> None:
    subject = Trained.load(with_head, data=True)
    weights = changed(subject)
    doubled = {name: 3 * tensor if name.startswith(":") else tensor for name, tensor in weights.items()}
    plain = Trained.before(with_head, True)
    examples = batches(plain, Sample("test"))
    randlora.adapters.attention.unfuse_attention(plain.backbone.module)
    with asked(plain):
        loss = Surface(plain, [weights, doubled], examples).loss((0.5, 0.5))
    with torch.no_grad():  # twice the head's weights are twice the logits
        logits = [2 * subject.bound.model(batch["image"]) for batch in examples]
    expected = nn.functional.cross_entropy(torch.cat(logits), torch.cat([batch["label"] for batch in examples]))
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_autocast_sees_the_weights_of_every_point(runs: list[Path]) -> None:
    """It keeps weights in bfloat16 while it is on; each corner's loss is that of a model that is asked by itself."""
    alone = []
    for folder in runs[1:]:  # which have trained nothing but what autocast keeps
        subject = Trained.load(folder, data=True, overrides=BF16)
        examples = batches(subject, Sample("test"))
        with asked(subject) as model:
            alone.append(subject.experiment.task.loss(model, examples[0]).item())
    rows = landscape(runs[1:], Grid(steps=2), Sample("test"), overrides=BF16)
    corners = [row["loss"] for row in rows if row["part"] == "model"]
    assert corners == pytest.approx(alone, rel=1e-5)
    assert abs(corners[0] - corners[1]) > 1e-3


# Approximation


def svd_error(target: torch.Tensor, rank: int) -> float:
    values = np.linalg.svd(target.numpy(), compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))


def test_lora_is_the_truncated_decomposition() -> None:
    weight, target = matrix(30, 20), matrix(30, 20, seed=1)
    (row,) = errors("a", weight, target, {"lora": LoRA()}, 5 * 50)
    assert (row["setting"], row["parameters"], row["settled"]) == ("method.rank=5", 250, True)
    assert row["error"] == pytest.approx(svd_error(target, 5), abs=1e-6)


@pytest.mark.parametrize(
    ("method", "rank"),
    [(SoRA(rank=5), 5), (NoLA(rank=3, num_bases=200), 3), (RandLoRAa(rank=4, num_bases=40), 4)],
    ids=lambda value: type(value).__name__,
)
def test_methods_that_reach_every_matrix_of_a_rank_find_the_nearest(method: Method, rank: int) -> None:
    """By L-BFGS and by least squares in turn: within 1e-4 of what Eckart and Young say."""
    weight, target = matrix(30, 20), matrix(30, 20, seed=1)
    fitted = nearest(weight, target, method, Fit(tolerance=1e-7, rounds=2000))
    error = ((fitted.delta - target).norm() / target.norm()).item()
    assert fitted.settled
    assert error == pytest.approx(svd_error(target, rank), abs=1e-4)


def test_blocks_of_melora_are_decomposed_each() -> None:
    weight, target = matrix(24, 16), matrix(24, 16, seed=1)
    fitted = nearest(weight, target, MELoRA(parts=2, rank=2), Fit(tolerance=1e-7, rounds=2000, restarts=2))
    blocks = [target[:12, :8], target[12:, 8:]]
    best = sum((truncated(block, 2) - block).square().sum() - block.square().sum() for block in blocks)
    expected = (target.square().sum() + best).sqrt() / target.norm()
    assert ((fitted.delta - target).norm() / target.norm()).item() == pytest.approx(expected.item(), abs=1e-4)


FOUND_AGAIN = [
    RandLoRA(rank=3), RandLoRA(rank=3, basis="kronecker"), RandLoRA(rank=4, num_bases=3),
    RandLoRAa(rank=5, num_bases=3), VeRA(rank=30), NoLA(rank=1, num_bases=6), NoLA(num_bases=10, start="ones"),
    DoRA(rank=1),
]  # fmt: skip


@pytest.mark.parametrize("shape", [(20, 14), (14, 20)], ids=["tall", "wide"])
@pytest.mark.parametrize("method", FOUND_AGAIN, ids=lambda method: method.name)
def test_an_update_of_the_method_itself_is_found_again(method: Method, shape: tuple[int, int]) -> None:
    """From random parameters, by the method's own `delta`: the error is none, though the search begins elsewhere."""
    weight = matrix(*shape).float()
    layer = _layer(weight)
    randlora.adapt(layer, method, ["site"], seed=0)
    (update,) = require_adaptation(layer).updates.values()
    with torch.no_grad():
        for number, parameter in enumerate(update.parameters()):
            parameter.copy_(matrix(*parameter.shape, seed=50 + number))
        target = update.delta(weight).double()
    fitted = nearest(weight, target, method, Fit(tolerance=1e-4, rounds=1000, restarts=4))
    assert ((fitted.delta - target).norm() / target.norm()).item() < 1e-4


def test_randlora_comes_as_near_as_scipy() -> None:
    """On a matrix that it cannot reach: the best of several starts of scipy's minimiser on the formula of the paper."""
    method, shape, n = RandLoRA(rank=4), (12, 8), 2
    target = matrix(*shape, seed=1)
    layer = _layer(torch.zeros(shape))
    randlora.adapt(layer, method, ["site"], seed=0)
    (update,) = require_adaptation(layer).updates.values()
    fixed = update.fixed()
    A, B = fixed.A.double(), fixed.B.matrix(torch.float64)

    def squares(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.tensor(parameters, requires_grad=True)
        lambda_, gamma = flat[: n * 4].view(n, 4), flat[n * 4 :].view(n, 8)
        blocks = (B[:, 4 * j : 4 * j + 4] @ lambda_[j].diag() @ A @ gamma[j].diag() for j in range(n))
        loss = (fixed.scale * sum(blocks) - target).square().sum()
        loss.backward()
        return loss.item(), flat.grad.numpy()

    starts = np.random.default_rng(0).normal(size=(6, n * 12))
    best = min(minimize(squares, start, jac=True, options={"maxiter": 1000}).fun for start in starts)
    fitted = nearest(torch.zeros(shape), target, method, Fit(tolerance=1e-7, rounds=2000, restarts=7))
    assert (fitted.delta - target).square().sum().item() == pytest.approx(best, rel=1e-3)


def test_many_unknowns_are_left_to_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways end at the same error."""
    weight, target = matrix(12, 8), matrix(12, 8, seed=1)
    fit = Fit(tolerance=1e-7, rounds=1000, restarts=3)
    solved = nearest(weight, target, VeRA(rank=20), fit)
    monkeypatch.setattr("randlora.use.solvers.UNKNOWNS", 10)
    descended = nearest(weight, target, VeRA(rank=20), fit)
    near, nearer = ((one.delta - target).norm().item() for one in (descended, solved))
    assert near == pytest.approx(nearer, rel=0.02)


def test_the_command_approximates_a_runs_updates(runs: list[Path], tmp_path: Path, program: Callable) -> None:
    into = tmp_path / "errors.jsonl"
    given = [
        "--sites",
        "*visual*.5.mlp.c_fc",
        "--ranks",
        "2",
        "4",
        "--method",
        "lora",
        "--method",
        "nola rank=1",
        "--random",
    ]
    arguments = [runs[0], *given, "--into", into, "--figure", tmp_path / "errors.png"]
    assert program(REPOSITORY / "train.py", "approximate", *arguments) == FINISHED
    rows = [json.loads(line) for line in into.read_text().splitlines()]
    assert [(row["method"], row["of"], row["budget"]) for row in rows] == [
        (method, of, rank * 960) for of in ("full", "random") for rank in (2, 4) for method in ("lora", "nola rank=1")
    ]
    subject, plain = Trained.load(runs[0]), Trained.before(runs[0])
    randlora.merge(subject.backbone.module)
    name = "visual.transformer.resblocks.5.mlp.c_fc.weight"
    states = (one.backbone.module.state_dict()[name].double() for one in (subject, plain))
    delta = next(states) - next(states)
    assert rows[0]["error"] == pytest.approx(svd_error(delta, 2), abs=1e-4)
    assert (tmp_path / "errors.png").stat().st_size > 1000


# Forgetting


def language(method: Method) -> Trained:
    backbone = llama()
    randlora.adapt(backbone.module, method, ["*.q_proj", "*.v_proj"])
    experiment = Experiment.from_config(
        settings("model=smollm2_135m", "task=e2e_nlg", "trainer.precision=fp32", "dry_run=true")
    )
    bound = experiment.task.bind(backbone)
    with torch.no_grad():
        for tensor in bound.trained().values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return Trained(experiment, backbone, bound)


def test_token_loss_is_that_of_each_text_by_itself() -> None:
    """By transformers' own loss on the merged model, weighted by tokens."""
    subject = language(LoRA(rank=2))
    texts = ["The sun rises.", "A week has seven days, and a year twelve months.", "x"]
    said = token_loss(subject, texts, batch_size=2)
    model = randlora.merge(subject.backbone.module)
    total, count = 0.0, 0
    for text in texts[:2]:  # a single token predicts nothing
        ids = torch.tensor([Letters()(text)["input_ids"]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert said == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(SettingsError, match="nothing to predict"):
        token_loss(subject, ["x"])


def test_a_language_model_is_asked_about_sentences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rows are of the models before and after; stand-ins are loaded in place of a run of a real one."""
    after, before = language(LoRA(rank=2)), language(LoRA(rank=2))
    randlora.adapters.core.unload(before.backbone.module)
    monkeypatch.setattr("randlora.use.forgetting.named", lambda folders: {"lora": folders[0]})
    monkeypatch.setattr("randlora.use.forgetting.experiment_of", lambda *_, **__: after.experiment)
    monkeypatch.setattr(Trained, "load", lambda *_, **__: after)
    monkeypatch.setattr(Trained, "before", lambda *_, **__: before)
    (row,) = forgetting([tmp_path])
    assert (row["on"], row["metric"]) == ("retention", "token_loss")
    assert row["before"] == pytest.approx(token_loss(before, SENTENCES))
    assert row["change"] == pytest.approx(token_loss(after, SENTENCES) - row["before"])
    assert abs(row["change"]) > 1e-3
    assert row["relative_norm"] > 0
    (other,) = forgetting([tmp_path], texts=["abc"])
    assert (other["on"], other["before"]) == ("texts", pytest.approx(token_loss(before, ["abc"])))
    draw([row, other], tmp_path / "figure.svg")


def test_clip_is_scored_on_another_task(runs: list[Path], tmp_path: Path, program: Callable) -> None:
    """On their own data by another name; open_clip's features say the score before, the merged weights the norms."""
    into = tmp_path / "forgotten.jsonl"
    other = ["task=digits", "task.name=other", "task.test_size=16"]
    assert program(REPOSITORY / "train.py", "forgetting", *runs[1:], *other, "--into", into) == FINISHED
    rows = [json.loads(line) for line in into.read_text().splitlines()]
    assert [row["run"] for row in rows] == ["lora", "randlora"]
    assert {(row["on"], row["metric"]) for row in rows} == {("other", "accuracy")}
    subject, plain = Trained.load(runs[1]), Trained.before(runs[1], True, other)
    clip, images = plain.backbone.module, batches(plain, Sample("test"))
    with torch.no_grad():
        names = plain.experiment.task.names()
        texts = clip.encode_text(plain.backbone.tokenizer()([f"An image of {name}" for name in names]))
        likest = [(clip.encode_image(batch["image"]) @ nn.functional.normalize(texts).T).argmax(-1) for batch in images]
    right = torch.cat(likest) == torch.cat([batch["label"] for batch in images])
    for row in rows:
        assert row["before"] == right.float().mean().item()
        assert row["change"] == row["after"] - row["before"]
    names = [f"{name}.weight" for name in adapted_layers(subject.backbone.module)]
    merged, unfused = randlora.merge(subject.backbone.module).state_dict(), plain.backbone.module.state_dict()
    names = [name.replace("in_proj.weight", "in_proj_weight") for name in names]
    norms = [((merged[name] - unfused[name]).norm() / unfused[name].norm()).item() for name in names]
    assert rows[0]["relative_norm"] == pytest.approx(np.mean(norms), rel=1e-4)


def test_a_run_is_asked_where_it_first_reached_a_score(
    tmp_path: Path, program: Callable, capsys: pytest.CaptureFixture
) -> None:
    """Oracle: a run that ended there, and the norm that it logged; the validation scores are written by hand."""
    of_both = ("model=clip_tiny", "method=lora", "trainer.learning_rate=2e-2", "trainer.schedule=constant")
    kept = ("trainer.evaluate_every=1", "trainer.keep_adapters=true")
    folder = finished(tmp_path / "kept", *of_both, *kept, "trainer.max_steps=2")
    ended = finished(tmp_path / "ended", *of_both, "trainer.evaluate_every=1", "trainer.max_steps=1")
    first = folder / "adapters" / "step_0000001"
    tensors, expected_tensors = (load_file(path / "adapter.safetensors") for path in (first, ended / "adapter"))
    assert all(torch.equal(tensors[name], expected_tensors[name]) for name in expected_tensors)
    config = Result.read(folder / "result.json").config
    assert signature(config) == signature(config | {"trainer": {**config["trainer"], "keep_adapters": False}})
    rows = (Row(step, 0.0, {"validation/accuracy": score}) for step, score in enumerate((0.5, 0.4), 1))
    (folder / "metrics.jsonl").write_text("".join(row.line() for row in rows))
    other, into = ["task=digits", "task.name=other", "task.test_size=16"], tmp_path / "rows.jsonl"
    asked = ["forgetting", folder, *other, "--at-score", "0.4", "0.6", "--into", into]
    assert program(REPOSITORY / "train.py", *asked) == FINISHED
    reached, never = (json.loads(line) for line in into.read_text().splitlines())
    norm = Row.of((ended / "metrics.jsonl").read_text().splitlines()[-1]).metrics["update/relative_norm_mean"]
    assert reached["relative_norm"] == pytest.approx(norm, rel=1e-5)
    assert (reached["method"], reached["arm"], reached["seed"]) == ("lora", "lora", 0)
    assert reached["change"] == reached["after"] - reached["before"]
    assert (reached["at_score"], reached["step"], reached["validation"]) == (0.4, 1, 0.5)
    assert (never["step"], never["validation"], never["after"], never["change"]) == (1, 0.5, None, None)
    assert "lora: never reaches 0.6; its best is 0.5, at step 1" in capsys.readouterr().err
    shutil.rmtree(first)
    with pytest.raises(SettingsError, match=r"reaches 0.4 at step 1, whose adapter was not kept"):
        first_at(folder, 0.4)
    (folder / "metrics.jsonl").write_text(Row(2, 0.0, {"validation/accuracy": 0.5}).line())
    assert first_at(folder, 0.4) == (2, 0.5, folder / "adapter")
    losses = (Row(step, 0.0, {"validation/loss": loss}) for step, loss in enumerate((3.0, 1.5, 2.0), 1))
    (folder / "metrics.jsonl").write_text("".join(row.line() for row in losses))
    assert first_at(folder, 1.6, "loss") == (2, 1.5, folder / "adapter")
    assert first_at(folder, 1.4, "loss") == (2, 1.5, None)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(SettingsError, match=r"no validation/accuracy; run it with trainer\.evaluate_every$"):
        first_at(folder, 0.4)
    with pytest.raises(SettingsError, match=r"no validation/loss; .* and trainer\.select=best$"):
        first_at(folder, 0.4, "loss")
    with pytest.raises(SettingsError, match="--by loss: it says what --at-score is of"):
        forgetting_command([str(folder), "--by", "loss"])
    with pytest.raises(SettingsError, match=r"keep_adapters=true: give trainer\.evaluate_every"):
        Trainer(keep_adapters=True)


@pytest.mark.parametrize("method", [SoRA(rank=4), IncreLoRA(rank=4), RandLoRA(rank=4)])
def test_an_adapter_on_the_way_is_as_if_it_ended_there(method: Method, tmp_path: Path) -> None:
    """Of methods that change at their end, too; the training goes on with what it had."""
    subject = language(method)
    adaptation = require_adaptation(subject.backbone.module)
    names, words = set(adaptation.saved()), torch.arange(12)[None]
    with torch.no_grad():
        expected = subject.backbone.module.eval()(words).logits
    keep_adapter(subject.backbone, subject.bound, tmp_path / "kept")
    assert (adaptation.method, set(adaptation.saved())) == (method, names)
    fresh = llama().module.eval()
    randlora.load_adapter(fresh, tmp_path / "kept")
    with torch.no_grad():
        torch.testing.assert_close(fresh(words).logits, expected)


def test_what_cannot_be_asked_is_refused(
    runs: list[Path], with_head: Path, tmp_path: Path, program: Callable, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "texts.txt").write_text("\n")
    for arguments, said in (
        (["cka", *runs, "--batch", "3"], "batch_size=3: unbiased HSIC needs 4 examples a batch or more"),
        (["cka", *runs, "--batch", "64"], "there are fewer examples than that"),
        (["cka", *runs, "--layers", "none"], "layers=none: no module has such a name"),
        (["cka", runs[0], with_head], "its model is clip_tiny_vision, and that of"),
        (["cka", runs[0], runs[0]], "a run is given twice"),
        (["cka", tmp_path], "is not the folder of a run"),
        (["cka", "task=digits"], "give the folder of a run first"),
        (["landscape", runs[0]], "1 runs: give two for a line, or three"),
        (["landscape", *runs, "--points", "1"], "Grid.points=1: must be a whole number of at least 2"),
        (
            ["landscape", *runs, "--figure", tmp_path / "a.txt"],
            "--figure .*a.txt: name a .svg or a .png or a .pdf file",
        ),
        (["approximate", runs[0], "--sites", "none"], "--sites none: no site has such a name"),
        (["approximate", runs[0], "--method", "full"], "full has no setting that chooses how much is trained"),
        (["approximate", runs[0], "--method", "lorra"], "lorra"),
        (["forgetting", runs[0]], "model clip_tiny gives no probability to texts: name a task"),
        (["forgetting", runs[0], "task=digits"], "task=digits: the runs were trained on it"),
        (["forgetting", with_head, "task=digits", "task.name=other"], "puts a head on clip_tiny_vision"),
        (["forgetting", runs[0], "--texts", tmp_path / "none"], "there is no such file"),
    ):
        assert program(REPOSITORY / "train.py", *arguments) == WRONG_SETTINGS, arguments
        line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert re.search(said, line), line
    with pytest.raises(SettingsError, match="these rows have no figure"):
        draw([{"a": 1}], tmp_path / "a.svg")
