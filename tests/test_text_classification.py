"""GLUE: scores, padding and refusals."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
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
