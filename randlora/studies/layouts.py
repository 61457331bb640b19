"""Tables as the paper has them: methods × data sets, a block of rows per budget; as Markdown and as LaTeX."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from randlora.studies.arms import Arm, baselines
from randlora.studies.published import Scores, beside
from randlora.studies.tables import markdown

MISSING = "–"
AVERAGE = "average"


class Entry(NamedTuple):
    """A method's score on a data set, per cent.

    Args:
        mean: Over seeds.
        deviation: The sample deviation, None of a single seed.
        seeds: How many.
        published: The paper's score for the same cell as printed, "" where it has none.
        place: 1 for the best of the column in its block, 2 for the second, 0 for others and where there is one alone.
        arm: Where it comes from; None of an average.
    """

    mean: float
    deviation: float | None
    seeds: int
    published: str = ""
    place: int = 0
    arm: Arm | None = None

    @property
    def text(self) -> str:
        """Mean ± deviation, and the paper's in brackets."""
        deviation = f" ± {self.deviation:.1f}" if self.deviation is not None else ""
        return f"{self.mean:.1f}{deviation}{f' [{self.published}]' if self.published else ''}"


class Line(NamedTuple):
    """A row: a method under a budget, its trained parameters as text, and its entries by column."""

    budget: str
    label: str
    parameters: str
    entries: dict[str, Entry]


class Grid(NamedTuple):
    """A model's table: the columns' names, and rows by budget.

    Args:
        part: The name of the part of a study that it is of.
        model: The model's name.
        columns: Data sets, with the metric where it is no accuracy, and ``average``.
        lines: By budget, and in it the score before training and the methods.
    """

    part: str
    model: str
    columns: list[str]
    lines: list[Line]

    @property
    def caption(self) -> str:
        """What the table shows."""
        seeds = sorted({entry.seeds for line in self.lines for entry in line.entries.values() if entry.seeds})
        shown = f"{seeds[0]} seed{'s' * (seeds[0] > 1)}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        of = f"{shown}{', mean ± sample deviation' if seeds[-1] > 1 else ''}"
        papers = any(entry.published for line in self.lines for entry in line.entries.values())
        return (
            f"{self.part}: {self.model}, test scores, %, accuracy where no other metric is named; {of}; "
            f"the best of a budget in bold, the second underlined{', in brackets the paper’s' if papers else ''}"
        )


def grids(part: str, arms: Sequence[Arm], published: Scores) -> list[Grid]:
    """The tables of a part, one per model, with the baselines of its cells; these alone where there is nothing else."""
    models = dict.fromkeys(arm.where.model for arm in arms if not arm.is_baseline)
    models = models or dict.fromkeys(arm.where.model for arm in arms)
    return [_grid(part, model, _with_baselines(model, arms), published) for model in models]


def _with_baselines(model: str, arms: Sequence[Arm]) -> list[Arm]:
    own = [arm for arm in arms if arm.where.model == model]
    beside = {id(arm): arm for where in dict.fromkeys(arm.where for arm in own) for arm in baselines(where, arms)}
    return [*own, *(arm for arm in beside.values() if arm.where.model != model)]


def _grid(part: str, model: str, arms: Sequence[Arm], published: Scores) -> Grid:
    names = {arm.where.task: _column(arm) for arm in sorted(arms, key=lambda arm: arm.where.task)}
    blocks: dict[str, list[Arm]] = {}
    for arm in sorted(arms, key=lambda arm: arm.where._replace(task="").order):
        blocks.setdefault(arm.where.budget, []).append(arm)
    lines = [line for budget, block in blocks.items() for line in _block(budget, block, names, published)]
    average = [AVERAGE] if any(AVERAGE in line.entries for line in lines) else []
    return Grid(part, model, [*names.values(), *average], lines)


