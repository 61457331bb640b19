"""Commonsense questions, asked of a causal language model as instructions.

Prompt, answer patterns and decoding are those of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933), which the paper
follows. Its training and evaluation prompts differ in blanks; here both are the evaluation's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from randlora.bounds import Count
from randlora.data.loader import Encoder, Item
from randlora.data.questions import question
from randlora.data.sources import Joined, Source, Table
from randlora.data.subsets import subsample
from randlora.data.texts import PromptEncoder, pad, pad_inputs
from randlora.models.base import Backbone
from randlora.tasks.base import Batch
from randlora.tasks.language_model import IGNORED, LabelledTokens, LanguageModelTask

_INDENT = " " * 16  # the published prompt is indented so
_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request. "


def prompt(instruction: str) -> str:
    """All that comes before the response."""
    return f"{_TASK}\n\n{_INDENT}### Instruction:\n{_INDENT}{instruction}\n\n{_INDENT}### Response:\n{_INDENT}"


@dataclass(frozen=True)
class Commonsense(LanguageModelTask):
    """Multiple choice; accuracy over the test questions, and the part of them that was answered at all.

    Args:
        tests: The sets that a mixture is tested on; the accuracy is then the mean of theirs, as published, and
            `test_size` bounds each. None: the test set is the source's own.
        scoring: ``generation`` (the first of the question's possible answers in the response counts, none is wrong) or
            ``likelihood`` (the answer that makes "the correct answer is ANSWER" most likely).
        train_on_inputs: Whether the loss is over the prompt's tokens too, as published.
    """

    headline: ClassVar[str] = "accuracy"
    zero_shot: ClassVar[bool] = True
    version: ClassVar[int] = 2  # 1 asked with the blanks before the response as tokens of their own

    tests: Source | None = None
    scoring: Literal["generation", "likelihood"] = "generation"
    train_on_inputs: bool = True
    max_length: Count = 256

    def check(self) -> None:
        super().check()
        if self.tests is not None:
            self.tests.check()

    def open(self) -> dict[str, Table]:
        tables = super().open()
        return tables if self.tests is None else tables | {"test": self.tests.open("test")}

    def test_rows(self, table: Table) -> np.ndarray:
        if not isinstance(table, Joined):
            return super().test_rows(table)
        rows, start = [], 0
        for name, size in table.sizes().items():
            rows.append(start + subsample(size, self.test_size, name))
            start += size
        return np.concatenate(rows)

    def encoder(self, backbone: Backbone, training: bool) -> Encoder:
        assert backbone.tokenizer is not None
        tokenizer = backbone.tokenizer()
        if training:
            return ResponseEncoder(tokenizer, self.max_length, self.train_on_inputs)
        return QuestionEncoder(tokenizer, self.scoring == "likelihood")

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, list]:
        if self.scoring == "likelihood":
            predicted = self._most_likely(model, batch)
        else:
            texts = self.generate(model, batch)
            predicted = [first_answer(text, words) for text, words in zip(texts, batch["recognised"], strict=True)]
        return {"predicted": predicted, "label": batch["answer"], "set": batch["set"]}

    def score(self, columns: Mapping[str, list]) -> dict[str, float]:
        rows = list(zip(columns["set"], columns["predicted"], columns["label"], strict=True))
        accuracy = {}
        for name in dict.fromkeys(columns["set"]):
            right = [predicted == label for origin, predicted, label in rows if origin == name]
            accuracy[name] = sum(right) / len(right)
        return {
            "accuracy": sum(accuracy.values()) / len(accuracy),
            "answered": sum(predicted != "" for _, predicted, _ in rows) / len(rows),
            **({f"{name}/accuracy": value for name, value in accuracy.items()} if len(accuracy) > 1 else {}),
        }

    def _most_likely(self, model: nn.Module, batch: Batch) -> list[str]:
        """By the summed log-probability of the tokens in which the answers differ."""
        targets = batch["targets"]
        if "rows" not in batch:  # they differ in one token, so one row says all
            scores = model.logits(batch["inputs"], keep=1)[:, -1].float().gather(1, targets.clamp_min(0))
            best = scores.masked_fill(targets == IGNORED, float("-inf")).argmax(1).tolist()
            return [names[i] for names, i in zip(batch["names"], best, strict=True)]
        span = targets.shape[1]
        logits = model.logits(batch["inputs"], keep=span + 1)[:, :-1].float().log_softmax(-1)
        steps = logits.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
        sums = steps.masked_fill(targets == IGNORED, 0).sum(1).split(batch["rows"])
        return [names[int(row.argmax())] for names, row in zip(batch["names"], sums, strict=True)]


def first_answer(text: str, answers: Sequence[str]) -> str:
    """The first of the answers in a response, or "" when there is none."""
    first = re.search("|".join(map(re.escape, answers)), text)
    return first[0] if first else ""


class ResponseEncoder(LabelledTokens):
    """Prompt, response and end token, with labels."""

    def __init__(self, tokenizer: Any, max_length: int, train_on_inputs: bool):
        super().__init__(tokenizer, max_length)
        self.train_on_inputs = train_on_inputs

    def __call__(self, example: Item) -> dict[str, Any]:
        asked, right = prompt(question(example).text), question(example).answer
        hidden = 0 if self.train_on_inputs else prompt_tokens(self.tokenizer, asked)
        return self.labelled(asked + f"the correct answer is {right}", hidden)


class QuestionEncoder(PromptEncoder):
    """Questions to go on from; for likelihoods, with the answers' tokens."""

    def __init__(self, tokenizer: Any, likelihood: bool):
        super().__init__(tokenizer)
        self.likelihood = likelihood

    def __call__(self, example: Item) -> dict[str, Any]:
        posed = question(example)
        asked = prompt(posed.text)
        known = {"answer": posed.answer, "set": example.get("set", ""), "recognised": posed.recognised}
        if not self.likelihood:
            return self.prompt(self.tokenizer(asked)["input_ids"][: prompt_tokens(self.tokenizer, asked)], **known)
        rows = [self.tokenizer(asked + f"the correct answer is {name}")["input_ids"] for name in posed.choices]
        shared = common_prefix(rows)
        return self.prompt(rows[0][:shared], names=posed.choices, tails=[row[shared:] for row in rows], **known)

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        batch = super().collate(items)
        if not self.likelihood:
            return batch
        answers = batch.pop("tails")
        if all(len(tail) == 1 for tails in answers for tail in tails):
            return batch | {"targets": pad([[tail[0] for tail in tails] for tails in answers], IGNORED)}
        rows = [self.prompt(item["input_ids"] + tail) for item in items for tail in item["tails"]]
        return batch | {
            "inputs": pad_inputs(rows, self.tokenizer.pad_token_id, side="left"),
            "rows": [len(tails) for tails in answers],
            "targets": pad([tail for tails in answers for tail in tails], IGNORED, side="left"),
        }


def prompt_tokens(tokenizer: Any, asked: str) -> int:
    """How many of a prompt's tokens are there whatever follows.

    The last blanks may join the response's first word in one token; a model that is trained on whole texts must be
    asked with what comes before it, or it is asked with a token that it never saw there.
    """
    return common_prefix([tokenizer(asked)["input_ids"], tokenizer(asked + "the correct answer is")["input_ids"]])


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows share."""
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))))
