"""Tables of results: paired differences and their intervals."""

import contextlib
import io
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import ttest_rel

from conftest import REPOSITORY
from randlora.errors import exit_code
from randlora.records import Headline, Result
from randlora.records.predictions import write_columns
from randlora.studies.statistics import holm, paired_difference

sys.path.insert(0, str(REPOSITORY / "scripts"))
from table import main

ONE, OTHER = [0.61, 0.64, 0.60, 0.66], [0.60, 0.60, 0.61, 0.62]


def record(
    root: Path, seed: int, basis: str, score: float, model: str = "vit", metrics: Mapping[str, float] | None = None
) -> None:
    folder = root / f"{model}{basis}{seed}"  # names say nothing
    folder.mkdir(parents=True)
    result = Result(
        task="cifar10", model=model, method="randlora", shots=16, fraction=None, seed=seed,
        signature=f"{basis}{seed}", config={"method": {"basis": basis}, "seed": seed}, status="finished",
        headline=Headline("test/accuracy", score), metrics=metrics or {}, trainable_parameters=1234,
    )  # fmt: skip
    result.write(folder / "result.json")


def predicted(root: Path, seed: int, basis: str, rows: list[int], right: list[int]) -> None:
    """A run with its predictions, of which those `right` are; the rows come as evaluation happens to meet them."""
    record(root, seed, basis, float(np.mean(right)))
    columns = {"row": rows, "predicted": [3 if hit else 4 for hit in right], "label": [3] * len(rows)}
    write_columns(root / f"vit{basis}{seed}", columns)


