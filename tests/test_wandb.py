"""What W&B is told, read from the file that its own client writes offline."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from conftest import settings
from randlora.errors import SettingsError
from randlora.records.logger import Membership
from randlora.records.result import Headline, Result
from randlora.records.wandb import Wandb
from randlora.studies.workspace import main, workspace


def blocks(log: bytes) -> Iterator[bytes]:
    """The records of W&B's file behind its header, as LevelDB logs: CRC (4), length (2), whole or which part (1)."""
    position, record = 0, b""
    while position + 7 <= len(log):
        length, part = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        record += log[position + 7 : position + 7 + length]
        if part in (1, 4):  # whole, or the last
            yield record
            record = b""
        position += 7 + length
        left = -(position + 7) % 2**15  # in the block, which the file's header is a part of
        position += left if left < 7 else 0


def records(folder: Path) -> list[wandb_internal_pb2.Record]:
    """Of the one run below a folder, once W&B's own process has written its end."""
    (file,) = folder.rglob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        read = [wandb_internal_pb2.Record.FromString(data) for data in blocks(file.read_bytes()[7:])]
        if any(record.HasField("exit") for record in read):
            return read
        time.sleep(0.05)
    raise TimeoutError(f"{file} has no end")


def mirrored(folder: Path, status: str, **options: bool) -> dict[str, wandb_internal_pb2.Record]:
    """The last record of each type that W&B's file of a run has that ends so."""
    config = settings("method=vera", "seed=3", "tags=[first]")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter.json").write_text("{}")
    logger = Wandb(mode="offline", **options)
    logger.start("digits/clip_tiny/vera/0123456789ab", config, folder)
    logger.log({"zero_shot/accuracy": 0.1}, 0)
    logger.log({"train/loss": 2.0, "test/accuracy": 0.5}, 1)
    logger.finish(
        Result(
            task="digits", model="clip_tiny", method="vera", shots=None, fraction=None, seed=3, config=config,
            signature="0123456789ab", headline=Headline("test/accuracy", 0.5), status=status,
            metrics={"test/accuracy": 0.5}, trainable_parameters=7,
        )
    )  # fmt: skip
    return {record.WhichOneof("record_type"): record for record in records(folder)}


def test_a_run_of_a_sweep_is_called_by_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDLORA_SWEEP", "")
    monkeypatch.setenv("RANDLORA_LABEL", "")
    Membership("aabbccddeeff", "method=vera seed=3 method.rank=8").declare()
    seen = mirrored(tmp_path, "finished", artifact=True)
    run = seen["run"].run
    assert (run.display_name, run.run_group) == ("vera clip_tiny digits seed=3 method.rank=8", "sweep aabbccddeeff")
    assert (run.run_id, list(run.tags), run.job_type) == ("0123456789ab", ["first"], "fine-tuning")
    assert seen["exit"].exit.exit_code == 0
    assert "preempting" not in seen
    artifact = seen["request"].request.log_artifact.artifact if "artifact" not in seen else seen["artifact"].artifact
    assert (artifact.name, artifact.type) == ("adapter-0123456789ab", "adapter")
    assert [entry.path for entry in artifact.manifest.contents] == ["adapter.json"]


@pytest.mark.parametrize(("status", "preempted"), [("interrupted", True), ("failed", False)])
def test_an_interrupted_run_has_not_failed(status: str, preempted: bool, tmp_path: Path) -> None:
    seen = mirrored(tmp_path, status)
    assert seen["run"].run.run_group == "digits/clip_tiny"
    assert seen["exit"].exit.exit_code == 1
    assert ("preempting" in seen) is preempted
    assert "artifact" not in seen


def test_the_workspace_draws_what_runs_log(tmp_path: Path) -> None:
    """Oracle: the summary and the history of a run in W&B's own file."""
    known = {"test/accuracy", "trainable_parameters", "peak_memory_bytes", "seconds_per_step"}
    mirrored(tmp_path, "finished")
    summary, history, drawn = set(), set(), set()
    for record in records(tmp_path):
        summary |= {"/".join(item.nested_key) or item.key for item in record.summary.update}
        history |= {"/".join(item.nested_key) or item.key for item in record.history.item}
    assert known <= summary
    assert {"zero_shot/accuracy", "train/loss"} <= history
    model = json.loads(workspace("team", "project")._to_model().model_dump_json(by_alias=True))
    sections = model["spec"]["section"]["panelBankConfig"]["sections"]
    for panel in (panel for section in sections for panel in section["panels"]):
        names = [value for key, value in panel["config"].items() if key in ("xAxis", "yAxis") and value]
        drawn |= {name.removeprefix("summary:") for name in names} | {*(panel["config"].get("metrics") or ())}
    assert known <= drawn


@pytest.mark.parametrize("project", ["project", "/project", "team/", "a/b/c"])
def test_a_workspace_needs_an_account_and_a_project(project: str) -> None:
    with pytest.raises(SettingsError, match="is not ENTITY/PROJECT"):
        main([project])
