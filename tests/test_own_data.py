"""Data of one's own: files of every kind, labels and their names, and the tasks that need no Python."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import settings
from letters import Letters
from randlora.config import build
from randlora.data.labels import check_real_valued, class_names, labelled
from randlora.data.sources import ArrayImages, Digits, Hub
from randlora.errors import SettingsError
from randlora.models.base import Backbone, Pixels
from randlora.tasks import Budget, ImageClassification, Task, TextClassification

TEXTS = ["a fine day", "NA", "so-so", "rain, again"]  # NA is a text, and a comma is no separator within quotes
WORDS = ["good", "bad", "good", "bad"]
CLIP = Backbone(torch.nn.Identity(), "clip", 8, pixels=Pixels(16, (0.5,) * 3, (0.5,) * 3))
BERT = Backbone(torch.nn.Identity(), "text", 8, tokenizer=Letters)


def write(file: Path, labels: Sequence[Any], text: str = "text", label: str = "label") -> None:
    """Texts and labels in the format of the file's ending, by Python's own writers where it has them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{text: TEXTS[i % len(TEXTS)], label: value} for i, value in enumerate(labels)]
    if file.suffix in (".csv", ".tsv"):
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [text, label], delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(file))


def images(root: Path, *names: str) -> None:
    """A picture of a class, its colour the class's place among `names`."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (label * 50,) * 3).save(root / name / "a.png")


def own(task: str, root: Path, *overrides: str) -> Task:
    return build(settings(f"task={task}", "task.source.folder=x", f"data_root={root}", *overrides)["task"])


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize(("labels", "numbered"), [(WORDS, [1, 0, 1, 0]), ([5, 1, 5, 3], [2, 0, 2, 1])])
def test_files_of_every_kind_with_labels_of_every_kind(
    ending: str, labels: list, numbered: list[int], tmp_path: Path
) -> None:
    """Oracle: the rows that were written, and their labels' places in sorted order."""
    for split in ("train", "test"):
        write(tmp_path / "x" / f"{split}.{ending}", labels, "review", "stars")
    task = own("own_texts", tmp_path, "task.source.columns={review: text, stars: label}")
    assert isinstance(task, TextClassification)
    names = [str(label) for label in sorted(set(labels))]
    assert task.names() == names
    assert task.remark() == f"classes in the order of their labels: {', '.join(names)}"
    for table in task.open().values():
        assert [table[i]["text"] for i in range(4)] == TEXTS
        assert [table[i]["label"] for i in range(4)] == table.column("label").tolist() == numbered


def test_everything_is_counted_and_validation_is_taken_from_training_or_from_its_file(tmp_path: Path) -> None:
    write(tmp_path / "x" / "train.csv", WORDS * 10)
    write(tmp_path / "x" / "test.csv", WORDS)
    task = own("own_texts", tmp_path)
    sizes = lambda splits: [len(split) for split in (splits.train, splits.validation, splits.test)]  # noqa: E731
    assert sizes(task.splits(BERT, Budget(0))) == [36, 4, 4]
    assert task.training_size(Budget(0)) == 36
    half = task.splits(BERT, Budget(7, fraction=0.5)).train
    assert task.training_size(Budget(7, fraction=0.5)) == len(half) == 18
    assert set(half.rows) < set(task.splits(BERT, Budget(0)).train.rows)
    assert set(half.rows) != set(task.splits(BERT, Budget(8, fraction=0.5)).train.rows)
    assert task.training_size(Budget(0, shots=3)) == len(task.splits(BERT, Budget(0, shots=3)).train) == 6
    write(tmp_path / "x" / "validation.csv", WORDS * 2)
    task = own("own_texts", tmp_path)
    assert sizes(task.splits(BERT, Budget(0))) == [40, 8, 4]
    assert task.training_size(Budget(0)) == 40


def test_either_of_several_sizes_will_do(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "x" / f"{split}.csv", WORDS)
    sizes = "task.sizes={train: [4, 9], test: 4}"
    assert own("own_texts", tmp_path, sizes).training_size(Budget(0)) == 4
    own("own_texts", tmp_path, sizes).open()
    with pytest.raises(SettingsError, match="the train split has 4 rows, expected 5 or 9; for data of your own give"):
        own("own_texts", tmp_path, "task.sizes={train: [5, 9], test: 4}").open()


