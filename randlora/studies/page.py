"""A report as one page of HTML that needs nothing else: tables, charts, and the record behind every point."""

from __future__ import annotations

import json
import re
import statistics
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from randlora.records import Result
from randlora.records.metrics import Row
from randlora.studies.arms import Arm, Part, baselines, flat_settings
from randlora.studies.charts import SHAPES, charts
from randlora.studies.commands import Commands
from randlora.studies.comparisons import Compared, ranking
from randlora.studies.figures import looks
from randlora.studies.frame import COST, differing
from randlora.studies.groups import Cell, cell
from randlora.studies.layouts import Grid
from randlora.studies.rates import tried

FILES = Path(__file__).with_name("page")
POINTS = 150  # of a curve, at most: a screen has no more to show
Data = dict[str, Any]


def page(
    title: str,
    parts: Sequence[Part],
    of_parts: Mapping[str, Sequence[Arm]],
    layouts: Mapping[str, Sequence[Grid]],
    compared: Mapping[str, Compared],
    reference: str,
    cost: bool = True,
    pictures: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """The page's text.

    Args:
        title: Its heading.
        parts: Of studies, or of folders of runs.
        of_parts: The arms of each part, by its name.
        layouts: The tables of each part, by its name.
        compared: The comparisons of each part, by its name.
        reference: The method that differences are first shown with.
        cost: Whether to give times and memory.
        pictures: The figures of each part's analyses, as SVG, by the part's name and the analysis's.
    """
    import jinja2
    import vl_convert

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    content = _data(parts, of_parts, compared, reference, cost)
    return environment.get_template("page.html").render(
        title=title,
        summary=_summary(parts),
        parts=parts,
        layouts=layouts,
        pictures={
            (part, name): b64encode(svg.encode()).decode()
            for part, of_part in (pictures or {}).items()
            for name, svg in of_part.items()
        },
        address=lambda arm: "|".join(quote(content["ids"][id(run)], safe="") for run in arm.runs),
        # An element of script ends at the first "</script", whatever it is in.
        data=json.dumps(_rounded(content["data"]), separators=(",", ":")).replace("<", "\\u003c"),
        vega=re.sub("</(?=script)", "<\\/", vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),
        **{name: (FILES / f"page.{name}").read_text() for name in ("css", "js")},
    )


def _summary(parts: Sequence[Part]) -> str:
    results = [result for part in parts for result in part.results]
    done = sum(result.status == "finished" for result in results)
    names = {
        name: len({getattr(result, name) for result in results if result.status == "finished"})
        for name in ("method", "model", "task")
    }
    counts = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in names.items())
    return f"{len(results):,} runs, of which {done:,} have finished: {counts}."


def _data(
    parts: Sequence[Part],
    of_parts: Mapping[str, Sequence[Arm]],
    compared: Mapping[str, Compared],
    reference: str,
    cost: bool,
) -> Data:
    """What the page's script reads, and under ``ids`` the address of each run by identity."""
    commands = Commands(result for part in parts for result in part.results)
    ids: dict[int, str] = {}
    runs, curves = [], {}
    for part in parts:
        for result in part.results:
            address = f"{part.name}/{result.signature}"
            while address in curves:  # one run in two folders
                address += "+"
            ids[id(result)] = address
            runs.append(_run(part.name, address, result, commands, cost))
            curves[address] = _curve(part.curves.get(result.signature, ()))
    labels = {arm.label: arm.method for of_part in of_parts.values() for arm in of_part}
    data = {
        "first": max(parts, key=lambda part: len(part.results)).name,
        "reference": reference,
        "charts": charts(),
        "labels": {label: [colour, SHAPES[mark]] for label, (colour, mark) in sorted(looks(labels).items())},
        "runs": runs,
        "settings": _settings([result for part in parts for result in part.results]),
        "curves": {address: curve for address, curve in curves.items() if curve},
        "arms": [_arm(name, arm, ids, cost) for name, of_part in of_parts.items() for arm in of_part],
        "levels": [
            {"part": name, "cell": _cell(where), "label": arm.label, "level": arm.mean, "shown": f"{arm.mean:.1f}"}
            for name, of_part in of_parts.items()
            for where in dict.fromkeys(arm.where for arm in of_part if not arm.is_baseline)
            for arm in baselines(where, of_part)
        ],
        "rates": [
            row for part in parts for arm in of_parts[part.name] for row in _rates(part.name, arm, ids, part.curves)
        ],
        "differences": [
            {
                "part": name, "reference": label, "cell": _cell(pair.where), "other": pair.other,
                **{key: getattr(pair.difference, key) for key in ("mean", "low", "high", "seeds", "p")},
                "holm": pair.holm,
            }
            for name, of_part in compared.items()
            for label, pairs in of_part.items()
            for pair in pairs
        ],
        "ranks": {name: ranks for name, of_part in of_parts.items() if (ranks := _ranks(of_part))},
    }  # fmt: skip
    return {"data": data, "ids": ids}


