"""The image data sets of the paper as their publishers lay them out, to be written in this package's parquet form.

A reader takes the folder in which the archives were unpacked and returns the class names, in the order of the labels,
and for every split its images: files, whose bytes are kept as they are, or small functions that make an image where the
source has none as a file. Names are made from the source's as aTLAS makes them (Zhang et al., 2024, which the paper
follows).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from randlora.errors import SettingsError
from randlora.rng import permutation

Image = Path | Callable[[], Any]  # a file, or what makes a PIL image


class Archive(NamedTuple):
    """Class names, and (image, label) pairs by split."""

    names: list[str]
    splits: dict[str, list[tuple[Image, int]]]


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


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def _listed(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]


def _by_folder(root: Path, folders: Sequence[str]) -> list[tuple[Image, int]]:
    """Every file of the class folders, in the order of the names."""
    return [(file, label) for label, name in enumerate(folders) for file in sorted((root / name).iterdir())]


def _array(pixels: np.ndarray) -> Callable[[], Any]:
    def make() -> Any:
        from PIL import Image

        return Image.fromarray(pixels)

    return make


def _four_fifths(rows: list[tuple[Image, int]], name: str) -> dict[str, list[tuple[Image, int]]]:
    """A random training and test split, 80 to 20, always the same; the paper's draw depends on torch's generator."""
    order = permutation(len(rows), "archive split", name)
    count = int(len(rows) * 0.8)
    return {"train": [rows[i] for i in np.sort(order[:count])], "test": [rows[i] for i in np.sort(order[count:])]}


def cars(root: Path) -> Archive:
    """devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, cars_train/, cars_test/."""
    from scipy.io import loadmat

    names = loadmat(root / "devkit" / "cars_meta.mat", squeeze_me=True)["class_names"].tolist()

    def rows(annotations: Path, images: str) -> list[tuple[Image, int]]:
        found = np.atleast_1d(loadmat(annotations, squeeze_me=True)["annotations"])
        return [(root / images / str(row["fname"]), int(row["class"]) - 1) for row in found]

    train = rows(root / "devkit" / "cars_train_annos.mat", "cars_train")
    return Archive(names, {"train": train, "test": rows(root / "cars_test_annos_withlabels.mat", "cars_test")})


def dtd(root: Path) -> Archive:
    """images/CLASS/, labels/train1.txt, val1.txt, test1.txt; the first of ten splits, validation added to training."""
    folders = _folders(root / "images")

    def rows(*files: str) -> list[tuple[Image, int]]:
        lines = [line for file in files for line in _listed(root / "labels" / file)]
        return [(root / "images" / line, folders.index(line.split("/")[0])) for line in lines]

    return Archive([_spaced(f) for f in folders], {"train": rows("train1.txt", "val1.txt"), "test": rows("test1.txt")})


EUROSAT = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}


def eurosat(root: Path) -> Archive:
    """2750/CLASS/. 270 images of every class for validation and 270 for test, a random draw as in the paper."""
    splits: dict[str, list[tuple[Image, int]]] = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(EUROSAT):
        files = sorted((root / "2750" / name).iterdir())
        held = min(270, len(files) // 3)
        for position, index in enumerate(permutation(len(files), "archive split", "eurosat", name)):
            split = "validation" if position < held else "test" if position < 2 * held else "train"
            splits[split].append((files[index], label))
    return Archive(list(EUROSAT.values()), splits)


def gtsrb(root: Path) -> Archive:
    """GTSRB/Training/00000/, GTSRB/Final_Test/Images/, GT-final_test.csv. Names are numbers; the YAML has words."""
    folders = _folders(root / "GTSRB" / "Training")
    train = [(file, label) for file, label in _by_folder(root / "GTSRB" / "Training", folders) if _suffix(file, ".ppm")]
    with (root / "GT-final_test.csv").open() as lines:
        test = [
            (root / "GTSRB" / "Final_Test" / "Images" / row["Filename"], int(row["ClassId"]))
            for row in csv.DictReader(lines, delimiter=";", skipinitialspace=True)
        ]
    return Archive([str(int(name)) for name in folders], {"train": train, "test": test})  # type: ignore[dict-item]


def _suffix(file: Image, suffix: str) -> bool:
    return isinstance(file, Path) and file.suffix == suffix


def resisc45(root: Path) -> Archive:
    """NWPU-RESISC45/CLASS/, resisc45-train.txt, resisc45-test.txt."""
    folders = _folders(root / "NWPU-RESISC45")

    def rows(split: str) -> list[tuple[Image, int]]:
        found = [(line.rpartition("_")[0], line) for line in _listed(root / f"resisc45-{split}.txt")]
        return [(root / "NWPU-RESISC45" / name / line, folders.index(name)) for name, line in found]

    return Archive([_spaced(f) for f in folders], {"train": rows("train"), "test": rows("test")})


def sun397(root: Path) -> Archive:
    """SUN397/a/abbey/, Training_01.txt, Testing_01.txt, ClassName.txt; the first of ten partitions."""
    classes = _listed(root / "ClassName.txt")  # such as /a/airplane_cabin and /b/bow_window/indoor

    def rows(file: str) -> list[tuple[Image, int]]:
        labels = {name: label for label, name in enumerate(classes)}
        return [(root / "SUN397" / line[1:], labels[line.rpartition("/")[0]]) for line in _listed(root / file)]

    names = [_spaced(name[3:]).replace("/", " ") for name in classes]
    return Archive(names, {"train": rows("Training_01.txt"), "test": rows("Testing_01.txt")})


def svhn(root: Path) -> Archive:
    """train_32x32.mat, test_32x32.mat; digit 0 is stored as 10."""
    from scipy.io import loadmat

    def rows(split: str) -> list[tuple[Image, int]]:
        stored = loadmat(root / f"{split}_32x32.mat")
        return [(_array(stored["X"][..., i]), int(label) % 10) for i, label in enumerate(stored["y"].reshape(-1))]

    return Archive([str(digit) for digit in range(10)], {"train": rows("train"), "test": rows("test")})


def stl10(root: Path) -> Archive:
    """stl10_binary/: train_X.bin, train_y.bin, test_X.bin, test_y.bin, class_names.txt; pixels by channel, column."""

    def rows(split: str) -> list[tuple[Image, int]]:
        pixels = np.fromfile(root / "stl10_binary" / f"{split}_X.bin", np.uint8).reshape(-1, 3, 96, 96)
        labels = np.fromfile(root / "stl10_binary" / f"{split}_y.bin", np.uint8)
        return [(_array(pixels[i].transpose(2, 1, 0)), int(label) - 1) for i, label in enumerate(labels)]

    names = _listed(root / "stl10_binary" / "class_names.txt")
    return Archive(names, {"train": rows("train"), "test": rows("test")})


def cifar100(root: Path) -> Archive:
    """cifar-100-python/: train, test, meta, as pickles that hold arrays alone."""
    stored = {name: _unpickle(root / "cifar-100-python" / name) for name in ("train", "test", "meta")}

    def rows(split: str) -> list[tuple[Image, int]]:
        pixels = np.asarray(stored[split]["data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return [(_array(pixels[i]), int(label)) for i, label in enumerate(stored[split]["fine_labels"])]

    names = [_spaced(name) for name in stored["meta"]["fine_label_names"]]
    return Archive(names, {"train": rows("train"), "test": rows("test")})


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


def food101(root: Path) -> Archive:
    """food-101/: images/CLASS/ID.jpg, meta/train.json, meta/test.json."""
    base = root / "food-101"
    folders = _folders(base / "images")

    def rows(split: str) -> list[tuple[Image, int]]:
        listed = json.loads((base / "meta" / f"{split}.json").read_text())
        return [(base / "images" / f"{key}.jpg", folders.index(name)) for name in folders for key in listed[name]]

    return Archive([_spaced(f) for f in folders], {"train": rows("train"), "test": rows("test")})


def caltech101(root: Path) -> Archive:
    """101_ObjectCategories/CLASS/, without BACKGROUND_Google."""
    base = root / "101_ObjectCategories"
    folders = [name for name in _folders(base) if name != "BACKGROUND_Google"]
    return Archive([_spaced(f) for f in folders], _four_fifths(_by_folder(base, folders), "caltech101"))


def caltech256(root: Path) -> Archive:
    """256_ObjectCategories/001.ak47/, clutter being class 257."""
    base = root / "256_ObjectCategories"
    folders = _folders(base)
    rows = [(file, label) for file, label in _by_folder(base, folders) if _suffix(file, ".jpg")]
    names = [name.split(".")[-1].replace("-", " ").removesuffix(" 101") for name in folders]
    return Archive(names, _four_fifths(rows, "caltech256"))


def fgvc_aircraft(root: Path) -> Archive:
    """fgvc-aircraft-2013b/data/: variants.txt, images_variant_train.txt, …_val.txt, …_test.txt, images/."""
    base = root / "fgvc-aircraft-2013b" / "data"
    names = _listed(base / "variants.txt")

    def rows(split: str) -> list[tuple[Image, int]]:
        lines = (line.split(" ", 1) for line in _listed(base / f"images_variant_{split}.txt"))
        return [(base / "images" / f"{key}.jpg", names.index(name)) for key, name in lines]

    return Archive(names, {"train": rows("train"), "validation": rows("val"), "test": rows("test")})


def flowers102(root: Path) -> Archive:
    """jpg/image_00001.jpg, imagelabels.mat, setid.mat. Names are numbers; the task's YAML has words."""
    from scipy.io import loadmat

    labels = loadmat(root / "imagelabels.mat", squeeze_me=True)["labels"]
    ids = loadmat(root / "setid.mat", squeeze_me=True)
    splits: dict[str, list[tuple[Image, int]]] = {
        split: [(root / "jpg" / f"image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in np.atleast_1d(ids[key])]
        for split, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid"))
    }
    return Archive([str(label + 1) for label in range(int(labels.max()))], splits)


def oxford_pets(root: Path) -> Archive:
    """images/Abyssinian_1.jpg, annotations/trainval.txt, annotations/test.txt."""
    lines = {
        split: [line.split() for line in _listed(root / "annotations" / file)]
        for split, file in (("train", "trainval.txt"), ("test", "test.txt"))
    }
    found = {int(label): key.rpartition("_")[0] for key, label, *_ in lines["train"]}
    names = [_spaced(found[label]) for label in sorted(found)]
    splits: dict[str, list[tuple[Image, int]]] = {
        split: [(root / "images" / f"{key}.jpg", int(label) - 1) for key, label, *_ in rows]
        for split, rows in lines.items()
    }
    return Archive(names, splits)


def cub200(root: Path) -> Archive:
    """CUB_200_2011/: images/, images.txt, classes.txt, image_class_labels.txt, train_test_split.txt."""
    base = root / "CUB_200_2011"

    def table(file: str) -> list[str]:
        return [line.split(" ", 1)[1] for line in _listed(base / file)]

    files, labels, training = (table(f) for f in ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    splits: dict[str, list[tuple[Image, int]]] = {"train": [], "test": []}
    for file, label, flag in zip(files, labels, training, strict=True):
        splits["train" if flag == "1" else "test"].append((base / "images" / file, int(label) - 1))
    return Archive([_spaced(name.split(".", 1)[1]) for name in table("classes.txt")], splits)


VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
_APART = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


def pascal_voc(root: Path) -> Archive:
    """VOCdevkit/VOC2007/: JPEGImages/, Annotations/, ImageSets/Main/. Every annotated object is one cropped image."""
    base = root / "VOCdevkit" / "VOC2007"

    def crop(file: Path, box: Sequence[float]) -> Any:
        from PIL import Image

        with Image.open(file) as image:
            left, upper, right, lower = (round(side) for side in box)
            return image.convert("RGB").crop((left, upper, right, lower))

    def rows(split: str) -> Iterator[tuple[Image, int]]:
        for key in _listed(base / "ImageSets" / "Main" / f"{split}.txt"):
            for item in ElementTree.parse(base / "Annotations" / f"{key}.xml").iter("object"):
                box = item.find("bndbox")
                sides = tuple(float(box.findtext(side) or "nan") for side in ("xmin", "ymin", "xmax", "ymax"))
                yield partial(crop, base / "JPEGImages" / f"{key}.jpg", sides), VOC.index(item.findtext("name") or "")

    files = {"train": "train", "validation": "val", "test": "test"}
    return Archive([_APART.get(n, n) for n in VOC], {split: list(rows(file)) for split, file in files.items()})


def country211(root: Path) -> Archive:
    """country211/train/AD/, valid/, test/. Names are country codes; the task's YAML has words."""
    base = root / "country211"
    folders = _folders(base / "train")
    names = {"train": "train", "validation": "valid", "test": "test"}
    return Archive(folders, {split: _by_folder(base / name, folders) for split, name in names.items()})


def ucf101(root: Path) -> Archive:
    """UCF-101-midframes/CLASS/, split_zhou_UCF101.json: the middle frame of every video."""
    listed = json.loads((root / "split_zhou_UCF101.json").read_text())
    found = {int(label): name for rows in listed.values() for _, label, name in rows}
    names = [_words(found[label]) for label in sorted(found)]
    splits: dict[str, list[tuple[Image, int]]] = {
        split: [(root / "UCF-101-midframes" / file, int(label)) for file, label, _ in listed[key]]
        for split, key in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    return Archive(names, splits)


def _words(name: str) -> str:
    """Apply_Eye_Makeup and ApplyEyeMakeup as words."""
    return " ".join(re.findall(r"[A-Z][a-z]*|[a-z]+|\d+", name))


def imagenet(root: Path) -> Archive:
    """train/n01440764/, val/n01440764/; names are open_clip's, but for two that it gives twice."""
    from open_clip import IMAGENET_CLASSNAMES

    names = list(IMAGENET_CLASSNAMES)
    names[744], names[836] = "projectile", "sunglass"  # WordNet's; open_clip has missile and sunglasses again
    folders = _folders(root / "train")
    if len(folders) != len(names):
        raise ValueError(f"train has {len(folders)} class folders, not {len(names)}")
    splits = {"train": _by_folder(root / "train", folders), "test": _by_folder(root / "val", folders)}
    return Archive(names, splits)


READERS: dict[str, Callable[[Path], Archive]] = {
    reader.__name__: reader
    for reader in (
        cars, dtd, eurosat, gtsrb, resisc45, sun397, svhn, stl10, cifar100, food101, caltech101, caltech256,
        fgvc_aircraft, flowers102, oxford_pets, cub200, pascal_voc, country211, ucf101, imagenet,
    )
}  # fmt: skip
