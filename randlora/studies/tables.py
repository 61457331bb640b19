"""Tables of results: text that pages hold as it is."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from rich.table import Table

from randlora.records import Result
from randlora.studies.groups import by_settings, cell, finished, paired, percent, spread, value
from randlora.studies.published import beside, read_scores
from randlora.studies.statistics import Difference, holm


def markdown(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; cells become text as they are."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (names, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(names), *lines[1:]])


def each(results: Sequence[Result]) -> Table:
    """One row per run, for a terminal; what a run that did not finish does not know is blank."""
    table = Table()
    for name in ("task", "model", "method", "seed", "metric", "zero-shot", "trained"):
        table.add_column(name, no_wrap=True)
    for name in ("parameters", "seconds", "MiB", "status", "where"):
        table.add_column(name, overflow="fold")
    for result in results:
        memory = result.peak_memory_bytes
        quantities = (
            (result.before, ".4f"),
            (result.headline.value, ".4f"),
            (result.trainable_parameters, ","),
            (result.train_seconds, ".0f"),
            (memory and memory / 2**20, ",.0f"),
        )
        texts = ["" if quantity is None else format(quantity, form) for quantity, form in quantities]
        where = f"{result.path.parent if result.path else ''} {result.collection}".strip()
        names = result.task, result.model, result.method, str(result.seed), result.metric
        table.add_row(*names, *texts, result.status, where)
    return table


def listing(results: Sequence[Result], keys: Sequence[str]) -> str:
    """One row per run with what it says of the `keys`; SettingsError for a key that no run has."""
    return markdown(keys, ([value(result, key) for key in keys] for result in results))


def over_seeds(results: Sequence[Result]) -> str:
    """A row per method: finished runs that differ in their seed alone."""
    names = ["task", "model", "shots", "method", "trained parameters", "metric", "zero-shot", "after training"]
    rows = []
    for runs in by_settings(results):
        result, where, scores = runs[0], cell(runs[0]), [percent(run) for run in runs]
        peaks = [run.peak_memory_bytes / 2**20 for run in runs if run.peak_memory_bytes]
        rows.append([
            where.task, where.model, where.data, result.method, _count(result.trainable_parameters),
            f"{result.metric}, %", "" if result.before is None else f"{100 * result.before:.1f}", spread(scores),
            f"{statistics.median(scores):.1f}", len(runs),
            _mean([run.train_seconds for run in runs if run.train_seconds is not None], ".0f"), _mean(peaks, ",.0f"),
        ])  # fmt: skip
    return markdown([*names, "median", "seeds", "seconds", "MiB"], rows)


def best(results: Sequence[Result], keys: Sequence[str]) -> str:
    """The settings that a search ends with, by the mean validation score over seeds; the test score takes no part.

    SettingsError for one of the `keys` that no run has.
    """
    groups: dict[tuple, dict[tuple[str, ...], list[float]]] = {}
    for result in finished(results):
        settings = tuple(value(result, key) for key in keys)
        if result.validation is not None:
            scores = groups.setdefault((cell(result), result.method), {}).setdefault(settings, [])
            scores.append(100 * result.validation)
    rows = []
    for (where, method), tried in groups.items():
        ranked = sorted(((statistics.mean(scores), settings) for settings, scores in tried.items()), reverse=True)
        second = f"{ranked[1][0]:.1f}" if len(ranked) > 1 else ""
        (score, settings) = ranked[0]
        rows.append([where.task, where.model, method, where.data, len(ranked), *settings, f"{score:.1f}", second])
    return markdown(["task", "model", "method", "shots", "tried", *keys, "validation, %", "runner-up, %"], rows)


def every_metric(results: Sequence[Result]) -> str:
    """A table per task: all that its test set measures, in the units of the results, mean ± sample deviation."""
    tasks: dict[str, list[list[Result]]] = {}
    for runs in by_settings(results):
        tasks.setdefault(runs[0].task, []).append(runs)
    return "\n\n".join(_metrics_of(groups) for groups in tasks.values())


def _metrics_of(groups: Sequence[Sequence[Result]]) -> str:
    """Rows are the methods of one task, after the scores that they start from where there are any."""
    measured = (name for runs in groups for name in runs[0].metrics if name.startswith("test/"))
    names = list(dict.fromkeys(name.removeprefix("test/") for name in measured))
    rows: list[list[object]] = []
    for runs in groups:
        before = _metrics_row("before", runs[:1], "zero_shot", names)
        if runs[0].before is not None and before not in rows:  # methods start from the same model
            rows.append(before)
        rows.append(_metrics_row(runs[0].method, runs, "test", names))
    return markdown(["task", "model", "shots", "method", *names, "seeds"], rows)


def _metrics_row(label: str, runs: Sequence[Result], stage: str, names: Sequence[str]) -> list[object]:
    where, texts = cell(runs[0]), []
    for name in names:
        scores = [run.metrics[f"{stage}/{name}"] for run in runs if f"{stage}/{name}" in run.metrics]
        texts.append(spread(scores, ".4g", ".2g") if len(scores) == len(runs) else "")
    return [where.task, where.model, where.data, label, *texts, len(runs)]


def beside_published(results: Sequence[Result]) -> str:
    """Ours and the paper's, which are of one run each; the paper's variant is named, since a rank may differ."""
    published, rows = read_scores(), []
    for runs in by_settings(results):
        result, where = runs[0], cell(runs[0])
        theirs = beside(published, result)
        text, source = (theirs.text, theirs.source) if theirs else ("", "not in the paper")
        ours = spread([percent(run) for run in runs])
        count = _count(result.trainable_parameters)
        rows.append([where.task, where.model, result.method, where.data, count, ours, text, source])
    names = ["task", "model", "method", "shots", "trained parameters", "ours, %", "published, %", "where"]
    return markdown(names, rows)


def differences(results: Sequence[Result], key: str, first: str, others: Sequence[str], examples: bool = False) -> str:
    """The score under a value of a setting less that under each of the others, by seed.

    The intervals hold one by one, over seeds, or with `examples` over seeds and test examples; the last column is the p
    of a difference of zero, by Holm's correction for all comparisons of the table.
    """
    pairs = [
        (where, other, pair) for other in others for where, pair in paired(results, key, first, other, examples).items()
    ]
    pairs.sort(key=lambda row: row[0].order)
    rows = [
        [
            f"{first} - {other}", where.task, where.model, where.data, spread(pair.first), spread(pair.second),
            *difference_cells(pair.difference, p),
        ]
        for (where, other, pair), p in zip(pairs, holm([pair.difference.p for *_, pair in pairs]), strict=True)
    ]  # fmt: skip
    return markdown([key, *DIFFERENCE_NAMES[:3], first, *DIFFERENCE_NAMES[4:]], rows)


DIFFERENCE_NAMES = (
    "task", "model", "shots", "the first", "the other", "difference, points", "95 % interval", "seeds", "p, Holm",
)  # fmt: skip


def difference_cells(gap: Difference, p: float) -> list[object]:
    """The last cells of a row of `differences`: the mean, its interval, the seeds, and p as corrected."""
    return [
        f"{round(gap.mean, 2) + 0.0:+.2f}", f"{gap.low:+.2f} to {gap.high:+.2f}", gap.seeds,
        f"{p:.3f}" if p >= 0.001 else "< 0.001",
    ]  # fmt: skip


def _count(parameters: int | None) -> str:
    return "" if parameters is None else f"{parameters:,}"


def _mean(quantities: Sequence[float], form: str) -> str:
    return f"{statistics.mean(quantities):{form}}" if quantities else ""
