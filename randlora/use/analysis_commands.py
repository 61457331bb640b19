"""The commands cka, landscape, approximate and forgetting: what is asked of runs beside each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from randlora.adapters import Method
from randlora.bounds import count
from randlora.config import build, settings
from randlora.errors import FINISHED, SettingsError
from randlora.integrity import write
from randlora.use.approximate import Fit, errors, updates_of
from randlora.use.cka import cka_of_runs
from randlora.use.commands import RUN, check_into
from randlora.use.figures import draw
from randlora.use.forgetting import forgetting
from randlora.use.landscape import Grid, barriers, landscape
from randlora.use.predict import written
from randlora.use.sample import Sample, named
from randlora.use.trained import Base, Trained

METHODS = ("lora", "randlora", "randlora_a", "vera", "nola", "mora", "melora")


def cka_command(arguments: Sequence[str]) -> int:
    """randlora cka RUN …"""
    parser = _parser("cka", "Linear CKA of the features of runs and of the frozen model, layer by layer.")
    parser.add_argument("--layers", nargs="+", default=[], metavar="PATTERN", help="of modules; or the adapted ones")
    _add_sample(parser, Sample())
    options = _parsed(parser, arguments)
    rows = cka_of_runs(options.runs, _sample(options), options.layers, options.base, options.overrides)
    return _finish(options, rows)


def landscape_command(arguments: Sequence[str]) -> int:
    """randlora landscape RUN RUN [RUN]"""
    parser = _parser("landscape", "The loss on the lines between the models of runs, and on the plane through three.")
    parser.add_argument("--points", type=count, default=Grid.points, help="on a side of the plane's grid")
    parser.add_argument("--margin", type=float, default=Grid.margin, help="of the grid around the models, as a share")
    parser.add_argument("--steps", type=count, default=Grid.steps, help="points of a line")
    _add_sample(parser, Sample("train"))
    options = _parsed(parser, arguments)
    grid = Grid(options.points, options.margin, options.steps)
    rows = landscape(options.runs, grid, _sample(options), options.base, options.overrides)
    for (start, end), height in barriers(rows).items():
        print(f"barrier between {start} and {end}: {height:.4g}", file=sys.stderr)
    return _finish(options, rows)


def approximate_command(arguments: Sequence[str]) -> int:
    """randlora approximate RUN"""
    parser = _parser("approximate", "How near each method comes to a run's updates with as many trained parameters.")
    parser.add_argument(
        "--method", action="append", metavar='"NAME [KEY=VALUE …]"',
        help=f"with its settings; may be given several times; without: {', '.join(METHODS)}",
    )  # fmt: skip
    parser.add_argument("--ranks", type=count, nargs="+", default=[8], help="of LoRA, whose parameters all methods get")
    parser.add_argument("--sites", nargs="+", default=["*"], metavar="PATTERN", help="of sites; all if not given")
    parser.add_argument("--random", action="store_true", help="also of a Gaussian matrix as large as each update")
    parser.add_argument("--restarts", type=int, default=Fit.restarts, help="further starts of a fit")
    parser.add_argument("--rounds", type=count, default=Fit.rounds, help="the most of a fit")
    options = _parsed(parser, arguments)
    methods = {text: _method(text) for text in options.method or METHODS}
    fit = Fit(rounds=options.rounds, restarts=options.restarts)
    rows: list[dict[str, Any]] = []
    for run, folder in named(options.runs).items():
        subject = Trained.load(folder, options.base)
        about = {"model": subject.experiment.model.name, "task": subject.experiment.task.name}
        updates = updates_of(subject.backbone.module)
        chosen = [site for site in updates if any(fnmatchcase(site, pattern) for pattern in options.sites)]
        if not chosen:
            first, given = next(iter(updates)), " ".join(options.sites)
            raise SettingsError(f"--sites {given}: no site has such a name; the first is {first}")
        for site in chosen:
            weight, delta = updates[site]
            matrices = {run: delta}
            if options.random:
                matrices["random"] = torch.randn(delta.shape, generator=torch.Generator().manual_seed(fit.seed))
            for of, matrix in matrices.items():
                for rank in options.ranks:
                    budget = rank * sum(matrix.shape)
                    found = errors(site, weight, matrix, methods, budget, fit)
                    rows += [{**about, "of": of, "budget": budget, **row} for row in found]
    return _finish(options, rows)


def forgetting_command(arguments: Sequence[str]) -> int:
    """randlora forgetting RUN … [task=NAME …]"""
    parser = _parser("forgetting", "Scores before and after training, on what the runs were not trained on.")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="a text a line, in place of the built-in sentences")
    parser.add_argument(
        "--at-score", type=float, nargs="+", default=[], metavar="SCORE",
        help="ask each run at its first evaluated step with this validation score; needs trainer.keep_adapters",
    )  # fmt: skip
    parser.add_argument(
        "--by", metavar="METRIC",
        help="the validation metric of --at-score, in place of the task's headline; loss, which trainer.select=best "
        "computes, is reached where it has fallen to the score",
    )  # fmt: skip
    options = _parsed(parser, arguments)
    if options.by and not options.at_score:
        raise SettingsError(f"--by {options.by}: it says what --at-score is of; give both")
    if options.texts is not None and not options.texts.is_file():
        raise SettingsError(f"--texts {options.texts}: there is no such file")
    texts = None if options.texts is None else [line for line in options.texts.read_text().splitlines() if line.strip()]
    rows = forgetting(options.runs, options.overrides, texts, options.base, options.at_score, options.by)
    for row in rows:
        if row["change"] is None:
            about = f"never reaches {row['at_score']:g}; its best is {row['validation']:g}, at step {row['step']}"
            print(f"{row['run']}: {about}", file=sys.stderr)
    return _finish(options, rows)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    epilog = (
        "The runs may be followed by a task and its settings, as task=cifar10 data_root=FOLDER, in place of theirs."
    )
    parser = argparse.ArgumentParser(prog=f"randlora {command}", description=description, epilog=epilog)
    parser.add_argument("given", nargs="+", metavar="RUN", help=RUN)
    parser.add_argument("--any-base", action="store_true", help="on other weights than the runs'")
    parser.add_argument("--into", type=Path, help="a .jsonl or .csv file; without it, CSV on the screen")
    parser.add_argument("--figure", type=Path, action="append", default=[], help="such as figure.svg")
    return parser


def _add_sample(parser: argparse.ArgumentParser, usual: Sample) -> None:
    parser.add_argument("--split", choices=["train", "validation", "test"], default=usual.split)
    parser.add_argument("--examples", type=count, default=usual.examples, help="the most of the split's")
    parser.add_argument("--batch", type=count, default=usual.batch_size, help="examples at a time")


def _sample(options: argparse.Namespace) -> Sample:
    return Sample(options.split, options.examples, options.batch)


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with `runs`, `overrides` and `base`; files that could not be written are refused."""
    options = parser.parse_args(arguments)
    options.overrides = [text for text in options.given if "=" in text and not Path(text).exists()]
    options.runs = [Path(text) for text in options.given if text not in options.overrides]
    if not options.runs:
        raise SettingsError(f"{' '.join(options.given)}: give the folder of a run first")
    base: Base = "any" if options.any_base else "same"
    options.base = base
    check_into(options.into, (".jsonl", ".csv"))
    for path in options.figure:
        check_into(path, (".svg", ".png", ".pdf"), "--figure")
    return options


def _finish(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> int:
    """Writes the rows, and the figure where one is wished for."""
    if options.into:
        write(options.into, written(_filled(rows), options.into.suffix))
    else:
        print(written(_filled(rows), ".csv"), end="")
    if options.figure:
        draw(rows, *options.figure)
    return FINISHED


def _filled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the same columns, as a table needs them."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _method(text: str) -> Method:
    name, *changes = text.split()
    return build(settings(f"method={name}", *(f"method.{change}" for change in changes))["method"])
