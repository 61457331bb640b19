"""What the image tasks need on disk.

python scripts/data.py check cars dtd --root data     what is there, what is missing, where to get it; all tasks if none
python scripts/data.py prepare dtd --from FOLDER --root data
    writes data/dtd/train.parquet and so on from the publisher's archive, unpacked in FOLDER (the layouts are in
    randlora/data/archives/); files are stored as they are, nothing is encoded anew that was a file
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from randlora.config import CONFIGS, build, settings
from randlora.data.archives import READERS, read, write
from randlora.data.sources import Hub
from randlora.errors import SettingsError, exit_code
from randlora.tasks import ImageClassification


def task_of(name: str, root: Path) -> ImageClassification:
    """The task as train.py would build it."""
    if not (CONFIGS / "task" / f"{name}.yaml").is_file():
        raise SettingsError(f"task={name}: configs/task has no {name}.yaml")
    return build(settings(f"task={name}", f"data_root={root}")["task"])


def image_tasks() -> list[str]:
    """The tasks whose images lie under a data root, by name."""
    return sorted({*READERS, "cifar10", "mnist", "tiny_imagenet"})


def check(name: str, root: Path) -> tuple[bool, str]:
    """Whether the data of a task are complete, and a sentence on it."""
    task = task_of(name, root)
    try:
        tables = task.open()
    except SettingsError as error:
        return False, str(error)
    return True, f"{name}: complete; " + ", ".join(f"{split} {len(table):,}" for split, table in tables.items())


def prepare(name: str, archive_folder: Path, root: Path) -> Iterator[Path]:
    """Writes the splits of an archive as parquet files under `root`, and gives each when it is there."""
    task = task_of(name, root)
    assert isinstance(task.source, Hub)
    archive = read(name, archive_folder)
    folder = root / task.source.folder
    folder.mkdir(parents=True, exist_ok=True)
    for split in archive.splits:
        file = folder / f"{task.source.splits[split]}.parquet"
        write(archive, split, file)
        yield file


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    checking, preparing = commands.add_parser("check"), commands.add_parser("prepare")
    checking.add_argument("tasks", nargs="*", help="all image tasks if none")
    preparing.add_argument("task")
    preparing.add_argument("--from", dest="archive", type=Path, required=True, help="the unpacked archive")
    for command in (checking, preparing):
        command.add_argument("--root", type=Path, required=True, help="the data root, as train.py's data_root")
    options = parser.parse_args(arguments)
    if options.command == "prepare":
        for file in prepare(options.task, options.archive, options.root):
            print(file)
        return 0
    answers = [check(name, options.root) for name in options.tasks or image_tasks()]
    for _, sentence in answers:
        print(sentence)
    return 0 if all(complete for complete, _ in answers) else 1


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