def _run(part: str, address: str, result: Result, commands: Commands, cost: bool) -> Data:
    command = commands.of(result)
    run = {
        "id": address, "part": part, "cell": _cell(cell(result)), "task": result.task, "model": result.model,
        "method": result.method, "budget": cell(result).data, "seed": result.seed, "status": result.status,
        "metric": result.metric, "score": result.headline.value, "metrics": dict(result.metrics),
        "parameters": result.trainable_parameters, "steps": result.steps, "bytes": result.adapter_bytes,
        "error": result.error, "commit": result.commit, "device": result.device, "command": command.line,
        "later": command.later,
    }  # fmt: skip
    if cost:
        run |= {name: getattr(result, name) for name in COST}
    return {key: value for key, value in run.items() if value not in (None, [], ())}


def _arm(part: str, arm: Arm, ids: Mapping[int, str], cost: bool) -> Data:
    deviation = arm.deviation or 0.0
    before = arm.runs[0].before
    content = {
        "part": part, "cell": _cell(arm.where), "series": f"{arm.where.task}, {arm.where.model}", "label": arm.label,
        "budget": arm.where.data, "order": arm.where.shots or 1e6 * (arm.where.fraction or 1), "mean": arm.mean,
        "low": arm.mean - deviation, "high": arm.mean + deviation, "seeds": len(arm.runs),
        "shown": f"{arm.mean:.1f}{f' ± {deviation:.1f}' if len(arm.runs) > 1 else ''}",
        "before": None if before is None else 100 * before, "metric": arm.runs[0].metric,
        "parameters": arm.runs[0].trainable_parameters, "bytes": arm.runs[0].adapter_bytes,
        "runs": [ids[id(run)] for run in arm.runs],
    }  # fmt: skip
    if cost:
        content["seconds"] = _mean([run.train_seconds for run in arm.runs])
        content["mebibytes"] = _mean([run.peak_memory_bytes and run.peak_memory_bytes / 2**20 for run in arm.runs])
    return content


def _rates(part: str, arm: Arm, ids: Mapping[int, str], curves: Mapping[str, Sequence[Row]]) -> list[Data]:
    """A row for each of the settings among which an arm was chosen, and for each of a search's pauses on the way."""
    return [
        {
            "part": part, "cell": _cell(arm.where), "label": arm.label, "rate": point.rate, "scale": point.scale,
            "validation": point.validation, "test": point.test, "seeds": len(point.runs), "chosen": point.chosen,
            "steps": point.steps, "whole": point.whole, "edge": point.edge,
            "runs": [ids[id(run)] for run in point.runs], "metric": point.runs[0].metric,
        }
        for point in tried(arm, curves)
    ]  # fmt: skip


def _ranks(of_part: Sequence[Arm]) -> Data | None:
    ranked = ranking(of_part)
    if ranked is None:
        return None
    half = ranked.ranks.critical_difference / 2
    averages = sorted(ranked.ranks.average.items(), key=lambda item: (item[1], item[0]))
    return {
        "cells": [_cell(where) for where in ranked.cells], "p": ranked.ranks.p, "distance": 2 * half,
        "rows": [
            {"label": label, "average": average, "low": average - half, "high": average + half}
            for label, average in averages
        ],
    }  # fmt: skip


def _curve(rows: Sequence[Row]) -> Data:
    """The losses and the validation metrics of a run, by name: steps and values."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    curve = {}
    for name in names:
        if name.startswith("validation/") or name.endswith("/loss"):
            points = [(row.step, row.metrics[name]) for row in rows if name in row.metrics]
            every = -(-len(points) // POINTS)
            kept = [point for index, point in enumerate(points) if index % every == 0 or index == len(points) - 1]
            curve[name] = [list(column) for column in zip(*kept, strict=True)]
    return curve


def _settings(results: Sequence[Result]) -> Data:
    """All settings, each value once: by key the values, and by run the numbers of its values, -1 for none."""
    settings = [{key: json.dumps(value) for key, value in flat_settings(result).items()} for result in results]
    keys = sorted({key for of_run in settings for key in of_run})
    values = {key: list(dict.fromkeys(of_run[key] for of_run in settings if key in of_run)) for key in keys}
    number = {key: {value: index for index, value in enumerate(of_key)} for key, of_key in values.items()}
    rows = [[number[key][of_run[key]] if key in of_run else -1 for key in keys] for of_run in settings]
    return {"values": values, "rows": rows, "differing": differing(results, [flat_settings(run) for run in results])}


def _cell(where: Cell) -> str:
    return f"{where.task}, {where.model}, {where.budget}"


def _mean(quantities: Sequence[float | None]) -> float | None:
    known = [quantity for quantity in quantities if quantity is not None]
    return statistics.mean(known) if known else None


def _rounded(value: Any) -> Any:
    """Plain data with six digits of every float; NaN and infinity, which JSON lacks, as null."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value
