"""Every image data set from its publisher's layout to a batch, on a few synthetic images."""

import csv
import dataclasses
import json
import pickle
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from conftest import REPOSITORY, settings
from randlora.config import build
from randlora.data.archives import READERS, arrays, read, write
from randlora.data.archives import files as archive_files
from randlora.data.archives.arrays import VOC
from randlora.data.archives.files import EUROSAT
from randlora.errors import SettingsError
from randlora.models.base import Backbone, Pixels
from randlora.tasks import Budget, ImageClassification

Expected = tuple[list[str], dict[str, int]]  # class names, images by split


def image(file: Path, level: int = 100) -> None:
    """A small image of one colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (level, 20, 30)).save(file)


def lines(file: Path, *content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(content) + "\n")


def cars(root: Path) -> Expected:
    for folder, count in (("cars_train", 2), ("cars_test", 1)):
        for i in range(count):
            image(root / folder / f"0000{i + 1}.jpg")
    kind = [("fname", object), ("class", object)]
    (root / "devkit").mkdir()
    savemat(
        root / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Audi S4"], dtype=object)}
    )
    train = np.array([("00001.jpg", 1), ("00002.jpg", 2)], dtype=kind)
    savemat(root / "devkit" / "cars_train_annos.mat", {"annotations": train})
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": np.array([("00001.jpg", 2)], dtype=kind)})
    return ["AM General Hummer", "Audi S4"], {"train": 2, "test": 1}


def dtd(root: Path) -> Expected:
    for name in ("banded/banded_0001.jpg", "banded/banded_0002.jpg", "dotted_line/x_1.jpg", "dotted_line/x_2.jpg"):
        image(root / "images" / name)
    lines(root / "labels" / "train1.txt", "banded/banded_0001.jpg", "dotted_line/x_1.jpg")
    lines(root / "labels" / "val1.txt", "banded/banded_0002.jpg")
    lines(root / "labels" / "test1.txt", "dotted_line/x_2.jpg")
    return ["banded", "dotted line"], {"train": 3, "test": 1}


def eurosat(root: Path) -> Expected:
    for name in EUROSAT:
        for i in range(4):
            image(root / "2750" / name / f"{name}_{i}.jpg")
    return list(EUROSAT.values()), {"train": 20, "validation": 10, "test": 10}


def gtsrb(root: Path) -> Expected:
    for label in range(2):
        image(root / "GTSRB" / "Training" / f"{label:05d}" / "00000_00000.ppm")
        lines(root / "GTSRB" / "Training" / f"{label:05d}" / f"GT-{label:05d}.csv", "Filename;ClassId")
    image(root / "GTSRB" / "Final_Test" / "Images" / "00000.ppm")
    with (root / "GT-final_test.csv").open("w") as stream:
        csv.writer(stream, delimiter=";").writerows([["Filename", "Width", "ClassId"], ["00000.ppm", 12, 1]])
    return ["0", "1"], {"train": 2, "test": 1}


def resisc45(root: Path) -> Expected:
    names = ["baseball_diamond_001.jpg", "airport_001.jpg", "airport_002.jpg"]
    for name in names:
        image(root / "NWPU-RESISC45" / name.rpartition("_")[0] / name)
    lines(root / "resisc45-train.txt", *names[:2])
    lines(root / "resisc45-test.txt", names[2])
    return ["airport", "baseball diamond"], {"train": 2, "test": 1}


def sun397(root: Path) -> Expected:
    for name in ("a/airplane_cabin/sun_1.jpg", "b/bow_window/indoor/sun_2.jpg", "b/bow_window/indoor/sun_3.jpg"):
        image(root / "SUN397" / name)
    lines(root / "ClassName.txt", "/a/airplane_cabin", "/b/bow_window/indoor")
    lines(root / "Training_01.txt", "/a/airplane_cabin/sun_1.jpg", "/b/bow_window/indoor/sun_2.jpg")
    lines(root / "Testing_01.txt", "/b/bow_window/indoor/sun_3.jpg")
    return ["airplane cabin", "bow window indoor"], {"train": 2, "test": 1}


def svhn(root: Path) -> Expected:
    rng = np.random.default_rng(0)
    for split, digits in (("train", [*range(1, 11)]), ("test", [3])):
        pixels = rng.integers(0, 255, (32, 32, 3, len(digits)), dtype=np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": np.array(digits)[:, None]})
    return [str(i) for i in range(10)], {"train": 10, "test": 1}


def stl10(root: Path) -> Expected:
    base = root / "stl10_binary"
    base.mkdir()
    rng = np.random.default_rng(0)
    for split, labels in (("train", [1, 2]), ("test", [2])):
        rng.integers(0, 255, (len(labels), 3, 96, 96), dtype=np.uint8).tofile(base / f"{split}_X.bin")
        np.array(labels, np.uint8).tofile(base / f"{split}_y.bin")
    lines(base / "class_names.txt", "airplane", "bird")
    return ["airplane", "bird"], {"train": 2, "test": 1}


def cifar100(root: Path) -> Expected:
    base = root / "cifar-100-python"
    base.mkdir()
    rng = np.random.default_rng(0)
    for split, labels in (("train", [0, 1]), ("test", [1])):
        content = {"data": rng.integers(0, 255, (len(labels), 3072), dtype=np.uint8), "fine_labels": labels}
        (base / split).write_bytes(pickle.dumps(content, protocol=2))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "aquarium_fish"]}, protocol=2))
    return ["apple", "aquarium fish"], {"train": 2, "test": 1}


def food101(root: Path) -> Expected:
    base = root / "food-101"
    for key in ("apple_pie/1", "apple_pie/2", "baby_back_ribs/3"):
        image(base / "images" / f"{key}.jpg")
    (base / "meta").mkdir()
    train = {"apple_pie": ["apple_pie/1"], "baby_back_ribs": ["baby_back_ribs/3"]}
    (base / "meta" / "train.json").write_text(json.dumps(train))
    (base / "meta" / "test.json").write_text(json.dumps({"apple_pie": ["apple_pie/2"], "baby_back_ribs": []}))
    return ["apple pie", "baby back ribs"], {"train": 2, "test": 1}


def caltech101(root: Path) -> Expected:
    for name in ("Faces_easy", "accordion", "BACKGROUND_Google"):
        for i in range(5):
            image(root / "101_ObjectCategories" / name / f"image_000{i}.jpg")
    return ["Faces easy", "accordion"], {"train": 8, "test": 2}


def caltech256(root: Path) -> Expected:
    for name in ("001.ak47", "003.back-pack", "056.dog", "145.motorbikes-101"):
        for i in range(5):
            image(root / "256_ObjectCategories" / name / f"{name[:3]}_000{i}.jpg")
    lines(root / "256_ObjectCategories" / "056.dog" / "RENAME2", "not an image")
    return ["ak47", "back pack", "dog", "motorbikes"], {"train": 16, "test": 4}


def fgvc_aircraft(root: Path) -> Expected:
    base = root / "fgvc-aircraft-2013b" / "data"
    lines(base / "variants.txt", "707-320", "A340-600 X")
    for split, rows in (("train", ["1 707-320", "2 A340-600 X"]), ("val", ["3 707-320"]), ("test", ["4 A340-600 X"])):
        lines(base / f"images_variant_{split}.txt", *rows)
        for row in rows:
            image(base / "images" / f"{row.split()[0]}.jpg")
    return ["707-320", "A340-600 X"], {"train": 2, "validation": 1, "test": 1}


def flowers102(root: Path) -> Expected:
    for i in range(1, 5):
        image(root / "jpg" / f"image_{i:05d}.jpg")
    savemat(root / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2]])})
    savemat(root / "setid.mat", {"trnid": np.array([[1, 2]]), "valid": np.array([[3]]), "tstid": np.array([[4]])})
    return ["1", "2"], {"train": 2, "validation": 1, "test": 1}


def oxford_pets(root: Path) -> Expected:
    keys = ["Abyssinian_100", "american_bulldog_2", "american_bulldog_3"]
    for key in keys:
        image(root / "images" / f"{key}.jpg")
    lines(root / "annotations" / "trainval.txt", f"{keys[0]} 1 1 1", f"{keys[1]} 2 2 1")
    lines(root / "annotations" / "test.txt", f"{keys[2]} 2 2 1")
    return ["Abyssinian", "american bulldog"], {"train": 2, "test": 1}


def cub200(root: Path) -> Expected:
    base = root / "CUB_200_2011"
    files = ["001.Black_footed_Albatross/a.jpg", "002.Laysan_Albatross/b.jpg", "002.Laysan_Albatross/c.jpg"]
    for file in files:
        image(base / "images" / file)
    lines(base / "images.txt", *(f"{i} {file}" for i, file in enumerate(files, 1)))
    lines(base / "classes.txt", "1 001.Black_footed_Albatross", "2 002.Laysan_Albatross")
    lines(base / "image_class_labels.txt", "1 1", "2 2", "3 2")
    lines(base / "train_test_split.txt", "1 1", "2 1", "3 0")
    return ["Black footed Albatross", "Laysan Albatross"], {"train": 2, "test": 1}


def pascal_voc(root: Path) -> Expected:
    base = root / "VOCdevkit" / "VOC2007"
    box = "<bndbox><xmin>2</xmin><ymin>1</ymin><xmax>8</xmax><ymax>6</ymax></bndbox>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    for key, names in (("000001", VOC), ("000002", ["dog"]), ("000003", ["cat"])):
        image(base / "JPEGImages" / f"{key}.jpg")
        objects = "".join(f"<object><name>{name}</name>{box}{part}</object>" for name in names)
        lines(base / "Annotations" / f"{key}.xml", f"<annotation>{objects}</annotation>")
    for split, key in (("train", "000001"), ("val", "000002"), ("test", "000003")):
        lines(base / "ImageSets" / "Main" / f"{split}.txt", key)
    names = [
        {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}.get(n, n) for n in VOC
    ]
    return names, {"train": 20, "validation": 1, "test": 1}


def country211(root: Path) -> Expected:
    for split in ("train", "valid", "test"):
        for code in ("AD", "AE"):
            image(root / "country211" / split / code / "1.jpg")
    return ["AD", "AE"], {"train": 2, "validation": 2, "test": 2}


def ucf101(root: Path) -> Expected:
    rows = [["Apply_Eye_Makeup/v_1.jpg", 0, "Apply_Eye_Makeup"], ["Yo_Yo/v_2.jpg", 1, "Yo_Yo"]]
    for file, _, _ in rows:
        image(root / "UCF-101-midframes" / file)
    split = {"train": rows, "val": rows[:1], "test": rows[1:]}
    (root / "split_zhou_UCF101.json").write_text(json.dumps(split))
    return ["Apply Eye Makeup", "Yo Yo"], {"train": 2, "validation": 1, "test": 1}


def imagenet(root: Path) -> Expected:
    """All thousand folders: their number is checked, and their order is that of the names."""
    for i in range(1000):
        for split in ("train", "val"):
            image(root / split / f"n{i:08}" / "x.JPEG")
    names = list(open_clip.IMAGENET_CLASSNAMES)
    names[744], names[836] = "projectile", "sunglass"
    return names, {"train": 1000, "test": 1000}


LAYOUTS: dict[str, Callable[[Path], Expected]] = {
    layout.__name__: layout
    for layout in (
        cars, dtd, eurosat, gtsrb, resisc45, sun397, svhn, stl10, cifar100, food101, caltech101, caltech256,
        fgvc_aircraft, flowers102, oxford_pets, cub200, pascal_voc, country211, ucf101, imagenet,
    )
}  # fmt: skip


def task_of(name: str, root: Path, sizes: dict[str, int], names: Sequence[str]) -> ImageClassification:
    """The shipped task, for the few images of a test."""
    task = build(settings(f"task={name}", f"data_root={root}")["task"])
    own = task.class_names
    return dataclasses.replace(task, sizes=sizes, class_names=len(names) if isinstance(own, int) else own[: len(names)])


@pytest.mark.parametrize("name", LAYOUTS)
def test_from_the_publishers_layout_to_a_batch(name: str, tmp_path: Path) -> None:
    unpacked, root = tmp_path / "unpacked", tmp_path / "root"
    unpacked.mkdir()
    names, sizes = LAYOUTS[name](unpacked)
    archive = read(name, unpacked)
    assert archive.names == names
    assert {split: len(rows) for split, rows in archive.splits.items()} == sizes
    (root / name).mkdir(parents=True)
    for split in sizes:
        write(archive, split, root / name / f"{split}.parquet")

    task = task_of(name, root, sizes, names)
    if isinstance(build(settings(f"task={name}")["task"]).class_names, int):
        assert task.names() == names
    backbone = Backbone(torch.nn.Identity(), "clip", 8, pixels=Pixels(16, (0.5,) * 3, (0.5,) * 3))
    splits = task.splits(backbone, Budget(seed=0))
    for split, part in (("train", splits.train), ("test", splits.test)):
        labels = [label for _, label in archive.splits[split]]
        for position, row in enumerate(part.rows):
            item = part[position, position]
            assert item["label"] == labels[row]
            assert item["image"].shape == (3, 16, 16)


def test_arrays_become_images_the_right_way_up(tmp_path: Path) -> None:
    """Oracle: the publishers' layouts, pixel by pixel: row y and column x of channel c of the first test image."""
    for name in ("svhn", "stl10", "cifar100"):
        LAYOUTS[name](tmp_path)
    stored = {
        "svhn": loadmat(tmp_path / "test_32x32.mat")["X"][..., 0],  # y, x, c
        "stl10": np.fromfile(tmp_path / "stl10_binary" / "test_X.bin", np.uint8)[: 3 * 96 * 96],  # c, x, y
        "cifar100": pickle.loads((tmp_path / "cifar-100-python" / "test").read_bytes())["data"][0],  # c, y, x
    }
    first = {name: read(name, tmp_path).splits["test"][0] for name in stored}
    assert {name: label for name, (_, label) in first.items()} == {"svhn": 3, "stl10": 1, "cifar100": 1}
    pixels = {name: np.asarray(make()) for name, (make, _) in first.items() if callable(make)}
    assert {name: array.shape for name, array in pixels.items()} == {
        "svhn": (32, 32, 3), "stl10": (96, 96, 3), "cifar100": (32, 32, 3),
    }  # fmt: skip
    for y, x, c in ((0, 0, 0), (5, 9, 2), (31, 4, 1)):
        assert pixels["svhn"][y, x, c] == stored["svhn"][y, x, c]
        assert pixels["stl10"][y, x, c] == stored["stl10"][c * 96 * 96 + x * 96 + y]
        assert pixels["cifar100"][y, x, c] == stored["cifar100"][c * 1024 + y * 32 + x]


