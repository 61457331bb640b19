"""Commonsense questions with numbered answers, asked of a causal language model as instructions.

Prompt, answer patterns and decoding are those of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933), which the paper
follows. Its training and evaluation prompts differ in blanks; here both are the evaluation's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.data.loader import Encoder, Item
from randlora.data.texts import pad, pad_inputs
from randlora.errors import SettingsError, check_choice, check_count
from randlora.models.base import Backbone
from randlora.tasks.base import Task

_INDENT = " " * 16  # the published prompt is indented so
_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
IGNORED = -100  # cross_entropy's ignore_index


def prompt(instruction: str) -> str:
    """All that comes before the response."""
    return f"{_TASK}\n\n{_INDENT}### Instruction:\n{_INDENT}{instruction}\n\n{_INDENT}### Response:\n{_INDENT}"


def instruction(example: Item) -> str:
    """LLM-Adapters' text where the row has it, and the same made from a public row of ARC or OpenBookQA."""
    if "instruction" in example:
        return example["instruction"]
    question = example.get("question") or example["question_stem"]
    answers = example["choices"]["text"]
    listed = " ".join(f"Answer{i}: {text}" for i, text in enumerate(answers, 1))
    names = "/".join(f"answer{i}" for i in range(1, len(answers) + 1))
    return f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {names}"


def answer(example: Item) -> str:
    """The right one, such as answer2."""
    if "answer" in example:
        return example["answer"]
    return f"answer{list(example['choices']['label']).index(example['answerKey']) + 1}"


@dataclass(frozen=True)
class Commonsense(Task):
    """Multiple choice; accuracy over the test questions.

    `answers` are the words to choose from. `scoring` is ``generation`` (`beams`, `max_new_tokens`; the first of
    the words in the response counts, none is wrong) or ``likelihood`` (the word that makes "the correct answer is
    WORD" most likely). With `train_on_inputs` the loss is over the prompt's tokens too, as published. Longer texts than
    `max_length` tokens are cut.
    """

    kinds: ClassVar[tuple[str, ...]] = ("causal_lm",)

    answers: Sequence[str] = ("answer1", "answer2", "answer3", "answer4", "answer5")
    scoring: str = "generation"
    beams: int = 4
    max_new_tokens: int = 32
    train_on_inputs: bool = True
    max_length: int = 256

    def __post_init__(self) -> None:
        check_choice("task.scoring", self.scoring, ("generation", "likelihood"))
        for name in ("beams", "max_new_tokens", "max_length"):
            check_count(f"task.{name}", getattr(self, name))
        if not self.answers or not all(isinstance(word, str) for word in self.answers):
            raise SettingsError(
                f"task.answers={list(self.answers)!r}: give words (in YAML, 'true' and 'false' in quotes)"
            )

    @property
    def headline(self) -> str:
        return "accuracy"

    def bind(self, backbone: Backbone) -> nn.Module:
        return LanguageModel(backbone)

    def zero_shot(self, backbone: Backbone) -> bool:
        return True

    def encoder(self, backbone: Backbone, training: bool) -> Encoder:
        assert backbone.tokenizer is not None
        tokenizer = backbone.tokenizer()
        if training:
            return ResponseEncoder(tokenizer, self.max_length, self.train_on_inputs)
        return QuestionEncoder(tokenizer, self.answers, self.scoring == "likelihood")

    def weight(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        logits = model(batch["inputs"])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, list]:
        if self.scoring == "likelihood":
            predicted = self._most_likely(model, batch)
        else:
            tokenizer = batch["tokenizer"]
            made = model.generate(batch["inputs"], tokenizer.pad_token_id, self.beams, self.max_new_tokens)
            texts = tokenizer.batch_decode(made, skip_special_tokens=True)
            predicted = [first_answer(text, self.answers) for text in texts]
        return {"predicted": predicted, "label": batch["answer"]}

    def score(self, columns: Mapping[str, list]) -> dict[str, float]:
        pairs = list(zip(columns["predicted"], columns["label"], strict=True))
        return {
            "accuracy": sum(p == y for p, y in pairs) / len(pairs),
            "answered": sum(p != "" for p, _ in pairs) / len(pairs),
        }

    def _most_likely(self, model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
        """By the summed log-probability of the tokens in which the answers differ."""
        targets = batch["targets"]
        if "rows" not in batch:  # they differ in one token, so one row says all
            scores = model(batch["inputs"], keep=1)[:, -1].float().gather(1, targets.clamp_min(0))
            best = scores.masked_fill(targets == IGNORED, float("-inf")).argmax(1).tolist()
            return [names[i] for names, i in zip(batch["names"], best, strict=True)]
        span = targets.shape[1]
        logits = model(batch["inputs"], keep=span + 1)[:, :-1].float().log_softmax(-1)
        steps = logits.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
        sums = steps.masked_fill(targets == IGNORED, 0).sum(1).split(batch["rows"])
        return [names[int(row.argmax())] for names, row in zip(batch["names"], sums, strict=True)]


def first_answer(text: str, answers: Sequence[str]) -> str:
    """The first of the words in a response, or "" when there is none."""
    found = re.search("|".join(map(re.escape, answers)), text)
    return found[0] if found else ""


class ResponseEncoder(Encoder):
    """Prompt, response and end token, with labels; padded on the right."""

    def __init__(self, tokenizer: Any, max_length: int, train_on_inputs: bool):
        self.tokenizer, self.max_length, self.train_on_inputs = tokenizer, max_length, train_on_inputs

    def __call__(self, example: Item) -> dict[str, Any]:
        asked = prompt(instruction(example))
        ids = self.tokenizer(asked + f"the correct answer is {answer(example)}")["input_ids"]
        ids = [*ids, self.tokenizer.eos_token_id][: self.max_length]
        hidden = 0 if self.train_on_inputs else len(self.tokenizer(asked)["input_ids"])
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [IGNORED] * min(hidden, len(ids)) + ids[hidden:],
        }

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        return {
            "inputs": pad_inputs(items, self.tokenizer.pad_token_id),  # type: ignore[arg-type]
            "labels": pad([item["labels"] for item in items], IGNORED),
        }


