"""Meaning representations to sentences: the E2E NLG challenge (Novikova et al. 2017, arXiv 1706.09254)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from randlora.bounds import Count, CountOrZero, NotNegative, Share
from randlora.data.loader import Encoder, Item
from randlora.data.sources import Table
from randlora.data.texts import PromptEncoder
from randlora.models.base import Backbone
from randlora.tasks.base import Batch
from randlora.tasks.language_model import LabelledTokens, LanguageModelTask
from randlora.tasks.text_metrics import meteor_is_missing, scores

_RENAMED = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def linearised(meaning: str) -> str:
    """``name[Blue Spice], eatType[pub]`` as ``name : Blue Spice | Type : pub``, as LoRA's authors write it."""
    slots = re.findall(r"\s*([^,\[\]]+)\[([^\]]*)\]", meaning)
    return " | ".join(f"{_RENAMED.get(name, name)} : {value}" for name, value in slots)


@dataclass(frozen=True)
class DataToText(LanguageModelTask):
    """Columns `meaning_representation` and `reference`; scored over the distinct meanings against all their references.

    Trained on "MEANING || REFERENCE", the loss over the reference and the end token alone. The headline is BLEU, as a
    part of 1; NIST, ROUGE-L, CIDEr and METEOR are beside it.

    Args:
        label_smoothing: Of the loss, from 0 to 1.
        length_penalty: Of the beam search.
        no_repeat_ngram: No n-gram of so many tokens comes twice within a text; 0: no such rule.
    """

    headline: ClassVar[str] = "bleu"

    label_smoothing: Share = 0.1
    beams: Count = 10
    max_new_tokens: Count = 64
    length_penalty: NotNegative = 0.8
    no_repeat_ngram: CountOrZero = 4

    def remark(self) -> str | None:
        return meteor_is_missing()

    def open(self) -> dict[str, Table]:
        tables = super().open()
        return {split: table if split == "train" else Meanings(table) for split, table in tables.items()}

    def encoder(self, backbone: Backbone, training: bool) -> Encoder:
        assert backbone.tokenizer is not None
        tokenizer = backbone.tokenizer()
        return ReferenceEncoder(tokenizer, self.max_length) if training else MeaningEncoder(tokenizer)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["inputs"], batch["positions"], batch["targets"], self.label_smoothing)

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, list]:
        prompt = batch["inputs"]["input_ids"].shape[1]
        rules = [NoRepeats(self.no_repeat_ngram, prompt)] if self.no_repeat_ngram else None
        texts = self.generate(model, batch, length_penalty=self.length_penalty, logits_processor=rules)
        return {"made": [text.strip() for text in texts], "references": batch["references"]}

    def score(self, columns: Mapping[str, list]) -> dict[str, float]:
        metrics = scores(columns["made"], columns["references"])
        return metrics | {"bleu": metrics["bleu"] / 100}


class Meanings:
    """The distinct meanings of a table, each with all its references; in the order in which they come first."""

    def __init__(self, table: Table):
        self.references: dict[str, list[str]] = {}
        for meaning, reference in zip(table.column("meaning_representation"), table.column("reference"), strict=True):
            self.references.setdefault(str(meaning), []).append(str(reference))
        self.meanings = list(self.references)

    def __len__(self) -> int:
        return len(self.meanings)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        meaning = self.meanings[index]
        references = self.references[meaning]
        return {"meaning_representation": meaning, "references": references, "reference": references[0]}

    def column(self, name: str) -> np.ndarray:
        return np.array({"meaning_representation": self.meanings}[name])


def _prompt(example: Item) -> str:
    return f"{linearised(example['meaning_representation'])} ||"


class ReferenceEncoder(LabelledTokens):
    """Meaning, reference and end token, with labels for the last two."""

    def __call__(self, example: Item) -> dict[str, Any]:
        asked = _prompt(example)
        return self.labelled(f"{asked} {example['reference']}", hidden=len(self.tokenizer(asked)["input_ids"]))


class MeaningEncoder(PromptEncoder):
    """Meanings to go on from, with the references to compare with."""

    def __call__(self, example: Item) -> dict[str, Any]:
        return self.prompt(self.tokenizer(_prompt(example))["input_ids"], references=example["references"])


class NoRepeats:
    """Forbids a second n-gram of `size` tokens after the prompt; transformers' own rule counts the prompt's, too."""

    def __init__(self, size: int, prompt: int):
        from transformers import NoRepeatNGramLogitsProcessor

        self.rule, self.prompt = NoRepeatNGramLogitsProcessor(size), prompt

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        return self.rule(ids[:, self.prompt :], logits)
