"""Reports against hand-computed tables, pandas' own reading of the files, scipy, statsmodels and Hydra's parser."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy.stats import rankdata, ttest_rel
from statsmodels.stats.multitest import multipletests

from conftest import REPOSITORY, settings
from randlora import cli
from randlora.errors import SettingsError
from randlora.records import Headline, Result, read
from randlora.records.signature import signature
from randlora.studies import index, report
from randlora.studies.arms import Part, arms, flat_settings, load
from randlora.studies.charts import SHAPES, WORDS, charts
from randlora.studies.commands import Commands, hydra_value
from randlora.studies.comparisons import comparisons, ranking
from randlora.studies.figures import COLOURS, MARKERS
from randlora.studies.frame import tidy
from randlora.studies.layouts import grids, latex_table, markdown_table
from randlora.studies.published import beside, read_scores
from randlora.use import figures

STUDIES = REPOSITORY / "experiments"
SCORES = {  # by method and task: test scores of seeds 0, 1, …
    ("lora", "cifar10"): [0.90, 0.92], ("lora", "dtd"): [0.49, 0.51],
    ("randlora", "cifar10"): [0.93, 0.93], ("randlora", "dtd"): [0.49, 0.53],
    ("vera", "cifar10"): [0.91, 0.90, 0.88],
}  # fmt: skip


def run(method: str, task: str, seed: int, score: float | None, shots: int = 16, **changes: Any) -> Result:
    config: dict[str, Any] = {
        "method": {"rank": 32}, "trainer": {"learning_rate": 0.001}, "seed": seed, "shots": shots,
        "data_root": "/home/someone/data",
    }  # fmt: skip
    for key, value in changes.pop("config", {}).items():
        section, _, name = key.partition(".")
        config[section] = {**config[section], name: value}
    content: dict[str, Any] = {
        "task": task, "model": "clip_vit_b32", "method": method, "shots": shots, "fraction": None, "seed": seed,
        "signature": signature(config | {"names": [method, task]}), "config": config, "status": "finished",
        "headline": Headline("test/accuracy", score), "steps": 7, "train_seconds": 12.5, "peak_memory_bytes": 3 * 2**20,
        "trainable_parameters": {"lora": 3000, "vera": 200}.get(method, 2500),
        "metrics": {"test/accuracy": score, "zero_shot/accuracy": 0.4, "validation/accuracy": 0.5},
    }  # fmt: skip
    return Result(**(content | changes))


def small() -> list[Result]:
    return [run(*names, seed, score) for names, scores in SCORES.items() for seed, score in enumerate(scores)]


def write(results: list[Result], root: Path) -> Path:
    for result in results:
        folder = root / result.task / result.method / result.signature
        folder.mkdir(parents=True)
        result.write(folder / "result.json")
        row = {"step": 1, "time": 5.0, "train/loss": 0.25, "train/learning_rate": 1e-3}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return root


def test_the_papers_layout_by_hand() -> None:
    """Means, sample deviations, places and missing cells worked out by hand; Table 11 has the scores in brackets."""
    (grid,) = grids("mine", arms(small()), read_scores())
    assert markdown_table(grid).splitlines() == [
        "mine: clip_vit_b32, test scores, %, accuracy where no other metric is named; 2 to 3 seeds, mean ± sample "
        "deviation; the best of a budget in bold, the second underlined, in brackets the paper’s.",
        "",
        "| budget | method | trained parameters | cifar10 | dtd | average |",
        "|---|---|---|---|---|---|",
        "| 16 shots | before training |  | 40.0 | 40.0 | – |",
        "| 16 shots | lora | 3,000 | <ins>91.0 ± 1.4 [93.0]</ins> | 50.0 ± 1.4 [64.8] | 70.5 |",
        "| 16 shots | randlora | 2,500 | **93.0 ± 0.0 [92.0]** | **51.0 ± 2.8 [70.2]** | **72.0** |",
        "| 16 shots | vera | 200 | 89.7 ± 1.5 [93.3] | – | – |",
    ]
    lines = latex_table(grid).splitlines()
    assert r"budget & method & parameters & cifar10 & dtd & average \\" in lines
    assert r" & lora & 3,000 & \underline{91.0 ± 1.4 [93.0]} & 50.0 ± 1.4 [64.8] & 70.5 \\" in lines
    assert lines[4] == r"\toprule"
    assert lines[-3:] == [r"\bottomrule", r"\end{tabular}", r"\end{table}"]


def test_latex_escapes_names_and_parts_budgets() -> None:
    results = [run(name, "tiny_imagenet", 0, 0.5, shots) for name in ("lora", "vera") for shots in (4, 16)]
    (grid,) = grids("a_study", arms(results), {})
    text = latex_table(grid)
    assert "a\\_study: clip\\_vit\\_b32, test scores, \\%," in text
    assert text.count(r"\cmidrule{1-4}") == 1
    assert not re.search(r"(?<!\\)_", text.replace("\\_", ""))


def test_two_of_a_column_are_not_ranked_second() -> None:
    """An underlined last place would say nothing; equal means share their place, and one alone has none."""
    scores = {"lora": 0.5, "vera": 0.5, "full": 0.4}
    for names, places in ((("lora", "full"), [1, 0]), (("lora", "vera", "full"), [1, 1, 2]), (("lora",), [0])):
        (grid,) = grids("", arms([run(name, "dtd", 0, scores[name]) for name in names]), {})
        by_label = {line.label: line.entries["dtd"].place for line in grid.lines[1:]}
        assert [by_label[name] for name in names] == places


def test_settings_are_chosen_on_validation_and_variants_are_arms() -> None:
    """The test score says the opposite of the validation score, and more seeds win over both."""
    rates = {
        rate: run(
            "lora", "dtd", 0, test, config={"trainer.learning_rate": rate}, metrics={"validation/accuracy": score}
        )
        for rate, test, score in ((0.1, 0.9, 0.3), (0.2, 0.1, 0.6), (0.3, 0.5, 0.2))
    }
    (arm,) = arms([*rates.values()])
    assert (arm.label, arm.mean, len(arm.tried)) == ("lora", pytest.approx(10), 3)
    second = replace(rates[0.3], seed=1, config={**rates[0.3].config, "seed": 1})
    (arm,) = arms([*rates.values(), second])
    assert arm.scores == {0: pytest.approx(50), 1: pytest.approx(50)}
    unknown = [replace(rates[rate], metrics={}) for rate in (0.1, 0.2)]
    assert [arm.label for arm in arms(unknown)] == [
        "lora, trainer.learning_rate=0.1",
        "lora, trainer.learning_rate=0.2",
    ]
    bases = [run("lora", "dtd", 0, 0.5, config={"method.basis": basis}) for basis in ("uniform", "normal")]
    assert sorted(arm.label for arm in arms(bases)) == ["lora, basis=normal", "lora, basis=uniform"]
    assert arms([replace(bases[0], status="failed")]) == []


@pytest.mark.parametrize(
    ("model", "method", "rank", "task", "shots", "printed"),
    [
        ("clip_vit_b32", "randlora", 8, "cifar10", 16, ("92.0", "table11 rank 6")),
        ("clip_vit_b32", "full", 8, "cifar10", None, ("97.9", "table11")),  # all of the data is its fraction 1
        ("roberta_base", "randlora", 8, "cola", None, ("59.4", "table4 rank 64")),
        ("llama3_8b", "randlora", 30, "commonsense_15k", None, ("81.31", "table15 rank 30")),
        ("llama3_8b", "randlora", 31, "commonsense_15k", None, None),  # it has several ranks, and this is none of them
        ("llama3_8b", "vera", 31, "commonsense_15k", None, ("77.14", "table15 rank 1024")),
        ("clip_vit_b32", "sora", 8, "cifar10", 16, None),
    ],
)
def test_the_papers_score_is_of_the_same_cell(
    model: str, method: str, rank: int, task: str, shots: int | None, printed: tuple[str, str] | None
) -> None:
    """As the paper prints them."""
    result = replace(run(method, task, 0, 0.5, config={"method.rank": rank}), model=model, shots=shots)
    score = beside(read_scores(), result)
    assert (score and (score.text, score.source)) == printed


def test_frames_are_read_back_as_the_results(tmp_path: Path) -> None:
    """Oracle: pandas reads both files; every value is compared with the result it comes from."""
    failed = run("lora", "dtd", 7, None, status="failed", error="no memory", metrics={}, train_seconds=None)
    parts = load([write([*small(), failed], tmp_path / "runs")])
    frame = tidy(parts)
    frame.to_csv(tmp_path / "results.csv", index=False)
    frame.to_parquet(tmp_path / "results.parquet", index=False)
    by_signature = {result.signature: result for result in [*small(), failed]}
    for table in (pandas.read_csv(tmp_path / "results.csv"), pandas.read_parquet(tmp_path / "results.parquet")):
        assert len(table) == len(by_signature) == len(set(table["signature"])) == 12
        for row in table.to_dict("records"):
            result = by_signature[row["signature"]]
            assert row["part"] == "runs"
            for name in ("task", "model", "method", "shots", "seed", "status", "trainable_parameters", "steps"):
                assert row[name] == getattr(result, name)
            for name, value in (
                ("score", result.headline.value), ("train_seconds", result.train_seconds), ("error", result.error),
                *((name, result.metrics.get(name)) for name in ("test/accuracy", "validation/accuracy")),
            ):  # fmt: skip
                assert pandas.isna(row[name]) if value is None else row[name] == value
    assert not {"data_root", "trainer.learning_rate", "method.rank"} & set(
        frame.columns
    )  # they are the same everywhere
    columns = set(frame.columns) - set(tidy(parts, cost=False).columns)
    assert columns == {"train_seconds", "seconds_per_step", "peak_memory_bytes"}


def test_settings_that_differ_are_columns() -> None:
    results = [
        run("lora", "dtd", seed, 0.5, config={"method.rank": rank, "method.basis": basis, "trainer.workers": seed})
        for seed, (rank, basis) in enumerate([(4, "uniform"), (8, None), (8, [1, 2])])
    ]
    frame = tidy([Part("runs", results)])
    assert frame["method.rank"].tolist() == [4, 8, 8]
    assert frame["method.rank"].dtype == "Int64"
    assert frame["method.basis"].fillna("").tolist() == ["uniform", "", "[1, 2]"]
    assert "trainer.workers" not in frame  # which changes no result


def test_differences_are_scipys_and_their_correction_is_statsmodels() -> None:
    compared = comparisons(arms(small()))
    assert list(compared) == ["lora", "randlora", "vera"]
    pairs = [("cifar10", "lora", 2), ("cifar10", "vera", 2), ("dtd", "lora", 2)]
    expected = []
    for task, other, seeds in pairs:
        scores = [100 * np.array(SCORES[name, task][:seeds]) for name in ("randlora", other)]
        expected.append((task, other, scores[0].mean() - scores[1].mean(), ttest_rel(*scores)))
    corrected = multipletests([test.pvalue for *_, test in expected], method="holm")[1]
    ours = sorted((pair.where.task, pair.other, pair) for pair in compared["randlora"])
    for (task, other, pair), (task_, other_, mean, test), p in zip(ours, expected, corrected, strict=True):
        interval = test.confidence_interval()
        assert (task, other) == (task_, other_)
        assert (pair.difference.mean, pair.difference.p, pair.holm) == pytest.approx((mean, test.pvalue, p))
        assert (pair.difference.low, pair.difference.high) == pytest.approx((interval.low, interval.high))
    (back,) = [pair for pair in compared["lora"] if (pair.other, pair.where.task) == ("randlora", "dtd")]
    there = ours[2][2].difference
    assert (back.difference.mean, back.difference.low, back.difference.high) == (-there.mean, -there.high, -there.low)


@pytest.mark.parametrize(("partial", "chosen", "cells"), [(1, 3, 3), (2, 5, 2)])
def test_ranks_are_scipys_over_the_largest_whole_block(partial: int, chosen: int, cells: int) -> None:
    """Three methods are in three cells, 9 pairs; with one more in two of them there are 8, and with two more 10."""
    names = ["full", "lora", "randlora", "sora", "vera"][: 3 + partial]
    table = {name: np.random.default_rng(index).random(3) for index, name in enumerate(names)}
    results = [
        run(name, f"task{index}", 0, float(score))
        for name, scores in table.items()
        for index, score in enumerate(scores[: 2 if name in names[3:] else 3])
    ]
    ranked = ranking(arms(results))
    assert ranked is not None
    assert (len(ranked.ranks.average), len(ranked.cells)) == (chosen, cells)
    expected = rankdata([-table[name][:cells] for name in names[:chosen]], axis=0).mean(1)
    assert list(ranked.ranks.average.values()) == pytest.approx(expected)
    assert ranking(arms(small())) is None


def test_a_command_repeats_the_run() -> None:
    """Oracle: the signature in the record, which the settings of the command line must have again."""
    results = [result for result in read(STUDIES) if result.signature == signature(result.config, result.task_version)]
    several = {(result.method, result.model): result for result in results}
    chosen = [several[names] for names in [("lora", "minilm"), ("randlora", "smollm2_135m"), ("vera", "clip_tiny")]]
    commands = Commands([*chosen, replace(chosen[0], method="own")])
    for result in chosen:
        command = commands.of(result)
        assert command.later == []
        program, script, *overrides = shlex.split(command.line)
        assert (program, script) == ("python", "train.py")
        assert signature(settings(*overrides), result.task_version) == result.signature
    assert commands.of(replace(chosen[0], method="own")).line == ""


def test_a_setting_that_is_newer_than_the_record_is_named() -> None:
    (result,) = read(STUDIES / "pretrain_clip_tiny")
    command = Commands([result]).of(result)
    assert "trainer.min_steps_per_epoch" in command.later
    assert not set(command.later) & set(flat_settings(result))


@pytest.mark.parametrize(
    "value", [None, True, 3, 1e-4, "bf16", "a b", "it's", "100", "", "a,b", ["*.c_fc", 1], {"a": None}]
)
def test_values_are_read_back_by_hydra(value: object) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"key={hydra_value(value)}"])
    assert override.value() == value
    assert type(override.value()) is type(value)


def test_the_index_is_up_to_date() -> None:
    """python scripts/report.py --index > experiments/README.md"""
    text = (STUDIES / "README.md").read_text()
    assert text == index.page(STUDIES) + "\n"
    rows = {row.split("](")[0].lstrip("| ["): row for row in text.splitlines() if row.startswith("| [")}
    assert len(rows) == len(list(STUDIES.glob("*/README.md")))
    assert (
        "| Which trains better? | 18 | nola | clip_tiny | digits | [finding](nola_start/" in rows["Two starts of NoLA"]
    )
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (STUDIES / link).is_file(), link


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of runs of which one failed, beside them in `report`."""
    folder = tmp_path_factory.mktemp("report")
    searched = [
        run(
            "lora",
            "dtd",
            0,
            0.3,
            config={"trainer.learning_rate": rate},
            metrics={"validation/accuracy": score},
            shots=4,
        )
        for rate, score in ((0.01, 0.2), (0.1, 0.3))
    ]
    failed = run("vera", "dtd", 0, None, status="failed", error="<b>no</b> memory </script>", metrics={})
    write([*small(), *searched, failed], folder / "runs")
    report.main([str(folder / "runs"), "--into", str(folder / "report"), "--without-cost"])
    return folder


