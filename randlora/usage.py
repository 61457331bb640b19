"""The text of --help, read from the config folders, so that it cannot go stale."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from randlora.config import CONFIGS
from randlora.overrides import options

COMMANDS = """\
{program} [GROUP=OPTION …] [KEY=VALUE …]    one run
{program} -m GROUP=OPTION,OPTION …          a sweep; finished runs are skipped
{program} … dry_run=true                    what would be trained, and what set each setting; nothing is loaded
{program} … --cfg job                       every setting of that run, and its value
randlora status RUNS                            how the runs and sweeps of a folder stand
{program} … --config-dir FOLDER             with configs of your own: FOLDER/task/mine.yaml is task=mine"""


def usage(argv: Sequence[str]) -> str:
    """How to ask, the options of each group, and the settings of any run with their defaults.

    Args:
        argv: the program and its arguments; a folder given with --config-dir is listed too.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    own = parser.parse_known_args(argv[1:])[0].config_dir
    folders = [CONFIGS] if own is None else [CONFIGS, own]
    program = "python train.py" if Path(argv[0]).name == "train.py" else "randlora"
    groups = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
    return "\n".join(
        [COMMANDS.format(program=program), "\nGroups"]
        + [line for group in groups for line in _paragraphs(group, options(group, folders))]
        + ["\nSettings of any run", *_settings(CONFIGS / "train.yaml")]
        + ["\nSettings of the trainer", *_settings(CONFIGS / "trainer" / "default.yaml", "trainer.")]
    )


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
