"""Commonsense questions: LLM-Adapters' instructions, and the same made from the rows of the public data sets.

The wording is that of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933), whose files the paper trains and tests on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from randlora.bounds import Bounded
from randlora.data.sources import Hub, Joined, Source
from randlora.errors import SettingsError, check_choice

_FORMAT = "Answer format: "
# How many answers of a kind the published evaluation looks for, whatever the question offers.
_PATTERNS = {"answer": 5, "ending": 4, "solution": 2, "option": 2}


class Question(NamedTuple):
    """An instruction, the choices that it names, and the right one of them."""

    text: str
    choices: list[str]
    answer: str

    @property
    def recognised(self) -> list[str]:
        """What counts as an answer in a response."""
        stem = self.choices[0].rstrip("0123456789")
        return [f"{stem}{i}" for i in range(1, _PATTERNS[stem] + 1)] if stem in _PATTERNS else self.choices


def question(row: Mapping[str, Any]) -> Question:
    """LLM-Adapters' text where the row has it, and the same made from a public row.

    A row's set is known by its columns: ARC, OpenBookQA, BoolQ, PIQA, Social IQa, HellaSwag, WinoGrande.

    Raises:
        SettingsError: the row is of none of these.
    """
    if "instruction" in row:
        text = row["instruction"]
        if _FORMAT not in text:
            raise SettingsError(f"an instruction without {_FORMAT!r}: {text[:60]!r}")
        return Question(text, text.rpartition(_FORMAT)[2].strip().split("/"), row["answer"])
    for columns, question_of in _PUBLIC.items():
        if columns <= row.keys():
            return question_of(row)
    raise SettingsError(f"a row with the columns {', '.join(row)} is of no data set that is known here")


def _asked(
    head: str, stem: str, options: Sequence[str], right: int, between: str = " ", last: str = "\n\n"
) -> Question:
    """Options are numbered from 1; `right` counts from 0."""
    names = [f"{stem}{i}" for i in range(1, len(options) + 1)]
    listed = between.join(f"{name.capitalize()}: {option}" for name, option in zip(names, options, strict=True))
    return Question(f"{head}\n\n{listed}{last}{_FORMAT}{'/'.join(names)}", names, names[right])


def _choices(row: Mapping[str, Any]) -> Question:
    """ARC and OpenBookQA."""
    head = f"Please choose the correct answer to the question: {row.get('question') or row['question_stem']}"
    return _asked(head, "answer", row["choices"]["text"], list(row["choices"]["label"]).index(row["answerKey"]))


def _boolq(row: Mapping[str, Any]) -> Question:
    head = f"Please answer the following question with true or false, question: {row['question']}?"
    return Question(f"{head}\n\n{_FORMAT}true/false", ["true", "false"], "true" if row["answer"] else "false")


def _piqa(row: Mapping[str, Any]) -> Question:
    head = f"Please choose the correct solution to the question: {row['goal']}"
    return _asked(head, "solution", [row["sol1"], row["sol2"]], int(row["label"]), between="\n\n")


def _siqa(row: Mapping[str, Any]) -> Question:
    head = f"Please choose the correct answer to the question: {row['context']} {row['question']}"
    return _asked(head, "answer", [row[f"answer{letter}"] for letter in "ABC"], int(row["label"]) - 1)


def _hellaswag(row: Mapping[str, Any]) -> Question:
    head = f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}"
    return _asked(head, "ending", row["endings"], int(row["label"]))


def _winogrande(row: Mapping[str, Any]) -> Question:
    head = f"Please choose the correct answer to fill in the blank to complete the given sentence: {row['sentence']}"
    return _asked(head, "option", [row["option1"], row["option2"]], int(row["answer"]) - 1, last=" ")


_PUBLIC: Mapping[frozenset[str], Callable[[Mapping[str, Any]], Question]] = {
    frozenset({"choices", "answerKey"}): _choices,
    frozenset({"goal", "sol1", "sol2", "label"}): _piqa,
    frozenset({"context", "question", "answerA", "label"}): _siqa,
    frozenset({"activity_label", "ctx", "endings", "label"}): _hellaswag,
    frozenset({"sentence", "option1", "option2", "answer"}): _winogrande,
    frozenset({"question", "passage", "answer"}): _boolq,
}


class Published(NamedTuple):
    """Where a set is on the hub, the folder LLM-Adapters keeps it in, and how many questions each split has."""

    folder: str
    repository: str
    train: int
    test: int
    configurations: Sequence[str | None] = (None,)
    revision: str | None = None
    test_split: str = "validation"  # most tests are hidden, so the public validation set is the test set


_PARQUET = "refs/convert/parquet"  # the hub's own copy of sets that came with a loading script
_WINOGRANDE = [f"winogrande_{size}" for size in ("xs", "s", "m", "l", "xl", "debiased")]
SETS = {
    "boolq": Published("boolq", "google/boolq", 9427, 3270),
    "piqa": Published("piqa", "ybisk/piqa", 16113, 1838, revision=_PARQUET),
    "siqa": Published("social_i_qa", "allenai/social_i_qa", 33410, 1954, revision=_PARQUET),
    "hellaswag": Published("hellaswag", "Rowan/hellaswag", 39905, 10042),
    "winogrande": Published("winogrande", "allenai/winogrande", 63238, 1267, _WINOGRANDE),
    "arc_easy": Published("ARC-Easy", "allenai/ai2_arc", 2251, 2376, ["ARC-Easy"], test_split="test"),
    "arc_challenge": Published("ARC-Challenge", "allenai/ai2_arc", 1119, 1172, ["ARC-Challenge"], test_split="test"),
    "openbookqa": Published("openbookqa", "allenai/openbookqa", 4957, 500, ["main"], test_split="test"),
}


@dataclass(frozen=True)
class QuestionSets(Bounded, Source):
    """Public sets of questions, one after the other; every example says in `set` which it is from.

    Of WinoGrande, training takes all sizes and the debiased set, as LLM-Adapters does.

    Args:
        names: of SETS.
        root: the data root, with ``commonsense/FOLDER/SPLIT.parquet`` or ``.json`` (LLM-Adapters' own files); None
            for the hub.
        splits: those that need to be there.
    """

    section: ClassVar[str] = "task.source"

    names: Sequence[str]
    root: str | None = None
    splits: Sequence[Literal["train", "test"]] = ("train", "test")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.names:
            check_choice("names of question sets", name, tuple(SETS))

    def check(self) -> None:
        for name in self.names:
            self._part(name).check()

    def open(self, split: str) -> Joined:
        check_choice("the split of question sets", split, self.splits)
        tables = {}
        for name in self.names:
            tables[name] = self._part(name).open(split) if self.root or split != "train" else self._all_sizes(name)
            expected = getattr(SETS[name], split)
            if len(tables[name]) != expected:
                raise SettingsError(f"{name}: the {split} split has {len(tables[name])} rows, expected {expected}")
        return Joined(tables)

    def available(self) -> Sequence[str]:
        return self.splits

    def _part(self, name: str, configuration: str | None = None) -> Hub:
        published = SETS[name]
        return Hub(
            folder=f"commonsense/{published.folder}",
            repository=published.repository,
            configuration=configuration or published.configurations[-1],
            revision=published.revision,
            root=self.root,
            splits={split: split for split in self.splits},
            hub_splits={"test": published.test_split},
        )

    def _all_sizes(self, name: str) -> Joined:
        return Joined({str(c): self._part(name, c).open("train") for c in SETS[name].configurations})
