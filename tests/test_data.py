"""Data: order, subsets, splits, sources and images."""

import signal
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import settings
from randlora.config import build
from randlora.data.images import AUGMENTATIONS, image_transform, rgb
from randlora.data.loader import Encoder, Item, Split, Unreadable, evaluation_keys, loader, training_keys
from randlora.data.sources import ArrayImages, Hub
from randlora.data.subsets import few_shot, fractional, split_validation, subsample, validation_size_of
from randlora.data.texts import pad
from randlora.errors import SettingsError
from randlora.models.base import Backbone, Pixels
from randlora.signals import SIGNALS
from randlora.tasks import Budget

PIXELS = Pixels(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def flat(keys) -> list[tuple[int, int]]:  # type: ignore[no-untyped-def]
    return [key for batch in keys for key in batch]


def test_every_epoch_is_a_permutation_and_epochs_differ() -> None:
    rows = [row for row, _ in flat(training_keys(10, 4, range(10), seed=0))]
    assert sorted(rows[:10]) == list(range(10))
    assert sorted(rows[10:20]) == list(range(10))
    assert rows[:10] != rows[10:20]
    assert rows != [row for row, _ in flat(training_keys(10, 4, range(10), seed=1))]


def test_order_can_be_entered_anywhere_and_shared_out() -> None:
    whole = flat(training_keys(10, 6, range(8), seed=0))
    assert flat(training_keys(10, 6, range(5, 8), seed=0)) == whole[30:]
    shares = [flat(training_keys(10, 6, range(8), seed=0, rank=r, world=3)) for r in range(3)]
    assert sorted(shares[0] + shares[1] + shares[2], key=lambda key: key[1]) == whole


def test_evaluation_sees_every_row_once() -> None:
    shares = [flat(evaluation_keys(range(11), 4, rank, 2)) for rank in range(2)]
    assert sorted(row for share in shares for row, _ in share) == list(range(11))


class Noise(Encoder):
    def __call__(self, example):  # type: ignore[no-untyped-def]
        return {"value": torch.rand(3) + example["label"]}


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_the_position_alone(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves devices alone, where the noise of a step is drawn."""
    table = ArrayImages(np.zeros((6, 4, 4), np.uint8), np.arange(6))
    split = Split(table, np.arange(6), Noise(), augment_seed=3)
    keys = list(training_keys(6, 3, range(4), seed=0))
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a device is seeded"))
    drawn = torch.cat([batch["value"] for (batch,) in loader(split, iter(keys), workers)])
    monkeypatch.undo()
    torch.manual_seed(99)
    again = torch.cat([batch["value"] for (batch,) in loader(split, iter(keys[2:]), 0)])
    assert torch.equal(drawn[6:], again)
    assert not torch.equal(drawn[:6] % 1, drawn[6:] % 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_of_a_billion_positions_begins_at_once(workers: int) -> None:
    """Counted, not timed: what has been drawn when the first batch is there."""
    drawn = 0

    def counted() -> Iterator[list[tuple[int, int]]]:
        nonlocal drawn
        for keys in training_keys(6, 5, range(200_000_000), seed=0):
            drawn += 1
            yield keys

    split = Split(ArrayImages(np.zeros((6, 4, 4), np.uint8), np.arange(6)), np.arange(6), Noise(), augment_seed=3)
    assert len(next(loader(split, counted(), workers))) == 1
    assert drawn <= 1 + 4 * workers


class Signals(Encoder):
    """What the process that encodes does with signals."""

    def __call__(self, example):  # type: ignore[no-untyped-def]
        ignored = [signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS if number != signal.SIGTERM]
        return {"ignored": all(ignored), "blocked": signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])}


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_leave_signals_to_who_started_them(workers: int) -> None:
    split = Split(ArrayImages(np.zeros((2, 2, 2), np.uint8), np.arange(2)), np.arange(2), Signals())
    ((batch,),) = loader(split, evaluation_keys(range(2), 2), workers)
    assert batch["ignored"].tolist() == batch["blocked"].tolist() == [workers == 1] * 2


def test_texts_without_a_token_are_filled_up() -> None:
    assert pad([[], [3, 4]], 9).tolist() == [[9, 9], [3, 4]]
    assert pad([[], []], 9).dtype == torch.int64


def test_few_shot_is_balanced_seeded_and_nested() -> None:
    labels = np.repeat(np.arange(5), 20)
    four, two = few_shot(labels, 4, seed=0), few_shot(labels, 2, seed=0)
    assert np.bincount(labels[four]).tolist() == [4] * 5
    assert set(two) < set(four)
    assert set(four) != set(few_shot(labels, 4, seed=1))
    assert few_shot(labels, 20, seed=0).tolist() == list(range(100))
    with pytest.raises(SettingsError, match="class 0 has only 20"):
        few_shot(labels, 21, seed=0)


def test_fractions_are_nested_and_validation_is_the_same_for_every_seed() -> None:
    assert set(fractional(100, 0.1, 0)) < set(fractional(100, 0.5, 0))
    assert [len(fractional(100, share, 0)) for share in (0.001, 0.1, 1.0)] == [1, 10, 100]
    assert [validation_size_of(count, 50) for count in (9, 10, 499, 500, 9000)] == [0, 1, 49, 50, 50]
    train, validation = split_validation(100, 10, "x")
    assert sorted([*train, *validation]) == list(range(100))
    assert subsample(5, None, "x").tolist() == list(range(5))
    assert len(subsample(100, 7, "x")) == 7


def picture(value: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (40, 30), value if mode == "L" else (value,) * 3)


def write_parquet(path: Path, rows: int) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [picture(10 * i, "L" if i % 2 else "RGB") for i in range(rows)]
    datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(rows)]}, features).to_parquet(str(path))


def test_parquet_and_image_folders_give_the_same_examples(tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet" / "train.parquet", 4)
    for i in range(4):
        folder = tmp_path / "folders" / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(10 * i, "L" if i % 2 else "RGB").save(folder / f"{i}.png")
    for name in ("parquet", "folders"):
        table = Hub(name, root=str(tmp_path), splits={"train": "train"}).open("train")
        assert sorted(table.column("label")) == [0, 0, 1, 1]
        colours = sorted(table[i]["image"].convert("RGB").getpixel((0, 0))[0] for i in range(4))
        assert colours == [0, 10, 20, 30]


def test_a_split_alone_and_a_class_alone_keep_their_labels(tmp_path: Path) -> None:
    """As where training is elsewhere; and of a folder with images of one class."""
    write_parquet(tmp_path / "test.parquet", 4)
    table = Hub(".", root=str(tmp_path), splits={"test": "test"}).open("test")
    assert table.column("label").tolist() == [0, 1, 0, 1]
    (tmp_path / "one" / "train" / "ant").mkdir(parents=True)
    picture(3).save(tmp_path / "one" / "train" / "ant" / "0.png")
    one = Hub("one", root=str(tmp_path), splits={"train": "train"})
    assert (one.class_names(), one.open("train")[0]["label"]) == (["ant"], 0)


def test_labels_are_read_without_decoding_images(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": b"not an image", "path": None}] * 3, "label": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "train.parquet"))
    table = Hub(".", root=str(tmp_path), splits={"train": "train"}).open("train")
    assert table.column("label").tolist() == [0, 1, 2]


def test_missing_data_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no image folder train/"):
        Hub("x", root=str(tmp_path)).check()
    with pytest.raises(SettingsError, match="on no hub"):
        Hub("x").check()
    write_parquet(tmp_path / "train.parquet", 2)
    table = Hub(".", root=str(tmp_path), splits={"train": "train"}).open("train")
    with pytest.raises(SettingsError, match="no column 'labels'; they have image, label"):
        table.column("labels")


def test_a_split_of_another_size_names_both_numbers(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    for split in ("train", "test"):
        write_parquet(tmp_path / "cifar10" / f"{split}.parquet", 4)
    task = build(settings("task=cifar10", f"data_root={tmp_path}")["task"])
    with pytest.raises(SettingsError, match="train split has 4 rows, expected 50000"):
        task.splits(Backbone(torch.nn.Module(), "vision", 1, PIXELS), Budget(0))


def test_digits_are_split_without_overlap() -> None:
    task = build(settings("task=digits")["task"])
    splits = task.splits(Backbone(torch.nn.Module(), "vision", 1, PIXELS), Budget(0, shots=3))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 140, 397)
    assert not set(splits.train.rows) & set(splits.validation.rows)
    image = splits.train[(0, 0)]["image"]
    assert image.shape == (3, 32, 32)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA"])
def test_every_kind_of_image_becomes_a_normalised_tensor(augmentation: str, mode: str) -> None:
    image = picture(128).convert(mode)
    tensor = image_transform(PIXELS, augmentation)(image)
    assert tensor.shape == (3, 32, 32)
    if augmentation != "strong" and mode != "CMYK":
        assert tensor.mean().item() == pytest.approx((128 / 255 - 0.5) / 0.25, abs=0.02)  # palettes dither


def test_real_parquet(shared_data: Path) -> None:
    task = build(settings("task=cifar10", f"data_root={shared_data}")["task"])
    splits = task.splits(Backbone(torch.nn.Module(), "vision", 1, PIXELS), Budget(0, shots=2))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 5000, 10000)
    assert splits.test[(0, 0)]["image"].shape == (3, 32, 32)


def test_images_of_every_mode_become_the_same_rgb(tmp_path: Path) -> None:
    """Oracle: the RGB picture that each was made from."""
    grey = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)
    expected = np.repeat(grey[..., None], 3, axis=2)
    image = Image.fromarray(grey)
    stored = {
        "L.png": image,
        "P.png": image.convert("P"),
        "RGBA.png": image.convert("RGBA"),
        "LA.png": image.convert("LA"),
        "CMYK.tiff": image.convert("RGB").convert("CMYK"),
        "I16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "I16.tiff": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    for name, image_of_mode in stored.items():
        image_of_mode.save(tmp_path / name)
        with Image.open(tmp_path / name) as read:
            assert np.abs(np.asarray(rgb(read)).astype(int) - expected).max() <= 1, name


def test_brighter_than_16_bits_is_white() -> None:
    """Of an image of 32-bit numbers; below, 257 to a grey of 8 bits, to the nearest; and less than nothing is black."""
    image = Image.fromarray(np.array([[70_000, 65_535, 257 * 9 + 129, 257 * 9 + 128, -300]], dtype=np.int32))
    assert np.asarray(rgb(image))[0].tolist() == [[255] * 3, [255] * 3, [10] * 3, [9] * 3, [0] * 3]


def damaged(tmp_path: Path, count: int, broken: list[int]) -> Hub:
    """A parquet file of `count` images, some of them cut short."""
    stream = tmp_path / "image.png"
    Image.new("RGB", (20, 20), (9, 9, 9)).save(stream)
    whole = stream.read_bytes()
    rows = [{"bytes": whole[: len(whole) // 2] if i in broken else whole, "path": f"{i}.png"} for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (tmp_path / "x").mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict({"image": rows, "label": list(range(count))}, features=features)
    table.to_parquet(str(tmp_path / "x" / "train.parquet"))
    return Hub("x", root=str(tmp_path), splits={"train": "train"})


class Colour(Encoder):
    def __call__(self, example):  # type: ignore[no-untyped-def]
        return {"value": np.asarray(example["image"]).mean(), "label": example["label"]}


def test_a_steps_items_of_like_length_share_a_micro_batch() -> None:
    """The items of a step stay the same; a reading through begins with the longest."""

    class Texts(Encoder):
        def __call__(self, example):  # type: ignore[no-untyped-def]
            return {"label": int(example["label"])}

        @staticmethod
        def length(item) -> int:  # type: ignore[no-untyped-def]
            return item["label"]

    table = ArrayImages(np.zeros((6, 2, 2), dtype=np.uint8), np.array([5, 1, 4, 2, 6, 3]))
    split = Split(table, np.arange(6), Texts())
    keys = [[(0, 0), (1, 1), (2, 2)], [(3, 3), (4, 4), (5, 5)]]
    micro = [[batch["label"].tolist() for batch in step] for step in loader(split, iter(keys), 0, micro_batch_size=2)]
    assert micro == [[[1, 4], [5]], [[2, 3], [6]]]
    assert split.by_length == [4, 0, 2, 5, 3, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_named_and_left_out_up_to_a_share(workers: int, tmp_path: Path) -> None:
    table = damaged(tmp_path, 10, broken=[3]).open("train")
    heard: list[str] = []
    split = Split(table, np.arange(10), Colour(), tolerance=0.1)
    for _ in range(2):
        batches = list(loader(split, evaluation_keys(range(10), 4), workers, heard.append))
        assert torch.cat([batch["label"] for (batch,) in batches]).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert len(heard) == 1
    assert heard[0].startswith("example 3 cannot be read")
    assert "1 of 10" in heard[0]


def test_too_many_damaged_images_stop_the_run(tmp_path: Path) -> None:
    table = damaged(tmp_path, 10, broken=[3, 7]).open("train")
    with pytest.raises(Unreadable, match=r"example 7 .* 2 of 10, more than task\.unreadable=0\.1 allows"):
        list(loader(Split(table, np.arange(10), Colour(), tolerance=0.1), evaluation_keys(range(10), 4), 0))
    with pytest.raises(Unreadable, match=r"task\.unreadable=0\.0"):
        list(loader(Split(table, np.arange(10), Colour()), evaluation_keys(range(10), 4), 0))


def test_a_step_of_damaged_images_alone_stops_the_run_and_has_no_length(tmp_path: Path) -> None:
    class Bright(Colour):
        @staticmethod
        def length(item) -> int:  # type: ignore[no-untyped-def]
            return 1 + int(item["label"])

    split = Split(damaged(tmp_path, 4, broken=[1, 2]).open("train"), np.arange(4), Bright(), tolerance=1.0)
    with pytest.raises(Unreadable, match=r"^a whole batch cannot be read, such as example 2$"):
        list(loader(split, iter([[(2, 0), (1, 1)]]), 0, lambda text: None))
    assert split.by_length == [3, 0, 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refused_example_is_the_encoders_sentence(workers: int) -> None:
    class Refusing(Encoder):
        def __call__(self, example: Item) -> Item:
            raise SettingsError("hidden labels")

    table = ArrayImages(np.zeros((6, 2, 2), dtype=np.uint8), np.arange(6))
    with pytest.raises(SettingsError, match=r"^hidden labels$"):
        list(loader(Split(table, np.arange(6), Refusing()), evaluation_keys(range(6), 2), workers))


@pytest.mark.parametrize("name", ["train.parquet", "train.json", "train/class/text.txt"])
def test_a_damaged_file_is_named_in_one_sentence(name: str, tmp_path: Path) -> None:
    file = tmp_path / "x" / name
    file.parent.mkdir(parents=True)
    file.write_text('[{"label": ')
    cannot = r"x/train\S* cannot be read \((?!DatasetGeneration)\w+: .*\); if it is damaged, get it again$"
    with pytest.raises(SettingsError, match=cannot):
        Hub("x", root=str(tmp_path), splits={"train": "train"}).open("train")
