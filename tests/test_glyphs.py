"""Drawings of letters, and sources side by side. Oracles: Unicode's data, scikit-learn, and the parts themselves."""

import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
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


def seeded(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_a_warp_is_the_recorded_one() -> None:
    """Taken when the embedded model was pretrained on these drawings; boxes tile the image, corners are shared."""
    mesh = glyphs._warp(seeded(1))
    edges = [(0, 21), (21, 43), (43, 64)]
    assert [box for box, _ in mesh] == [(x0, y0, x1, y1) for y0, y1 in edges for x0, x1 in edges]
    recorded = {
        0: [27.35, 20.54, 14.73, 36.05, 36.47, 39.11, 50.23, 19.74],
        4: [36.47, 39.11, 29.43, 59.36, 53.89, 64.99, 62.81, 41.06],
        8: [53.89, 64.99, 49.37, 83.87, 66.17, 84.47, 76.51, 65.12],
    }
    for cell, corners in recorded.items():
        assert mesh[cell][1] == pytest.approx(corners, abs=0.006)


def test_colours_are_the_recorded_ones() -> None:
    """Of no ink and of all, by seed: white on black, the reverse, two colours, with noise and without."""
    recorded = {
        0: [2, 2, 2, 159, 159, 159], 1: [255, 255, 255, 94, 94, 94], 2: [207, 195, 217, 74, 192, 14],
        3: [255, 255, 255, 89, 89, 89], 4: [0, 0, 0, 227, 227, 227], 5: [236, 107, 44, 108, 235, 171],
        6: [0, 0, 0, 216, 216, 216], 7: [1, 1, 1, 201, 201, 201], 8: [0, 0, 0, 167, 167, 167],
        9: [0, 0, 0, 156, 156, 156], 10: [255, 255, 255, 59, 59, 59], 11: [211, 187, 243, 84, 60, 116],
    }  # fmt: skip
    ink = np.array([[0.0, 1.0]], dtype=np.float32)
    for seed, values in recorded.items():
        assert np.asarray(glyphs._coloured(ink, seeded(seed))).ravel() == pytest.approx(values, abs=1)


def test_strokes_are_drawn_as_recorded() -> None:
    """The mean ink of 16 parts of the canvas; a thin pen and a thick one."""
    strokes = [np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 1.0], [0.5, 0.9]])]
    recorded = {
        0: [[12, 1, 0, 0], [1, 50, 1, 0], [0, 9, 52, 0], [7, 17, 3, 9]],
        2: [[45, 29, 0, 0], [7, 145, 27, 0], [7, 58, 161, 24], [43, 66, 15, 42]],
    }
    for seed, parts in recorded.items():
        drawn = np.asarray(glyphs._stroked(strokes, seeded(seed)))
        assert drawn.max() == 255
        assert drawn.reshape(4, 24, 4, 24).mean((1, 3)) == pytest.approx(np.array(parts), abs=3)


def test_printed_glyphs_are_in_the_middle_and_as_bold_as_drawn() -> None:
    """A pixel more on every side for each of up to three."""
    font, _ = next(glyphs._font_files())
    extents = {}
    for seed in range(20):
        rows, columns = np.asarray(glyphs._printed("Q", font, seeded(seed))).nonzero()
        assert columns.min() + columns.max() == pytest.approx(glyphs.CANVAS, abs=2)
        assert rows.min() + rows.max() == pytest.approx(glyphs.CANVAS, abs=2)
        extents[int(seeded(seed).integers(0, 4))] = np.ptp(columns)
    assert [extents[bold] - extents[0] for bold in range(4)] == [0, 2, 4, 6]
    assert np.asarray(glyphs._printed("Q", font, seeded(0))).max() == 255


def test_what_draws_a_glyph() -> None:
    """Latin letters in every font and every kind of strokes; these fill a square of side 1 in its middle."""
    table = Glyphs().open("train")
    fonts = [font.getname()[0] for font in table.fonts["A"] if not isinstance(font, list)]  # type: ignore[attr-defined]
    assert {"DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono", "STIXGeneral"} <= set(fonts)
    assert all(font.size == glyphs.SIDE for font in table.fonts["A"] if not isinstance(font, list))  # type: ignore[attr-defined]
    assert not [font for font in table.fonts["ა"] if isinstance(font, list)]  # type: ignore[attr-defined]
    for letter in "AZaz":
        drawn = [strokes for strokes in table.fonts[letter] if isinstance(strokes, list)]  # type: ignore[attr-defined]
        assert len(drawn) == len(glyphs.STROKES)
        for points in map(np.concatenate, drawn):
            assert np.ptp(points, axis=0).max() == pytest.approx(1)
            assert (points.min(0) + points.max(0)).tolist() == pytest.approx([1, 1])
    assert len(Glyphs().class_names()) == 471
    assert "fonts" not in pickle.loads(pickle.dumps(table)).__dict__


def test_drawings_are_the_recorded_ones() -> None:
    """The sides of the first 24 of training and a coarse grey of some, with the fonts of matplotlib 3.11."""
    table = Glyphs().open("train")
    sides = [64, 64, 64, 8, 64, 64, 64, 14, 64, 22, 64, 17, 64, 64, 20, 18, 15, 30, 64, 23, 64, 64, 64, 64]
    assert [table[i]["image"].size for i in range(24)] == [(side, side) for side in sides]
    recorded = {
        0: [194, 194, 194, 194, 162, 193, 194, 192, 193], 1: [145, 143, 145, 145, 139, 144, 145, 142, 145],
        2: [0, 22, 18, 17, 69, 11, 0, 27, 2], 3: [56, 84, 4, 108, 154, 57, 69, 149, 45],
        7: [168, 168, 166, 171, 174, 166, 168, 168, 166], 9: [130, 126, 2, 109, 129, 9, 59, 94, 66],
    }  # fmt: skip
    for index, grey in recorded.items():
        coarse = table[index]["image"].convert("L").resize((3, 3), Image.Resampling.BOX)
        assert np.asarray(coarse).ravel() == pytest.approx(grey, abs=3)


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
