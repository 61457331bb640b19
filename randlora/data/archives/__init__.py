"""The image data sets of the paper as their publishers lay them out, to be written in this package's parquet form.

A reader takes the folder in which the archives were unpacked and returns the class names, in the order of the labels,
and for every split its images: files, whose bytes are kept as they are (`files`), or small functions that make an image
where the source has none as a file (`arrays`); `parquet` writes what was read. Names are made from the source's as
aTLAS makes them (Zhang et al., 2024, which the paper follows).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from randlora.data.archives import arrays, files
from randlora.data.archives.base import Archive
from randlora.errors import SettingsError

READERS: dict[str, Callable[[Path], Archive]] = {
    reader.__name__: reader for reader in (*files.READERS, *arrays.READERS)
}


def read(task: str, folder: Path) -> Archive:
    """The archive of a task; SettingsError when the folder does not hold what it should."""
    if task not in READERS:
        raise SettingsError(f"{task!r} has no archive to prepare; known are {', '.join(sorted(READERS))}")
    try:
        archive = READERS[task](folder)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"{folder} is not {task}'s archive, unpacked: {error}") from error
    for split, rows in archive.splits.items():
        if not rows:
            raise SettingsError(f"{folder} is not {task}'s archive, unpacked: it has no images of the {split} split")
        missing = next((image for image, _ in rows if isinstance(image, Path) and not image.is_file()), None)
        if missing is not None:
            raise SettingsError(f"{folder} is not {task}'s whole archive, unpacked: {missing} is missing")
    return archive
