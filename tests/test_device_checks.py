"""The checks of a device, on the CPU: their order, budget, file and page, and that they see what is wrong."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY
from randlora.analysis.device import CHECKS, updates
from randlora.analysis.device import report as device_report
from randlora.analysis.device.place import Place
from randlora.analysis.device.report import NotHere, Wrong, run_checks, table, within
from randlora.analysis.device.steps import measured
from randlora.analysis.workloads import Block, Workload
from randlora.methods.randlora import RandLoRAUpdate

CPU = Place(torch.device("cpu"), tiny=True)
SCRIPT = REPOSITORY / "scripts" / "gpu.py"


def test_every_end_is_in_the_file_after_each_check(tmp_path: Path) -> None:
    file, seen = tmp_path / "gpu.json", []

    def breaks() -> dict[str, float]:
        seen.append(list(json.loads(file.read_text())["checks"]))
        raise RuntimeError("out of luck")

    def elsewhere() -> dict[str, float]:
        raise NotHere("needs a moon")

    checks: dict[str, Callable[[], device_report.Figures]] = {
        "fine": lambda: within({"a": 0.5, "b": 0.25}, 1.0),
        "broken": breaks,
        "worse": lambda: within({"a": 0.5, "b": math.nan, "c": 7.0}, 1.0),
        "elsewhere": elsewhere,
        "times": lambda: device_report.Listed(a=2.0, b=1.0),
    }
    report = run_checks(checks, CPU.device, 60, file)
    assert seen == [["fine"]]
    assert json.loads(file.read_text()) == json.loads(json.dumps(report)) | {
        "checks": json.loads(file.read_text())["checks"]
    }
    assert [result["ended"] for result in report["checks"].values()] == [
        "passed",
        "failed",
        "failed",
        "not run",
        "passed",
    ]
    assert device_report.failed(report) == ["broken", "worse"]
    for row in (
        "| fine | passed | a: 0.5 |", "| broken | failed | RuntimeError: out of luck |",
        "| worse | failed | b: nan, more than 1 |", "| elsewhere | not run | needs a moon |",
        "| times | passed | a: 2; b: 1 |",
    ):  # fmt: skip
        assert row in table(report)
    late = run_checks({"fine": checks["fine"]}, CPU.device, -1.0)
    assert late["checks"]["fine"] | {"seconds": 0} == {
        "ended": "not run", "reason": "the -1 seconds are over", "figures": {}, "seconds": 0,
    }  # fmt: skip


def test_a_right_update_passes_and_one_wrong_by_a_hundredth_fails(
    program: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    assert program(SCRIPT, "--tiny", "--json", file) == 0
    ends = {name: result["ended"] for name, result in json.loads(file.read_text())["checks"].items()}
    assert ends.keys() == CHECKS.keys()
    assert {name for name, end in ends.items() if end == "passed"} == {
        "layers in float32", "layers in bfloat16", "one output in every form",
        "cached and checkpointed",
    }  # fmt: skip
    right = RandLoRAUpdate.forward
    monkeypatch.setattr(RandLoRAUpdate, "forward", lambda self, x, base: 1.01 * right(self, x, base))
    assert program(SCRIPT, "--tiny", "--json", file, "--only", "layers in float32,layers in tf32") == 1
    assert "| layers in float32 | failed | randlora: 0.01, more than 0.0001 |" in capsys.readouterr().out


def test_a_gradient_that_is_missing_on_one_side_is_infinitely_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RandLoRAUpdate.forward
    monkeypatch.setattr(RandLoRAUpdate, "forward", lambda self, x, base: right(self, x, base).detach() + 0 * x.sum())
    with pytest.raises(Wrong, match="randlora: inf"):
        updates.in_float32(CPU)


def test_the_page_is_made_of_the_records(program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """And says that no figure is of a GPU as long as none of them is."""
    files = sorted((REPOSITORY / "experiments" / "gpu").glob("*.json"))
    assert program(SCRIPT, "--page", *files) == 0
    page = (REPOSITORY / "docs" / "cuda.md").read_text()
    assert capsys.readouterr().out == page
    cards = [json.loads(file.read_text())["machine"]["type"] == "cuda" for file in files]
    assert ("No figure on this page is from a GPU" in page) is not any(cards)


def test_a_step_is_timed() -> None:
    small = Workload(lambda: torch.nn.Sequential(Block(24, heads=4, mlp=48)), ["*.q_proj", "*.up"], (2, 5, 24))
    figures = measured(small, CPU.device, ["lora", "randlora"], rounds=1)
    assert figures.keys() == {"lora, ms", "randlora, ms", "lora, MiB", "randlora, MiB", "randlora / lora"}
    assert figures["randlora / lora"] == pytest.approx(figures["randlora, ms"] / figures["lora, ms"])
