"""A report of runs and studies: tidy tables, the paper's layouts, figures, and one page that works offline.

randlora report runs --into report
randlora report experiments --into report                all committed studies
randlora report experiments/image_protocol --into report --only collection=records task=cifar10
randlora report runs --into report --without-cost        without times and memory, which differ when runs are repeated

The folder holds results.csv and results.parquet, a row per run; tables.md and tables.tex (LaTeX's booktabs), methods ×
data sets under each budget; figures/ as SVG, PDF and PNG; and index.html. The same records give the same files.
"""

from __future__ import annotations

import argparse
import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from randlora.errors import SettingsError
from randlora.integrity import write
from randlora.records.metrics import Row
from randlora.studies import tables
from randlora.studies.arms import Arm, Part, arms, load
from randlora.studies.comparisons import Compared, Comparison, comparisons, ranking
from randlora.studies.figures import draw
from randlora.studies.frame import tidy
from randlora.studies.groups import spread
from randlora.studies.layouts import Grid, grids, latex_table, markdown_table
from randlora.studies.page import page
from randlora.studies.published import FOLDER, Scores, read_scores
from randlora.studies.rates import tried

NEEDED = ("pandas", "pyarrow", "jinja2", "vl_convert", "matplotlib")
FORMATS = ("svg", "pdf", "png")


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(
        prog="randlora report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUNS|STUDY", help="a folder of runs or studies")
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="where the report is written")
    parser.add_argument("--only", metavar="KEY=VALUE", nargs="+", default=[], help="runs that have one of the values")
    parser.add_argument("--reference", default="randlora", metavar="METHOD", help="what others are compared with")
    parser.add_argument("--published", type=Path, default=FOLDER, metavar="FOLDER", help="of the paper's tables")
    parser.add_argument("--without-cost", action="store_true", help="leave out times and memory")
    options = parser.parse_args(arguments)
    parts = load(options.paths, options.only)
    gc.freeze()  # statsmodels looks through everything at each of its tests for what it could free
    report(parts, options.into, options.reference, read_scores(options.published), cost=not options.without_cost)
    print(options.into / "index.html")


def report(parts: Sequence[Part], folder: Path, reference: str, published: Scores, cost: bool = True) -> None:
    """Writes a report.

    Args:
        parts: Of studies, or of folders of runs.
        folder: Where to, made where there is none.
        reference: The method that the others are compared with, where it is one of a part's.
        published: The paper's scores.
        cost: Whether to give times and memory, which differ when runs are done again.

    Raises:
        SettingsError: A package that it needs is missing, or the folder cannot be written.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise SettingsError(f"a report needs {', '.join(missing)}: pip install 'randlora[report]'")
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written: {error.strerror}; give another --into") from error
    of_parts = {part.name: arms(part.results) for part in parts}
    # Figures and the page take about as long: each has a process.
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        drawn = pool.submit(_figures, of_parts, folder / "figures")
        frame = tidy(parts, cost)
        frame.to_csv(folder / "results.csv", index=False)
        frame.to_parquet(folder / "results.parquet", index=False)
        layouts = {name: grids(name, of_part, published) for name, of_part in of_parts.items()}
        write(folder / "tables.tex", "".join(f"{latex_table(grid)}\n" for part in layouts.values() for grid in part))
        compared = {name: comparisons(of_part) for name, of_part in of_parts.items()}
        sections = [
            _section(part, of_parts[part.name], layouts[part.name], compared[part.name], reference) for part in parts
        ]
        write(folder / "tables.md", "\n\n".join(["# Tables", *sections]) + "\n")
        pictures = {part.name: _pictures(part, folder / "figures") for part in parts}
        title = _title(parts)
        write(folder / "index.html", page(title, parts, of_parts, layouts, compared, reference, cost, pictures))
        drawn.result()


def _title(parts: Sequence[Part]) -> str:
    names = list(dict.fromkeys(part.name.partition(",")[0] for part in parts))
    return f"Report of {', '.join(names) if len(names) < 4 else f'{len(names)} studies'}"


def _figures(of_parts: Mapping[str, Sequence[Arm]], folder: Path) -> None:
    """A figure of each part, of the cells in which there are two arms or more to compare."""
    for name, of_part in of_parts.items():
        counts = Counter(arm.where for arm in of_part)
        if runs := [run for arm in of_part if counts[arm.where] > 1 for run in arm.runs]:
            draw(runs, *(folder / f"{name.replace(', ', '_')}.{ending}" for ending in FORMATS))


def _pictures(part: Part, folder: Path) -> dict[str, str]:
    """The figures of a part's analyses, by name, as SVG for the page; they are written to `folder` in all formats."""
    pictures = {}
    for analysis in part.analyses:
        from randlora.use.figures import draw as draw_analysis  # which imports torch

        stem = f"{part.name.replace(', ', '_')}_{analysis.name}"
        draw_analysis(analysis.rows, *(folder / f"{stem}.{ending}" for ending in FORMATS))
        pictures[analysis.name] = (folder / f"{stem}.svg").read_text()
    return pictures


