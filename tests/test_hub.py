"""Sources of several parts, and the public hub, in whose place a function stands that notes what it is asked for."""

from pathlib import Path

import datasets
import pytest

from conftest import settings
from randlora.config import build
from randlora.data import questions
from randlora.data.questions import QuestionSets
from randlora.data.sources import Hub, HubTable, Joined
from randlora.errors import SettingsError
from randlora.tasks.data_to_text import Meanings


class Asked(list):
    """What the hub was asked for; its sets have two rows, and their configuration's name in each."""

    def load_dataset(self, repository: str, configuration: str | None, *, split: str, revision: str | None):  # type: ignore[no-untyped-def]
        self.append((repository, configuration, split, revision))
        return datasets.Dataset.from_dict({"their": [f"{configuration}", "x"], "label": [0, 1]})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(datasets, "load_dataset", asked.load_dataset)
    return asked


def test_without_a_root_a_set_is_fetched_from_the_hub(asked: Asked) -> None:
    source = Hub(
        "x", "them/set", configuration="small", revision="main", splits={"train": "train", "test": "dev"},
        hub_splits={"test": "validation"}, columns={"their": "our"},
    )  # fmt: skip
    source.check()
    for split in ("train", "test", "train"):
        assert source.open(split)[0] == {"our": "small", "label": 0}
    assert asked == [("them/set", "small", "train", "main"), ("them/set", "small", "validation", "main")]  # each once


def test_a_set_that_cannot_be_fetched_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(SettingsError) as error:
        Hub("folder", "them/set").open("train")
    assert str(error.value) == (
        "cannot fetch them/set: ConnectionError: no network; with data_root=FOLDER it is read from FOLDER/folder"
    )


def test_training_questions_of_the_hub_are_those_of_all_configurations(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LLM-Adapters takes WinoGrande, of which tests are the last configuration's validation set."""
    sizes = {"train": 12, "test": 2}
    monkeypatch.setitem(questions.SETS, "winogrande", questions.SETS["winogrande"]._replace(**sizes))
    sets = QuestionSets(["winogrande"])
    names = [f"winogrande_{size}" for size in ("xs", "s", "m", "l", "xl", "debiased")]
    table = sets.open("train")
    assert [table[i]["their"] for i in range(0, 12, 2)] == names
    assert {table[i]["set"] for i in range(12)} == {"winogrande"}
    assert asked == [("allenai/winogrande", name, "train", None) for name in names]
    asked.clear()
    assert len(sets.open("test")) == 2
    assert asked == [("allenai/winogrande", "winogrande_debiased", "validation", None)]
    monkeypatch.setitem(questions.SETS, "winogrande", questions.SETS["winogrande"]._replace(test=3))
    with pytest.raises(SettingsError, match="winogrande: the test split has 2 rows, expected 3"):
        sets.open("test")
    with pytest.raises(SettingsError, match=r"^the split of question sets='validation': choose one of train, test"):
        sets.open("validation")
    with pytest.raises(SettingsError, match=r"^names of question sets='x': choose one of boolq, piqa"):
        QuestionSets(["x"])


def test_missing_questions_are_named_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"commonsense/piqa has no train\.parquet"):
        QuestionSets(["piqa"], root=str(tmp_path)).check()
    (tmp_path / "commonsense").mkdir()
    (tmp_path / "commonsense" / "commonsense_15k.json").write_text("[]")
    mixture = build(settings("task=commonsense_15k", f"data_root={tmp_path}")["task"])
    mixture.source.check()
    with pytest.raises(SettingsError, match=r"commonsense/boolq has no test\.parquet"):
        mixture.check()


def test_joined_tables_are_one_after_the_other() -> None:
    parts = [Hub("x", "y")._renamed(datasets.Dataset.from_dict({"label": labels})) for labels in ([3, 1], [2], [5, 4])]
    joined = Joined({name: HubTable(part) for name, part in zip("abc", parts, strict=True)})
    assert joined.sizes() == {"a": 2, "b": 1, "c": 2}
    assert joined.column("label").tolist() == [joined[i]["label"] for i in range(len(joined))] == [3, 1, 2, 5, 4]
    assert [joined[i]["set"] for i in range(5)] == [*"aabcc"]


def test_meanings_are_told_apart_by_their_text() -> None:
    rows = {"meaning_representation": ["b[1]", "a[1]", "b[1]"], "reference": ["x", "y", "z"]}

    class Table(dict):
        def column(self, name: str) -> list[str]:
            return self[name]

    meanings = Meanings(Table(rows))  # type: ignore[arg-type]
    assert meanings.column("meaning_representation").tolist() == ["b[1]", "a[1]"]
    assert meanings[0] == {"meaning_representation": "b[1]", "references": ["x", "z"], "reference": "x"}
    with pytest.raises(KeyError):
        meanings.column("reference")
