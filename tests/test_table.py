"""Tables of records: paired differences and their intervals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel

from conftest import REPOSITORY

ONE, OTHER = [0.61, 0.64, 0.60, 0.66], [0.60, 0.60, 0.61, 0.62]


def record(root: Path, seed: int, basis: str, score: float, model: str = "vit") -> None:
    folder = root / "cifar10" / model / "randlora" / f"{basis}{seed}"
    folder.mkdir(parents=True)
    result = {
        "status": "finished",
        "seed": seed,
        "trainable_parameters": 1234,
        "headline": {"name": "test/accuracy", "value": score},
        "config": {"method": {"basis": basis}, "shots": 16, "fraction": None, "seed": seed},
    }
    (folder / "result.json").write_text(json.dumps(result))


def table(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/table.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def test_paired_differences_are_scipys(tmp_path: Path) -> None:
    """Oracle: scipy's paired t-test. A seed that has only one of the two does not count."""
    for seed, (one, other) in enumerate(zip(ONE, OTHER, strict=True)):
        record(tmp_path, seed, "kronecker", one)
        record(tmp_path, seed, "uniform", other)
    record(tmp_path, 9, "uniform", 0.1)
    record(tmp_path, 0, "uniform", 0.1, model="clip")  # nothing to compare there
    expected = ttest_rel(100 * np.array(ONE), 100 * np.array(OTHER)).confidence_interval()
    row = table(str(tmp_path), "--paired", "method.basis=kronecker,uniform").stdout.splitlines()[-1]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:3] == ["cifar10", "vit", "16"]
    assert cells[5:] == [
        f"{100 * np.mean(np.subtract(ONE, OTHER)):+.2f}",
        f"{expected[0]:+.2f} to {expected[1]:+.2f}",
        "4",
    ]


def test_ours_beside_the_papers(tmp_path: Path) -> None:
    """Table 11 prints 92.0 for RandLoRA-6 on CIFAR-10 with 16 shots."""
    for seed, score in enumerate((0.9, 0.94)):
        record(tmp_path, seed, "uniform", score, model="clip_vit_b32")
    record(tmp_path, 0, "uniform", 0.5)
    rows = table(str(tmp_path), "--published").stdout.splitlines()[2:]
    assert rows == [
        "| cifar10 | clip_vit_b32 | randlora | 16 | 1,234 | 92.0 ± 2.8 | 92.0 | table11 rank 6 |",
        "| cifar10 | vit | randlora | 16 | 1,234 | 50.0 |  | not in the paper |",
    ]


def test_every_metric_with_the_score_before_training(tmp_path: Path) -> None:
    """A metric that only some of a task's runs have is left blank in the others' rows."""
    for seed, (model, extra) in enumerate((("vit", {}), ("clip", {"test/nist": 8.5, "zero_shot/accuracy": 0.25}))):
        record(tmp_path, seed, "uniform", 0.5, model=model)
        path = tmp_path / "cifar10" / model / "randlora" / f"uniform{seed}" / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": {"test/accuracy": 0.5, **extra}}))
    assert table(str(tmp_path), "--metrics").stdout.splitlines() == [
        "| task | model | shots | method | accuracy | nist | seeds |",
        "|---|---|---|---|---|---|---|",
        "| cifar10 | clip | 16 | before | 0.25 |  | 1 |",
        "| cifar10 | clip | 16 | randlora | 0.5 | 8.5 | 1 |",
        "| cifar10 | vit | 16 | randlora | 0.5 |  | 1 |",
    ]


def test_a_search_ends_with_the_best_validation_score(tmp_path: Path) -> None:
    """The test scores say the opposite, and take no part."""
    for basis, test, validation in (("uniform", 0.9, 0.5), ("normal", 0.1, 0.7), ("binary", 0.8, 0.6)):
        record(tmp_path, 0, basis, test)
        path = tmp_path / "cifar10" / "vit" / "randlora" / f"{basis}0" / "result.json"
        result = json.loads(path.read_text()) | {"metrics": {"validation/accuracy": validation}}
        path.write_text(json.dumps(result))
    row = table(str(tmp_path), "--best", "method.basis,method.alpha").stdout.splitlines()[-1]
    assert row == "| cifar10 | vit | randlora | 16 | 3 | normal |  | 70.0 | 60.0 |"


def test_one_sentence_for_what_cannot_be_paired(tmp_path: Path) -> None:
    record(tmp_path, 0, "uniform", 0.5)
    for asked in ("method.basis=kronecker,uniform", "method.nosuch=1,2", "method.basis=uniform"):
        done = table(str(tmp_path), "--paired", asked)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