def test_folders_of_images_need_a_folder_alone(tmp_path: Path) -> None:
    images(tmp_path / "x" / "train", "ant", "bee", "cat")
    images(tmp_path / "x" / "test", "ant", "cat")  # without a bee, and so with other labels of its own
    task = own("own_images", tmp_path)
    assert isinstance(task, ImageClassification)
    assert task.names() == ["ant", "bee", "cat"]
    assert task.remark() == "classes in the order of their labels: ant, bee, cat"
    tables = task.open()
    assert tables["train"].column("label").tolist() == [0, 1, 2]
    assert tables["test"].column("label").tolist() == [tables["test"][i]["label"] for i in range(2)] == [0, 2]
    assert task.splits(CLIP, Budget(0)).train[0, 0]["image"].shape == (3, 16, 16)
    images(tmp_path / "x" / "test", "dog")
    with pytest.raises(SettingsError, match="'dog' of test is not in train"):
        own("own_images", tmp_path).open()


@pytest.mark.parametrize("task", ["own_images", "own_texts"])
def test_the_settings_of_own_data_are_the_fields(task: str, tmp_path: Path) -> None:
    config = settings(f"task={task}", "task.source.folder=x")["task"]
    fields = {field.name for field in dataclasses.fields(own(task, tmp_path))}
    assert set(config) - {"_target_"} == fields
    with pytest.raises(SettingsError, match="folder"):
        settings(f"task={task}")


def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "x" / "train.csv", WORDS, "review")
    with pytest.raises(SettingsError, match="for the test split; put rows there that are in no other split"):
        own("own_texts", tmp_path).check()
    with pytest.raises(SettingsError, match="give data_root"):
        build(settings("task=own_texts", "task.source.folder=x")["task"]).training_size(Budget(0))
    write(tmp_path / "x" / "test.csv", WORDS, "review")
    with pytest.raises(SettingsError, match=r"no column 'text'; they have review, label: .*columns=\{THEIRS: text\}"):
        own("own_texts", tmp_path).open()
    with pytest.raises(SettingsError, match="has neither; its columns are review, label"):
        own("own_texts", tmp_path, "task.source.columns={words: text}").open()
    with pytest.raises(SettingsError, match="has both columns"):
        own("own_texts", tmp_path, "task.source.columns={review: label}").open()
    write(tmp_path / "x" / "test.tsv", WORDS, "review")
    with pytest.raises(SettingsError, match=r"both test\.csv and test\.tsv"):
        own("own_texts", tmp_path).open()


@pytest.mark.parametrize(
    ("labels", "overrides", "why"),
    [
        (["good", "", "bad"], [], "1 of 3 rows of train have no label"),
        ([0.5, 1.5], [], r"0\.5 in train is neither a text nor a whole number.*class_names=\[\]"),
        (WORDS, ["task.class_names=[good,poor]"], "label 'bad' in train is none of the classes good, poor"),
        ([1, 2], ["task.class_names=[low,high]"], "label 2 in train, with 2 classes, whose labels are 0 to 1"),
        (WORDS, ["task.class_names=[]", "task.metrics=[pearson]"], "labels that are no numbers, such as good"),
        ([0, 1], ["task.class_names=[a,a]"], "must be different; 'a' is there twice"),
        ([0, 1], ["task.class_names=[true,false]"], "True in class_names is not a name"),
        ([0, 1], ["task.class_names=[a,' ']"], "' ' in class_names is not a name"),
        ([0, 1], ["task.class_names=positive"], "must be a list of names"),
        ([0, 1], ["task.class_names=[]"], "task.metrics='accuracy': choose one of pearson, spearman"),
        ([0, 1], ["task.texts=[label]"], "column 'label' of train holds 0, which is no text"),
    ],
)
def test_labels_that_cannot_be_used_are_named(labels: list, overrides: list[str], why: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "x" / f"{split}.csv", labels)
    with pytest.raises(SettingsError, match=why):
        own("own_texts", tmp_path, *overrides).open()


