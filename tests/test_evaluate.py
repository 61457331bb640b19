"""A finished run's adapter, scored again: what the run recorded is the oracle."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import REPOSITORY, settings
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.integrity import seal
from randlora.records import Headline, Result
from randlora.run import run

sys.path.insert(0, str(REPOSITORY / "scripts"))
from evaluate import scores

SHORT = (
    "trainer.max_steps=3",
    "trainer.batch_size=8",
    "task.validation_size=10",
    "shots=2",
    "trainer.learning_rate=1e-2",
)


def finished(root: Path, *overrides: str) -> tuple[Path, dict[str, float]]:
    """A run's folder and its metrics."""
    experiment = Experiment.from_config(settings(f"run_root={root}", *SHORT, *overrides))
    assert run(experiment, "as: given\n").code == 0
    return experiment.folder, json.loads((experiment.folder / "result.json").read_text())["metrics"]


def write_result(folder: Path, status: str) -> None:
    """A record without a run."""
    Result(
        task="digits", model="clip_tiny", method="lora", shots=None, fraction=None, seed=0, signature="0" * 12,
        headline=Headline("test/accuracy", None), config=settings(), status=status,
    ).write(folder / "result.json")  # fmt: skip


def part(metrics: dict[str, float], name: str) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key.startswith(f"{name}/")}


def test_a_run_scores_what_it_recorded(tmp_path: Path) -> None:
    folder, metrics = finished(tmp_path, "task.test_size=60")
    assert metrics["test/loss"] != metrics["zero_shot/loss"]
    assert scores(folder) == pytest.approx(part(metrics, "test"), rel=1e-6)
    assert scores(folder, zero_shot=True) == pytest.approx(part(metrics, "zero_shot"), rel=1e-6)
    again = scores(folder, ["task=digits", "task.test_size=60", "trainer.evaluation_batch_size=7"])
    assert again == pytest.approx(part(metrics, "test"), rel=1e-5)


def test_a_record_of_before_optimizers_were_a_choice_is_scored(tmp_path: Path) -> None:
    folder, metrics = finished(tmp_path, "task.test_size=60")
    result = json.loads((folder / "result.json").read_text())
    result["config"]["trainer"]["betas"] = result["config"].pop("optimizer")["betas"]
    result["config"]["logger"] = None
    del result["sha256"]  # records of that time had none
    (folder / "result.json").write_text(json.dumps(result))
    assert scores(folder) == pytest.approx(part(metrics, "test"), rel=1e-6)


def test_the_head_comes_with_the_adapter(tmp_path: Path) -> None:
    folder, metrics = finished(tmp_path, "model=clip_tiny_vision", "task.test_size=60")
    assert scores(folder) == pytest.approx(part(metrics, "test"), rel=1e-6)
    with pytest.raises(SettingsError, match="no score before training"):
        scores(folder, zero_shot=True)
    (folder / "adapter" / "head.safetensors").unlink()
    with pytest.raises(SettingsError, match=r"no adapter can be read .*head.safetensors is missing"):
        scores(folder)
    seal(folder / "adapter", ["adapter.json", "adapter.safetensors"])
    with pytest.raises(SettingsError, match=r"this task's head is \{'head.weight': \(10, 128\).* and the run's none"):
        scores(folder)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["task=digits", "model=clip"], "model=clip: model, method, targets, seed are the run's"),
        (["task=digits", "+method.rank=3"], "+method.rank=3: model, method"),
        (["task=digits", "experiment=table2/a"], "experiment=table2/a: model, method"),
        (["task.test_size=3"], "name the task too, such as task=digits"),
        (["task=digit"], "did you mean digits?"),
    ],
)
def test_wrong_settings_are_a_sentence(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    write_result(tmp_path, "finished")
    with pytest.raises(SettingsError) as caught:
        scores(tmp_path, overrides)
    assert sentence in str(caught.value)


def test_folders_without_a_finished_run_end_with_2(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    write_result(tmp_path, "interrupted")
    other = tmp_path / "other"
    other.mkdir()
    (other / "result.json").write_text("[]")
    for folder, sentence in (
        (tmp_path, "this run is interrupted"),
        (other, "is not the folder of a run"),
        (tmp_path / "none", "is not the folder of a run"),
    ):
        assert program(REPOSITORY / "scripts/evaluate.py", folder) == 2
        assert sentence in capsys.readouterr().err