def _section(
    part: Part, of_part: Sequence[Arm], layouts: Sequence[Grid], compared: Compared, reference: str
) -> str:  # fmt: skip
    """A part in tables.md."""
    name, curves = part.name, part.curves
    texts = [f"## {name}", *map(markdown_table, layouts)]
    if len(of_part) == 0:
        texts.append("No run has finished.")
    if searched := _searches(of_part, curves):
        texts.append(searched)
    if compared:
        texts.append(_differences(of_part, compared.get(reference, next(iter(compared.values())))))
    if (ranked := ranking(of_part)) is not None:
        rows = sorted(ranked.ranks.average.items(), key=lambda item: (item[1], item[0]))
        note = (
            f"Average ranks over {len(ranked.cells)} cells; critical difference {ranked.ranks.critical_difference:.2f} "
            f"(Nemenyi, 5 %), p of Friedman's test {ranked.ranks.p:.3f}."
        )
        table = tables.markdown(["method", "average rank"], [(label, f"{average:.2f}") for label, average in rows])
        texts.append(f"{note}\n\n{table}")
    for analysis in part.analyses:
        table = tables.markdown(analysis.columns(), analysis.lines())
        texts.append(f"{analysis.summary.caption} (`randlora {analysis.command}`).\n\n{table}")
    return "\n\n".join(texts)


def _searches(of_part: Sequence[Arm], curves: Mapping[str, Sequence[Row]]) -> str:
    """What was chosen where several learning rates were tried, and whether at an end of them."""
    names = ["task", "model", "budget", "method", "settings tried", "rates", "chosen", "validation, %", "at an end"]
    rows = []
    for arm in of_part:
        points = tried(arm, curves)
        for point in points:
            if point.chosen:
                rates = f"{points[0].rate:.3g} to {points[-1].rate:.3g}"
                settings = ", ".join(filter(None, [f"{point.rate:.3g}", point.scale]))
                rows.append([
                    arm.where.task, arm.where.model, arm.where.data, arm.label, len(arm.tried), rates, settings,
                    f"{point.validation:.1f}", "yes" if point.edge else "",
                ])  # fmt: skip
    return f"What was searched; validation chose.\n\n{tables.markdown(names, rows)}" if rows else ""


def _differences(of_part: Sequence[Arm], pairs: Sequence[Comparison]) -> str:
    scores = {(arm.where, arm.label): list(arm.scores.values()) for arm in of_part}
    rows = [
        [
            f"{pair.reference} - {pair.other}", pair.where.task, pair.where.model, pair.where.data,
            spread(scores[pair.where, pair.reference]), spread(scores[pair.where, pair.other]),
            *tables.difference_cells(pair.difference, pair.holm),
        ]
        for pair in pairs
    ]  # fmt: skip
    return tables.markdown(["method", *tables.DIFFERENCE_NAMES], rows)