def test_labels_that_are_real_numbers_stay_as_they_are(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "x" / f"{split}.csv", [0.5, 4.0])
    task = own("own_texts", tmp_path, "task.class_names=[]", "task.metrics=[pearson]")
    assert task.open()["train"].column("label").tolist() == [0.5, 4.0]
    check_real_valued("t", {"train": ArrayImages(np.zeros((2, 2, 2)), np.array([1, 0], np.uint8))})
    with pytest.raises(SettingsError, match=r"^t: train has labels that are no numbers, such as nan; for classes set"):
        check_real_valued("t", {"train": ArrayImages(np.zeros((2, 2, 2)), np.array([np.nan, 0.5]))})


def test_words_find_their_place_in_the_names_that_are_given(tmp_path: Path) -> None:
    """In the order of the settings, and however they are spelt; where spelling tells two apart, exactly."""
    for split in ("train", "test"):
        write(tmp_path / "x" / f"{split}.csv", ["very_good", "Bad"])
    task = own("own_texts", tmp_path, "task.class_names=[very good,bad]")
    assert task.open()["test"].column("label").tolist() == [0, 1]
    for split in ("train", "test"):
        write(tmp_path / "x" / f"{split}.csv", ["B+", "B-", "B"])
    task = own("own_texts", tmp_path, "task.class_names=['B-','B','B+']")
    assert task.open()["test"].column("label").tolist() == [2, 0, 1]


def test_f1_is_for_two_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "x" / f"{split}.csv", ["a", "b", "c"])
    model = build(settings("model=minilm")["model"])
    own("own_texts", tmp_path).check_model(model)
    with pytest.raises(SettingsError, match="f1 is for two classes, own_texts has 3"):
        own("own_texts", tmp_path, "task.metrics=[f1]").check_model(model)


class Named(Digits):
    """Ten labels, whose names are the data's."""

    def __init__(self, names: list[str]):
        self.names = names

    def class_names(self) -> list[str]:
        return self.names


CARRIED = ["airplane", "automobile", "bird", "cat"]


@pytest.mark.parametrize(
    "given",
    [
        CARRIED,
        ["Airplane", "auto-mobile", "BIRD", "cat"],
        ["plane", "car", "bird", "cat"],  # other words for two of them
        ["zero", "one", "two", "three"],
        4,
        None,
    ],
)
def test_names_may_be_other_words_than_the_datas(given: Any) -> None:
    table = ArrayImages(np.zeros((4, 2, 2), np.uint8), np.arange(4))
    assert labelled("t", Named(CARRIED), given, {"train": table})["train"].column("label").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["automobile", "airplane", "bird", "cat"], "2 names.*label 0 is 'automobile' in the settings, 'airplane' in"),
        (["plane", "Bird", "automobile", "cat"], "label 1 is 'Bird' in the settings, 'automobile' in the data"),
        (["tree", "airplane", "bird", "cat"], "1 names.*label 1 is 'airplane'"),
    ],
)
def test_a_name_with_two_labels_is_refused(given: list[str], why: str) -> None:
    table = ArrayImages(np.zeros((4, 2, 2), np.uint8), np.arange(4))
    with pytest.raises(SettingsError, match=why):
        labelled("t", Named(CARRIED), given, {"train": table})


class Column:
    """A table of labels alone, of any kind."""

    def __init__(self, *labels: object):
        self.labels = np.array(labels, dtype=object)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"label": self.labels[index]}

    def column(self, name: str) -> np.ndarray:
        return {"label": self.labels}[name]


class Unnamed(Digits):
    """Labels without names."""

    def __init__(self, table: Column):
        self.table = table

    def class_names(self) -> None:  # type: ignore[override]
        return None

    def open(self, split: str) -> Column:
        return self.table


