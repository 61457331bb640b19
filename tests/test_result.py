"""result.json: written, read and refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import randlora.methods
from randlora.errors import SettingsError
from randlora.methods import Method
from randlora.records import Headline, Result, read
from randlora.records.result import METHOD_NAMES

RESULT = Result(
    task="dtd", model="vit", method="lora", shots=None, fraction=0.5, seed=3, signature="0123456789ab",
    config={"method": {"_target_": "randlora.methods.LoRA", "rank": 4}, "betas": [0.9, 1]}, status="diverged",
    headline=Headline("test/accuracy", None), metrics={"test/accuracy": 0.5, "zero_shot/accuracy": 0.25},
    steps=7, examples={"train": 10}, versions={"torch": "2"}, error="the loss is nan",
)  # fmt: skip

# A record of before November 2026, of a run that failed before anything was known, written by hand.
OLD = {
    "status": "failed", "headline": {"name": "test/accuracy", "value": None}, "metrics": {},
    "trainable_parameters": None, "head_parameters": None, "total_parameters": None, "adapter_bytes": None,
    "train_seconds": None, "seconds_per_step": None, "peak_memory_bytes": None, "steps": None, "seed": 3,
    "signature": "0123456789ab", "versions": {"torch": "2"}, "commit": None, "device": "cpu", "error": "no data",
    "examples": None,
    "config": {
        "task": {"name": "dtd"}, "model": {"name": "vit"}, "shots": 4, "fraction": None,
        "method": {"_target_": "randlora.methods.FullFineTuning"},
    },
}  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    RESULT.write(path)
    assert Result.read(path) == RESULT
    assert Result.read(path).path == path
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert (RESULT.metric, RESULT.before, RESULT.validation) == ("accuracy", 0.25, None)


def test_the_keys_of_the_file(tmp_path: Path) -> None:
    """Those that scripts of others rely on."""
    RESULT.write(tmp_path / "result.json")
    assert set(json.loads((tmp_path / "result.json").read_text())) == {
        "schema", "task", "model", "method", "shots", "fraction", "status", "headline", "metrics",
        "trainable_parameters", "head_parameters", "total_parameters", "adapter_bytes", "train_seconds",
        "seconds_per_step", "peak_memory_bytes", "steps", "seed", "signature", "config", "versions", "commit", "device",
        "error", "examples", "task_version", "selected_step", "micro_batch_size",
        "calibrated", "sha256", "files",
    }  # fmt: skip


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    """They are text in the file, so that every reader of JSON takes it, and numbers again when read."""
    metrics = {"test/loss": math.nan, "validation/loss": math.inf}
    replace(RESULT, metrics=metrics).write(tmp_path / "result.json")
    json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    metrics = dict(Result.read(tmp_path / "result.json").metrics)
    assert math.isnan(metrics["test/loss"])
    assert metrics["validation/loss"] == math.inf


def test_a_record_of_the_old_form(tmp_path: Path) -> None:
    """Its names are in its settings; where it lies says nothing."""
    path = tmp_path / "a" / "b" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(OLD))
    (result,) = read(tmp_path)
    assert (result.task, result.model, result.method, result.shots, result.fraction) == ("dtd", "vit", "full", 4, None)
    assert (result.task_version, result.steps, result.error) == (1, None, "no data")
    content = result.to_json()
    assert {key: content[key] for key in OLD} == OLD


def test_old_records_name_the_methods_as_the_methods_do() -> None:
    for cls in vars(randlora.methods).values():
        if isinstance(cls, type) and issubclass(cls, Method) and cls is not Method:
            assert METHOD_NAMES.get(cls.__name__, cls.__name__.lower()) == cls.__new__(cls).name


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"status": "done"}, "'status' is 'done', not one of finished, failed"),
        ({"seed": "3"}, "'seed' is '3'"),
        ({"seed": True}, "'seed' is True"),
        ({"steps": 1.5}, "'steps' is 1.5"),
        ({"metrics": {"test/accuracy": "high"}}, "'metrics' is"),
        ({"headline": {"name": "test/accuracy"}}, "'headline' is"),
        ({"headline": None}, "'headline' is None"),
        ({"config": []}, "'config' is []"),
        ({"schema": 3}, "'schema' is 3; this version reads 1 and 2"),
        ({"score": 1}, "'score' is no key"),
    ],
)
def test_a_damaged_file_is_a_sentence(change: dict[str, object], part: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT.to_json() | change))
    with pytest.raises(SettingsError) as error:
        Result.read(path)
    assert str(error.value).startswith(f"{path}: {part}")


def test_a_changed_digit_is_damage(tmp_path: Path) -> None:
    """Still JSON, and still a result: its own checksum tells."""
    path = tmp_path / "result.json"
    RESULT.write(path)
    text = path.read_text()
    assert text.count('"steps": 7') == 1
    path.write_text(text.replace('"steps": 7', '"steps": 8'))
    for reader in (Result.read, lambda path: read(path.parent)):
        with pytest.raises(SettingsError, match=f"{path} is damaged: its SHA-256"):
            reader(path)


@pytest.mark.parametrize("key", ["task", "seed", "signature", "config", "headline", "status"])
def test_a_missing_key_is_a_sentence(key: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({name: value for name, value in RESULT.to_json().items() if name != key}))
    with pytest.raises(SettingsError, match=f"{path}: '{key}' is 'missing'"):
        Result.read(path)


@pytest.mark.parametrize("text", ['{"status": "fini', "[]", '{"accuracy": 0.5}', "3", "\x00"])
def test_a_foreign_file_is_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(SettingsError, match=str(tmp_path / "result.json")):
        read(tmp_path)


def test_an_empty_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"run train.py with run_root={tmp_path}"):
        read(tmp_path)
