"""Drawings of letters, and sources side by side. Oracles: Unicode's data, scikit-learn, and the parts themselves."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from randlora.data import glyphs
from randlora.data.glyphs import Glyphs
from randlora.data.sources import Digits, Hub, Union
from randlora.errors import SettingsError

pytest.importorskip("matplotlib")
pytest.importorskip("HersheyFonts", reason="Hershey-Fonts is not installed: pip install '.[glyphs]'")


def test_no_glyph_is_a_digit_and_each_is_drawn() -> None:
    """Oracle: Unicode's numeric values. A drawing has ink, and so more than one colour."""
    table = Glyphs(train=1000).open("train")
    names = Glyphs().class_names()
    assert len(set(names)) == len(names) > 400
    for label, name in enumerate(names):
        with pytest.raises(ValueError, match="not a numeric"):
            unicodedata.numeric(unicodedata.lookup(name))
        example = table[label]
        assert example["label"] == label
        assert len(np.unique(np.asarray(example["image"]))) > 2


def test_a_drawing_is_the_same_every_time_and_no_other() -> None:
    names = Glyphs().class_names()
    one, two, other = Glyphs().open("train"), Glyphs().open("train"), Glyphs().open("test")
    arrays = [np.asarray(table[7]["image"].resize((64, 64))) for table in (one, two, other)]
    assert np.array_equal(arrays[0], arrays[1])
    assert not np.array_equal(arrays[0], arrays[2])
    assert np.array_equal(
        one.column("label")[:500],
        [one[i]["label"] for i in range(5)] + [*range(5, len(names)), *range(500 - len(names))],
    )


def test_a_class_is_a_shape() -> None:
    """Oracle: scikit-learn tells X from V in drawings it has not seen, of which the colours say nothing."""
    table = Glyphs(train=60_000).open("train")
    names = Glyphs().class_names()
    labels = [names.index(f"latin capital letter {letter}") for letter in "xv"]

    def features(rounds: range) -> tuple[np.ndarray, np.ndarray]:
        rows = [(table[i * len(names) + label]["image"], label) for i in rounds for label in labels]
        grey = [np.asarray(image.convert("L").resize((16, 16)), dtype=float).ravel() for image, _ in rows]
        contrast = [np.abs(pixels - np.median(pixels)) for pixels in grey]
        return np.array(contrast) / 255, np.array([label for _, label in rows])

    model = LogisticRegression(C=0.1, max_iter=1000).fit(*features(range(60)))
    assert model.score(*features(range(60, 120))) > 0.75


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="draws fonts of matplotlib: pip install"):
        Glyphs().check()


def test_sources_side_by_side() -> None:
    """Oracle: the sources alone."""
    letters, digits = Glyphs(train=30, test=10), Digits()
    both = Union({"letters": letters, "digits": digits})
    names, count = letters.class_names(), len(letters.class_names())
    assert both.class_names() == [*names, *map(str, range(10))]
    table = both.open("test")
    assert len(table) == 10 + 397
    assert table.column("label").tolist() == [*range(10), *(count + digits.open("test").column("label"))]
    example = table[10 + 5]
    assert example["label"] == count + digits.open("test")[5]["label"]
    assert np.array_equal(np.asarray(example["image"]), np.asarray(digits.open("test")[5]["image"]))


def test_sources_that_share_a_class_or_name_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="class '0' is in two of first, second"):
        Union({"first": Digits(), "second": Digits()}).class_names()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.csv").write_text("image,label\na.png,1\n")
    plain = Hub("plain", root=str(tmp_path), splits={"train": "train"})
    with pytest.raises(SettingsError, match=r"sources.plain: this source's classes have no names"):
        Union({"plain": plain, "digits": Digits()}).open("train")