@pytest.mark.parametrize("missing", [None, "", float("nan")])
def test_every_kind_of_missing_label_is_counted(missing: object) -> None:
    table = Column(1, missing, 2, missing)
    with pytest.raises(SettingsError, match=r"^t: 2 of 4 rows of train have no label"):
        labelled("t", Unnamed(table), None, {"train": table})  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"^t: 0 of 0 rows of train have no label"):
        labelled("t", Unnamed(Column()), None, {"train": Column()})  # type: ignore[arg-type]


def test_true_and_false_are_names_and_numbers_are_positions() -> None:
    truths, numbers = Column(True, False, True), Column(3, 0, 2)
    made = labelled("t", Unnamed(truths), ["False", "True"], {"train": truths})["train"]  # type: ignore[arg-type]
    assert made.column("label").tolist() == [1, 0, 1]
    assert class_names("t", Unnamed(truths), 2) == ["False", "True"]  # type: ignore[arg-type]
    kept = labelled("t", Unnamed(numbers), list("abcd"), {"train": numbers})["train"]  # type: ignore[arg-type]
    assert kept.column("label").tolist() == [3, 0, 2]
    for given, strange in ((list("abc"), 3), (["a"], 2)):
        with pytest.raises(SettingsError, match=rf"label {strange} in train, with {len(given)} classes"):
            labelled("t", Unnamed(numbers), given, {"train": numbers})  # type: ignore[arg-type]
    below = Column(-1, 0)
    with pytest.raises(SettingsError, match="label -1 in train, with 2 classes"):
        labelled("t", Unnamed(below), ["a", "b"], {"train": below})  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="the labels of the data have no names"):
        class_names("t", Unnamed(numbers), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("names", "count"), [(["a", "b", "a"], 3), (["a", "b"], 3), (["a", "b", "a"], 2)])
def test_names_of_the_data_are_as_many_as_asked_and_different(names: list[str], count: int) -> None:
    different = len(set(names))
    sentence = rf"^t: the data name {len(names)} classes, {different} of them different, expected {count}$"
    with pytest.raises(SettingsError, match=sentence):
        class_names("t", Named(names), count)
    assert class_names("t", Named(["a", "b"]), 2) == ["a", "b"]


def test_five_names_in_another_order_are_shown() -> None:
    names, table = list("abcdefg"), ArrayImages(np.zeros((7, 2, 2), np.uint8), np.arange(7))
    with pytest.raises(SettingsError) as error:
        labelled("t", Named(names), names[::-1], {"train": table})
    assert "(6 names): label 0 is 'g' in the settings, 'a' in the data; label 1 " in str(error.value)
    assert str(error.value).count("in the settings") == 5


def test_names_that_are_spelt_alike_say_nothing() -> None:
    table = ArrayImages(np.zeros((3, 2, 2), np.uint8), np.arange(3))
    labelled("t", Named(["B+", "B-", "C"]), ["B-", "B", "C"], {"train": table})


@pytest.mark.parametrize("name", ["cifar10", "tiny_imagenet"])
def test_shipped_names_are_the_published_files(name: str, shared_data: Path) -> None:
    task = build(settings(f"task={name}", f"data_root={shared_data}")["task"])
    names = [*task.names()]
    assert isinstance(task.source, Hub)
    assert task.source.class_names() == names
    task.open()
    names[3], names[7] = names[7], names[3]
    with pytest.raises(SettingsError, match="2 names"):
        dataclasses.replace(task, class_names=names).open()


@pytest.mark.parametrize(
    "template", ["a photo", "a {} and a {}", "a {name}", "a {0}", "a {!r}", "a {:>3}", "a {", "", 3]
)
def test_a_template_has_one_place_for_the_name(template: Any) -> None:
    for name in ("templates", "ensemble"):
        with pytest.raises(SettingsError, match=rf"task.{name}\[1\]=.*: must be a text with one {{}}"):
            ImageClassification("t", Digits(), class_names=["a"], **{name: ["a {}", template]})
    with pytest.raises(SettingsError, match="must be a list"):
        ImageClassification("t", Digits(), class_names=["a"], templates="a {}")
    ImageClassification("t", Digits(), class_names=["a"], templates=["{}", "a {}, {{or}} so"])
