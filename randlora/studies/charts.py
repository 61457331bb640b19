"""The charts of a report's page, as Vega-Lite specifications.

Each is a template: the page puts its rows in, and for the texts of WORDS what its controls say. Vega-Lite v6,
https://vega.github.io/vega-lite.
"""

from __future__ import annotations

from typing import Any

Spec = dict[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
# What the page replaces: the column on the x axis and its title, the score's title, the arms that are shown, their
# colours and shapes, the legend's columns, the width of labels, and the height of a chart of names.
WORDS = ("$x", "$x_title", "$y_title", "$labels", "$colours", "$shapes", "$columns", "$label_limit", "$height")
# As vega has figures.MARKERS.
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right", "triangle-left")

_LEGEND = {
    "orient": "bottom",
    "columns": "$columns",
    "title": None,
    "labelLimit": 280,
    "symbolLimit": 0,
    "symbolOpacity": 1,
}
_COLOUR = {"field": "label", "type": "nominal", "scale": {"domain": "$labels", "range": "$colours"}, "legend": _LEGEND}
_SHAPE = {"field": "label", "type": "nominal", "scale": {"domain": "$labels", "range": "$shapes"}, "legend": _LEGEND}
_SCORE = {"type": "quantitative", "title": "$y_title", "scale": {"zero": False}}
_POINT = {"type": "point", "filled": True, "size": 90, "stroke": "#222", "strokeWidth": 0.7, "cursor": "pointer"}


def _chart(description: str, height: Any = 320, **parts: Any) -> Spec:
    return {
        "$schema": SCHEMA,
        "description": description,
        "width": "container",
        "height": height,
        "data": {"name": "rows"},
        **parts,
        "config": {
            "font": "system-ui, sans-serif",
            "axis": {"labelFontSize": 12, "titleFontSize": 13, "gridColor": "#e3e3e3", "labelColor": "#1b1b1b"},
            "legend": {"labelFontSize": 12, "labelColor": "#1b1b1b"},
        },
    }


def _tooltip(*fields: tuple[str, str]) -> list[Spec]:
    return [{"field": field, "title": title} for field, title in fields]


_ARM = _tooltip(
    ("label", "method"), ("shown", "score, %"), ("seeds", "seeds"), ("parameters", "trained parameters"),
    ("seconds", "seconds"), ("mebibytes", "peak MiB"),
)  # fmt: skip


def charts() -> dict[str, Spec]:
    """The templates by name: pareto, budgets, rates, curves, differences, ranks."""
    return {
        "pareto": _pareto(),
        "budgets": _budgets(),
        "rates": _rates(),
        "curves": _curves(),
        "differences": _differences(),
        "ranks": _ranks(),
    }


def _pareto() -> Spec:
    scale = {"type": "log", "nice": False, "padding": 24}
    x = {"field": "$x", "type": "quantitative", "title": "$x_title", "scale": scale, "axis": {"format": "~s"}}
    costly: list[Spec] = [{"filter": "datum['$x'] > 0"}]
    front = [
        *costly,
        {"window": [{"op": "max", "field": "mean", "as": "front"}], "sort": [{"field": "$x"}], "frame": [None, 0]},
        {"filter": "datum.mean >= datum.front"},
    ]
    return _chart(
        "Scores of methods against a cost; a grey line joins the methods that none with less cost surpasses. "
        "Dashed lines are scores without an update.",
        encoding={"x": x},
        layer=[
            {
                "name": "before",  # which the page leaves out where no row has it
                "transform": [
                    {"filter": "isValid(datum.before)"},
                    {"aggregate": [{"op": "mean", "field": "before", "as": "before"}]},
                ],
                "mark": {"type": "rule", "strokeDash": [5, 4], "color": "#6b6b6b"},
                "encoding": {"x": None, "y": {"field": "before", **_SCORE}},
            },
            {
                "transform": front,
                "mark": {"type": "line", "interpolate": "step-after", "color": "#8a8a8a"},
                "encoding": {"y": {"field": "mean", **_SCORE}},
            },
            {
                "transform": [{"filter": "isValid(datum.level)"}],
                "mark": {"type": "rule", "strokeDash": [8, 4], "strokeWidth": 1.5},
                "encoding": {
                    "x": None,
                    "y": {"field": "level", **_SCORE},
                    "color": _COLOUR,
                    "tooltip": _tooltip(("label", "method"), ("shown", "score, %")),
                },
            },
            {
                "transform": costly,
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {"y": {"field": "low", **_SCORE}, "y2": {"field": "high"}, "color": _COLOUR},
            },
            {
                "transform": costly,
                "mark": _POINT,
                "encoding": {"y": {"field": "mean", **_SCORE}, "color": _COLOUR, "shape": _SHAPE, "tooltip": _ARM},
            },
        ],
    )


def _budgets() -> Spec:
    sort = {"field": "order", "op": "min"}
    return _chart(
        "Scores of methods against the budget of training examples, with bands of a sample deviation over seeds.",
        encoding={
            "x": {"field": "budget", "type": "ordinal", "sort": sort, "title": "budget", "axis": {"labelAngle": 0}},
            "color": _COLOUR,
        },
        layer=[
            {
                "mark": {"type": "area", "opacity": 0.13},
                "encoding": {"y": {"field": "low", **_SCORE}, "y2": {"field": "high"}},
            },
            {"mark": {"type": "line"}, "encoding": {"y": {"field": "mean", **_SCORE}}},
            {"mark": _POINT, "encoding": {"y": {"field": "mean", **_SCORE}, "shape": _SHAPE, "tooltip": _ARM}},
        ],
    )


def _rates() -> Spec:
    tooltip = _tooltip(
        ("label", "method"), ("rate", "learning rate"), ("scale", "other settings"), ("validation", "validation, %"),
        ("test", "test, %"), ("seeds", "seeds"), ("steps", "after steps"), ("edge", "chosen at an end"),
    )  # fmt: skip
    by = ["label", "rate", "steps", "whole"]
    best = {"aggregate": [{"op": "max", "field": "validation", "as": "validation"}], "groupby": by}
    opacity = {"condition": {"test": "datum.whole", "value": 1}, "value": 0.35}
    dash = {"condition": {"test": "datum.edge", "value": [3, 3]}, "value": [1, 0]}
    return _chart(
        "Validation scores against the learning rate, a line through the best at each rate; rings are the chosen ones, "
        "dashed where they are at an end of what was tried. Faint: what a search has compared before the runs' end.",
        encoding={
            "x": {
                "field": "rate",
                "type": "quantitative",
                "title": "learning rate",
                "scale": {"type": "log", "padding": 20},
                "axis": {"format": "~g"},
            },
            "y": {"field": "validation", **_SCORE},
            "color": _COLOUR,
        },
        layer=[
            {
                "transform": [best],
                "mark": {"type": "line"},
                "encoding": {"detail": {"field": "steps"}, "opacity": opacity},
            },
            {"mark": _POINT, "encoding": {"shape": _SHAPE, "opacity": opacity, "tooltip": tooltip}},
            {
                "transform": [{"filter": "datum.chosen"}],
                "mark": {"type": "point", "size": 320, "strokeWidth": 2.5, "filled": False, "tooltip": None},
                "encoding": {"strokeDash": dash},
            },
        ],
    )


def _curves() -> Spec:
    return _chart(
        "What was logged while the runs trained, a line per run.",
        mark={"type": "line", "strokeWidth": 1.3, "opacity": 0.85, "point": {"size": 14}},
        encoding={
            "x": {"field": "step", "type": "quantitative", "title": "step"},
            "y": {"field": "value", **_SCORE},
            "detail": {"field": "id"},
            "color": _COLOUR,
            "tooltip": _tooltip(("label", "method"), ("seed", "seed"), ("step", "step"), ("value", "value")),
        },
    )


def _differences() -> Spec:
    y = {
        "field": "name",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelLimit": "$label_limit", "ticks": False},
    }
    tooltip = _tooltip(
        ("name", "comparison"), ("mean", "difference, points"), ("low", "from"), ("high", "to"), ("holm", "p, Holm")
    )
    colour = {
        "condition": {"test": "datum.holm <= 0.05", "value": "#0b57a4"},
        "value": "#6b6b6b",
    }
    return _chart(
        "Differences of scores in points with 95 % intervals, blue where p is .05 or less after Holm's correction.",
        height="$height",
        encoding={"y": y},
        layer=[
            {"mark": {"type": "rule", "color": "#1b1b1b", "aria": False}, "encoding": {"x": {"datum": 0}, "y": None}},
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {
                    "x": {"field": "low", "type": "quantitative", "title": "difference, points"},
                    "x2": {"field": "high"},
                    "color": colour,
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 60},
                "encoding": {"x": {"field": "mean", "type": "quantitative"}, "color": colour, "tooltip": tooltip},
            },
        ],
    )


def _ranks() -> Spec:
    y = {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": "$label_limit"}}
    tooltip = _tooltip(("label", "method"), ("average", "average rank"))
    return _chart(
        "Average ranks of methods, 1 the best; two whose bars do not overlap differ by Nemenyi's test at 5 %.",
        height="$height",
        encoding={"y": y},
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 5, "color": "#b9cfe6"},
                "encoding": {
                    "x": {"field": "low", "type": "quantitative", "title": "average rank", "scale": {"zero": False}},
                    "x2": {"field": "high"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80, "color": "#0b57a4"},
                "encoding": {"x": {"field": "average", "type": "quantitative"}, "tooltip": tooltip},
            },
        ],
    )
