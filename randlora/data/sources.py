"""Where examples come from: parquet or image folders under a data root, or the public source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from randlora.errors import SettingsError


class Table(Protocol):
    """Examples in order. Columns can be read without decoding the others."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def column(self, name: str) -> np.ndarray: ...


class Source(Protocol):
    """Opens the splits of one data set."""

    def check(self) -> None:
        """Raises SettingsError when the data are known to be missing, without opening them."""

    def open(self, split: str) -> Table: ...

    def class_names(self) -> list[str]: ...


@dataclass(frozen=True)
class Hub:
    """A data set as ``root/folder/SPLIT.parquet``, ``SPLIT.json`` (a list of rows) or ``SPLIT/CLASS/image``, else from
    the public hub.

    `splits` maps our names to the source's: files under the root, splits of `repository` on the hub. `columns` renames
    the hub's columns to ours where they differ. With a root, the hub is never asked.
    """

    folder: str
    repository: str | None = None
    configuration: str | None = None
    revision: str | None = None
    root: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    hub_splits: Mapping[str, str] = field(default_factory=dict)  # where the hub's names differ from the files'
    columns: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""  # where the publisher's archive is, for data that scripts/data.py prepares

    def check(self) -> None:
        if self.root is None:
            if self.repository is None:
                raise SettingsError(f"{self.folder} is on no hub: give data_root{self._advice()}")
            return
        base = Path(self.root) / self.folder
        missing = [name for name in self.splits.values() if not self._local(name)]
        if missing:
            raise SettingsError(
                f"data_root={self.root}: {base} has no {missing[0]}.parquet, no {missing[0]}.json and no image folder "
                f"{missing[0]}/; put the data there{', or leave data_root out to fetch it' if self.repository else ''}"
                f"{self._advice()}"
            )

    def open(self, split: str) -> Table:
        self.check()
        return HubTable(self._load(split))

    def class_names(self) -> list[str]:
        """The names that the labels' column has, in their order; SettingsError when it has none."""
        self.check()
        feature = self._load("train").features.get("label")
        names = getattr(feature, "names", None)
        if names is None:
            raise SettingsError(f"the labels of {self.folder} have no names: give task.class_names, or prepare it anew")
        return list(names)

    def _advice(self) -> str:
        return f"; from {self.origin}, by scripts/data.py prepare" if self.origin else ""

    def _local(self, name: str) -> Path | None:
        base = Path(self.root or ".") / self.folder
        return next((path for end in (".parquet", ".json", "") if (path := base / f"{name}{end}").exists()), None)

    def _load(self, split: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        name = self.splits[split]
        if self.root is not None:
            path = self._local(name)
            assert path is not None  # check() has been here
            return _read(path)
        try:
            dataset = datasets.load_dataset(
                self.repository, self.configuration, split=self.hub_splits.get(split, name), revision=self.revision
            )
        except Exception as error:  # the hub client raises many kinds
            raise SettingsError(
                f"cannot fetch {self.repository}: {type(error).__name__}: {str(error).splitlines()[0]}; "
                f"with data_root=FOLDER it is read from FOLDER/{self.folder}"
            ) from error
        return dataset.rename_columns({hub: ours for hub, ours in self.columns.items() if hub in dataset.column_names})


def _read(path: Path) -> Any:
    """The datasets.Dataset of a file or of a folder of images; SettingsError for one that is damaged."""
    import datasets

    try:
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path), split="train", drop_labels=False)
        if path.suffix == ".json":
            return datasets.Dataset.from_json(str(path))
        return datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # of Arrow's, of JSON's, of datasets'
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        raise SettingsError(f"{path} cannot be read ({reason}); if it is damaged, get it again") from error


class HubTable:
    """A datasets.Dataset as a Table; images are decoded when an example is read."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.dataset[int(index)]

    def column(self, name: str) -> np.ndarray:
        if name not in self.dataset.column_names:
            raise SettingsError(f"the data have no column {name!r}; they have {', '.join(self.dataset.column_names)}")
        return np.asarray(self.dataset.select_columns([name]).with_format("numpy")[:][name])


class Joined:
    """Tables one after the other; every example says in `set` which it is from."""

    def __init__(self, tables: Mapping[str, Table]):
        self.tables, self.names = list(tables.values()), list(tables)
        self.ends = np.cumsum([len(table) for table in self.tables])

    def sizes(self) -> dict[str, int]:
        """How many examples each has, by name, in order."""
        return {name: len(table) for name, table in zip(self.names, self.tables, strict=True)}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        which = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[which - 1]) if which else 0
        return {**self.tables[which][index - start], "set": self.names[which]}

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([table.column(name) for table in self.tables])


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 grey: the data set that is always there.

    It has no split of its own; the writers come one after the other, so the last 397 images are the test set.
    """

    test: int = 397

    def check(self) -> None:
        """It ships with scikit-learn."""

    def class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def open(self, split: str) -> Table:
        from sklearn.datasets import load_digits

        digits = load_digits()
        rows = slice(None, -self.test) if split == "train" else slice(-self.test, None)
        return ArrayImages((digits.images[rows] * (255 / 16)).astype(np.uint8), digits.target[rows])


class ArrayImages:
    """Images (N, H, W) of uint8 and their labels (N,) as a Table."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        from PIL import Image

        return {"image": Image.fromarray(self.images[index]), "label": int(self.labels[index])}

    def column(self, name: str) -> np.ndarray:
        return {"label": self.labels}[name]