class Printed(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def table(*arguments: str) -> Printed:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = exit_code(lambda: main(arguments))
    return Printed(code, output.getvalue(), errors.getvalue())


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


def test_paired_differences_are_scipys(tmp_path: Path) -> None:
    """Oracle: scipy's paired t-test. A seed that has only one of the two does not count."""
    for seed, (one, other) in enumerate(zip(ONE, OTHER, strict=True)):
        record(tmp_path, seed, "kronecker", one)
        record(tmp_path, seed, "uniform", other)
    record(tmp_path, 9, "uniform", 0.1)
    record(tmp_path, 0, "uniform", 0.1, model="clip")  # nothing to compare there
    expected = ttest_rel(100 * np.array(ONE), 100 * np.array(OTHER))
    low, high = expected.confidence_interval()
    row = table(str(tmp_path), "--paired", "method.basis=kronecker,uniform").stdout.splitlines()[-1]
    assert cells(row)[:4] == ["kronecker - uniform", "cifar10", "vit", "16"]
    assert cells(row)[6:] == [
        f"{100 * np.mean(np.subtract(ONE, OTHER)):+.2f}",
        f"{low:+.2f} to {high:+.2f}",
        "4",
        f"{expected.pvalue:.3f}",
    ]


def test_several_differences_are_corrected_for_their_number(tmp_path: Path) -> None:
    """Two equal comparisons: Holm doubles the smaller p, and the larger is no smaller than that."""
    for seed, (one, other) in enumerate(zip(ONE, OTHER, strict=True)):
        for basis, score in (("kronecker", one), ("uniform", other), ("normal", other)):
            record(tmp_path, seed, basis, score)
    rows = table(str(tmp_path), "--paired", "method.basis=kronecker,uniform,normal").stdout.splitlines()[2:]
    assert [cells(row)[0] for row in rows] == ["kronecker - uniform", "kronecker - normal"]
    assert {cells(row)[-1] for row in rows} == {f"{2 * ttest_rel(ONE, OTHER).pvalue:.3f}"}


def test_holms_correction() -> None:
    """By hand: 4 × 0.005, 3 × 0.01, 2 × 0.03, and 0.04 raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


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
    for model, extra in (("vit", {}), ("clip", {"test/nist": 8.5, "zero_shot/accuracy": 0.25})):
        record(tmp_path, 0, "uniform", 0.5, model, {"test/accuracy": 0.5, **extra})
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
        record(tmp_path, 0, basis, test, metrics={"validation/accuracy": validation})
    row = table(str(tmp_path), "--best", "method.basis,fraction").stdout.splitlines()[-1]
    assert row == "| cifar10 | vit | randlora | 16 | 3 | normal |  | 70.0 | 60.0 |"


@pytest.mark.parametrize("option", ["--best", "--columns"])
def test_a_key_that_no_run_has_is_a_sentence(option: str, tmp_path: Path) -> None:
    record(tmp_path, 0, "uniform", 0.5)
    done = table(str(tmp_path), option, "method.basis,method.bassi")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: method.bassi: no run has it")


def test_some_of_the_runs(tmp_path: Path) -> None:
    for seed, basis in enumerate(("uniform", "normal", "binary")):
        record(tmp_path, seed, basis, 0.5, metrics={"test/accuracy": 0.5})
    options = "--only", "method.basis=uniform,binary", "seed=2", "--columns", "seed,method.basis,test/accuracy"
    assert table(str(tmp_path), *options).stdout.splitlines()[2:] == ["| 2 | binary | 0.5 |"]
    done = table(str(tmp_path), "--only", "method.basis=sparse")
    assert done.returncode == 2
    assert "of 'method.basis' there is binary, normal, uniform" in done.stderr


def test_a_partial_record_is_a_row(tmp_path: Path) -> None:
    """A run that failed before its parameters were counted."""
    record(tmp_path, 0, "uniform", 0.5)
    (tmp_path / "failed").mkdir()
    failed = Result(
        task="dtd", model="vit", method="lora", shots=None, fraction=None, seed=0, signature="a", config={},
        headline=Headline("test/accuracy", None), error="no memory",
    )  # fmt: skip
    failed.write(tmp_path / "failed" / "result.json")
    done = table(str(tmp_path))
    assert done.returncode == 0
    assert "failed" in next(line for line in done.stdout.splitlines() if "dtd" in line)
    for options in (["--seeds"], ["--metrics"], ["--published"], ["--best", "method.basis"]):
        done = table(str(tmp_path), *options)
        assert done.returncode == 0
        assert done.stderr == "1 of 2 runs have not finished\n"
        assert "dtd" not in done.stdout


def test_one_sentence_for_what_cannot_be_paired(tmp_path: Path) -> None:
    record(tmp_path, 0, "uniform", 0.5)
    for asked in ("method.basis=kronecker,uniform", "method.nosuch=1,2", "method.basis=uniform"):
        done = table(str(tmp_path), "--paired", asked)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_intervals_over_seeds_and_examples(tmp_path: Path) -> None:
    """Oracle: `paired_difference` of arrays in one order, made by hand; the files hold the examples in another."""
    generator = np.random.default_rng(0)
    hits = {name: (generator.random((3, 50)) < chance).astype(int) for name, chance in (("a", 0.8), ("b", 0.6))}
    for basis, of_seeds in hits.items():
        for seed, right in enumerate(of_seeds):
            order = generator.permutation(50)
            predicted(tmp_path, seed, basis, (order * 2).tolist(), right[order].tolist())
    expected = paired_difference(*({seed: 100 * right for seed, right in enumerate(hits[name])} for name in "ab"))
    row = cells(table(str(tmp_path), "--paired", "method.basis=a,b", "--examples").stdout.splitlines()[2])
    assert row[6:] == [
        f"{expected.mean:+.2f}", f"{expected.low:+.2f} to {expected.high:+.2f}", "3", f"{expected.p:.3f}",
    ]  # fmt: skip
    over_seeds = cells(table(str(tmp_path), "--paired", "method.basis=a,b").stdout.splitlines()[2])
    assert over_seeds[6] == row[6]
    assert over_seeds[7] != row[7]


def test_intervals_over_examples_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    asked = ("--paired", "method.basis=a,b", "--examples")
    for seed in (0, 1):
        predicted(tmp_path / "rows", seed, "a", [0, 1], [1, 0])
        predicted(tmp_path / "rows", seed, "b", [0, 2], [1, 0])
        predicted(tmp_path / "mean", seed, "a", [0, 1], [1, 0])
        predicted(tmp_path / "mean", seed, "b", [0, 1], [1, 0])
        record(tmp_path / "none", seed, "a", 0.5)
        record(tmp_path / "none", seed, "b", 0.5)
    assert "scored on different test examples" in table(str(tmp_path / "rows"), *asked).stderr
    assert "runs with predictions=true" in table(str(tmp_path / "none"), *asked).stderr
    path = tmp_path / "mean" / "vitb1" / "result.json"
    replace(Result.read(path), headline=Headline("test/accuracy", 0.4)).write(path)  # as a correlation would be
    assert "test/accuracy is not a mean over examples" in table(str(tmp_path / "mean"), *asked).stderr
    assert "give both" in table(str(tmp_path / "mean"), "--examples").stderr
