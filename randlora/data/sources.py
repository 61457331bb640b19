"""Where examples come from: files or image folders under a data root, or the public source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from annotated_types import Ge, Lt

from randlora.bounds import Bounded, Folder
from randlora.errors import SettingsError

if TYPE_CHECKING:
    from datasets import Dataset


class Table(Protocol):
    """Examples in order. Columns can be read without decoding the others."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def column(self, name: str) -> np.ndarray: ...


@runtime_checkable
class Source(Protocol):
    """Opens the splits of one data set; what inherits it need only say how."""

    def check(self) -> None:
        """Raises SettingsError when the data are known to be missing, without opening them."""

    def available(self) -> Sequence[str]:
        """The splits that there are."""
        return ["train", "test"]

    def open(self, split: str) -> Table:
        """The examples of a split, with labels that mean the same in all splits."""
        ...

    def class_names(self) -> list[str] | None:
        """The names that the data give to the labels 0, 1, …; None where they give none."""
        return None


@dataclass(frozen=True)
class Hub(Bounded):
    """A data set in files under a data root or, for a published set without a root, on the public hub.

    A split is ``root/folder/SPLIT`` with one of the endings in `FILES`, or a folder ``SPLIT/CLASS/image``. With a root,
    the hub is never asked.

    Args:
        folder: where the files are, below the root.
        repository: the set's name on the hub; None for a set that is not there.
        configuration: of the set on the hub.
        revision: of the set on the hub.
        root: the data root; None for the hub.
        splits: the source's name of a split by ours: files under the root, splits of `repository` on the hub; several
            names with ``+`` between them are one split.
        hub_splits: the hub's names of splits where they differ from the files'.
        optional: the splits (our names) that may be missing.
        columns: our names by the source's, in files and on the hub; a column that has our name already stays.
        origin: where the publisher's archive is, for sets that scripts/data.py prepares.
    """

    section: ClassVar[str] = "task.source"

    folder: Folder
    repository: str | None = None
    configuration: str | None = None
    revision: str | None = None
    root: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    optional: Sequence[str] = ()
    columns: Mapping[str, str] | None = None
    origin: str = ""

    def check(self) -> None:
        if self.root is None:
            if self.repository is None:
                raise SettingsError(f"{self.folder} is on no hub: give data_root{self._advice()}")
            return
        for split, name in ((split, name) for split, names in self.splits.items() for name in names.split("+")):
            if self._path(name) is None and split not in self.optional:
                endings = f"no {name}.parquet, no {name}.json, {', '.join(FILES[2:])} and no image folder {name}/"
                raise SettingsError(
                    f"data_root={self.root}: {Path(self.root) / self.folder} has {endings} for the {split} split; "
                    f"{self._remedy(split)}{self._advice()}"
                )

    def available(self) -> list[str]:
        """The splits, without optional ones that are not there."""
        return [
            split
            for split, name in self.splits.items()
            if split not in self.optional or (self.root is not None and all(map(self._path, name.split("+"))))
        ]

    def open(self, split: str) -> Table:
        """Raises SettingsError for missing or damaged data, or columns that are not there."""
        dataset = self._dataset(split)
        names = _label_names(dataset)
        training = self.class_names() if names is not None and "train" in self.splits else None
        if names is None or training is None or names == training:
            return HubTable(dataset)
        unknown = [name for name in names if name not in training]
        if unknown:
            raise SettingsError(f"{self.folder}: class {unknown[0]!r} of {split} is not in train ({len(unknown)} such)")
        return Relabelled(HubTable(dataset), {label: training.index(name) for label, name in enumerate(names)})

    def class_names(self) -> list[str] | None:
        return _label_names(self._dataset("train"))

    def _remedy(self, split: str) -> str:
        if self.repository:
            return "put the data there, or leave data_root out to fetch it"
        if split == "test":
            return "put rows there that are in no other split: they alone give the result"
        return "put the data there"

    def _advice(self) -> str:
        return f"; from {self.origin}, by scripts/data.py prepare" if self.origin else ""

    def _path(self, name: str) -> Path | None:
        base = Path(self.root or ".") / self.folder
        paths = [path for ending in (*FILES, "") if (path := base / f"{name}{ending}").exists()]
        if len(paths) > 1:
            raise SettingsError(f"{base} has both {paths[0].name} and {paths[1].name}: keep the one that is meant")
        return paths[0] if paths else None

    @cached_property
    def _datasets(self) -> dict[str, Dataset]:
        """The splits that have been opened: counting, naming and reading ask for the same ones."""
        return {}

    def _dataset(self, split: str) -> Dataset:
        import datasets

        if split not in self._datasets:
            datasets.disable_progress_bars()
            self.check()
            self._datasets[split] = self._renamed(self._local(split) if self.root is not None else self._fetched(split))
        return self._datasets[split]

    def _local(self, split: str) -> Dataset:
        import datasets

        paths = map(self._path, self.splits[split].split("+"))
        parts = [read_file(path) for path in paths if path is not None]  # check() and available() have been here
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]

    def _fetched(self, split: str) -> Dataset:
        import datasets

        name = self.hub_splits.get(split, self.splits[split])
        try:
            return datasets.load_dataset(self.repository, self.configuration, split=name, revision=self.revision)
        except Exception as error:  # the hub client raises many kinds
            raise SettingsError(
                f"cannot fetch {self.repository}: {type(error).__name__}: {str(error).splitlines()[0]}; "
                f"with data_root=FOLDER it is read from FOLDER/{self.folder}"
            ) from error

    def _renamed(self, dataset: Dataset) -> Dataset:
        for theirs, ours in (self.columns or {}).items():
            if theirs in dataset.column_names:
                if ours in dataset.column_names:
                    raise SettingsError(
                        f"task.source.columns={{{theirs}: {ours}}}: {self.folder} has both columns; rename one of them"
                    )
                dataset = dataset.rename_column(theirs, ours)
            elif ours not in dataset.column_names:
                raise SettingsError(
                    f"task.source.columns={{{theirs}: {ours}}}: {self.folder} has neither; its columns are "
                    f"{', '.join(dataset.column_names)}"
                )
        return dataset


