"""What tasks of causal language models share: the loss over labelled tokens, and beam search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.data.loader import Encoder, Item
from randlora.data.texts import pad, pad_inputs
from randlora.models.base import Backbone

IGNORED = -100  # cross_entropy's ignore_index: the label of tokens that are not learned


class LabelledTokens(Encoder):
    """Items of `input_ids`, `attention_mask` and `labels`, padded on the right."""

    tokenizer: Any

    @staticmethod
    def length(item: Item) -> int:
        return len(item["input_ids"])

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        return {
            "inputs": pad_inputs(items, self.tokenizer.pad_token_id),  # type: ignore[arg-type]
            "labels": pad([item["labels"] for item in items], IGNORED),
        }


def labelled(batch: Mapping[str, Any]) -> int:
    """How many tokens the loss is a mean over."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def longest(size: int, length: int) -> dict[str, Any]:
    """A batch of zeros of `size` texts of `length` tokens, all of them labelled."""
    ids = torch.zeros(size, length, dtype=torch.int64)
    return {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "labels": ids}


def mean_loss(model: nn.Module, batch: Mapping[str, Any], smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the labelled tokens, each predicted from those before it."""
    logits = model(batch["inputs"])[:, :-1].flatten(0, 1).float()
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=smoothing)


class LanguageModel(nn.Module):
    """The causal model as it is."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.lm = backbone.module

    def forward(self, inputs: dict[str, Tensor], keep: int = 0) -> Tensor:
        """Logits (B, length, vocabulary), of the last `keep` positions if not 0."""
        return self._run(inputs, use_cache=False, logits_to_keep=keep).logits

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], pad: int, num_beams: int, **settings: Any) -> Tensor:
        """The new tokens (B, new) of a beam search after prompts that are padded on the left.

        `settings` are those of transformers' generate.
        """
        # The beams share their prompt, so all but its last token is read once; generate would read it per beam.
        read = self._run({name: value[:, :-1] for name, value in inputs.items()}, use_cache=True, logits_to_keep=1)
        read.past_key_values.batch_repeat_interleave(num_beams)
        settings |= {"num_beams": num_beams, "do_sample": False, "pad_token_id": pad}
        ids = self.lm.generate(**inputs, past_key_values=read.past_key_values, **settings)
        return ids[:, inputs["input_ids"].shape[1] :]

    def _run(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)  # padding on the left is not counted
        return self.lm(**inputs, position_ids=positions, **options)
