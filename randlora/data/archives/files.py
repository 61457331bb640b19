"""Readers of archives that hold image files, with lists or folders that say their classes and splits."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from randlora.data.archives.base import Archive, Rows, archive, by_folder, folders_in, lines_of, spaced
from randlora.rng import permutation


def cars(root: Path) -> Archive:
    """devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, cars_train/, cars_test/."""
    from scipy.io import loadmat

    names = loadmat(root / "devkit" / "cars_meta.mat", squeeze_me=True)["class_names"].tolist()

    def rows(part: tuple[str, str]) -> Rows:
        annotations, images = part
        listed = np.atleast_1d(loadmat(root / annotations, squeeze_me=True)["annotations"])
        return [(root / images / str(row["fname"]), int(row["class"]) - 1) for row in listed]

    test = "cars_test_annos_withlabels.mat", "cars_test"
    return archive(names, rows, train=("devkit/cars_train_annos.mat", "cars_train"), test=test)


def dtd(root: Path) -> Archive:
    """images/CLASS/, labels/train1.txt, val1.txt, test1.txt; the first of ten splits, validation added to training."""
    folders = folders_in(root / "images")

    def rows(files: Sequence[str]) -> Rows:
        lines = [line for file in files for line in lines_of(root / "labels" / file)]
        return [(root / "images" / line, folders.index(line.split("/")[0])) for line in lines]

    return archive([spaced(f) for f in folders], rows, train=["train1.txt", "val1.txt"], test=["test1.txt"])


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
    splits: dict[str, Rows] = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(EUROSAT):
        files = sorted((root / "2750" / name).iterdir())
        held = min(270, len(files) // 3)
        for position, index in enumerate(permutation(len(files), "archive split", "eurosat", name)):
            split = "validation" if position < held else "test" if position < 2 * held else "train"
            splits[split].append((files[index], label))
    return Archive(list(EUROSAT.values()), splits)


def gtsrb(root: Path) -> Archive:
    """GTSRB/Training/00000/, GTSRB/Final_Test/Images/, GT-final_test.csv. Names are numbers; the YAML has words."""
    folders = folders_in(root / "GTSRB" / "Training")
    with (root / "GT-final_test.csv").open() as lines:
        test: Rows = [
            (root / "GTSRB" / "Final_Test" / "Images" / row["Filename"], int(row["ClassId"]))
            for row in csv.DictReader(lines, delimiter=";", skipinitialspace=True)
        ]
    train = by_folder(root / "GTSRB" / "Training", folders, ".ppm")
    return Archive([str(int(name)) for name in folders], {"train": train, "test": test})


def resisc45(root: Path) -> Archive:
    """NWPU-RESISC45/CLASS/, resisc45-train.txt, resisc45-test.txt."""
    folders = folders_in(root / "NWPU-RESISC45")

    def rows(split: str) -> Rows:
        files = [(line.rpartition("_")[0], line) for line in lines_of(root / f"resisc45-{split}.txt")]
        return [(root / "NWPU-RESISC45" / name / file, folders.index(name)) for name, file in files]

    return archive([spaced(f) for f in folders], rows, train="train", test="test")


def sun397(root: Path) -> Archive:
    """SUN397/a/abbey/, Training_01.txt, Testing_01.txt, ClassName.txt; the first of ten partitions."""
    classes = lines_of(root / "ClassName.txt")  # such as /a/airplane_cabin and /b/bow_window/indoor

    def rows(file: str) -> Rows:
        labels = {name: label for label, name in enumerate(classes)}
        return [(root / "SUN397" / line[1:], labels[line.rpartition("/")[0]]) for line in lines_of(root / file)]

    names = [spaced(name[3:]).replace("/", " ") for name in classes]
    return archive(names, rows, train="Training_01.txt", test="Testing_01.txt")


def food101(root: Path) -> Archive:
    """food-101/: images/CLASS/ID.jpg, meta/train.json, meta/test.json."""
    base = root / "food-101"
    folders = folders_in(base / "images")

    def rows(split: str) -> Rows:
        listed = json.loads((base / "meta" / f"{split}.json").read_text())
        return [(base / "images" / f"{key}.jpg", folders.index(name)) for name in folders for key in listed[name]]

    return archive([spaced(f) for f in folders], rows, train="train", test="test")


def caltech101(root: Path) -> Archive:
    """101_ObjectCategories/CLASS/, without BACKGROUND_Google."""
    base = root / "101_ObjectCategories"
    folders = [name for name in folders_in(base) if name != "BACKGROUND_Google"]
    return Archive([spaced(f) for f in folders], _four_fifths(by_folder(base, folders), "caltech101"))


def caltech256(root: Path) -> Archive:
    """256_ObjectCategories/001.ak47/, clutter being class 257."""
    base = root / "256_ObjectCategories"
    folders = folders_in(base)
    names = [name.split(".")[-1].replace("-", " ").removesuffix(" 101") for name in folders]
    return Archive(names, _four_fifths(by_folder(base, folders, ".jpg"), "caltech256"))


def fgvc_aircraft(root: Path) -> Archive:
    """fgvc-aircraft-2013b/data/: variants.txt, images_variant_train.txt, …_val.txt, …_test.txt, images/."""
    base = root / "fgvc-aircraft-2013b" / "data"
    names = lines_of(base / "variants.txt")

    def rows(split: str) -> Rows:
        lines = (line.split(" ", 1) for line in lines_of(base / f"images_variant_{split}.txt"))
        return [(base / "images" / f"{key}.jpg", names.index(name)) for key, name in lines]

    return archive(names, rows, train="train", validation="val", test="test")


def flowers102(root: Path) -> Archive:
    """jpg/image_00001.jpg, imagelabels.mat, setid.mat. Names are numbers; the task's YAML has words."""
    from scipy.io import loadmat

    labels = loadmat(root / "imagelabels.mat", squeeze_me=True)["labels"]
    ids = loadmat(root / "setid.mat", squeeze_me=True)

    def rows(key: str) -> Rows:
        return [(root / "jpg" / f"image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in np.atleast_1d(ids[key])]

    names = [str(label + 1) for label in range(int(labels.max()))]
    return archive(names, rows, train="trnid", validation="valid", test="tstid")


def oxford_pets(root: Path) -> Archive:
    """images/Abyssinian_1.jpg, annotations/trainval.txt, annotations/test.txt."""

    def rows(file: str) -> Rows:
        lines = (line.split() for line in lines_of(root / "annotations" / file))
        return [(root / "images" / f"{key}.jpg", int(label) - 1) for key, label, *_ in lines]

    breeds = {label: image.stem.rpartition("_")[0] for image, label in rows("trainval.txt")}
    return archive([spaced(breeds[label]) for label in sorted(breeds)], rows, train="trainval.txt", test="test.txt")


def cub200(root: Path) -> Archive:
    """CUB_200_2011/: images/, images.txt, classes.txt, image_class_labels.txt, train_test_split.txt."""
    base = root / "CUB_200_2011"

    def table(file: str) -> list[str]:
        return [line.split(" ", 1)[1] for line in lines_of(base / file)]

    files, labels, training = (table(f) for f in ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    splits: dict[str, Rows] = {"train": [], "test": []}
    for file, label, flag in zip(files, labels, training, strict=True):
        splits["train" if flag == "1" else "test"].append((base / "images" / file, int(label) - 1))
    return Archive([spaced(name.split(".", 1)[1]) for name in table("classes.txt")], splits)


def country211(root: Path) -> Archive:
    """country211/train/AD/, valid/, test/. Names are country codes; the task's YAML has words."""
    base = root / "country211"
    folders = folders_in(base / "train")

    def rows(part: str) -> Rows:
        return by_folder(base / part, folders)

    return archive(folders, rows, train="train", validation="valid", test="test")


def ucf101(root: Path) -> Archive:
    """UCF-101-midframes/CLASS/, split_zhou_UCF101.json: the middle frame of every video."""
    listed = json.loads((root / "split_zhou_UCF101.json").read_text())
    actions = {int(label): name for rows in listed.values() for _, label, name in rows}
    # Apply_Eye_Makeup and ApplyEyeMakeup as words.
    names = [" ".join(re.findall(r"[A-Z][a-z]*|[a-z]+|\d+", actions[label])) for label in sorted(actions)]

    def rows(key: str) -> Rows:
        return [(root / "UCF-101-midframes" / file, int(label)) for file, label, _ in listed[key]]

    return archive(names, rows, train="train", validation="val", test="test")


def imagenet(root: Path) -> Archive:
    """train/n01440764/, val/n01440764/; names are open_clip's, but for two that it gives twice."""
    from open_clip import IMAGENET_CLASSNAMES

    names = list(IMAGENET_CLASSNAMES)
    names[744], names[836] = "projectile", "sunglass"  # WordNet's; open_clip has missile and sunglasses again
    folders = folders_in(root / "train")
    if len(folders) != len(names):
        raise ValueError(f"train has {len(folders)} class folders, not {len(names)}")
    splits = {"train": by_folder(root / "train", folders), "test": by_folder(root / "val", folders)}
    return Archive(names, splits)


def _four_fifths(rows: Rows, name: str) -> dict[str, Rows]:
    """A random training and test split, 80 to 20, always the same; the paper's draw depends on torch's generator."""
    order = permutation(len(rows), "archive split", name)
    count = int(len(rows) * 0.8)
    return {"train": [rows[i] for i in np.sort(order[:count])], "test": [rows[i] for i in np.sort(order[count:])]}


READERS = (
    cars, dtd, eurosat, gtsrb, resisc45, sun397, food101, caltech101, caltech256, fgvc_aircraft, flowers102,
    oxford_pets, cub200, country211, ucf101, imagenet,
)  # fmt: skip
