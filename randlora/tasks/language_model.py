"""What tasks of causal language models share: the loss over labelled tokens, and beam search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bounds import Count
from randlora.data.loader import Item, Split
from randlora.data.texts import TokenEncoder, pad, pad_inputs
from randlora.models.base import Backbone
from randlora.tasks.base import Batch, Bound, Budget, Splits, Task
from randlora.tasks.chunked_cross_entropy import chunked_cross_entropy
from randlora.tasks.mixins import KnownShapes, UnequalExamples

IGNORED = -100  # cross_entropy's ignore_index: the label of tokens that are not learned


class LabelledTokens(TokenEncoder):
    """Items of `input_ids`, `attention_mask` and `labels`, padded on the right; longer texts are cut."""

    def __init__(self, tokenizer: Any, max_length: int):
        super().__init__(tokenizer)
        self.max_length = max_length

    def labelled(self, text: str, hidden: int) -> dict[str, list[int]]:
        """A text and the end token, all of it learned but the first `hidden` tokens.

        Prompt and response are one text, since some tokenizers begin every text with a token of its own.
        """
        ids = [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id][: self.max_length]
        hidden = min(hidden, len(ids))
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * hidden + ids[hidden:]}

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        inputs = pad_inputs(items, self.tokenizer.pad_token_id)
        return {"inputs": inputs, **learned(pad([item["labels"] for item in items], IGNORED))}


def learned(labels: Tensor) -> dict[str, Tensor]:
    """From labels (B, length): the `targets` (tokens,) and the `positions` (tokens,), row by row, that predict them."""
    row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return {"positions": row * labels.shape[1] + column, "targets": labels[row, column + 1]}


@dataclass(frozen=True)
class LanguageModelTask(KnownShapes, UnequalExamples, Task):
    """Tasks of a causal language model as it is: the loss is the mean over the labelled tokens of a batch.

    Args:
        max_length: Longer training texts are cut to this many tokens.
        beams: Of the beam search that writes texts.
        max_new_tokens: The most tokens that it writes.
    """

    kinds: ClassVar[tuple[str, ...]] = ("causal_lm",)

    max_length: Count = 512
    beams: Count = 4
    max_new_tokens: Count = 32

    def bind(self, backbone: Backbone) -> Bound:
        return Bound(LanguageModel(backbone))

    def splits(self, backbone: Backbone, budget: Budget) -> Splits:
        splits = super().splits(backbone, budget)
        held = splits.validation
        return replace(splits, labelled=Split(held.table, held.rows, self.encoder(backbone, training=True)))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["inputs"], batch["positions"], batch["targets"])

    def generate(self, model: nn.Module, batch: Batch, **settings: Any) -> list[str]:
        """What the model writes after the prompts of a batch of PromptEncoder; `settings` as in LanguageModel."""
        limits = {"num_beams": self.beams, "max_new_tokens": self.max_new_tokens}
        tokenizer = batch["tokenizer"]
        ids = model.generate(batch["inputs"], tokenizer.pad_token_id, **limits, **settings)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def terms(self, batch: Batch) -> int:
        return len(batch["targets"])

    def sample(self, backbone: Backbone, size: int) -> Batch:
        """Texts of `max_length` tokens, all of them labelled."""
        ids = torch.zeros(size, self.max_length, dtype=torch.int64)
        places = torch.arange(size * self.max_length).view(size, -1)[:, :-1].flatten()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {"inputs": inputs, "positions": places, "targets": torch.zeros_like(places)}


# Those whose logits are the head of the last hidden states, and nothing more: neither scaled nor capped.
_PLAIN = ("gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")


class LanguageModel(nn.Module):
    """The causal model as it is."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.lm = backbone.module
        head = self.lm.get_output_embeddings()
        # An updated head is no plain linear map.
        self.plain_head = self.lm.config.model_type in _PLAIN and type(head) is nn.Linear

    def forward(self, inputs: dict[str, Tensor], positions: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of the labelled tokens, each predicted from those before it; a scalar.

        Args:
            inputs: `input_ids` and `attention_mask`, (B, length).
            positions: Those that predict a labelled token, among all B · length, row by row: (tokens,).
            targets: The tokens that they predict, (tokens,).
            smoothing: Of the labels, from 0 to 1.
        """
        if self.plain_head:
            hidden = self._run(self.lm.base_model, inputs).last_hidden_state
            return chunked_cross_entropy(
                hidden.flatten(0, 1)[positions], self.lm.get_output_embeddings(), targets, smoothing
            )
        logits = self.logits(inputs).flatten(0, 1)[positions].float()
        return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum") / max(len(targets), 1)

    def logits(self, inputs: dict[str, Tensor], keep: int = 0) -> Tensor:
        """Logits (B, length, vocabulary), of the last `keep` positions alone if `keep` is not 0."""
        return self._run(self.lm, inputs, logits_to_keep=keep).logits

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], pad: int, num_beams: Count, **settings: Any) -> Tensor:
        """The new tokens (B, new) of a beam search after prompts that are padded on the left.

        `settings` are those of transformers' generate.
        """
        # The beams share their prompt, so all but its last token is read once; generate would read it per beam.
        before = {name: value[:, :-1] for name, value in inputs.items()}
        read = self._run(self.lm, before, use_cache=True, logits_to_keep=1)
        read.past_key_values.batch_repeat_interleave(num_beams)
        settings |= {"num_beams": num_beams, "do_sample": False, "pad_token_id": pad}
        ids = self.lm.generate(**inputs, past_key_values=read.past_key_values, **settings)
        return ids[:, inputs["input_ids"].shape[1] :]

    @staticmethod
    def _run(model: Any, inputs: dict[str, Tensor], use_cache: bool = False, **options: Any) -> Any:
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)  # padding on the left is not counted
        return model(**inputs, position_ids=positions, use_cache=use_cache, **options)
