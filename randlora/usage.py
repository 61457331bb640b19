"""The text of --help, read from the config folders, so that it cannot go stale."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from randlora.bounds import allowed, declared
from randlora.config import CONFIGS, PARTS, General, composed, named_class
from randlora.overrides import options

COMMANDS = """\
{program} [GROUP=OPTION …] [KEY=VALUE …]    one run
{program} -m GROUP=OPTION,OPTION …          a sweep; finished runs are skipped
{program} -m search=halving method=A,B …    the best learning rate and scale of each method, with one budget
{program} … dry_run=true                    what would be trained, and what set each setting; nothing is loaded
{program} GROUP=OPTION … --help             the settings of these options, with their values and what each may be
{program} … --cfg job                       every setting of that run, and its value
{program} … --config-dir FOLDER             with configs of your own: FOLDER/task/mine.yaml is task=mine
{program} predict RUN INPUT …               labels and scores by a finished run; also generate, merge and export
{program} status RUNS                       how the runs and sweeps of a folder stand
{program} report RUNS --into FOLDER         their tables, figures and a page that works offline
{program} workspace ENTITY/PROJECT          the same figures in W&B, as a saved workspace"""


def usage(argv: Sequence[str]) -> str:
    """How to ask, the options of each group, and the settings of any run with their defaults.

    Args:
        argv: the program and its arguments; a folder given with --config-dir is listed too. With overrides such as
            method=mora among them, what each setting of these parts may be instead.

    Raises:
        SettingsError: where the overrides do not compose.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    known, rest = parser.parse_known_args(argv[1:])
    own = known.config_dir
    overrides = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if overrides:
        return _ranges(overrides, own)
    folders = [CONFIGS] if own is None else [CONFIGS, own]
    program = "python train.py" if Path(argv[0]).name == "train.py" else "randlora"
    groups = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
    return "\n".join(
        [COMMANDS.format(program=program), "\nGroups"]
        + [line for group in groups for line in _paragraphs(group, options(group, folders))]
        + ["\nSettings of any run", *_settings(CONFIGS / "train.yaml")]
        + ["\nSettings of the trainer", *_settings(CONFIGS / "trainer" / "default.yaml", "trainer.")]
    )


def _ranges(overrides: Sequence[str], own: Path | None) -> str:
    """A line for each setting of any run and of the parts that are named: its value, and what it may be."""
    from omegaconf import OmegaConf

    searched = [] if own is None else [f"hydra.searchpath=[{own.resolve()}]"]
    config: Any = OmegaConf.to_container(composed(*overrides, *searched), resolve=True)
    words = {word for override in overrides for word in re.split(r"[^\w]", override.partition("=")[0])}
    parts = [part for part in (*PARTS, "search") if part in words and part in config] or PARTS
    lines = [_range(name, config[name], allowed(annotation)) for name, annotation in declared(General).items()]
    return "\n".join(lines + [line for part in parts for line in _ranges_of(part, config[part])])


def _ranges_of(path: str, config: object) -> Iterator[str]:
    """Those of a part, and of the parts in it."""
    if not isinstance(config, Mapping):
        return
    cls = named_class(config["_target_"]) if "_target_" in config else None
    annotations = declared(cls) if dataclasses.is_dataclass(cls) else {}
    for name, value in config.items():
        if name in annotations and not (isinstance(value, Mapping) and "_target_" in value):
            yield _range(f"{path}.{name}", value, allowed(annotations[name]))
        elif cls and not annotations and name != "_target_":  # settings of torch's own
            yield _range(f"{path}.{name}", value, "")
        else:
            yield from _ranges_of(f"{path}.{name}", value)


def _range(name: str, value: object, words: str) -> str:
    shown = value if isinstance(value, str) else json.dumps(value)
    return f"  {textwrap.shorten(f'{name}={shown}', 48, placeholder=' …'):48} {words}".rstrip()


def _paragraphs(group: str, names: Sequence[str]) -> list[str]:
    """The options of a group, and those of each folder in it: a line, or several under one another."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        folder, slash, stem = name.rpartition("/")
        by_folder.setdefault(folder + slash, []).append(stem)
    return [
        textwrap.fill(
            ", ".join(stems),
            width=110,
            initial_indent=f"  {f'{group}={folder}':27} ",
            subsequent_indent=" " * 30,
            break_on_hyphens=False,
        )
        for folder, stems in sorted(by_folder.items())
    ]


def _settings(path: Path, prefix: str = "") -> list[str]:
    """The keys of a YAML file that have a comment, with their defaults and that comment."""
    rows = re.findall(r"^(\w+): *(.*?) +# (.*)$", path.read_text(), re.MULTILINE)
    return [f"  {f'{prefix}{key}={value}':36} {comment}" for key, value, comment in rows]
