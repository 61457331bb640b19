"""The image data sets of the paper as their publishers lay them out, to be written in this package's parquet form.

A reader takes the folder in which the archives were unpacked and returns the class names, in the order of the labels,
and for every split its images: files, whose bytes are kept as they are (`files`), or small functions that make an image
where the source has none as a file (`arrays`). Names are made from the source's as
aTLAS makes them (Zhang et al., 2024, which the paper follows).
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from randlora.data.archives import arrays, files
from randlora.data.archives.base import Archive, Image
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


def write(archive: Archive, split: str, file: Path) -> None:
    """One split as a parquet file with columns image (bytes, path) and label, the class names in its schema."""
    import datasets

    datasets.disable_progress_bars()

    def rows() -> Iterator[dict[str, Any]]:
        for image, label in archive.splits[split]:
            name = image.name if isinstance(image, Path) else None
            yield {"image": {"bytes": _encoded(image), "path": name}, "label": label}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=archive.names)})
    draft = file.with_suffix(".partial")
    # A cache of its own: the library's knows the paths, not what is in the files, and would give old images again.
    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        datasets.Dataset.from_generator(rows, features=features, cache_dir=cache).to_parquet(str(draft))
    draft.replace(file)  # so that a broken run leaves no half file


def _encoded(image: Image) -> bytes:
    """A file's bytes as they are; a made image as PNG."""
    if isinstance(image, Path):
        return image.read_bytes()
    stream = io.BytesIO()
    image().save(stream, "PNG")
    return stream.getvalue()
