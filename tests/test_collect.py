"""Studies: what is collected from runs comes back whole."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import REPOSITORY
from randlora.errors import SettingsError
from randlora.records import Headline, Result, read
from randlora.studies.collect import collect, read_curves

sys.path.insert(0, str(REPOSITORY / "scripts"))
from collect import main


def settings(draw: random.Random, depth: int = 0) -> object:
    """Settings of any shape, few enough that runs share many of them."""
    if depth < 3 and draw.random() < 0.6:
        return {name: settings(draw, depth + 1) for name in draw.sample("abcd", draw.randint(0, 4))}
    return draw.choice([None, True, 1, 1.0, 0, "", "x", [], [1, {"a": 1}], {}])


def runs(root: Path, count: int = 40) -> dict[str, str]:
    """Folders of runs; the text of each one's result.json by signature."""
    draw, texts = random.Random(0), {}
    for index in range(count):
        result = Result(
            task=draw.choice("st"), model=draw.choice("mn"), method=draw.choice("kl"), shots=None, fraction=None,
            seed=index, signature=f"{index:03}", status=draw.choice(["finished", "failed"]),
            config={"seed": index, "run_root": "runs", **{name: settings(draw) for name in "xyz"}},
            headline=Headline("test/accuracy", draw.random()), metrics={"test/loss": float("nan")},
        )  # fmt: skip
        folder = root / str(draw.random())
        folder.mkdir(parents=True)
        result.write(folder / "result.json")
        if index % 3:
            rows = [{"step": step, "train/loss": draw.random()} for step in range(index)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts[result.signature] = (folder / "result.json").read_text()
    return texts


def test_every_key_comes_back(tmp_path: Path) -> None:
    """Oracle: the files themselves. 1, 1.0 and true are not the same setting."""
    texts = runs(tmp_path / "runs")
    assert collect(tmp_path / "runs", tmp_path / "study") == len(texts)
    results = read(tmp_path / "study" / "results.jsonl")
    assert [result.signature for result in results] != sorted(texts)  # by task, model and method
    for result in results:
        expected = json.loads(texts[result.signature])
        del expected["sha256"], expected["files"]  # checksums of a folder that a study does not have
        assert json.dumps(result.to_json(), sort_keys=True) == json.dumps(expected, sort_keys=True)
    assert len(texts) == len(results)
    assert {path.name for path in (tmp_path / "study").iterdir()} == {"results.jsonl", "curves.jsonl.gz"}


def test_every_curve_comes_back(tmp_path: Path) -> None:
    runs(tmp_path / "runs")
    collect(tmp_path / "runs", tmp_path / "study")
    curves = read_curves(tmp_path / "study")
    for result in read(tmp_path / "runs"):
        assert result.path
        file = result.path.with_name("metrics.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else None
        assert curves.get(("records", result.signature)) == rows


def test_again_changes_nothing_and_order_does_not_matter(tmp_path: Path) -> None:
    study, other = tmp_path / "study", tmp_path / "other"
    runs(tmp_path / "runs")
    folders = sorted((tmp_path / "runs").iterdir())
    collect(tmp_path / "runs", study)
    assert collect(tmp_path / "runs", study) == 0
    for folder in reversed(folders):
        collect(folder, other)
    for name in ("results.jsonl", "curves.jsonl.gz"):
        assert (study / name).read_bytes() == (other / name).read_bytes()


def test_another_result_of_the_same_run_is_refused(tmp_path: Path) -> None:
    runs(tmp_path / "runs", 3)
    collect(tmp_path / "runs", tmp_path / "study")
    before = (tmp_path / "study" / "results.jsonl").read_bytes()
    result = read(tmp_path / "runs")[0]
    assert result.path
    replace(result, headline=Headline("test/accuracy", 0.125)).write(result.path)
    with pytest.raises(SettingsError, match=f"{result.signature} in 'records'; --replace takes this one"):
        collect(tmp_path / "runs", tmp_path / "study")
    assert (tmp_path / "study" / "results.jsonl").read_bytes() == before
    collect(tmp_path / "runs", tmp_path / "study", "scan")  # another part of the study
    main([str(tmp_path / "runs"), "--into", str(tmp_path / "study"), "--replace"])
    scores = [r.headline.value for r in read(tmp_path / "study") if r.signature == result.signature]
    assert scores == [0.125, 0.125]


def test_folders_of_this_machine_are_not_collected(tmp_path: Path) -> None:
    root = str(tmp_path / "data")
    config = {"data_root": root, "run_root": str(tmp_path), "task": {"source": {"root": root, "folder": "x"}}}
    (tmp_path / "run").mkdir()
    Result(
        task="t", model="m", method="k", shots=None, fraction=None, seed=0, signature="a", config=config,
        headline=Headline("test/accuracy", None),
    ).write(tmp_path / "run" / "result.json")  # fmt: skip
    collect(tmp_path / "run", tmp_path / "study")
    (result,) = read(tmp_path / "study")
    source = {"root": "FOLDER", "folder": "x"}
    assert result.config == {"data_root": "FOLDER", "run_root": "runs", "task": {"source": source}}


@pytest.mark.parametrize("damage", ["{", '{"task": "t"}', '{"collection": "records"}'])
def test_a_damaged_line_is_a_sentence(damage: str, tmp_path: Path) -> None:
    runs(tmp_path / "runs", 3)
    collect(tmp_path / "runs", tmp_path / "study")
    file = tmp_path / "study" / "results.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], damage, *lines[3:]]))
    with pytest.raises(SettingsError, match=f"{file}, line 3: "):
        read(tmp_path / "study")


def test_curves_are_not_taken_for_results() -> None:
    with pytest.raises(SettingsError, match=r"curves.jsonl.gz is no results.jsonl of a study"):
        read(REPOSITORY / "experiments" / "image_protocol" / "curves.jsonl.gz")
