"""GLUE: scores, padding and refusals."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn

from conftest import task
from letters import Letters
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
