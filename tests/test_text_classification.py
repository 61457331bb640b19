"""GLUE: scores, padding and refusals."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn

from conftest import settings, task
from letters import Letters
from randlora.config import build
from randlora.data.texts import pad
from randlora.errors import SettingsError
from randlora.models.base import Backbone


@pytest.mark.parametrize(
    ("name", "oracles"),
    [
        ("mrpc", {"accuracy": accuracy_score, "f1": f1_score}),
        ("rte", {"accuracy": accuracy_score}),
        ("cola", {"matthews": matthews_corrcoef, "accuracy": accuracy_score}),
        ("sst2", {"accuracy": accuracy_score}),
        ("stsb", {"pearson": lambda y, p: pearsonr(y, p)[0], "spearman": lambda y, p: spearmanr(y, p)[0]}),
    ],
)
def test_glue_scores_are_the_official_metrics(name: str, oracles: dict) -> None:
    """Oracle: scikit-learn and SciPy, as GLUE's own script."""
    glue, rng = task(name), np.random.default_rng(0)
    label, predicted = rng.integers(0, 2, 50).tolist(), rng.integers(0, 2, 50).tolist()
    if name == "stsb":
        label, predicted = rng.uniform(0, 5, 50).tolist(), rng.uniform(0, 5, 50).tolist()
    scores = glue.score({"label": [float(y) for y in label], "predicted": predicted, "loss": [1.0] * 50})
    assert glue.headline == next(iter(oracles))
    for metric, oracle in oracles.items():
        assert scores[metric] == pytest.approx(oracle(label, predicted))


def test_a_constant_prediction_scores_zero_not_nan() -> None:
    scores = task("stsb").score({"label": [1.0, 2.0, 3.0], "predicted": [2.0] * 3, "loss": [0.0] * 3})
    assert scores["pearson"] == scores["spearman"] == 0.0


def test_an_f1_without_a_positive_is_zero_and_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert task("mrpc").score({"label": [0.0, 0.0], "predicted": [0, 0], "loss": [0.0] * 2})["f1"] == 0


@pytest.mark.parametrize("name", ["rte", "stsb"])
def test_predictions_and_losses_are_per_example(name: str) -> None:
    """The largest logit's class and its negative log-probability; of real numbers the output and its squared error."""
    torch.manual_seed(0)
    glue, outputs = task(name), torch.randn(5, 2 if name == "rte" else 1)
    label = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    rows = outputs.double().numpy()
    if name == "rte":
        losses = np.log(np.exp(rows).sum(1)) - rows[range(5), label.int()]
        predicted = rows.argmax(1)
    else:
        losses, predicted = (rows[:, 0] - label.numpy()) ** 2, rows[:, 0]
    model = lambda inputs: outputs.bfloat16() if inputs == "half" else outputs  # noqa: E731
    columns = glue.predict(model, {"inputs": None, "label": label})  # type: ignore[arg-type]
    assert columns == {
        "predicted": pytest.approx(predicted), "label": [0, 1, 1, 0, 1], "loss": pytest.approx(losses, rel=1e-5),
    }  # fmt: skip
    for inputs, tolerance in ((None, 1e-5), ("half", 0.02)):
        loss = glue.loss(model, {"inputs": inputs, "label": label})  # type: ignore[arg-type]
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(losses.mean(), rel=tolerance)
    assert glue.score(columns)["loss"] == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_head_is_that_of_bert_or_roberta(hidden: bool) -> None:
    """Oracle: the published classifiers, dropout and a linear map, and before it a hidden layer with tanh."""
    torch.manual_seed(0)
    features = lambda module, inputs: module(inputs).bfloat16()  # noqa: E731
    backbone = Backbone(nn.Linear(3, 300), "text", 300, features=features, head_dropout=0.3, head_hidden=hidden)
    bound = task("mnli").bind(backbone)
    assert isinstance(bound.head, nn.Sequential)
    before = [nn.Dropout, nn.Linear, nn.Tanh] if hidden else []
    assert [type(layer) for layer in bound.head] == [*before, nn.Dropout, nn.Linear]
    assert [layer.p for layer in bound.head if isinstance(layer, nn.Dropout)] == [0.3] * (1 + hidden)
    linear = [layer for layer in bound.head if isinstance(layer, nn.Linear)]
    assert [layer.weight.shape for layer in linear] == [(300, 300)] * hidden + [(3, 300)]
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not layer.bias.any()
    x = torch.randn(4, 3)
    expected = features(backbone.module, x).float()
    for i, layer in enumerate(linear):
        expected = (torch.tanh(expected) if i else expected) @ layer.weight.T
    torch.testing.assert_close(bound.model.eval()(x), expected)
    assert task("stsb").bind(backbone).head[-1].out_features == 1  # type: ignore[index]
    planned = task("mnli").bind(replace(backbone, module=nn.Linear(3, 300, device="meta"))).head
    assert planned is not None
    assert all(parameter.is_meta for parameter in planned.parameters())