FILES = (".parquet", ".json", ".jsonl", ".csv", ".tsv")


def read_file(path: Path) -> Dataset:
    """A file, or a folder of images; SettingsError for one that is damaged."""
    import datasets

    try:
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path), split="train", drop_labels=False)
        if path.suffix in (".json", ".jsonl"):
            return datasets.Dataset.from_json(str(path))
        if path.suffix in (".csv", ".tsv"):
            # Without pandas' default, by which a text such as "NA" or "null" is a missing one.
            separator = "\t" if path.suffix == ".tsv" else ","
            return datasets.Dataset.from_csv(str(path), sep=separator, keep_default_na=False)
        return datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # of Arrow's, of JSON's, of datasets'
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        raise SettingsError(f"{path} cannot be read ({reason}); if it is damaged, get it again") from error


def _label_names(dataset: Dataset) -> list[str] | None:
    names = getattr(dataset.features.get("label"), "names", None)
    return None if names is None else list(names)


class HubTable:
    """A datasets.Dataset as a Table; images are decoded when an example is read."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.dataset[int(index)]

    def column(self, name: str) -> np.ndarray:
        self.check_column(name)
        return np.asarray(self.dataset.select_columns([name]).with_format("numpy")[:][name])

    def check_column(self, name: str) -> None:
        """Raises SettingsError for a column that the data lack."""
        if name not in self.dataset.column_names:
            raise SettingsError(
                f"the data have no column {name!r}; they have {', '.join(self.dataset.column_names)}: name the one "
                f"that is meant by task.source.columns={{THEIRS: {name}}}"
            )


def check_columns(tables: Mapping[str, Table], names: Sequence[str]) -> None:
    """Raises SettingsError for a column that one of the splits lacks, where they are files."""
    for table in tables.values():
        for name in names:
            if isinstance(table, HubTable):
                table.check_column(name)


class Relabelled:
    """A table with other labels.

    Args:
        table: the examples.
        labels: the new label of every old one.
    """

    def __init__(self, table: Table, labels: Mapping[Any, int]):
        self.table, self.labels = table, labels

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        example = self.table[index]
        return {**example, "label": self.labels[example["label"]]}

    def column(self, name: str) -> np.ndarray:
        values = self.table.column(name)
        return np.array([self.labels[value] for value in values.tolist()]) if name == "label" else values


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
class Union(Source):
    """Several sources of one column layout as one: the classes of the second are counted after those of the first.

    Args:
        sources: by name; each names its own classes, and no name is in two of them.
    """

    sources: Mapping[str, Source]

    def check(self) -> None:
        for source in self.sources.values():
            source.check()

    def class_names(self) -> list[str]:
        return [name for names in self._names().values() for name in names]

    def open(self, split: str) -> Table:
        first, tables = 0, {}
        for name, names in self._names().items():
            labels = {label: first + label for label in range(len(names))}
            tables[name] = Relabelled(self.sources[name].open(split), labels)
            first += len(names)
        return Joined(tables)

    def _names(self) -> dict[str, list[str]]:
        """SettingsError for a source whose classes have no names."""
        names = {name: source.class_names() for name, source in self.sources.items()}
        nameless = next((name for name, of_source in names.items() if of_source is None), None)
        if nameless is not None:
            raise SettingsError(f"task.source.sources.{nameless}: this source's classes have no names; leave it out")
        every = [name for of_source in names.values() for name in of_source or ()]
        twice = next((name for name, count in Counter(every).items() if count > 1), None)
        if twice is not None:
            raise SettingsError(f"task.source.sources: class {twice!r} is in two of {', '.join(names)}; rename one")
        return {name: list(of_source or ()) for name, of_source in names.items()}


@dataclass(frozen=True)
class Digits(Bounded, Source):
    """scikit-learn's 1,797 handwritten digits, 8 × 8 grey: the data set that is always there.

    It has no split of its own; the writers come one after the other, so the last `test` images are the test set.
    """

    section: ClassVar[str] = "task.source"

    test: Annotated[int, Ge(1), Lt(1700)] = 397

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
