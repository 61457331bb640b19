"""Labels as positions in a list of class names, and the one rule by which names are compared.

Data have labels as whole numbers, with names or without, or as texts. A task gives the names, their number, or None:

* Texts are looked up in the names given; without any, the names are the training split's texts, sorted.
* Whole numbers are positions in the names given or in those that the data carry (a parquet file's ClassLabel, the
  folders of images). With neither, the training split's numbers are the names, sorted.
* The names given may be other words than the data's ("stop" for "14"), but a name that both lists have must have the
  same label in both; otherwise a run would train and report on wrong classes.

Two names are the same if they differ in case, blanks and punctuation alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from randlora.data.sources import Relabelled, Source, Table
from randlora.errors import SettingsError, check_count

Names = Sequence[str] | int | None  # what a task says of its classes: the names, how many the data name, or nothing


def check_names(task: str, given: Names) -> None:
    """Raises SettingsError unless `given` is None, a count, or a list of different texts."""
    if given is None:
        return
    if isinstance(given, int):
        check_count("task.class_names", given)
        return
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise SettingsError(f"task.class_names={given!r}: must be a list of names, their number, or null")
    strange = next((name for name in given if not isinstance(name, str) or not name.strip()), None)
    if strange is not None:
        raise SettingsError(f"task {task}: {strange!r} in class_names is not a name; put a word between quotes")
    twice = next((name for name, count in Counter(given).items() if count > 1), None)
    if twice is not None:
        raise SettingsError(f"task {task}: class_names must be different; {twice!r} is there twice")


def class_names(task: str, source: Source, given: Names) -> list[str]:
    """The names of a task's classes in the order of their labels, read from the data where they are not given.

    Raises:
        SettingsError: the data name another number of classes than `given`, or none where a number is given.
    """
    if isinstance(given, Sequence):
        return list(given)
    names = source.class_names()
    if names is None:
        values = _distinct(task, "train", source.open("train"))
        if given is not None and not _are_texts(values):
            raise SettingsError(f"{task}: the labels of the data have no names: list them in task.class_names")
        names = [str(value) for value in values]
    if given is not None and (len(names) != given or len(set(names)) != given):
        raise SettingsError(
            f"{task}: the data name {len(names)} classes, {len(set(names))} of them different, expected {given}"
        )
    return names


def described(names: Sequence[str]) -> str:
    """A sentence for the log on names that the data give, so that a record says what its labels are."""
    return f"classes in the order of their labels: {', '.join(names)}"


def labelled(task: str, source: Source, given: Names, tables: Mapping[str, Table]) -> dict[str, Table]:
    """The splits with labels that are positions in `class_names`.

    Args:
        task: the task's name, for messages.
        source: where `tables` are from.
        given: the names in the settings, how many the data name, or None.
        tables: the splits by name, with the labels as the data have them.

    Raises:
        SettingsError: a label is missing, unknown or out of range, or names are in another order than the data's.
    """
    labels = {split: _distinct(task, split, table) for split, table in tables.items()}
    carried = source.class_names()
    if carried is None and (given is None or _are_texts(labels["train"])):
        names = class_names(task, source, given)
        return {
            split: Relabelled(table, _positions(task, split, labels[split], names)) for split, table in tables.items()
        }
    if carried is not None and isinstance(given, Sequence):
        _check_order(task, given, carried)
    count = given if isinstance(given, int) else len(class_names(task, source, given))
    for split, values in labels.items():
        strange = next((value for value in values if isinstance(value, str) or not 0 <= value < count), None)
        if strange is not None:
            raise SettingsError(
                f"{task}: label {strange} in {split}, with {count} classes, whose labels are 0 to {count - 1}; "
                "with task.class_names=null the data's own labels are the classes"
            )
    return dict(tables)


def check_real_valued(task: str, tables: Mapping[str, Table]) -> None:
    """Raises SettingsError where a label is missing or is not a number."""
    for split, table in tables.items():
        labels = table.column("label")
        if labels.dtype.kind not in "iuf" or (labels != labels).any():
            raise SettingsError(
                f"{task}: {split} has labels that are no numbers, such as {labels[0]}; for classes set "
                "task.class_names=null"
            )


def _check_order(task: str, given: Sequence[str], carried: Sequence[str]) -> None:
    """Raises SettingsError where a name that both lists have has two labels."""
    labels = _by_spelling(carried)
    moved = [label for name, label in _by_spelling(given).items() if labels.get(name, label) != label]
    if moved:
        theirs = dict(enumerate(carried))
        shown = "; ".join(
            f"label {label} is {given[label]!r} in the settings, {theirs.get(label)!r} in the data"
            for label in moved[:5]
        )
        raise SettingsError(
            f"{task}: class_names are in another order than the data's ({len(moved)} names): {shown}; "
            "give them in the data's order"
        )


def _positions(task: str, split: str, values: Sequence[str | int], names: Sequence[str]) -> dict[str | int, int]:
    """The position in `names` of every value; by its exact spelling first."""
    exact, alike = {name: label for label, name in enumerate(names)}, _by_spelling(names)
    positions = {}
    for value in values:
        position = exact.get(str(value), alike.get(_spelling(str(value))))
        if position is None:
            raise SettingsError(
                f"{task}: label {value!r} in {split} is none of the classes {', '.join(names[:20])}"
                f"{', …' if len(names) > 20 else ''}; correct the file or task.class_names"
            )
        positions[value] = position
    return positions


def _distinct(task: str, split: str, table: Table) -> list[str | int]:
    """A split's labels, each once, sorted; SettingsError where they cannot be classes."""
    labels = table.column("label").tolist()
    missing = sum(label is None or label == "" or label != label for label in labels)
    if missing or not labels:
        raise SettingsError(
            f"{task}: {missing:,} of {len(labels):,} rows of {split} have no label; every row needs one"
        )
    if not isinstance(labels[0], str | int):
        raise SettingsError(
            f"{task}: label {labels[0]!r} in {split} is neither a text nor a whole number; "
            "for texts with real-valued labels set task.class_names=[]"
        )
    return sorted(set(labels))


def _are_texts(values: Sequence[str | int]) -> bool:
    return isinstance(values[0], str | bool)  # true and false are names too


def _by_spelling(names: Sequence[str]) -> dict[str, int]:
    """Labels by spelling, without the names that others are too much alike."""
    counts = Counter(map(_spelling, names))
    return {_spelling(name): label for label, name in enumerate(names) if counts[_spelling(name)] == 1}


def _spelling(name: str) -> str:
    """A name without case, blanks and punctuation."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())