def test_texts_are_padded_and_masked() -> None:
    encoder = task("mrpc").encoder(Backbone(nn.Module(), "text", 4, tokenizer=Letters), training=True)
    items = [
        encoder({"sentence1": "ab", "sentence2": "c", "label": 1}),
        encoder({"sentence1": "d", "sentence2": "", "label": 0}),
    ]
    batch = encoder.collate(items)
    assert batch["inputs"]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["inputs"]["input_ids"].shape == (2, 3)
    assert batch["label"].tolist() == [1.0, 0.0]
    assert pad([[5], [6, 7]], 0, side="left").tolist() == [[0, 5], [6, 7]]
    with pytest.raises(SettingsError, match="hidden labels"):
        encoder({"sentence1": "a", "sentence2": "b", "label": -1})


def test_texts_are_cut_and_a_plan_has_the_longest() -> None:
    """Every field but the labels has its shape in a plan; token types are those of pairs, and filled with zeros."""

    class Typed(Letters):
        pad_token_id = 9

        def __call__(self, text: str, second: str = "", **options) -> dict:  # type: ignore[no-untyped-def]
            assert options["truncation"]
            made = super().__call__(text, second, **options)
            return made | {"token_type_ids": [1] * len(made["input_ids"])}

    backbone = Backbone(nn.Module(), "text", 4, tokenizer=Typed)
    mrpc = task("mrpc", "max_length=4")
    encoder = mrpc.encoder(backbone, training=True)
    items = [encoder({"sentence1": "abcdef", "sentence2": "gh", "label": 1}), encoder(PAIR)]
    assert [len(item["input_ids"]) for item in items] == [4, 2]
    batch, planned = encoder.collate(items), mrpc.sample(backbone, 2)
    assert batch["inputs"]["input_ids"][1, 2:].tolist() == [9, 9]
    assert batch["inputs"]["token_type_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert planned["label"].shape == batch["label"].shape
    for name in ("input_ids", "attention_mask"):
        assert (planned["inputs"][name].shape, planned["inputs"][name].dtype) == ((2, 4), torch.int64)
    assert planned["inputs"]["attention_mask"].all()


PAIR = {"sentence1": "a", "sentence2": "b", "label": 0}


def test_colas_test_set_is_glues_whole_validation_set(shared_data: Path, tmp_path: Path) -> None:
    """527 sentences of the domains that are trained on and 516 of others, in GLUE's order."""
    tables = build(settings("task=cola", f"data_root={shared_data}")["task"]).open()
    assert len(tables["test"]) == 1043
    first, second = (
        pq.read_table(shared_data / "glue" / "cola" / f"{name}.parquet").column("sentence").to_pylist()
        for name in ("validation", "validation_out_of_domain")
    )
    assert tables["test"].column("sentence").tolist() == first + second
    (tmp_path / "glue").mkdir()
    shutil.copytree(shared_data / "glue" / "cola", tmp_path / "glue" / "cola")
    (tmp_path / "glue" / "cola" / "validation_out_of_domain.parquet").unlink()
    with pytest.raises(SettingsError, match=r"no validation_out_of_domain.parquet"):
        build(settings("task=cola", f"data_root={tmp_path}")["task"]).check()
