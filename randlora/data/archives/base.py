"""What an archive is, and what its readers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import PIL.Image

Image: TypeAlias = "Path | Callable[[], PIL.Image.Image]"  # a file, or what makes an image where there is no file
Rows: TypeAlias = list[tuple[Image, int]]  # images and their labels


class Archive(NamedTuple):
    """Class names in the order of the labels, and the images with their labels by split."""

    names: list[str]
    splits: dict[str, Rows]


def archive(names: list[str], rows: Callable[[Any], Rows], **parts: Any) -> Archive:
    """The archive whose `rows` of each split are made from that split's part, such as a file's name."""
    return Archive(names, {split: rows(part) for split, part in parts.items()})


def spaced(name: str) -> str:
    """A name with blanks for its underscores."""
    return name.replace("_", " ")


def folders_in(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted."""
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def lines_of(file: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]


def by_folder(root: Path, folders: Sequence[str], ending: str = "") -> Rows:
    """The files of the class folders with this ending, in the order of their names; a folder's place is its label."""
    return [
        (file, label)
        for label, name in enumerate(folders)
        for file in sorted((root / name).iterdir())
        if file.name.endswith(ending)
    ]