def test_the_same_results_are_the_same_bytes(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, by `randlora report`, with other times and memory, and written in another order."""
    for path in sorted((written / "runs").rglob("result.json"), reverse=True):
        result = Result.read(path)
        folder = tmp_path / "elsewhere" / "runs" / path.parent.relative_to(written / "runs")
        folder.mkdir(parents=True)
        config = {**result.config, "data_root": "/elsewhere"}
        replace(result, train_seconds=99.0, peak_memory_bytes=1, config=config).write(folder / "result.json")
        row = json.loads((path.parent / "metrics.jsonl").read_text())
        (folder / "metrics.jsonl").write_text(json.dumps(row | {"time": 6.0}) + "\n")
    runs, into = str(tmp_path / "elsewhere" / "runs"), str(tmp_path / "report")
    monkeypatch.setattr(sys, "argv", ["randlora", "report", runs, "--into", into, "--without-cost"])
    assert cli.main() == 0
    names = sorted(path.relative_to(written / "report") for path in (written / "report").rglob("*") if path.is_file())
    assert [path.as_posix() for path in names] == [
        "figures/runs.pdf", "figures/runs.png", "figures/runs.svg", "index.html", "results.csv", "results.parquet",
        "tables.md", "tables.tex",
    ]  # fmt: skip
    for name in names:
        content = (written / "report" / name).read_bytes()
        assert (tmp_path / "report" / name).read_bytes() == content, name
        assert b"/home/someone" not in content


class Outline(HTMLParser):
    """What a reader with a screen reader, and a browser without a network, get of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.unlabelled: list[str] = []
        self.scripts: dict[str, str] = {}
        self._script = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.references += [str(given[name]) for name in ("src", "href", "aria-labelledby") if name in given]
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if tag in ("select", "input") and "label" not in self.open:
            self.unlabelled.append(str(given))
        if tag == "script":
            self._script = given.get("id") or given.get("type") or ""
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


def test_the_page_is_whole_and_needs_nothing_else(written: Path) -> None:
    text = (written / "report" / "index.html").read_text()
    page = Outline(text)
    assert page.open == []
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert len(set(page.ids)) == len(page.ids)
    assert page.unlabelled == []
    for reference in page.references:
        assert reference.lstrip("#") in page.ids or reference.startswith(("#run=", "data:,")), reference
    assert 500_000 < len(text.encode()) < 5_000_000
    data = json.loads(page.scripts["data"])
    runs = {run["id"]: run for run in data["runs"]}
    assert len(runs) == 14
    compared = [address for arm in data["arms"] for address in arm["runs"]]
    assert len(compared) == len(set(compared)) == len(small()) + 1  # of the searched settings the chosen one
    chosen = {row["rate"]: row["chosen"] for row in data["rates"]}
    assert chosen == {0.01: False, 0.1: True}
    failed = next(run for run in data["runs"] if run["status"] == "failed")
    assert failed["error"] == "<b>no</b> memory </script>"
    assert "train_seconds" not in failed
    for address in re.findall(r"#run=([^\"]+)", text[: text.index("<dialog")]):
        assert set(unquote(address).split("|")) <= set(runs)
    assert data["curves"][failed["id"]] == {"train/loss": [[1], [0.25]]}
    # The settings of every run, each value once.
    keys = list(data["settings"]["values"])
    row = data["settings"]["rows"][data["runs"].index(failed)]
    own = {key: json.loads(data["settings"]["values"][key][at]) for key, at in zip(keys, row, strict=True) if at >= 0}
    assert (own["method.rank"], own["seed"], own["data_root"]) == (32, 0, "FOLDER")


def test_a_record_cannot_become_markup(written: Path) -> None:
    """What a record says is text, in the data and in the tables."""
    text = (written / "report" / "index.html").read_text()
    assert "<b>no</b>" not in text
    assert text.count("</script") == 3  # of the charts' library, the data and the page's own


ROWS = [
    {
        "label": label, "method": label, "mean": 50.0 + i, "low": 49.0 + i, "high": 51.0 + i, "before": 40.0,
        "holm": 0.01 * i, "parameters": 10.0 ** (i + 1), "budget": str(i), "order": i, "seeds": 2, "shown": "50",
        "rate": 10.0**-i,
        "validation": 50.0 + i, "test": 1.0, "chosen": i == 1, "scale": "", "id": label, "seed": i, "step": i + 1,
        "value": 1.0 / (i + 1), "name": f"less {label}", "average": 1.0 + i, "seconds": 1.0, "mebibytes": 1.0,
    }
    for i, label in enumerate(("lora", "vera", "full"))
]  # fmt: skip


@pytest.mark.parametrize("name", charts())
def test_charts_draw_a_mark_for_every_row(name: str) -> None:
    """Oracle: Vega-Lite itself draws them; a word that nothing fills, or a wrong field, draws less."""
    vl_convert = pytest.importorskip("vl_convert", reason="needs pip install 'randlora[report]'")
    words: dict[str, Any] = {
        "$x": "parameters", "$x_title": "trained parameters", "$y_title": "accuracy, %",
        "$labels": ["full", "lora", "vera"],
        "$colours": ["#000000", "#0072B2", "#009E73"], "$shapes": list(SHAPES[:3]), "$columns": 3, "$label_limit": 200,
        "$height": 100,
    }  # fmt: skip
    assert set(words) == set(WORDS)

    def filled(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        if isinstance(value, str):
            return words[value] if value in words else value.replace("$x", words["$x"])
        return value

    spec = {**filled(charts()[name]), "width": 400, "datasets": {"rows": ROWS}}
    assert "$" not in re.sub(r'"\$schema"', "", json.dumps(spec))
    drawing = vl_convert.vegalite_to_svg(spec)
    points = {"pareto": 3, "budgets": 3, "rates": 3 + 1, "curves": 3, "differences": 3, "ranks": 3}
    assert drawing.count('aria-roledescription="point"') == points[name]


def test_analyses_beside_the_records_have_a_place(tmp_path: Path) -> None:
    """Means worked out by hand; the page stays whole, with the figure in it and described."""
    runs = write(small(), tmp_path / "runs")
    rows = [
        {"model": "m", "task": "dtd", "layer": str(layer), "run": name, "against": "full", "cka": value}
        for name, values in {"lora": (0.5, 0.75), "</td>": (1.0, 0.5)}.items()
        for layer, value in enumerate(values)
    ]
    (runs / "cka.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = load([runs])
    assert [analysis.lines() for part in parts for analysis in part.analyses] == [
        [["m", "dtd", "lora", "full", "0.625"], ["m", "dtd", "</td>", "full", "0.75"]]
    ]
    report.report(parts, tmp_path / "report", "randlora", {})
    assert "| m | dtd | lora | full | 0.625 |" in (tmp_path / "report" / "tables.md").read_text()
    text = (tmp_path / "report" / "index.html").read_text()
    page = Outline(re.sub(r"(<img[^>]*)>", r"\1></img>", text))
    assert page.open == []
    assert page.unlabelled == []
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    (alt, image) = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)">', text)[0]
    assert alt.startswith("Linear CKA")
    assert base64.b64decode(image) == (tmp_path / "report" / "figures" / "runs_cka.svg").read_bytes()
    (runs / "cka.jsonl").unlink()
    about = {"model": "m", "task": "dtd", "run": "lora 1", "method": "lora", "arm": "lora, alpha=4", "on": "retention"}
    asked = about | {"metric": "token_loss", "at_score": 0.4, "before": 3.0, "relative_norm": 0.1, "validation": 0.5}
    reached = [asked | {"seed": seed, "step": 4 + seed, "after": 3.5, "change": 0.5 + seed} for seed in range(2)]
    never = asked | {"seed": 2, "step": 9, "after": None, "change": None, "relative_norm": None}
    at_end = {key: value for key, value in reached[0].items() if key not in ("at_score", "step", "validation")}
    (runs / "forgetting_late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*reached, never, at_end]))
    ((late,),) = (part.analyses for part in load([runs]))
    assert late.lines() == [
        ["m", "dtd", "retention", "token_loss", "0.4", "lora, alpha=4", "6", "0.5", "1", "0.1"],
        ["m", "dtd", "retention", "token_loss", "", "lora, alpha=4", "", "", "0.5", "0.1"],
    ]
    assert (late.command, late.columns()[:3]) == ("forgetting", ["model", "task", "on"])
    figures.draw(late.rows, tmp_path / "late.svg")
    assert "lora, alpha=4" in (tmp_path / "late.svg").read_text()
    (runs / "forgetting_late.jsonl").unlink()
    (runs / "cka.jsonl").write_text('{"model": "m"}\n')
    with pytest.raises(SettingsError, match=r"cka.jsonl has rows without against"):
        load([runs])


def test_a_marker_in_print_is_a_shape_on_the_page() -> None:
    assert len(SHAPES) == len(MARKERS) == len(set(MARKERS))
    assert len(COLOURS) > len(MARKERS)


@pytest.mark.parametrize("missing", report.NEEDED)
def test_a_missing_package_is_a_sentence(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == missing else object())
    parts = [Part("runs", small())]
    with pytest.raises(SettingsError, match=rf"needs {missing}: pip install 'randlora\[report\]'"):
        report.report(parts, tmp_path / "report", "randlora", {})
    assert not (tmp_path / "report").exists()


def test_what_cannot_be_reported_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("a", "b"):
        (tmp_path / where).mkdir()
        shutil.copytree(STUDIES / "nola_start", tmp_path / where / "study")
    with pytest.raises(SettingsError, match="studies of one name"):
        load([tmp_path])
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"file cannot be written: Not a directory"):
        report.report([Part("runs", small())], tmp_path / "file", "randlora", {})
    monkeypatch.setattr(sys, "argv", ["randlora", "report", str(tmp_path / "none"), "--into", str(tmp_path / "x")])
    assert cli.main() == 2


def test_parts_are_collections_of_studies() -> None:
    parts = {part.name: part for part in load([STUDIES / "nola_start"])}
    assert {name: len(part.results) for name, part in parts.items()} == {"nola_start": 10, "nola_start, search": 8}
    (only,) = load([STUDIES / "nola_start"], ["collection=search", "method.start=ones"])
    assert (only.name, len(only.results)) == ("nola_start, search", 4)
    rows = only.curves[only.results[0].signature]
    assert rows[0].step == 1
    assert all(isinstance(row.metrics["train/loss"], float) for row in rows if "train/loss" in row.metrics)
