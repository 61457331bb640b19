"""Readers of archives whose images are made: from arrays, or from parts of larger images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from randlora.data.archives.base import Archive, Rows, archive, lines_of, spaced


def svhn(root: Path) -> Archive:
    """train_32x32.mat, test_32x32.mat; digit 0 is stored as 10."""
    from scipy.io import loadmat

    def rows(split: str) -> Rows:
        stored = loadmat(root / f"{split}_32x32.mat")
        return _images(np.moveaxis(stored["X"], -1, 0), stored["y"].reshape(-1) % 10)

    return archive([str(digit) for digit in range(10)], rows, train="train", test="test")


def stl10(root: Path) -> Archive:
    """stl10_binary/: train_X.bin, train_y.bin, test_X.bin, test_y.bin, class_names.txt; pixels by channel, column."""

    def rows(split: str) -> Rows:
        pixels = np.fromfile(root / "stl10_binary" / f"{split}_X.bin", np.uint8).reshape(-1, 3, 96, 96)
        labels = np.fromfile(root / "stl10_binary" / f"{split}_y.bin", np.uint8)
        return _images(pixels.transpose(0, 3, 2, 1), labels - 1)

    return archive(lines_of(root / "stl10_binary" / "class_names.txt"), rows, train="train", test="test")


def cifar100(root: Path) -> Archive:
    """cifar-100-python/: train, test, meta, as pickles that hold arrays alone."""
    stored = {name: _unpickle(root / "cifar-100-python" / name) for name in ("train", "test", "meta")}

    def rows(split: str) -> Rows:
        pixels = np.asarray(stored[split]["data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return _images(pixels, stored[split]["fine_labels"])

    return archive([spaced(name) for name in stored["meta"]["fine_label_names"]], rows, train="train", test="test")


def _unpickle(file: Path) -> dict[str, Any]:
    """A pickle of built-in types and NumPy arrays; anything else in it is refused."""
    import pickle

    allowed = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
    allowed |= {("numpy._core.multiarray", "_reconstruct"), ("_codecs", "encode")}

    class Arrays(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise ValueError(f"{file} holds {module}.{name}")
            return super().find_class(module, name)

    with file.open("rb") as stream:
        return Arrays(stream, encoding="latin1").load()


VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
_APART = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


def pascal_voc(root: Path) -> Archive:
    """VOCdevkit/VOC2007/: JPEGImages/, Annotations/, ImageSets/Main/. Every annotated object is one cropped image."""
    base = root / "VOCdevkit" / "VOC2007"

    def crop(file: Path, box: Sequence[float]) -> Image.Image:
        with Image.open(file) as image:
            left, upper, right, lower = (round(side) for side in box)
            return image.convert("RGB").crop((left, upper, right, lower))

    def rows(split: str) -> Rows:
        objects: Rows = []
        for key in lines_of(base / "ImageSets" / "Main" / f"{split}.txt"):
            for item in ElementTree.parse(base / "Annotations" / f"{key}.xml").iter("object"):
                box, name = item.find("bndbox"), item.findtext("name") or ""
                sides = tuple(float(box.findtext(side) or "nan") for side in ("xmin", "ymin", "xmax", "ymax"))
                objects.append((partial(crop, base / "JPEGImages" / f"{key}.jpg", sides), VOC.index(name)))
        return objects

    return archive([_APART.get(n, n) for n in VOC], rows, train="train", validation="val", test="test")


def _images(pixels: np.ndarray, labels: Sequence[int] | np.ndarray) -> Rows:
    """Rows of uint8 (N, height, width, 3) and N labels."""
    return [(partial(Image.fromarray, image), int(label)) for image, label in zip(pixels, labels, strict=True)]


READERS = (svhn, stl10, cifar100, pascal_voc)