class QuestionEncoder(Encoder):
    """Prompts to go on from, padded on the left; for likelihoods, with the answers' tokens."""

    def __init__(self, tokenizer: Any, answers: Sequence[str], likelihood: bool):
        self.tokenizer, self.answers, self.likelihood = tokenizer, list(answers), likelihood

    def __call__(self, example: Item) -> dict[str, Any]:
        text, right = instruction(example), answer(example)
        asked = prompt(text)
        if not self.likelihood:
            return {"answer": right, "prefix": self.tokenizer(asked)["input_ids"]}
        names = [name for name in self.answers if name in text] or self.answers
        rows = [self.tokenizer(asked + f"the correct answer is {name}")["input_ids"] for name in names]
        shared = common_prefix(rows)
        return {"answer": right, "names": names, "prefix": rows[0][:shared], "tails": [row[shared:] for row in rows]}

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        batch: dict[str, Any] = {"answer": [item["answer"] for item in items], "tokenizer": self.tokenizer}
        rows = [item["prefix"] for item in items]
        if self.likelihood:
            batch["names"] = [item["names"] for item in items]
            if all(len(tail) == 1 for item in items for tail in item["tails"]):
                batch["targets"] = pad([[tail[0] for tail in item["tails"]] for item in items], IGNORED)
            else:
                rows = [item["prefix"] + tail for item in items for tail in item["tails"]]
                batch["rows"] = [len(item["tails"]) for item in items]
                batch["targets"] = pad([tail for item in items for tail in item["tails"]], IGNORED, side="left")
        padded = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        return batch | {"inputs": pad_inputs(padded, self.tokenizer.pad_token_id, side="left")}


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows share."""
    length = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


class LanguageModel(nn.Module):
    """The causal model as it is."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.lm = backbone.module

    def forward(self, inputs: dict[str, Tensor], keep: int = 0) -> Tensor:
        """Logits (B, length, vocabulary), of the last `keep` positions if not 0."""
        return self._run(inputs, use_cache=False, logits_to_keep=keep).logits

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], pad: int, beams: int, max_new_tokens: int) -> Tensor:
        """The new tokens (B, new) of a beam search after prompts that are padded on the left."""
        # A question's beams share its prompt, so all but its last token is read once; generate would read it per beam.
        read = self._run({name: value[:, :-1] for name, value in inputs.items()}, use_cache=True, logits_to_keep=1)
        read.past_key_values.batch_repeat_interleave(beams)
        settings = {"num_beams": beams, "max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
        ids = self.lm.generate(**inputs, past_key_values=read.past_key_values, **settings)
        return ids[:, inputs["input_ids"].shape[1] :]

    def _run(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)  # padding on the left is not counted
        return self.lm(**inputs, position_ids=positions, **options)