def test_every_archive_is_tested() -> None:
    assert set(READERS) == set(LAYOUTS)


def test_crops_are_the_annotated_boxes(tmp_path: Path) -> None:
    pascal_voc(tmp_path)
    make, label = read("pascal_voc", tmp_path).splits["test"][0]
    assert callable(make)
    assert make().size == (6, 5)
    assert label == VOC.index("cat")


def test_an_image_that_is_missing_is_named(tmp_path: Path) -> None:
    dtd(tmp_path)
    (tmp_path / "images" / "banded" / "banded_0002.jpg").unlink()
    with pytest.raises(SettingsError, match=r"banded_0002\.jpg is missing"):
        read("dtd", tmp_path)


def test_a_changed_archive_is_written_anew(tmp_path: Path) -> None:
    dtd(tmp_path)
    for level in (10, 200):
        image(tmp_path / "images" / "dotted_line" / "x_2.jpg", level)
        write(read("dtd", tmp_path), "test", tmp_path / "test.parquet")
        (row,) = datasets.Dataset.from_parquet(str(tmp_path / "test.parquet"), cache_dir=str(tmp_path / str(level)))
        assert abs(row["image"].getpixel((0, 0))[0] - level) < 5


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_pickles_of_old_and_new_numpy_are_read(module: str, tmp_path: Path) -> None:
    content = pickle.dumps({"data": np.arange(6, dtype=np.uint8)}, protocol=2)
    for known in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        content = content.replace(known, module.encode())
    (tmp_path / "old").write_bytes(content)
    assert arrays._unpickle(tmp_path / "old")["data"].tolist() == list(range(6))


