"""Texts to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from randlora.data.loader import Encoder, Item


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """int64 (rows, longest), short rows filled with `value` on the right or left `side`."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def pad_inputs(items: Sequence[Item], pad_id: int, side: str = "right") -> dict[str, Tensor]:
    """input_ids, attention_mask and token_type_ids, whichever the items have, each int64 (B, longest).

    Args:
        items: what a tokenizer gives for every text.
        pad_id: the token that fills input_ids; the other fields are filled with 0.
        side: where short texts are filled, right or left.
    """
    values = {"input_ids": pad_id, "attention_mask": 0, "token_type_ids": 0}
    return {key: pad([item[key] for item in items], value, side) for key, value in values.items() if key in items[0]}


class TokenEncoder(Encoder):
    """Items with the `input_ids` of a text; those of like length share a batch."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @staticmethod
    def length(item: Item) -> int:
        return len(item["input_ids"])


class PromptEncoder(TokenEncoder):
    """Prompts to go on from, padded on the left in `inputs`; what else the items have comes in lists."""

    def prompt(self, ids: list[int], **others: Any) -> dict[str, Any]:
        """The item of a prompt's tokens."""
        return {"input_ids": ids, "attention_mask": [1] * len(ids), **others}

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        others = {key: [item[key] for item in items] for key in items[0] if key not in ("input_ids", "attention_mask")}
        inputs = pad_inputs(items, self.tokenizer.pad_token_id, side="left")
        return others | {"inputs": inputs, "tokenizer": self.tokenizer}