def _block(budget: str, arms: Sequence[Arm], names: dict[str, str], published: Scores) -> list[Line]:
    columns: dict[str, list[tuple[str, Entry]]] = {}  # by column, the entries by label
    before: dict[str, Entry] = {}
    for arm in arms:
        theirs, column = beside(published, arm.runs[0]), names[arm.where.task]
        entry = Entry(arm.mean, arm.deviation, len(arm.runs), theirs.text if theirs else "", arm=arm)
        columns.setdefault(column, []).append((arm.label, entry))
        if (start := arm.runs[0].before) is not None:
            before[column] = Entry(100 * start, None, 0)
    labels = sorted({arm.label for arm in arms})
    rows = {label: {column: dict(entries).get(label) for column, entries in columns.items()} for label in labels}
    if len(columns) > 1:
        whole = {label: [entry.mean for entry in row.values() if entry] for label, row in rows.items()}
        whole = {label: means for label, means in whole.items() if len(means) == len(columns)}
        averages = [(label, Entry(statistics.mean(means), None, 0)) for label, means in whole.items()]
        columns |= {AVERAGE: averages} if averages else {}
    placed = {column: _placed(entries) for column, entries in columns.items()}
    lines = [Line(budget, "before training", "", before)] if before else []
    for label in labels:
        entries = {column: placed[column][label] for column in columns if label in placed[column]}
        counts = sorted({arm.runs[0].trainable_parameters or 0 for arm in arms if arm.label == label})
        shown = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
        lines.append(Line(budget, label, shown, entries))
    return lines


def _placed(entries: Sequence[tuple[str, Entry]]) -> dict[str, Entry]:
    """The entries of a column, with the places of the best and the second; equal means share theirs."""
    ranked = sorted({entry.mean for _, entry in entries}, reverse=True)[: 2 if len(entries) > 2 else len(entries) - 1]
    return {
        label: entry._replace(place=ranked.index(entry.mean) + 1 if entry.mean in ranked else 0)
        for label, entry in entries
    }


def _column(arm: Arm) -> str:
    metric = arm.runs[0].metric
    return arm.where.task if metric == "accuracy" else f"{arm.where.task} ({metric})"


def markdown_table(grid: Grid) -> str:
    """As Markdown under its caption."""
    styles = ("{}", "**{}**", "<ins>{}</ins>")
    rows = [
        [
            line.budget, line.label, line.parameters,
            *(styles[entry.place].format(entry.text) if (entry := line.entries.get(column)) else MISSING
              for column in grid.columns),
        ]
        for line in grid.lines
    ]  # fmt: skip
    return f"{grid.caption}.\n\n{markdown(['budget', 'method', 'trained parameters', *grid.columns], rows)}"


def latex_table(grid: Grid) -> str:
    r"""As a LaTeX table with the rules of the package booktabs: ``\usepackage{booktabs}`` is all that it needs."""
    import pandas

    index = pandas.MultiIndex.from_tuples([(line.budget, line.label) for line in grid.lines])
    texts, styles = (
        pandas.DataFrame(
            [
                [first, *(show(line.entries.get(column)) for column in grid.columns)]
                for line, first in zip(grid.lines, firsts, strict=True)
            ],
            index=index,
            columns=["parameters", *grid.columns],
        )
        for show, firsts in (
            (lambda entry: entry.text if entry else MISSING, [line.parameters for line in grid.lines]),
            (lambda entry: _LATEX[entry.place] if entry else "", [""] * len(grid.lines)),
        )
    )
    styler = texts.style.format(escape="latex").format_index(escape="latex").format_index(escape="latex", axis=1)
    labels = r"p{0.3\textwidth}" if max(len(line.label) for line in grid.lines) > 40 else "l"
    text = styler.apply(lambda _: styles, axis=None).to_latex(
        hrules=True, multirow_align="naive", clines="skip-last;data", position="t", position_float="centering",
        column_format=f"l{labels}r{'r' * len(grid.columns)}", caption=_escaped(grid.caption),
    )  # fmt: skip
    text = text.replace(" &  & parameters", "budget & method & parameters", 1)
    # A rule of booktabs after every budget but the last, which has the one below.
    return re.sub(r" *\\cline(\{[^}]*\})\n(\\bottomrule)?", lambda rule: rule[2] or rf"\cmidrule{rule[1]}" + "\n", text)


_LATEX = ("", "textbf:--rwrap;", "underline:--rwrap;")


def _escaped(text: str) -> str:
    for character in "&%#_":
        text = text.replace(character, "\\" + character)
    return text