def test_a_pickle_that_holds_code_is_refused(tmp_path: Path) -> None:
    cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps(subprocess.run))
    with pytest.raises(SettingsError, match=r"subprocess\.run"):
        read("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("labels", "why"),
    [([0, 0, 1, 2], "label 2 in train, with 2 classes"), ([0, 0, 0, 0], "class 1 has no training image")],
)
def test_labels_out_of_range_and_empty_classes_are_refused(labels: list[int], why: str, tmp_path: Path) -> None:
    names, sizes = dtd(tmp_path / "unpacked")
    archive = read("dtd", tmp_path / "unpacked")
    (tmp_path / "dtd").mkdir()
    rows = [(file, label) for (file, _), label in zip(archive.splits["train"] * 2, labels, strict=False)]
    wrong = archive._replace(names=["a", "b", "c"], splits={"train": rows, "test": archive.splits["test"]})
    for split in wrong.splits:
        write(wrong, split, tmp_path / "dtd" / f"{split}.parquet")
    with pytest.raises(SettingsError, match=why):
        task_of("dtd", tmp_path, sizes | {"train": 4}, names).open()
    with pytest.raises(SettingsError, match="the data name 3 classes"):
        task_of("dtd", tmp_path, sizes | {"train": 4}, names).names()


def test_the_command_line_says_what_is_missing_and_where_to_get_it(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    script = REPOSITORY / "scripts/data.py"
    assert program(script, "check", "dtd", "--root", tmp_path) == 1
    said = capsys.readouterr().out
    assert "train.parquet" in said
    assert "robots.ox.ac.uk" in said
    assert program(script, "prepare", "dtd", "--from", tmp_path / "no", "--root", tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_eurosats_split_is_the_recorded_draw(tmp_path: Path) -> None:
    """270 of a class for validation and 270 for test, a third of a smaller class for each; which ones never changes."""
    for count, name in zip([1000, 10], EUROSAT, strict=False):
        (tmp_path / "2750" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "2750" / name / f"{i:03}.jpg").touch()
    for name in list(EUROSAT)[2:]:
        (tmp_path / "2750" / name).mkdir()
    splits = archive_files.eurosat(tmp_path).splits
    counts = {split: [sum(label == of for _, label in rows) for of in (0, 1)] for split, rows in splits.items()}
    assert counts == {"train": [460, 4], "validation": [270, 3], "test": [270, 3]}
    small = {split: [int(file.stem) for file, label in rows if label == 1] for split, rows in splits.items()}
    assert small == {"train": [9, 5, 3, 7], "validation": [1, 6, 4], "test": [0, 2, 8]}
