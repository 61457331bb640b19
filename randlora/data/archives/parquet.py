"""An archive's splits as parquet files, as the tasks read them."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from randlora.data.archives.base import Archive, Image


def write(archive: Archive, split: str, file: Path) -> None:
    """One split as a parquet file with columns image (bytes, path) and label, the class names in its schema."""
    import datasets

    datasets.disable_progress_bars()

    def rows() -> Iterator[dict[str, Any]]:
        for image, label in archive.splits[split]:
            name = image.name if isinstance(image, Path) else None
            yield {"image": {"bytes": _encoded(image), "path": name}, "label": label}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=archive.names)})
    partial = file.with_suffix(".partial")
    # A cache of its own: the library's knows the paths, not what is in the files, and would give old images again.
    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        datasets.Dataset.from_generator(rows, features=features, cache_dir=cache).to_parquet(str(partial))
    partial.replace(file)  # so that a broken run leaves no half file


def _encoded(image: Image) -> bytes:
    """A file's bytes as they are; a made image as PNG."""
    if isinstance(image, Path):
        return image.read_bytes()
    stream = io.BytesIO()
    image().save(stream, "PNG")
    return stream.getvalue()
